"""What it costs a message to be kept: sent, delivered and completed, each of the three in the journal.

Ours is the whole provider (``InMemoryConfig(path=...)``), with everything that the queue does. The rival is SQLite
(sqlite_journal.py), which only keeps. "Synced" is ``fsync="always"``, and ``synchronous=FULL`` there: what is
acknowledged is on the disk. Without, it is in the kernel: safe from a kill of the process. Files are where pytest puts
its temporary directories. Recovery is of a log of 200,000 messages of 100 bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.sqlite_journal import DELETE, INSERT, UPDATE, SQLiteJournal
from queue_runtime._core.envelope import encode_envelope
from queue_runtime.clock import SystemClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.message import Message
from queue_runtime.providers.base import COMPLETE
from queue_runtime.providers.durable import open_memory

BATCH = 100
DEEP = 200_000
MESSAGES = [Message(body=b"x" * 100) for _ in range(BATCH)]


class Ours:
    def __init__(self, path: Path | None, *, sync: bool) -> None:
        self.loop = asyncio.new_event_loop()
        config = InMemoryConfig(path=path, fsync="always" if sync else "never", capacity=2 * DEEP)
        self.provider = open_memory(config, clock=SystemClock())
        self.receiver = self.run(self.provider.open_receiver("q"))

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    async def some(self, start: int, count: int) -> None:
        await self.provider.send("q", MESSAGES[start : start + count])
        received = await self.receiver.receive(count, 0.0)
        await self.receiver.settle(COMPLETE, [message.receipt for message in received])

    def close(self) -> None:
        self.run(self.provider.close())
        self.loop.close()


class Rival(Ours):
    def __init__(self, path: Path, *, sync: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.journal = SQLiteJournal(path / "queue.db", sync=sync)
        self.number = 0

    async def some(self, start: int, count: int) -> None:
        numbers = range(self.number, self.number + count)
        self.number += count
        messages = MESSAGES[start : start + count]
        await self.journal.write(INSERT, [(n, encode_envelope(m)) for n, m in zip(numbers, messages, strict=True)])
        await self.journal.write(UPDATE, [(n,) for n in numbers])
        await self.journal.write(DELETE, [(n,) for n in numbers])

    def close(self) -> None:
        self.journal.close()
        self.loop.close()


async def singly(side: Ours, rounds: int) -> None:
    for _ in range(rounds):
        await side.some(0, 1)


async def by_tasks(side: Ours, rounds: int) -> None:
    for _ in range(rounds):
        await asyncio.gather(*[side.some(start, 1) for start in range(BATCH)])


async def by_hundred(side: Ours, rounds: int) -> None:
    for _ in range(rounds):
        await side.some(0, BATCH)


LOADS: dict[str, tuple[Callable[[Ours, int], Awaitable[None]], int, int]] = {
    "one at a time": (singly, 1, 200),
    "100 tasks, one at a time each": (by_tasks, BATCH, 5),
    "100 in a call": (by_hundred, BATCH, 10),
}


ROWS = {
    f"{side}: {load}{', synced' if sync else ''}": (side, load, sync)
    for load in LOADS
    for sync in (False, True)
    for side in ("ours", "ours, without a path", "SQLite")
}


@pytest.mark.parametrize("row", ROWS)
def test_journal(benchmark: Any, tmp_path: Path, row: str) -> None:
    side, load, sync = ROWS[row]
    job, each, rounds = LOADS[load]
    if sync:
        rounds = max(1, rounds // 10)
    benchmark.group = f"journal: {load}{', synced' if sync else ''}, per message"
    benchmark.extra_info["items"] = each * rounds
    if side == "SQLite":
        place: Ours = Rival(tmp_path, sync=sync)
    else:
        place = Ours(tmp_path if side == "ours" else None, sync=sync)
    if side == "ours":
        benchmark.extra_info["goal"] = ">= 1 x SQLite" if sync else ">= 2 x SQLite"
    benchmark.pedantic(lambda: place.run(job(place, rounds)), rounds=10 if sync else 50, warmup_rounds=2)
    place.close()


def test_ours_recovery(benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = "journal: recovery, per message"
    benchmark.extra_info["items"] = DEEP
    benchmark.extra_info["goal"] = ">= 500,000/s"
    place = Ours(tmp_path, sync=False)
    for _ in range(DEEP // BATCH):
        place.run(place.provider.send("q", MESSAGES))
    place.close()

    def recover() -> None:
        Ours(tmp_path, sync=False).close()

    benchmark.pedantic(recover, rounds=5)
