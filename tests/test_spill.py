"""Large bodies of the in-memory provider in files without a name [C6, C39]."""

import asyncio
import errno
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from queue_runtime._core.body import Mapping
from queue_runtime.bodies import Spill
from queue_runtime.client import QueueClient
from queue_runtime.clock import settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import ClosedError, ConfigurationError, MessageTooLargeError, ProviderError
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import NoRetry

LARGE = os.urandom(100_000)
SMALL = b"small"


def config(directory: Path, **changes: object) -> InMemoryConfig:
    settings = {"body_file_threshold": 16384, "body_directory": str(directory), "retry": NoRetry()}
    return InMemoryConfig(**settings | changes)  # type: ignore[arg-type]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[QueueClient]:
    async with QueueClient(config(tmp_path / "bodies")) as client:
        yield client


def segments(directory: Path) -> int:
    """Files without a name that are mapped from there."""
    return sum(
        str(directory) in line and line.endswith("(deleted)")
        for line in Path("/proc/self/maps").read_text().splitlines()
    )


async def mapped(directory: Path) -> int:
    return await asyncio.to_thread(segments, directory)


async def descriptors() -> int:
    return len(await asyncio.to_thread(os.listdir, "/proc/self/fd"))


def is_moved(message: Message | ReceivedMessage) -> bool:
    return isinstance(message.body_view.obj, Mapping)


async def one(client: QueueClient) -> ReceivedMessage:
    message = await client.receive_message("q", 0)
    assert message is not None
    return message


async def test_c6_every_field_arrives_as_sent(client: QueueClient) -> None:
    sent = Message(
        body=LARGE, attributes={"a": "ü"}, session_id=None, correlation_id="c", content_type="t", time_to_live=60.25,
        deduplication_id="d",
    )  # fmt: skip
    assert await client.send_message("q", sent) == sent.message_id
    received = await one(client)
    assert received.message() == sent
    assert is_moved(received)
    assert not is_moved(sent)
    assert received.body is received.body  # one copy, however often it is asked for
    with received.open_body() as file:
        assert file.read(10) == LARGE[:10]


async def test_only_large_bodies_are_moved(client: QueueClient, tmp_path: Path) -> None:
    await client.send_message("q", Message(body=bytes(16383), attributes={"a": "x" * 20_000}))
    assert not is_moved(await one(client))
    assert await mapped(tmp_path) == 0
    await client.send_message("q", Message(body=bytes(16384)))
    assert is_moved(await one(client))
    assert await mapped(tmp_path) == 1
    assert await asyncio.to_thread(os.listdir, tmp_path / "bodies") == []


async def test_a_body_is_moved_once(client: QueueClient) -> None:
    """Not again when it comes back, dies, is re-driven or forwarded."""
    await client.send_message("q", Message(body=LARGE))
    received = await one(client)
    first = received.body_view
    await client.dead_letter_message(received, "reason")
    await client.dead_letters("q").redrive()
    await client.send_message("q", received.message())
    for _ in range(2):
        again = await one(client)
        assert again.body_view.obj is first.obj
        assert again.body == LARGE
        await client.complete_message(again)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(LARGE)
    return tmp_path / "file"


async def test_a_mapped_file_stays_where_it_is(client: QueueClient, tmp_path: Path, file: Path) -> None:
    message = Message.from_file(file)
    await client.send_message("q", message)
    assert (await one(client)).body_view.obj is message.body_view.obj
    assert await mapped(tmp_path) == 0


async def test_nothing_overtakes_a_body_that_is_being_moved(client: QueueClient) -> None:
    """[C24] What is sent after it comes after it, large or small."""
    bodies = [LARGE, SMALL, bytes(20_000), b"last"]
    await asyncio.gather(*(client.send_message("q", Message(body=body, session_id="s")) for body in bodies))
    session = await client.accept_session("q", "s")
    assert session is not None
    assert [message.body for message in await session.receive_messages(10, 0)] == bodies
    await session.close()


def test_the_files_end_with_their_last_message(tmp_path: Path) -> None:
    spill = Spill(16384, tmp_path, segment_size=300_000)
    before = len(os.listdir("/proc/self/fd"))
    messages = spill.move([Message(body=LARGE) for _ in range(9)])
    assert segments(tmp_path) == 5  # of two each: after the first, bodies begin at multiples of 64
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert all(message.body == LARGE for message in messages)
    kept = messages[2].body_view[7:9]
    del messages
    assert segments(tmp_path) == 2
    spill.close()
    assert segments(tmp_path) == 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept == LARGE[7:9]
    del kept
    assert segments(tmp_path) == 0
    (huge,) = spill.move([Message(body=bytes(1_000_000))])
    assert huge.body_view.nbytes == 1_000_000


async def test_a_client_that_is_closed_leaves_no_file(tmp_path: Path) -> None:
    """[C23]"""
    before = await descriptors()
    async with QueueClient(config(tmp_path)) as client:
        await client.send_message("q", Message(body=LARGE))
        await one(client)
        assert await mapped(tmp_path) == 1
    del client
    gc.collect()
    assert await mapped(tmp_path) == 0
    assert await descriptors() == before


