"""Large bodies: through a queue, and through an envelope, read as a view, as bytes or as a file.

"Through a queue": what was received from somewhere, a memoryview of a buffer, is made a message, sent, received, read
and completed. The copying way is the same queue with `bytes(...)` of what comes in and of what goes out, as it has to
be without views. "Read" is a look at both ends, so that the time is the library's own; as a file it is all of it,
into one buffer of 256 KiB. "Through an envelope": encode, hand the bytes to the other side (who has them as a view of a
larger buffer), decode and read; msgpack is the rival, which copies at both ends.

`extra_info["peak"]` is the memory newly taken by one item at its highest, in bodies (tracemalloc, outside the clock);
what a file holds, and the memory of the page cache, is not in it.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import pytest

from queue_runtime import Message, ReceivedMessage, decode_envelope, encode_envelope
from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.providers.base import COMPLETE
from queue_runtime.providers.memory import InMemoryProvider

SIZES = {"1 KiB": 1 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20}
INTO = bytearray(256 << 10)
LARGEST = 32 << 20


def ends(buffer: bytes | memoryview) -> int:
    return buffer[0] + buffer[-1]


def as_view(message: ReceivedMessage | Message) -> int:
    return ends(message.body_view)


def as_bytes(message: ReceivedMessage | Message) -> int:
    return ends(message.body)


def as_copy(message: ReceivedMessage | Message) -> int:
    return ends(bytes(message.body_view))


def as_file(message: ReceivedMessage | Message) -> int:
    total = 0
    with message.open_body() as file:
        while count := file.readinto(INTO):
            total += count
    return total


def peak(step: Callable[[], object], size: int) -> float:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        step()
        return round((tracemalloc.get_traced_memory()[1] - before) / size, 2)
    finally:
        tracemalloc.stop()


Take = Callable[[memoryview], "bytes | memoryview"]
WAYS: dict[str, tuple[Take, Callable[[ReceivedMessage], int], bool]] = {
    "ours, a view": (lambda source: source, as_view, False),
    "ours, bytes": (lambda source: source, as_bytes, False),
    "ours, a file": (lambda source: source, as_file, False),
    "ours, moved to a file, a view": (lambda source: source, as_view, True),
    "the copying way": (bytes, as_copy, False),
}


def rows(names: Iterable[str]) -> list[Any]:
    return [pytest.param(size, name, id=f"{name}, {size}") for size in SIZES for name in names]


GOALS = {
    ("1 KiB", "ours, a view"): "<= 1.1 x the copying way",
    ("64 KiB", "ours, a view"): "<= 1 x the copying way",
    ("1 MiB", "ours, a view"): ">= 3 x the copying way",
    ("16 MiB", "ours, a view"): ">= 50 x the copying way",
}


@pytest.mark.parametrize(("size", "name"), rows(WAYS))
def test_queue(benchmark: Any, size: str, name: str) -> None:
    take, read, moved = WAYS[name]
    threshold = 1 << 14 if moved else None
    source = memoryview(bytes(SIZES[size] + 100))[50:-50]
    loop = asyncio.new_event_loop()
    provider = InMemoryProvider(
        InMemoryConfig(max_message_size=LARGEST, body_file_threshold=threshold), clock=SystemClock()
    )
    receiver = loop.run_until_complete(provider.open_receiver("q"))
    count = 3 if SIZES[size] > 1 << 20 else 20

    async def once() -> None:
        await provider.send("q", [Message(body=take(source))])
        (received,) = await receiver.receive(1, 0.0)
        read(received)
        await receiver.settle(COMPLETE, [received.receipt])

    async def some() -> None:
        for _ in range(count):
            await once()

    benchmark.group = f"bodies: {size} through a queue"
    benchmark.extra_info["items"] = count
    benchmark.extra_info["peak"] = peak(lambda: loop.run_until_complete(once()), SIZES[size])
    if goal := GOALS.get((size, name)):
        benchmark.extra_info["goal"] = goal
    benchmark.pedantic(lambda: loop.run_until_complete(some()), rounds=50, warmup_rounds=2)
    loop.run_until_complete(receiver.close())
    loop.run_until_complete(provider.close())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def ours(read: Callable[[Message], int]) -> Callable[[bytes], object]:
    def run(body: bytes) -> None:
        read(decode_envelope(memoryview(encode_envelope(Message(body=body, message_id="m")))))

    return run


def with_msgpack(body: bytes) -> None:
    wire = msgpack.packb([1, "m", None, None, None, None, None, None, None, {}, body])
    ends(msgpack.unpackb(memoryview(wire), max_bin_len=LARGEST)[10])


CODECS: dict[str, Callable[[bytes], object]] = {
    "ours, a view": ours(as_view),
    "ours, bytes": ours(as_bytes),
    "ours, a file": ours(as_file),
    "msgpack": with_msgpack,
}


@pytest.mark.parametrize(("size", "name"), rows(CODECS))
def test_envelope(benchmark: Any, size: str, name: str) -> None:
    body = bytes(SIZES[size])
    run = CODECS[name]
    count = 3 if SIZES[size] > 1 << 20 else 20

    def some() -> None:
        for _ in range(count):
            run(body)

    benchmark.group = f"bodies: {size} through an envelope"
    benchmark.extra_info["items"] = count
    benchmark.extra_info["peak"] = peak(lambda: run(body), SIZES[size])
    if name == "ours, a view" and SIZES[size] > 1 << 10:
        benchmark.extra_info["goal"] = ">= 1.5 x msgpack"
    benchmark.pedantic(some, rounds=50, warmup_rounds=2)
