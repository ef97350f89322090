"""What the rules around a handler cost a message: the breaker, a retry that is not needed, the stores of done keys.

In the clock is the loop over the items; a coroutine that is called does nothing. A store is asked and marked for each
message, by 100 tasks at once, as 100 handlers would, or by one task after the other. By hand is what one would write
first: sqlite3 in a thread of the pool, a commit for each message.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiobreaker import CircuitBreaker as AioBreaker
from tenacity import AsyncRetrying, stop_after_attempt, wait_exponential

from queue_runtime import (
    BreakerConfig,
    CircuitBreaker,
    ExponentialRetry,
    IdempotencyStore,
    MemoryIdempotencyStore,
    SQLiteIdempotencyStore,
    SystemClock,
    retrying,
)

COUNT = 2_000


async def nothing() -> None:
    pass


def run(benchmark: Any, group: str, job: Callable[[], Coroutine[Any, Any, None]], items: int = COUNT) -> None:
    benchmark.group = group
    benchmark.extra_info["items"] = items
    loop = asyncio.new_event_loop()
    try:
        benchmark.pedantic(lambda: loop.run_until_complete(job()), rounds=9, warmup_rounds=1)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


# The breaker.

CALL = "circuit breaker around a call, per call"


def test_ours_asked_by_the_caller(benchmark: Any) -> None:
    """As a consumer does it: ask before, tell after."""
    breaker = CircuitBreaker(BreakerConfig())
    benchmark.extra_info["goal"] = "<= 1/4 of aiobreaker"

    async def job() -> None:
        for _ in range(COUNT):
            if breaker.may_try():
                await nothing()
                breaker.succeeded()

    run(benchmark, CALL, job)


def test_ours_call(benchmark: Any) -> None:
    breaker = CircuitBreaker(BreakerConfig())

    async def job() -> None:
        for _ in range(COUNT):
            await breaker.call(nothing)

    run(benchmark, CALL, job)


def test_aiobreaker(benchmark: Any) -> None:
    breaker = AioBreaker(fail_max=5, timeout_duration=timedelta(seconds=30))

    async def job() -> None:
        for _ in range(COUNT):
            await breaker.call_async(nothing)

    run(benchmark, CALL, job)


def test_bare_call(benchmark: Any) -> None:
    async def job() -> None:
        for _ in range(COUNT):
            await nothing()

    run(benchmark, CALL, job)


# Retry.

RETRY = "retry around a call that goes well, per call"


def test_ours_retrying(benchmark: Any) -> None:
    policy, clock = ExponentialRetry(), SystemClock()
    benchmark.extra_info["goal"] = "<= 1/4 of tenacity"

    async def job() -> None:
        for _ in range(COUNT):
            await retrying(nothing, policy, clock)

    run(benchmark, RETRY, job)


def test_tenacity(benchmark: Any) -> None:
    policy = AsyncRetrying(stop=stop_after_attempt(3), wait=wait_exponential(0.1, max=30))

    async def job() -> None:
        for _ in range(COUNT):
            await policy(nothing)

    run(benchmark, RETRY, job)


def test_bare_await(benchmark: Any) -> None:
    async def job() -> None:
        for _ in range(COUNT):
            await nothing()

    run(benchmark, RETRY, job)


# Idempotency.


class ByHand:
    """A connection in one thread of a pool, a commit for each message."""

    def __init__(self, path: Path) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._connection = self._pool.submit(self._open, path).result()

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE done (key TEXT PRIMARY KEY) WITHOUT ROWID")
        return connection

    def _look_up(self, keys: list[str]) -> set[str]:
        found = (self._connection.execute("SELECT key FROM done WHERE key = ?", (key,)).fetchone() for key in keys)
        return {row[0] for row in found if row}

    def _mark(self, keys: list[str]) -> None:
        for key in keys:
            self._connection.execute("INSERT OR IGNORE INTO done VALUES (?)", (key,))

    async def done(self, keys: list[str]) -> set[str]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._look_up, keys)

    async def mark(self, keys: list[str]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self._mark, keys)

    async def close(self) -> None:
        self._pool.submit(self._connection.close).result()
        self._pool.shutdown()


STORES: dict[str, Callable[[Path], Any]] = {
    "ours: memory": lambda path: MemoryIdempotencyStore(),
    "ours: SQLite": SQLiteIdempotencyStore,
    "ours: SQLite, flushed for power loss": lambda path: SQLiteIdempotencyStore(path, durability="power"),
    "sqlite3 by hand": ByHand,
}


@pytest.mark.parametrize("row", STORES)
def test_store_of_many_tasks(benchmark: Any, row: str) -> None:
    measure_store(benchmark, row, 100)


@pytest.mark.parametrize("row", STORES)
def test_store_of_one_task(benchmark: Any, row: str) -> None:
    measure_store(benchmark, row, 1)


def measure_store(benchmark: Any, row: str, tasks: int) -> None:
    if row == "ours: SQLite":
        benchmark.extra_info["goal"] = f"<= {'1/2' if tasks > 1 else '1.5'} of sqlite3 by hand"
    items = COUNT if tasks > 1 else COUNT // 10
    marked = 0
    with tempfile.TemporaryDirectory() as directory:
        store: IdempotencyStore = STORES[row](Path(directory) / "done.db")

        async def one(keys: range) -> None:
            for key in keys:
                known = await store.done([f"orders/{key}"])
                assert not known
                await store.mark([f"orders/{key}"])

        async def job() -> None:
            nonlocal marked
            keys = range(marked, marked + items)
            marked += items
            await asyncio.gather(*(one(keys[task::tasks]) for task in range(tasks)))

        who = f"{tasks} tasks at once" if tasks > 1 else "one task"
        try:
            run(benchmark, f"ask and mark a message's key, {who}, per message", job, items)
        finally:
            asyncio.run(_close(store.close))


async def _close(close: Callable[[], Awaitable[None]]) -> None:
    await close()
