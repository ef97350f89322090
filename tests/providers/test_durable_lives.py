"""What a journal lives through: loops that end, forks, a store that is closed, clocks that go back [C33, C47]."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from test_durable import all_of, files, filled, names, no_file_beyond, opened

from queue_runtime._core.body import Mapping
from queue_runtime.clock import ManualClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import ConfigurationError, ProviderError
from queue_runtime.message import Message
from queue_runtime.providers import store
from queue_runtime.providers.base import COMPLETE
from queue_runtime.providers.durable import DurableProvider


def fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_a_duplicate_is_not_acknowledged_by_a_later_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync of the first one failed, so a second sync that succeeds proves nothing."""
    provider = opened(tmp_path, fsync="always")
    message = Message(body=b"x", deduplication_id="d")
    with monkeypatch.context() as patched:
        patched.setattr(store, "sync_files", fail)
        (outcome,) = await provider.send("q", [message])
    assert isinstance(outcome, ProviderError)
    assert provider._store.journal.failure is not None
    (outcome,) = await provider.send("q", [message])
    assert isinstance(outcome, ProviderError)
    assert (outcome.code, outcome.is_transient) == ("journal-failed", True)
    while provider._store.journal.failure is not None:
        await asyncio.sleep(0)
    assert provider._store._old == []  # the snapshot has what they could not keep
    assert await provider.send("q", [message]) == [None]
    await provider.close()


class Syncs:
    """Stands in for the sync, and can hold it up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = store.sync_files
        self.count = 0
        self.may_go = threading.Event()
        self.may_go.set()
        monkeypatch.setattr(store, "sync_files", self)

    def __call__(self, *arguments: Any) -> None:
        self.may_go.wait(10.0)
        self.real(*arguments)
        self.count += 1


async def until_synced(provider: DurableProvider) -> None:
    while provider._store._syncing:
        await asyncio.sleep(0)


async def test_what_is_written_during_a_sync_is_synced_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nothing comes after it: an interval later it is on the disk."""
    syncs, clock = Syncs(monkeypatch), ManualClock()
    provider = DurableProvider(InMemoryConfig(path=tmp_path), clock=clock)
    await provider.send("q", [Message(body=b"x")])
    syncs.may_go.clear()
    await clock.advance(1.0)
    assert provider._store._syncing
    await provider.send("q", [Message(body=b"y")])
    syncs.may_go.set()
    await until_synced(provider)
    await clock.advance(1.0)
    await until_synced(provider)
    assert provider._store._synced == provider._store.journal.written
    assert syncs.count == 2
    await provider.close()


def test_another_event_loop_syncs_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer of the loop before never fires."""
    syncs, clock = Syncs(monkeypatch), ManualClock()
    provider = DurableProvider(InMemoryConfig(path=tmp_path), clock=clock)

    async def one() -> None:
        await provider.send("q", [Message(body=b"x")])

    async def another() -> None:
        await one()
        await clock.advance(1.0)
        await until_synced(provider)
        assert syncs.count == 1
        await provider.close()

    asyncio.run(one())
    asyncio.run(another())


def test_another_event_loop_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What began on the loop before does not come back."""
    provider = opened(tmp_path, fsync="always")

    async def broken() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(store, "sync_files", fail)
            (outcome,) = await provider.send("q", [Message(body=b"x")])
            assert isinstance(outcome, ProviderError)

    async def repaired() -> None:
        for _ in range(1000):
            if await provider.send("q", [Message(body=b"x", message_id="2")]) == [None]:
                break
            await asyncio.sleep(0.001)
        assert [message.message_id for message in await all_of(provider)][1:] == ["2"]
        await provider.close()

    asyncio.run(broken())
    asyncio.run(repaired())


async def test_a_send_that_is_cancelled_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had sent of its messages before it waited for room is there, as anything else."""
    syncs, clock = Syncs(monkeypatch), ManualClock()
    provider = DurableProvider(InMemoryConfig(path=tmp_path, capacity=1, on_full="wait"), clock=clock)
    task = asyncio.create_task(provider.send("q", [Message(body=b"x", message_id=name) for name in "ab"]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await clock.advance(1.0)
    await until_synced(provider)
    assert syncs.count == 1
    await provider.close()
    provider = opened(tmp_path)
    assert [message.message_id for message in await all_of(provider)] == ["a"]
    await provider.close()


async def test_a_send_that_is_cancelled_while_it_is_synced_was_done(tmp_path: Path) -> None:
    """It is in the queue by then: to cancel it takes nothing back."""
    provider = opened(tmp_path, fsync="always")
    task = asyncio.create_task(provider.send("q", [Message(body=b"x", message_id="a")]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.close()
    provider = opened(tmp_path)
    assert [message.message_id for message in await all_of(provider)] == ["a"]
    await provider.close()


async def test_a_closed_store_leaves_the_directory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody settles late, when another has the directory, and there would be much to compact."""
    provider = opened(tmp_path)
    await provider.send("q", [Message(body=bytes(1000)) for _ in range(3)])
    receiver = await provider.open_receiver("q")
    received = await receiver.receive(3, 0.0)
    await receiver.settle(COMPLETE, [message.receipt for message in received[:2]])
    await provider.close()
    before = await asyncio.to_thread(os.listdir, tmp_path)
    monkeypatch.setattr(store, "LEAST_GARBAGE", 1)
    (outcome,) = await receiver.settle(COMPLETE, [received[2].receipt])
    assert outcome is not None
    assert provider._store.journal.flush() is not None  # its file may be somebody else's by now
    assert await asyncio.to_thread(os.listdir, tmp_path) == before


