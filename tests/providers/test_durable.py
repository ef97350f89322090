"""The journal's directory: what can be wrong with it, a full disk, syncs that fail, compaction [C33, C47]."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from queue_runtime._core.recovery import checksum
from queue_runtime.clock import ManualClock
from queue_runtime.config import InMemoryConfig, config_from_url
from queue_runtime.errors import ConfigurationError, ProviderError
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers import store
from queue_runtime.providers.base import COMPLETE, DEFER, Action, Disposition
from queue_runtime.providers.durable import DurableProvider


def opened(path: Path, **settings: Any) -> DurableProvider:
    return DurableProvider(InMemoryConfig(path=path, **settings), clock=ManualClock())


async def filled(path: Path, count: int, **settings: Any) -> None:
    provider = opened(path, **settings)
    await provider.send("q", [Message(body=b"x" * 100, message_id=str(number)) for number in range(count)])
    await provider.close()


async def all_of(provider: DurableProvider, *, dead: bool = False) -> list[ReceivedMessage]:
    return await provider.peek("q", 100_000, dead_letter=dead)


def names(path: Path) -> list[str]:
    """What one finds who opens it."""

    async def look() -> list[str]:
        provider = opened(path)
        found = [message.message_id for message in await all_of(provider)]
        await provider.close()
        return found

    return asyncio.run(look())


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.journal"))


def refused(path: Path, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        opened(path)
    assert caught.value.field == "path"


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SEGMENT_SIZE", 2000)


class TestDirectory:
    def test_a_url_names_it(self, tmp_path: Path) -> None:
        config = config_from_url(f"memory://shop?path={tmp_path}/made/for/it&fsync=always")
        assert isinstance(config, InMemoryConfig)
        clock = ManualClock()

        async def share() -> None:
            first, second = (DurableProvider(config, clock=clock) for _ in range(2))
            await first.send("q", [Message(body=b"x")])
            await first.close()
            assert len(await all_of(second)) == 1
            await second.close()

        asyncio.run(share())
        assert [path.name for path in files(tmp_path / "made" / "for" / "it")] == ["log-000000000001.journal"]

    async def test_it_is_in_use(self, tmp_path: Path) -> None:
        provider = opened(tmp_path)
        refused(tmp_path, f"is in use by this process, {os.getpid()}")
        await provider.close()
        await opened(tmp_path).close()

    def test_it_is_in_use_by_another_process(self, tmp_path: Path) -> None:
        code = "import sys; from queue_runtime.providers.disk import *; lock = DirectoryLock(Path(sys.argv[1]))\n"
        code += "print(flush=True); input()"
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            refused(tmp_path, f"is in use by process {other.pid}$")
            other.kill()
        assert asyncio.run(filled(tmp_path, 1)) is None

    def test_it_cannot_be_written(self, tmp_path: Path) -> None:
        """Root may write anywhere, and so is somebody else for a moment."""
        asyncio.run(filled(tmp_path / "a", 1))
        (tmp_path / "a").chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            refused(tmp_path / "a", "Permission denied")
            refused(tmp_path / "b" / "c", "Permission denied")
        finally:
            os.seteuid(user)
            (tmp_path / "a").chmod(0o755)

    def test_it_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused(tmp_path / "file", "File exists")
        refused(tmp_path / "file" / "below", "Not a directory")

    def test_what_is_there_is_newer(self, tmp_path: Path) -> None:
        asyncio.run(filled(tmp_path, 1))
        (log,) = files(tmp_path)
        content = bytearray(log.read_bytes())
        content[8:12] = struct.pack("<I", 2)
        content[28:32] = struct.pack("<I", checksum(bytes(content[:28])))
        log.write_bytes(content)
        refused(tmp_path, "version 2 of the format, and this release reads up to 1")

    def test_no_secret_of_a_refusal_stays(self, tmp_path: Path) -> None:
        """After a refusal the directory can be used: nothing holds it."""
        asyncio.run(filled(tmp_path, 1))
        (log,) = files(tmp_path)
        whole = log.read_bytes()
        log.write_bytes(b"?" + whole[1:])
        refused(tmp_path, "log-000000000001.journal, at byte 0: it does not begin as a journal does")
        log.write_bytes(whole)
        asyncio.run(filled(tmp_path, 1))


class TestDamage:
    def test_in_an_older_file(self, tmp_path: Path, small_files: None) -> None:
        asyncio.run(self.several(tmp_path))
        assert len(files(tmp_path)) > 5
        older = files(tmp_path)[1]
        content = bytearray(older.read_bytes())
        content[500] ^= 1
        older.write_bytes(content)
        refused(tmp_path, rf"is damaged: .*{older.name}, at byte \d+: there is no right record")
        older.unlink()
        refused(tmp_path, rf"{older.name}, at byte 0: the file is missing")

    async def several(self, path: Path) -> None:
        provider = opened(path)
        for number in range(100):
            await provider.send("q", [Message(body=b"x" * 100, message_id=str(number))])
        await provider.close()

    def test_a_torn_end_is_cut_off(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        asyncio.run(filled(tmp_path, 10))
        (log,) = files(tmp_path)
        os.truncate(log, log.stat().st_size - 3)
        with caplog.at_level(logging.WARNING, "queue_runtime"):
            assert names(tmp_path) == [str(number) for number in range(9)]
        (record,) = caplog.records
        assert (record.__dict__["file"], record.__dict__["kept_aside"]) == (str(log), False)
        asyncio.run(filled(tmp_path, 1))
        assert names(tmp_path) == [*map(str, range(9)), "0"]
        assert len(caplog.records) == 1

    def test_what_follows_a_bad_record_is_kept_aside(self, tmp_path: Path) -> None:
        """Without syncs a crash of the machine can leave that in the newest file: it is no reason not to go on."""
        asyncio.run(filled(tmp_path, 10))
        (log,) = files(tmp_path)
        content = bytearray(log.read_bytes())
        content[-300] ^= 1
        log.write_bytes(content)
        assert 0 < len(names(tmp_path)) < 9
        (aside,) = tmp_path.glob("*.torn-*")
        assert bytes(content).endswith(aside.read_bytes())

    @pytest.mark.parametrize("size", [0, 5, 31])
    def test_a_file_that_was_just_begun(self, tmp_path: Path, size: int) -> None:
        asyncio.run(filled(tmp_path, 3))
        (tmp_path / "log-000000000002.journal").write_bytes(store.header(store.LOG, 2)[:size])
        for _ in range(2):
            assert names(tmp_path) == ["0", "1", "2"]

    def test_a_compaction_that_was_cut_short(self, tmp_path: Path) -> None:
        """Before its last step the parts of it are removed; after that, what it replaced is."""
        asyncio.run(filled(tmp_path, 3))
        (tmp_path / "snapshot-000000000001.part").write_bytes(b"part")
        old = files(tmp_path)[0].read_bytes()

        async def compact() -> None:
            provider = opened(tmp_path)
            provider._store.compact()
            while provider._store._snapshot is not None:
                await asyncio.sleep(0)
            await provider.close()

        asyncio.run(compact())
        compacted = ["log-000000000002.journal", "snapshot-000000000001.journal"]
        assert [path.name for path in files(tmp_path)] == compacted
        (tmp_path / "log-000000000001.journal").write_bytes(old)
        assert names(tmp_path) == ["0", "1", "2"]
        assert [path.name for path in files(tmp_path)] == compacted
        assert not list(tmp_path.glob("*.part"))


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writes behind that offset fail, the one that crosses it in its middle: as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fsync", ["always", "never"])
class TestFullDisk:
    """An error for exactly those whose change could not be written, and nothing half done."""

    async def test_nothing_is_half_done(self, tmp_path: Path, fsync: str) -> None:
        provider = opened(tmp_path, fsync=fsync)
        await provider.send("q", [Message(body=b"x", message_id=str(number)) for number in range(4)])
        receiver = await provider.open_receiver("q")
        (first,) = await receiver.receive(1, 0.0)
        before = await provider.counts("q")
        with no_file_beyond(provider._store.journal.offset + 50):
            outcomes = await provider.send("q", [Message(body=bytes(100)) for _ in range(3)])
            assert [str(outcome) for outcome in outcomes] == [str(outcomes[0])] * 3
            assert isinstance(outcomes[0], ProviderError)
            assert (outcomes[0].code, outcomes[0].is_transient, outcomes[0].retry_after) == ("no-room", True, 5.0)
            assert isinstance(outcomes[0].__cause__, OSError)
            assert os.fstat(provider._store._file).st_size == provider._store.journal.offset  # nothing of it is left
            with pytest.raises(ProviderError, match="no-room"):
                await receiver.receive(2, 0.0)  # a delivery that nobody can count is none
            for disposition in (DEFER, Disposition(Action.ABANDON, delay=5.0)):
                (outcome,) = await receiver.settle(disposition, [first.receipt])  # these records do fit
                assert outcome is None
                break
            assert await provider.counts("q") == before.__class__(
                active=3, in_flight=0, scheduled=0, deferred=1, dead_lettered=0
            )
            with pytest.raises(ProviderError, match="no-room"):
                await receiver.receive_deferred([1])
            with pytest.raises(ProviderError, match="no-room"):
                await provider.create_queue("a-queue-with-a-long-name" * 3)
        assert [type(outcome) for outcome in await provider.send("q", [Message(body=b"y")])] == [type(None)]
        received = await receiver.receive(9, 0.0)
        assert [message.delivery_count for message in received] == [1, 1, 1, 1]
        with no_file_beyond(provider._store.journal.offset):
            outcomes = await receiver.settle(COMPLETE, [message.receipt for message in received[:2]])
            assert [getattr(outcome, "code", None) for outcome in outcomes] == ["no-room", "no-room"]
            assert (await provider.counts("q")).in_flight == 4
        assert await receiver.settle(COMPLETE, [message.receipt for message in received[:2]]) == [None, None]
        left = [(message.message_id, message.sequence_number) for message in await all_of(provider)]
        await provider.close()
        provider = opened(tmp_path, fsync=fsync)
        assert [(message.message_id, message.sequence_number) for message in await all_of(provider)] == left
        assert (await provider.counts("q")).deferred == 1
        await provider.close()

    async def test_exactly_those_concerned(self, tmp_path: Path, fsync: str) -> None:
        provider = opened(tmp_path, fsync=fsync)
        await provider.create_queue("q")
        with no_file_beyond(provider._store.journal.offset + 3000):
            sends = [
                provider.send("q", [Message(body=bytes(size), message_id=f"{size}-{i}")])
                for i, size in enumerate([10, 5000, 20, 4000, 30])
            ]
            outcomes = [outcome for (outcome,) in await asyncio.gather(*sends)]
        assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
        assert [m.message_id for m in await all_of(provider)] == ["10-0", "20-2", "30-4"]
        await provider.close()
        provider = opened(tmp_path)
        assert [m.message_id for m in await all_of(provider)] == ["10-0", "20-2", "30-4"]
        await provider.close()

    async def test_of_a_large_batch_what_was_written_stays(self, tmp_path: Path, fsync: str) -> None:
        """It is written by the megabyte; an outcome each [C9]."""
        provider = opened(tmp_path, fsync=fsync)
        with no_file_beyond(4 << 20):
            outcomes = await provider.send("q", [Message(body=bytes(300_000)) for _ in range(20)])
        taken = sum(outcome is None for outcome in outcomes)
        assert 4 <= taken <= 13
        assert [outcome is None for outcome in outcomes] == [True] * taken + [False] * (20 - taken)
        assert (await provider.counts("q")).active == taken
        await provider.close()


async def test_a_sync_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it is told; then everything is written anew, and it goes on. No disk here fails on demand."""
    provider = opened(tmp_path, fsync="always")
    await provider.send("q", [Message(body=b"x", message_id="0")])

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(store, "sync_files", fail)
        first = asyncio.create_task(provider.send("q", [Message(body=b"x", message_id="1")]))
        second = asyncio.create_task(provider.send("q", [Message(body=b"x", message_id="2")]))
        for send in (first, second):
            (outcome,) = await send
            assert isinstance(outcome, ProviderError)
            assert outcome.code == "journal-failed"
            assert not outcome.is_transient, "it may have been sent"
        (refusal,) = await provider.send("q", [Message(body=b"x", message_id="3")])
        assert isinstance(refusal, ProviderError)
        assert refusal.is_transient
    while provider._store.journal.failure is not None:
        await asyncio.sleep(0)
    assert await provider.send("q", [Message(body=b"x", message_id="4")]) == [None]
    await provider.close()
    provider = opened(tmp_path)
    assert [m.message_id for m in await all_of(provider)] == ["0", "1", "2", "4"]
    await provider.close()