async def test_what_is_refused_is_not_written(client: QueueClient, tmp_path: Path) -> None:
    with pytest.raises(MessageTooLargeError):
        await client.send_message("q", Message(body=bytes(2_000_000)))
    assert await mapped(tmp_path) == 0


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "disk-full"), (errno.EROFS, "read-only")])
async def test_a_disk_that_refuses(
    client: QueueClient, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    """Nothing is sent, and what comes later is as it should be."""
    write = os.write

    def refuse(fd: int, data: memoryview) -> int:
        if len(data) < 50_000:
            raise OSError(number, os.strerror(number))
        return write(fd, data[:50_000])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(ProviderError, match=r"cannot move a large body to a file in .*/bodies: ") as caught:
            await client.send_message("q", Message(body=b"?" * 99_999))
    assert caught.value.code == code
    assert (await client.counts("q")).active == 0
    await client.send_message("q", Message(body=LARGE))
    assert (await one(client)).body == LARGE


async def test_a_directory_that_is_a_file(file: Path) -> None:
    async with QueueClient(config(file)) as client:
        with pytest.raises(ProviderError, match="cannot move a large body to a file"):
            await client.send_message("q", Message(body=LARGE))
        await client.send_message("q", Message(body=SMALL))


async def test_a_send_that_ends_while_its_body_is_moved(tmp_path: Path) -> None:
    """Cancelled: it is not sent. Closed meanwhile: ClosedError. Neither keeps the next from its turn."""
    async with QueueClient(config(tmp_path)) as client:
        first = asyncio.create_task(client.send_message("q", Message(body=LARGE)))
        second = asyncio.create_task(client.send_message("q", Message(body=LARGE)))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert first.cancelled()
        assert (await client.counts("q")).active == 1
        late = asyncio.create_task(client.send_message("q", Message(body=LARGE)))
        await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await late
    await settle_tasks()


async def test_clients_that_share_their_queues_agree(tmp_path: Path) -> None:
    async with QueueClient(config(tmp_path, name="spill")) as client:
        with pytest.raises(ConfigurationError, match="body_file_threshold"):
            await QueueClient(InMemoryConfig(name="spill")).counts("q")
        async with QueueClient(config(tmp_path, name="spill")) as other:
            await client.send_message("q", Message(body=LARGE))
            assert (await one(other)).body == LARGE


def test_a_second_event_loop(tmp_path: Path) -> None:
    spill = Spill(16384, tmp_path)

    async def crowd() -> None:
        moved = await asyncio.gather(*(spill.moved([Message(body=LARGE)]) for _ in range(3)))
        assert [message.body for messages in moved for message in messages] == [LARGE] * 3

    asyncio.run(crowd())
    asyncio.run(crowd())


@settings(max_examples=15)
@given(st.lists(st.one_of(st.integers(0, 100), st.integers(16380, 70_000)), max_size=8))
def test_any_sizes_at_any_places(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    """A message's body is its own, wherever it lies in whichever file."""
    spill = Spill(16384, tmp_path_factory.mktemp("bodies"), segment_size=65_536)
    bodies = [os.urandom(size) for size in sizes]
    moved = spill.move([Message(body=body, message_id="m") for body in bodies])
    assert [message.body for message in moved] == bodies
    assert list(moved) == [Message(body=body, message_id="m") for body in bodies]
    assert [is_moved(message) for message in moved] == [size >= 16384 for size in sizes]


MANY = """if True:
    import asyncio, hashlib, sys
    from pathlib import Path
    from queue_runtime import InMemoryConfig, Message, QueueClient

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def body(n):
        return hashlib.sha256(str(n).encode()).digest() * 32_736  # 1 MiB but for 1 KiB, so that the ids have room

    async def main(settings):
        async with QueueClient(InMemoryConfig(**settings)) as client:
            await client.send_message("q", Message(body=body(0)))
            before = anonymous()
            for n in range(1, 500):
                await client.send_message("q", Message(body=body(n)))
            filled = anonymous() - before
            for n in range(500):
                message = await client.receive_message("q", 0)
                assert message.body_view == body(n), n
                await client.complete_message(message)
            print(filled, anonymous() - before)

    asyncio.run(main({}))
"""


def grown(directory: Path | None) -> tuple[float, float]:
    """MiB that a process's own memory grows by with 500 messages of 1 MiB in a queue, and when all were read."""
    settings = {} if directory is None else {"body_file_threshold": 65_536, "body_directory": str(directory)}
    code = MANY.replace("main({})", f"main({settings!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    filled, emptied = map(float, done.stdout.split())
    return filled, emptied


def test_p9_a_queue_of_large_messages_does_not_fill_the_memory(tmp_path: Path) -> None:
    """[C6, C39, P9] 500 MiB in the queue, and the process is as large as before."""
    filled, emptied = grown(tmp_path)
    assert filled < 16
    assert emptied < 16


def test_without_a_threshold_it_does() -> None:
    """That the measure measures."""
    filled, _ = grown(None)
    assert filled > 450
