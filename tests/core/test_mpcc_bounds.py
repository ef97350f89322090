"""Full slots: each policy, waiting for room, low water [C39]."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from loops import LOOPS, Recorder, run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import ClosedError, QueueFullError

DAY = 86400
POLICIES = ["raise", "block", "drop_oldest", "unbounded"]


def test_raise_takes_all_or_none() -> None:
    mpcc: MPCC[int] = MPCC(5, DAY, 1, 2, slot_capacity=11)
    mpcc.push_many(range(7), 0)
    with pytest.raises(QueueFullError, match=r"slot 0 is full.*11") as caught:
        mpcc.push_many(range(5), 0)
    assert caught.value.capacity == 11
    mpcc.push_many(range(7, 11), 0)
    with pytest.raises(QueueFullError):
        mpcc.push(0, 0)
    mpcc.push(0, 1)
    stats = mpcc.stats(0)
    assert (stats.pushed, stats.waiting, stats.refused) == (11, 11, 2)
    assert run(mpcc.complete()) == {0: list(range(11)), 1: [0]}


@pytest.mark.parametrize("overflow", POLICIES)
def test_push_many_of_nothing_and_of_any_iterable(overflow: Any) -> None:
    mpcc: MPCC[Any] = MPCC(5, DAY, 1, 1, overflow=overflow, slot_capacity=20)
    mpcc.push_many([], 0)
    mpcc.push_many(iter("ab"), 0)
    mpcc.push_many(("c", None), 0)
    mpcc.push_many({"d": 1}, 0)
    with pytest.raises(TypeError):
        mpcc.push_many(1, 0)  # type: ignore[arg-type]
    assert run(mpcc.complete()) == {0: ["a", "b", "c", None, "d"]}
    for push in (lambda: mpcc.push_many(range(1000), 0), lambda: mpcc.push(1, 0)):
        with pytest.raises(ClosedError):
            push()


def test_drop_oldest() -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[int] = MPCC(4, DAY, 1, 1, overflow="drop_oldest", slot_capacity=10)
        for i in range(25):
            mpcc.push(i, 0)
        assert mpcc.stats().dropped == 15
        mpcc.push_many(range(25, 29), 0)
        mpcc.push_many(range(100, 135), 0)
        stats = mpcc.stats()
        assert (stats.dropped, stats.waiting, stats.refused) == (54, 10, 0)
        mpcc.start(pump)
        await mpcc.complete()
        assert pump.items() == list(range(125, 135))

    run(main())


def test_unbounded_keeps_the_order() -> None:
    async def main() -> None:
        pump = Recorder(lambda items, slot: asyncio.sleep(0))
        mpcc: MPCC[int] = MPCC(4, 5, 1, 1, overflow="unbounded", slot_capacity=8)
        mpcc.start(pump)
        await turns()
        mpcc.push_many(range(100), 0)  # more than the ring, into an empty slot: still pumped at once
        for i in range(100, 131):
            mpcc.push(i, 0)
        await asyncio.sleep(1)
        assert pump.items() == list(range(128))
        assert max(pump.sizes()) == 4
        await asyncio.sleep(5)
        mpcc.push_many(range(131, 200), 0)
        assert await mpcc.complete() == {}
        assert pump.items() == list(range(200))
        stats = mpcc.stats()
        assert (stats.pushed, stats.waiting, stats.dropped, stats.refused) == (200, 0, 0, 0)

    run(main())


@pytest.mark.parametrize("many", [False, True])
def test_block_waits_for_low_water(many: bool) -> None:
    """A blocked thread goes on once the slot is down to low_water, not before."""
    mpcc: MPCC[int] = MPCC(2, DAY, 1, 1, overflow="block", slot_capacity=10, low_water=3)
    mpcc.push_many(range(10), 0)
    thread = threading.Thread(target=(lambda: mpcc.push_many([10, 11], 0)) if many else (lambda: mpcc.push(10, 0)))
    thread.start()

    async def main() -> None:
        gate: asyncio.Queue[None] = asyncio.Queue()
        pump = Recorder(lambda items, slot: gate.get())
        mpcc.start(pump)
        await turns()
        for waiting in (8, 6, 4):
            assert mpcc.stats().waiting == waiting
            await asyncio.sleep(0.005)
            assert thread.is_alive()
            gate.put_nowait(None)
            await turns()
        await asyncio.to_thread(thread.join)
        assert mpcc.stats().pushed == (12 if many else 11)
        for _ in range(10):
            gate.put_nowait(None)
        assert await mpcc.complete() == {}
        assert pump.items() == list(range(12 if many else 11))

    run(main(), LOOPS["asyncio"])


def test_block_never_blocks_a_loop() -> None:
    async def main() -> None:
        mpcc: MPCC[int] = MPCC(2, DAY, 1, 1, overflow="block", slot_capacity=2)
        mpcc.push_many([1, 2], 0)
        with pytest.raises(QueueFullError):
            mpcc.push(3, 0)
        with pytest.raises(QueueFullError):
            mpcc.push_many([3, 4], 0)
        assert await mpcc.complete() == {0: [1, 2]}

    run(main())


def test_complete_lets_blocked_threads_go() -> None:
    mpcc: MPCC[int] = MPCC(2, DAY, 1, 1, overflow="block", slot_capacity=2)
    mpcc.push_many([1, 2], 0)
    answers: list[str] = []

    def blocked() -> None:
        try:
            mpcc.push(3, 0)
        except ClosedError:
            answers.append("closed")

    threads = [threading.Thread(target=blocked) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.01)
    assert answers == []
    assert run(mpcc.complete()) == {0: [1, 2]}
    for thread in threads:
        thread.join(5)
    assert answers == ["closed"] * 3


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("overflow", POLICIES)
def test_push_wait_under_every_policy(overflow: Any, name: str) -> None:
    async def main() -> None:
        pump = Recorder(lambda items, slot: asyncio.sleep(0))
        mpcc: MPCC[Any] = MPCC(5, 0.01, 1, 1, overflow=overflow, slot_capacity=7)
        mpcc.start(pump)

        async def produce(me: int) -> None:
            for i in range(60):
                await mpcc.push_wait((me, i), 0)

        await asyncio.gather(*[produce(me) for me in range(4)])
        assert await mpcc.complete() == {}
        for me in range(4):
            assert [i for who, i in pump.items() if who == me] == list(range(60))
        assert mpcc.stats().dropped == mpcc.stats().refused == 0
        with pytest.raises(ClosedError):
            await mpcc.push_wait(1, 0)

    run(main(), LOOPS[name])


def test_push_wait_cancelled_adds_nothing() -> None:
    async def main() -> None:
        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1, slot_capacity=2)
        mpcc.push_many([1, 2], 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mpcc.push_wait(3, 0), 1)
        waiting = asyncio.ensure_future(mpcc.push_wait(4, 0))
        await turns()
        assert await mpcc.complete() == {0: [1, 2]}
        with pytest.raises(ClosedError):
            await waiting

    run(main())


def test_threads_that_drop_while_the_loop_takes() -> None:
    """Producers are consumers too for a moment: nothing twice, nothing lost but what is counted, order kept."""

    async def main() -> None:
        got: list[tuple[int, int]] = []

        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
            got.extend(items)

        mpcc: MPCC[Any] = MPCC(10, 0.001, 1, 1, overflow="drop_oldest", slot_capacity=16)
        mpcc.start(pump)

        def produce(me: int) -> None:
            for i in range(20_000):
                mpcc.push((me, i), 0)

        threads = [threading.Thread(target=produce, args=(me,)) for me in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0)
        assert await mpcc.complete() == {}
        stats = mpcc.stats()
        assert stats.dropped > 0
        assert stats.pushed == 60_000 == len(got) + stats.dropped
        assert len(set(got)) == len(got)
        for me in range(3):
            mine = [i for who, i in got if who == me]
            assert mine == sorted(mine)

    run(main(), LOOPS["asyncio"])