async def test_compaction_keeps_the_files_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While queues are in use, in two of them, with what is dead, deferred, held back and scheduled."""
    monkeypatch.setattr(store, "LEAST_GARBAGE", 20_000)
    monkeypatch.setattr(store, "PIECE", 1000)
    provider = opened(tmp_path)
    keep = [Message(body=b"keep", message_id=f"k{i}", session_id="s", deduplication_id=f"k{i}") for i in range(20)]
    await provider.send("q", keep)
    await provider.send("other", [Message(body=b"later", delay=1000.0)])
    session = await provider.accept_session("q", "s", 0.0)
    assert session is not None
    await session.set_state(b"state")
    await session.close()
    receiver = await provider.open_receiver("q")
    largest = 0
    for number in range(1000):
        await provider.send("q", [Message(body=b"x" * 100, message_id=str(number))])
        (message,) = await receiver.receive(1, 0.0)
        how = {500: DEFER, 501: Disposition(Action.DEAD_LETTER, reason="r"), 502: Disposition(Action.ABANDON, 1000.0)}
        await receiver.settle(how.get(number, COMPLETE), [message.receipt])
        largest = max(largest, provider._store.journal.total_bytes)
        await asyncio.sleep(0)
        while number % 10 == 0 and provider._store._snapshot is not None:
            await asyncio.sleep(0)  # the thread writes a piece, and the loop goes on with the next
    sizes = await asyncio.to_thread(lambda: [path.stat().st_size for path in files(tmp_path)])
    assert sum(sizes) == provider._store.journal.total_bytes
    assert largest < 60_000 < provider._store.journal.written
    seen = [await all_of(provider, dead=dead) for dead in (False, True)]
    counts = await provider.counts("q")
    await provider.close()
    provider = opened(tmp_path)
    assert [await all_of(provider, dead=dead) for dead in (False, True)] == seen
    assert await provider.counts("q") == counts
    assert (await provider.counts("other")).scheduled == 1
    assert await provider.send("q", keep) == [None] * 20  # and not taken twice
    assert await provider.counts("q") == counts
    session = await provider.accept_session("q", "s", 0.0)
    assert session is not None
    assert await session.get_state() == b"state"
    assert [m.message_id for m in await session.receive(100, 0.0)] == [f"k{i}" for i in range(20)]
    await provider.send("q", [Message(body=b"", message_id="last")])
    assert max(m.sequence_number or 0 for m in await all_of(provider)) == 1021
    await provider.close()
