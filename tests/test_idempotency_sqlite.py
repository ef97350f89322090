"""The SQLite store between processes: nothing marked is lost by a kill, errors are clear, nothing is left behind."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from queue_runtime import idempotency_sqlite
from queue_runtime.clock import ManualClock
from queue_runtime.errors import (
    ClosedError,
    ConfigurationError,
    ProviderError,
    QueueRuntimeError,
    ServiceUnavailableError,
)
from queue_runtime.idempotency_sqlite import SQLiteIdempotencyStore

CHILD = """
import asyncio, os, random, sys
from queue_runtime.idempotency_sqlite import SQLiteIdempotencyStore

async def main(path, name, total):
    store = SQLiteIdempotencyStore(path)
    chance = random.Random(name)
    async def marker(task):
        for number in range(total):
            keys = [f"{name}-{task}-{number}-{i}" for i in range(chance.choice([1, 1, 5]))]
            await store.mark(keys)
            assert await store.done(keys) == set(keys)
            os.write(1, ("\\n".join(keys) + "\\n").encode())
    await asyncio.gather(*(marker(task) for task in range(8)))
    await store.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def child(path: Path, name: str, total: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(path), name, str(total)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def stored(path: Path) -> set[str]:
    """What is in the file, read without the store."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
        return {key.decode() for (key,) in connection.execute("SELECT key FROM queue_runtime_done")}
    finally:
        connection.close()


def threads() -> int:
    return sum(thread.name == "queue-runtime-idempotency" for thread in threading.enumerate())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "done.db"


def test_nothing_marked_is_lost_when_processes_are_killed(path: Path) -> None:
    """Two at a time in one file, killed at random moments in the middle of their commits, again and again."""
    chance = random.Random(4)
    told: set[str] = set()
    for round_ in range(4):
        pair = [child(path, f"{round_}{which}", 1_000_000) for which in "ab"]
        outputs: list[bytes] = []
        for each in pair:
            assert each.stdout is not None
            outputs.append(each.stdout.readline())  # it has begun
        time.sleep(chance.uniform(0.0, 0.05))
        for each, output in zip(pair, outputs, strict=True):
            each.send_signal(signal.SIGKILL)
            rest, errors = each.communicate()
            assert (each.returncode, errors) == (-signal.SIGKILL, b"")
            told.update((output + rest).decode().rpartition("\n")[0].split())
    assert len(told) > 50
    assert {key.partition("-")[0] for key in told} == {f"{round_}{which}" for round_ in range(4) for which in "ab"}
    assert told <= stored(path)


def test_processes_share_the_file(path: Path) -> None:
    """Writing at the same time, none is refused."""
    pair = [child(path, name, 40) for name in "ab"]
    told: set[str] = set()
    for each in pair:
        output, errors = each.communicate()
        assert (each.returncode, errors) == (0, b"")
        told.update(output.decode().split())
    assert told == stored(path)
    assert {key[0] for key in told} == {"a", "b"}
    assert [file.name for file in path.parent.iterdir()] == ["done.db"], "the last one to close leaves one file"


OPENING = """
import asyncio, sys
from queue_runtime import SQLiteIdempotencyStore

async def main():
    for number in range(100):
        async with SQLiteIdempotencyStore(f"{sys.argv[1]}/{number}.db") as store:
            await store.mark(["x"])

sys.stdin.readline()
asyncio.run(main())
"""


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Whoever turns the file to write-ahead logging has it alone for a moment; SQLite itself does not wait for that."""
    command = [sys.executable, "-c", OPENING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    told = [process.communicate()[0] for process in processes]
    assert told == [b""] * 4


async def test_another_store_sees_it_at_once(path: Path) -> None:
    one, two = SQLiteIdempotencyStore(path), SQLiteIdempotencyStore(str(path), durability="power")
    for number in range(20):
        key = str(number)
        await (one, two)[number % 2].mark([key])
        assert await (two, one)[number % 2].done([key]) == {key}
    await one.close()
    await two.close()
    async with SQLiteIdempotencyStore(path) as again:
        assert len(await again.done([str(number) for number in range(30)])) == 20


async def test_many_marks_become_few_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    real = idempotency_sqlite._File.answer

    def counted(self: Any, batch: list[Any]) -> None:
        batches.append(len(batch))
        real(self, batch)

    monkeypatch.setattr(idempotency_sqlite._File, "answer", counted)
    async with SQLiteIdempotencyStore(path) as store:
        await asyncio.gather(*(store.mark([str(number)]) for number in range(2500)))
        assert len(await store.done([str(number) for number in range(2500)])) == 2500
    assert sum(batches) == 2502, "the file is opened with a question, too"
    assert max(batches) <= 1000
    assert len(batches) < 100


async def test_a_cancelled_mark_is_still_done(path: Path) -> None:
    """[C38] The effect of its handler has happened."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    async with SQLiteIdempotencyStore(path) as store:
        tasks = [asyncio.create_task(store.mark([str(number)])) for number in range(10)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks] == [True, False] * 5
        assert len(await store.done([str(number) for number in range(10)])) == 10
    assert unhandled == []


async def test_the_file_holds_about_a_window(path: Path) -> None:
    """[C39] What is too old is deleted along with later marks."""
    clock = ManualClock()
    async with SQLiteIdempotencyStore(path, window=60, clock=clock) as store:
        for turn in range(30):
            await store.mark([f"{turn}-{number}" for number in range(50)])
            clock._now += 10
            if turn > 6:
                assert len(await asyncio.to_thread(stored, path)) <= 400
        clock._now += 100
        for turn in range(300):
            await store.mark([f"late-{turn}"])
        # Faster than they come: the backlog of a pause is worked off, not kept.
        assert len(await asyncio.to_thread(stored, path)) == 300
    clock._now += 100
    async with SQLiteIdempotencyStore(path, window=60, clock=clock) as store:
        await store.mark(["first"])  # of a process that never makes many
        assert len(await asyncio.to_thread(stored, path)) < 200


async def test_closing(path: Path) -> None:
    """[C23] What was asked for is finished; no thread is left; afterwards ClosedError."""
    before = threads()
    store = SQLiteIdempotencyStore(path)
    assert threads() == before, "nothing begins before the first use"
    await store.done([])
    assert threads() == before
    marks = [asyncio.ensure_future(store.mark([str(number)])) for number in range(100)]
    await asyncio.sleep(0)
    assert threads() == before + 1
    await asyncio.gather(store.close(), store.close())
    assert threads() == before
    await asyncio.gather(*marks)
    for call in (store.mark(["a"]), store.done(["a"])):
        with pytest.raises(ClosedError):
            await call
    await store.close()
    assert len(await asyncio.to_thread(stored, path)) == 100
    unused = SQLiteIdempotencyStore(path)
    await unused.close()


def test_several_event_loops(path: Path) -> None:
    """Each gets its own answers; one that is gone disturbs nobody."""
    store = SQLiteIdempotencyStore(path)
    failures: list[BaseException] = []

    async def use(name: str) -> None:
        for number in range(30):
            await store.mark([f"{name}{number}"])
            assert await store.done([f"{name}{number}", "nothing"]) == {f"{name}{number}"}

    def run(name: str) -> None:
        try:
            asyncio.run(use(name))
        except BaseException as error:
            failures.append(error)

    gone = asyncio.new_event_loop()

    async def forget() -> None:
        for number in range(100):
            store._ask([b"%d" % number], is_mark=True)

    workers = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for worker in workers:
        worker.start()
    gone.run_until_complete(forget())
    gone.close()
    for worker in workers:
        worker.join()
    assert failures == []
    asyncio.run(store.close())
    assert len(stored(path)) == 190


def test_a_forked_child_is_refused(path: Path) -> None:
    """SQLite's locks do not survive a fork, nor do threads: it would wait for ever."""
    code = """
import asyncio, os, sys
from queue_runtime import ClosedError, SQLiteIdempotencyStore
store = SQLiteIdempotencyStore(sys.argv[1])
asyncio.run(store.mark(["a"]))
child = os.fork()
if not child:
    try:
        asyncio.run(store.mark(["b"]))
    except ClosedError as error:
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
asyncio.run(store.close())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")


# Errors.


def no_directory(path: Path) -> Path:
    return path.parent / "nowhere" / "done.db"


def a_directory(path: Path) -> Path:
    path.mkdir()
    return path


def another_file(path: Path) -> Path:
    path.write_bytes(b"no database, but long enough to have a header of one " * 40)
    return path


@pytest.mark.parametrize("make", [no_directory, a_directory, another_file])
async def test_a_path_that_cannot_be_used_is_named(path: Path, make: Callable[[Path], Path]) -> None:
    """[C33] In ``async with``; else at the first use, and at each: when it is put right, the next call goes well."""
    place = await asyncio.to_thread(make, path)
    before = threads()
    with pytest.raises(ConfigurationError, match="path: "):
        async with SQLiteIdempotencyStore(place):
            pytest.fail("no message may be handled with it")
    assert threads() == before
    store = SQLiteIdempotencyStore(place)
    for call in (store.mark(["a"]), store.done(["a"])):
        with pytest.raises(ConfigurationError) as caught:
            await call
        assert caught.value.field == "path"
        assert isinstance(caught.value.__cause__, sqlite3.Error)

    def put_right() -> None:
        if place.is_dir():
            place.rmdir()
        elif place.exists():
            place.unlink()
        place.parent.mkdir(exist_ok=True)

    await asyncio.to_thread(put_right)
    await store.mark(["a"])
    assert await store.done(["a"]) == {"a"}
    await store.close()


def test_a_file_that_must_not_be_written_is_named(path: Path) -> None:
    sqlite3.connect(path).close()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    error = idempotency_sqlite._translated(caught.value)
    assert isinstance(error, ConfigurationError)
    assert error.field == "path"
    assert "cannot be written to (SQLITE_READONLY" in str(error)


def holding(path: Path) -> sqlite3.Connection:
    """Somebody who writes and does not come to an end."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


async def test_a_file_that_others_keep_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transient; looking up goes on meanwhile, and nothing is half done."""
    monkeypatch.setattr(idempotency_sqlite, "BUSY_TIMEOUT", 0.02)
    async with SQLiteIdempotencyStore(path) as store:
        await store.mark(["a"])
        other = await asyncio.to_thread(holding, path)
        outcomes: list[Any] = await asyncio.gather(
            store.mark(["b"]), store.mark(["c"]), store.done(["a", "b"]), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [ServiceUnavailableError, ServiceUnavailableError, set]
        assert outcomes[0] is not outcomes[1]
        assert outcomes[0].is_transient
        assert outcomes[2] == {"a"}
        await asyncio.to_thread(other.close)
        await store.mark(["b"])
        assert await store.done(["a", "b", "c"]) == {"a", "b"}


async def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks of the batch fail together, those before stay, and it goes on when there is room."""
    connections: list[sqlite3.Connection] = []
    real = sqlite3.connect

    def limited(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options, check_same_thread=False)
        connection.execute("PRAGMA max_page_count = 8")
        connections.append(connection)
        return connection

    monkeypatch.setattr(idempotency_sqlite.sqlite3, "connect", limited)
    async with SQLiteIdempotencyStore(path) as store:
        await store.mark(["a"])
        with pytest.raises(ProviderError) as caught:
            await store.mark([f"{number:0200}" for number in range(1000)])
        assert caught.value.code == "SQLITE_FULL"
        assert caught.value.is_transient
        assert await store.done(["a", f"{0:0200}"]) == {"a"}
        await asyncio.to_thread(connections[0].execute, "PRAGMA max_page_count = 100000")
        await store.mark([f"{number:0200}" for number in range(1000)])
        assert await store.done(["a", f"{0:0200}"]) == {"a", f"{0:0200}"}


async def test_a_commit_that_fails_half_way_leaves_nothing(path: Path) -> None:
    """And the next one is not in its way."""

    def refuse_bad() -> None:
        connection = sqlite3.connect(path)
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON queue_runtime_done WHEN new.key = x'626164' "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
        connection.close()

    async with SQLiteIdempotencyStore(path) as store:
        await store.mark(["before"])
        await asyncio.to_thread(refuse_bad)
        with pytest.raises(ProviderError, match="refused") as caught:
            await store.mark(["a", "bad", "c"])
        assert not caught.value.is_transient
        await store.mark(["d"])
        assert await store.done(["before", "a", "bad", "c", "d"]) == {"before", "d"}


@pytest.mark.parametrize(
    ("code", "kind", "transient"),
    [
        ("SQLITE_BUSY_SNAPSHOT", ServiceUnavailableError, True),
        ("SQLITE_LOCKED", ServiceUnavailableError, True),
        ("SQLITE_IOERR_WRITE", ProviderError, True),
        ("SQLITE_CORRUPT", ProviderError, False),
        (None, ProviderError, False),
    ],
)
def test_errors_are_translated(code: str | None, kind: type[QueueRuntimeError], transient: bool) -> None:
    """[C31] The original is the cause."""
    original = sqlite3.OperationalError("what")
    if code is not None:
        original.sqlite_errorname = code
    error = idempotency_sqlite._translated(original)
    assert type(error) is kind
    assert error.is_transient is transient
    assert error.__cause__ is original


async def test_the_loop_is_not_blocked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes for long, other tasks go on."""
    monkeypatch.setattr(idempotency_sqlite, "BUSY_TIMEOUT", 5.0)
    turns = 0

    async def others(task: Awaitable[None]) -> None:
        nonlocal turns
        while not task.done():  # type: ignore[attr-defined]
            turns += 1
            await asyncio.sleep(0)

    async with SQLiteIdempotencyStore(path) as store:
        await store.mark(["a"])
        other = await asyncio.to_thread(holding, path)
        marking = asyncio.ensure_future(store.mark(["b"]))
        counting = asyncio.create_task(others(marking))
        while turns < 1000:
            await asyncio.sleep(0)
        assert not marking.done()
        await asyncio.to_thread(other.close)
        await marking
        await counting