def test_a_fork_has_no_part_in_it(tmp_path: Path) -> None:
    """A child would write to the same places of the same file as its parent."""
    provider = opened(tmp_path)
    child = os.fork()
    if child == 0:
        verdict = 1
        try:

            async def use() -> None:
                nonlocal verdict
                (outcome,) = await provider.send("q", [Message(body=b"child")])
                await provider.close()
                verdict = 0 if "forked" in str(outcome) and "process" in str(outcome) else 2

            try:
                asyncio.run(use())
            except ProviderError as error:
                verdict = 0 if "forked" in str(error) else 3
                asyncio.run(provider.close())
        finally:
            os._exit(verdict)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async def go_on() -> None:
        assert await provider.send("q", [Message(body=b"x", message_id="parent")]) == [None]
        await provider.close()

    asyncio.run(go_on())
    assert names(tmp_path) == ["parent"]


def test_an_opening_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    """The directory is not kept by a provider that nobody has."""
    for name in ("", "shared"):
        path = tmp_path / f"in-{name}"
        with no_file_beyond(40), pytest.raises(ProviderError, match="no-room"):
            opened(path, name=name, queues=["a-queue-of-some-length"])
        asyncio.run(filled(path, 1, name=name, queues=["a-queue-of-some-length"]))


def test_foreign_files_stay(tmp_path: Path) -> None:
    """Whatever else is in the directory is its owner's."""
    asyncio.run(filled(tmp_path, 3))
    foreign = ["film.part", "x-0.journal", "log-.journal", "notes.journal", "snapshot-x.part", "log-1.part"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "directory.part").mkdir()

    async def compact() -> None:
        provider = opened(tmp_path)
        provider._store.compact()
        while provider._store._snapshot is not None:
            await asyncio.sleep(0)
        await provider.close()

    asyncio.run(compact())
    assert names(tmp_path) == ["0", "1", "2"]
    assert {*foreign, "directory.part"} <= {path.name for path in tmp_path.iterdir()}


def test_what_a_damaged_snapshot_replaced_stays(tmp_path: Path) -> None:
    """As long as it is there, it can be recovered from."""
    asyncio.run(filled(tmp_path, 3))
    (tmp_path / "snapshot-000000000001.journal").write_bytes(b"damaged" * 10)
    before = files(tmp_path)
    with pytest.raises(Exception, match="damaged"):
        opened(tmp_path)
    assert files(tmp_path) == before


def test_a_file_of_zeros_was_just_begun(tmp_path: Path) -> None:
    """After a loss of power a new file may have its length and nothing else."""
    asyncio.run(filled(tmp_path, 3))
    (tmp_path / "log-000000000002.journal").write_bytes(bytes(5000))
    for _ in range(2):
        assert names(tmp_path) == ["0", "1", "2"]


def test_large_bodies_do_not_come_back_to_memory(tmp_path: Path) -> None:
    """They are views of files again, as they were when they had been sent; those of a snapshot too."""
    settings = {"body_file_threshold": 16384, "body_directory": tmp_path / "bodies"}
    sent = {"small": b"s" * 900, "large": b"l" * 50_000}

    async def send() -> None:
        provider = opened(tmp_path / "journal", **settings)
        await provider.send("q", [Message(body=body, message_id=name) for name, body in sent.items()])
        await provider.close()

    async def look(*, compact: bool) -> None:
        provider = opened(tmp_path / "journal", **settings)
        found = await all_of(provider)
        assert {message.message_id: bytes(message.body_view) for message in found} == sent
        assert [isinstance(message.body_view.obj, Mapping) for message in found] == [False, True]
        if compact:
            provider._store.compact()
            while provider._store._snapshot is not None:
                await asyncio.sleep(0)
        await provider.close()

    asyncio.run(send())
    for compact in (True, False):
        asyncio.run(look(compact=compact))
    (tmp_path / "file").write_bytes(b"")
    before = [path.read_bytes() for path in files(tmp_path / "journal")]
    with pytest.raises(ConfigurationError, match="move a large body"):
        opened(tmp_path / "journal", body_file_threshold=16384, body_directory=tmp_path / "file")
    assert [path.read_bytes() for path in files(tmp_path / "journal")] == before, "nothing was taken for damaged"
