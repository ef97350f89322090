"""The MPCC: what a push costs, an item's way to the pump, and threads into the loop.

A single push cannot beat deque.append under the GIL, which is one C call with no bound, no slot and nobody to wake;
the gain is in the batch, the bound, the one wake for many pushes and the one C call for many items. Every round
begins with an empty consumer; a `for` loop over the items is inside the clock for everybody.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import culsans
import janus
import pytest
from rivals import LoopQueue, PlainMPCC

from queue_runtime import MultiProducerConcurrentConsumer as MPCC

ITEMS = 20_000
PUMPED = 60_000  # enough batches for the first touch of fresh memory not to count
SLOTS = 4
THREADS = 4


def repeat(
    benchmark: Any, group: str, items: int, setup: Callable[[], tuple[Any, ...]], run: Callable[..., Any]
) -> None:
    benchmark.group = group
    benchmark.extra_info["items"] = items
    benchmark.pedantic(run, setup=lambda: (setup(), {}), rounds=25, warmup_rounds=3)


def bounded() -> MPCC[int]:
    return MPCC(500, 3600, 1, SLOTS, slot_capacity=1 << 15)


def one_by_one(push: Callable[..., Any], items: list[int]) -> None:
    for item in items:
        push(item)


def to_slot(push: Callable[..., Any], items: list[int]) -> None:
    for item in items:
        push(item, 1)


NUMBERS = list(range(ITEMS))


def test_deque_append(benchmark: Any) -> None:
    repeat(benchmark, "push, per item", ITEMS, lambda: (deque().append, NUMBERS), one_by_one)


def test_simple_queue_put(benchmark: Any) -> None:
    repeat(benchmark, "push, per item", ITEMS, lambda: (queue.SimpleQueue().put, NUMBERS), one_by_one)


def test_asyncio_queue_put_nowait(benchmark: Any) -> None:
    repeat(benchmark, "push, per item", ITEMS, lambda: (asyncio.Queue().put_nowait, NUMBERS), one_by_one)


def test_ours_push(benchmark: Any) -> None:
    benchmark.extra_info["goal"] = "<= 2.5 x deque.append"
    repeat(benchmark, "push, per item", ITEMS, lambda: (bounded().push, NUMBERS), to_slot)


def test_list_extend(benchmark: Any) -> None:
    def run(extend: Callable[..., Any]) -> None:
        for _ in range(40):
            extend(batch)

    batch = NUMBERS[:500]
    repeat(benchmark, "push_many of 500, per item", ITEMS, lambda: ([].extend,), run)


def test_ours_push_many(benchmark: Any) -> None:
    def run(push_many: Callable[..., Any]) -> None:
        for _ in range(40):
            push_many(batch, 1)

    batch = NUMBERS[:500]
    benchmark.extra_info["goal"] = "<= list.extend + 12 ns an item"
    repeat(benchmark, "push_many of 500, per item", ITEMS, lambda: (bounded().push_many,), run)


def pump_all(benchmark: Any, make: Callable[[], Any], batch_size: int, many: bool = False) -> None:
    """Push to four slots in turn, with a turn of the loop after each four batches; the pump does nothing."""
    loop = asyncio.new_event_loop()

    async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
        pass

    async def run() -> None:
        consumer = make()
        consumer.start(pump)
        push, push_many = consumer.push, consumer.push_many
        batch = NUMBERS[:batch_size]
        for _ in range(PUMPED // (SLOTS * batch_size)):
            if many:
                for slot in range(SLOTS):
                    push_many(batch, slot)
            else:
                for item in batch:
                    push(item, 0)
                    push(item, 1)
                    push(item, 2)
                    push(item, 3)
            await asyncio.sleep(0)
        await consumer.complete()

    way = "push_many" if many else "push"
    repeat(
        benchmark,
        f"{way} to pump, {SLOTS} slots, batches of {batch_size}, per item",
        PUMPED,  # a multiple of every round's items
        lambda: (),
        lambda: loop.run_until_complete(run()),
    )
    loop.close()


@pytest.mark.parametrize("batch_size", [500, 100, 10])
def test_plain_python_mpcc(benchmark: Any, batch_size: int) -> None:
    pump_all(benchmark, lambda: PlainMPCC(batch_size, 3600, 4, SLOTS), batch_size)


@pytest.mark.parametrize("batch_size", [500, 100, 10])
def test_ours_mpcc(benchmark: Any, batch_size: int) -> None:
    if batch_size == 500:
        benchmark.extra_info["goal"] = "<= 1/4 of the plain-Python MPCC"
    pump_all(benchmark, lambda: MPCC(batch_size, 3600, 4, SLOTS), batch_size)


def test_plain_python_mpcc_many(benchmark: Any) -> None:
    pump_all(benchmark, lambda: PlainMPCC(500, 3600, 4, SLOTS), 500, many=True)


def test_ours_mpcc_many(benchmark: Any) -> None:
    pump_all(benchmark, lambda: MPCC(500, 3600, 4, SLOTS), 500, many=True)


def into_the_loop(benchmark: Any, items: int, open_: Callable[[], Any], takes_slot: bool = False) -> None:
    """Four threads push; the clock stops when the loop has everything."""
    loop = asyncio.new_event_loop()
    each = (NUMBERS * (items // ITEMS + 1))[: items // THREADS]

    async def run() -> None:
        push, arrived = open_()

        def put() -> None:
            for i in each:
                push(i)

        def put_to_slot() -> None:
            for i in each:
                push(i, 0)

        produce = put_to_slot if takes_slot else put
        threads = [threading.Thread(target=produce) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        await arrived(items)
        for thread in threads:
            thread.join()

    benchmark.group = f"{THREADS} threads into the loop, per item"
    benchmark.extra_info["items"] = items
    benchmark.pedantic(lambda: loop.run_until_complete(run()), rounds=15 if takes_slot else 3, warmup_rounds=1)
    loop.close()


def test_asyncio_queue_and_call_soon_threadsafe(benchmark: Any) -> None:
    def open_() -> Any:
        rival = LoopQueue()

        async def arrived(count: int) -> None:
            for _ in range(count):
                await rival.get()

        return rival.put, arrived

    into_the_loop(benchmark, 200_000, open_)


def test_janus(benchmark: Any) -> None:
    def open_() -> Any:
        rival: janus.Queue[int] = janus.Queue()

        async def arrived(count: int) -> None:
            for _ in range(count):
                await rival.async_q.get()
            await rival.aclose()

        return rival.sync_q.put, arrived

    into_the_loop(benchmark, 200_000, open_)


def test_culsans(benchmark: Any) -> None:
    def open_() -> Any:
        rival: culsans.Queue[int] = culsans.Queue()

        async def arrived(count: int) -> None:
            for _ in range(count):
                await rival.async_q.get()

        return rival.sync_q.put, arrived

    into_the_loop(benchmark, 200_000, open_)


def test_ours_from_threads(benchmark: Any) -> None:
    def open_() -> Any:
        consumer: MPCC[int] = MPCC(1000, 0.001, 4, 1, slot_capacity=1 << 18)
        total = 0
        done = asyncio.get_running_loop().create_future()
        wanted = 0

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            nonlocal total
            total += len(items)
            if total == wanted:
                done.set_result(None)

        async def arrived(count: int) -> None:
            nonlocal wanted
            wanted = count
            consumer.start(pump)
            await done
            await consumer.complete()

        return consumer.push, arrived

    benchmark.extra_info["goal"] = ">= 50 x each rival"
    into_the_loop(benchmark, 200_000, open_, takes_slot=True)
