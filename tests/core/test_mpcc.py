"""The MPCC's behaviours, by their numbers in mpcc.md [C41], on every loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from datetime import timedelta
from typing import Any

import pytest
from loops import LOOPS, JumpingLoop, Recorder, run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import AlreadyStartedError, ClosedError, SlotOutOfRangeError, ValidationError

DAY = timedelta(days=1)


@pytest.fixture(params=LOOPS)
def loop_factory(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


async def never(items: list[Any], slot: int) -> None:
    await asyncio.get_running_loop().create_future()


def test_1_slots_are_isolated(loop_factory: Any) -> None:
    """Behaviours 1 and 6: a batch holds one slot's items, in order, from 1 to batch_size of them."""

    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(7, DAY, 2, 3)
        mpcc.start(pump)
        for i in range(300):
            mpcc.push((i % 3, i), i % 3)
            if i % 50 == 0:
                await turns()
        assert await mpcc.complete() == {}
        for slot in range(3):
            assert pump.items(slot) == [(slot, i) for i in range(slot, 300, 3)]
        assert all(1 <= size <= 7 for size in pump.sizes())
        assert mpcc.stats(1).pushed == mpcc.stats(1).delivered == 100

    run(main(), loop_factory)


def test_2_push_from_any_thread(loop_factory: Any) -> None:
    """Behaviour 2; the threads' pushes overlap with pumps (seen by the loop while they push)."""
    if loop_factory is JumpingLoop:
        loop_factory = LOOPS["asyncio"]

    async def main() -> None:
        seen_while_pushing = 0
        pushing = 4

        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
            nonlocal seen_while_pushing
            got[slot].extend(items)
            seen_while_pushing += pushing > 0

        got: list[list[tuple[int, int]]] = [[], []]
        mpcc: MPCC[Any] = MPCC(50, 0.001, 2, 2, overflow="block", slot_capacity=200)
        mpcc.start(pump)

        def produce(me: int) -> None:
            nonlocal pushing
            for i in range(2000):
                mpcc.push((me, i), i % 2)
            pushing -= 1

        threads = [threading.Thread(target=produce, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        while pushing:
            await asyncio.sleep(0.001)
        for thread in threads:
            thread.join()
        assert await mpcc.complete() == {}
        assert seen_while_pushing > 10
        for slot in range(2):
            for me in range(4):
                assert [i for who, i in got[slot] if who == me] == list(range(slot, 2000, 2))

    run(main(), loop_factory)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 450])
def test_3_pushed_before_start(count: int, loop_factory: Any) -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(100, DAY, 9, 1)
        mpcc.push_many(range(count), 0)
        await turns()
        mpcc.start(pump)
        await turns()
        assert pump.sizes() == [100] * (count // 100)
        assert await mpcc.complete() == {}
        assert pump.items() == list(range(count))

    run(main(), loop_factory)


@pytest.mark.parametrize("slot", [-1, 4, 10**30, -(10**30)])
def test_4_slot_out_of_range(slot: int) -> None:
    mpcc: MPCC[Any] = MPCC(1, 1, 1, 4)
    for push in (mpcc.push, mpcc.stats):
        with pytest.raises(SlotOutOfRangeError, match=r"outside 0\.\.3"):
            push(*([1, slot] if push == mpcc.push else [slot]))
    with pytest.raises(IndexError):
        mpcc.push_many([1], slot)
    for waiting in (mpcc.push_wait, mpcc.push_and_wait):
        with pytest.raises(SlotOutOfRangeError):
            run(waiting(1, slot))
    assert mpcc.stats().pushed == 0


@pytest.mark.parametrize("slot", [True, 1.0, "1", None])
def test_4_slot_of_a_wrong_type(slot: Any) -> None:
    mpcc: MPCC[Any] = MPCC(1, 1, 1, 4)
    with pytest.raises(ValidationError, match="slot_number"):
        mpcc.push(1, slot)


GOOD: dict[str, Any] = {"batch_size": 5, "push_interval": 1.0, "max_concurrency": 2, "number_of_slots": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, bad) for field in GOOD for bad in (0, -1, True, None, "1", float("nan"), float("inf"), 10**30)),
        *((field, 1.5) for field in GOOD if field != "push_interval"),
        ("push_interval", timedelta(0)),
        ("push_interval", timedelta(seconds=-1)),
        ("push_interval", 10**400),
        ("overflow", "drop"),
        ("overflow", ["raise"]),
        ("slot_capacity", 4),
        ("low_water", 3),
        ("low_water", 8192),
        ("on_failure", 1),
        ("retry", 1),
    ],
)
def test_4_bad_numbers(field: str, value: Any) -> None:
    if field == "push_interval" and value == 10**30:
        return  # long, and a time all the same
    with pytest.raises(ValidationError) as caught:
        MPCC(**{**GOOD, field: value})
    assert caught.value.field == field


def test_5_start(loop_factory: Any) -> None:
    async def main() -> None:
        seen: list[Any] = []

        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
            seen.append((items, slot, state, cancellation.cancelled))

        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 2)
        with pytest.raises(ValidationError, match="pump"):
            mpcc.start(None)  # type: ignore[arg-type]
        state = object()
        mpcc.start(pump, state)
        with pytest.raises(AlreadyStartedError, match="already started"):
            mpcc.start(pump)
        mpcc.push("a", 1)
        await turns()
        assert seen == [(["a"], 1, state, False)]
        await mpcc.complete()

    run(main(), loop_factory)
    with pytest.raises(RuntimeError, match="event loop"):
        MPCC(1, 1, 1, 1).start(Recorder())


def test_7_a_full_batch_starts_at_once(loop_factory: Any) -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(10, DAY, 1, 2)
        mpcc.start(pump)
        for i in range(9):
            mpcc.push(i, 0)
            mpcc.push(i, 1)
        await turns()
        assert pump.batches == []
        mpcc.push(9, 1)
        await turns(3)
        assert pump.batches == [(1, list(range(10)))]
        await mpcc.complete()

    run(main(), loop_factory)


def test_8_nothing_waits_longer_than_the_interval() -> None:
    """Behaviour 8 and D11: never late; and early batches are at most one in an interval."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waits: list[float] = []
        starts: list[float] = []

        async def pump(items: list[float], slot: int, state: Any, cancellation: Any) -> None:
            starts.append(loop.time())
            waits.extend(loop.time() - pushed for pushed in items)

        mpcc: MPCC[float] = MPCC(40, 10, 3, 1)
        mpcc.start(pump)
        mpcc.push(loop.time(), 0)
        await asyncio.sleep(30)
        assert waits == pytest.approx([10])  # a single item, and no later
        begin, count = loop.time(), 0
        for pause in (1, 3, 0.01, 25, 9.99, 0.3, 2):
            for _ in range(100):
                mpcc.push(loop.time(), 0)
                count += 1
                await asyncio.sleep(pause)
        await asyncio.sleep(11)
        assert len(waits) == count + 1
        assert max(waits) <= 10 + 1e-6
        full = count // 40
        assert len(starts) - 1 <= full + (loop.time() - begin) / 10 * 2
        await mpcc.complete()

    run(main())


def test_8_interval_on_real_time() -> None:
    for loop_factory in (LOOPS["asyncio"], LOOPS["uvloop"]):

        async def main() -> None:
            loop = asyncio.get_running_loop()
            done = loop.create_future()

            async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
                done.set_result(loop.time())

            mpcc: MPCC[Any] = MPCC(100, 0.02, 1, 1)
            mpcc.start(pump)
            await turns()
            begin = loop.time()
            mpcc.push(1, 0)
            assert 0.015 < await done - begin < 1
            await mpcc.complete()

        run(main(), loop_factory)


def test_9_fan_out(loop_factory: Any) -> None:
    """Exactly 16 pumps hold exactly 1600 items."""

    async def main() -> None:
        pump = Recorder(never)
        mpcc: MPCC[Any] = MPCC(100, 0.001, 4, 4)
        mpcc.start(pump)
        for i in range(2400):
            mpcc.push(i, i % 4)
        await turns(30)
        await asyncio.sleep(0.01)
        assert pump.sizes() == [100] * 16
        assert pump.most == dict.fromkeys(range(4), 4)
        stats = mpcc.stats()
        assert (stats.pumps, stats.in_flight, stats.waiting) == (16, 1600, 800)
        left = await mpcc.complete(timeout=0)
        assert left == {slot: list(range(slot, 2400, 4)) for slot in range(4)}

    run(main(), loop_factory)


@pytest.mark.parametrize("first", ["push", "start"])
def test_10_complete_in_the_middle(first: str, loop_factory: Any) -> None:
    async def main() -> None:
        pump = Recorder(lambda items, slot: asyncio.sleep(0))
        mpcc: MPCC[Any] = MPCC(100, DAY, 4, 4)
        if first == "start":
            mpcc.start(pump)
        for i in range(2000):
            mpcc.push(i, i % 4)
        if first == "push":
            mpcc.start(pump)
        assert await mpcc.complete() == {}
        assert sorted(pump.items()) == list(range(2000))

    run(main(), loop_factory)


def test_11_the_interval_alone(loop_factory: Any) -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(10000, 0.001, 4, 4)
        mpcc.start(pump)
        for i in range(2000):
            mpcc.push(i, i % 4)
        while len(pump.items()) < 2000:
            await asyncio.sleep(0.001)
        before = len(pump.batches)
        await mpcc.complete()
        assert len(pump.batches) == before

    run(main(), loop_factory)


def test_12_discard_without_start(loop_factory: Any) -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1)
        mpcc.push("old", 0)
        assert await mpcc.complete(drain=False) == {0: ["old"]}
        mpcc.start(pump)
        mpcc.push("new", 0)
        await mpcc.complete()
        assert pump.batches == [(0, ["new"])]

    run(main(), loop_factory)


def test_13_complete_is_prompt() -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(1000, DAY, 1, 4)
        mpcc.start(pump)
        mpcc.push_many(range(10), 2)
        begin = asyncio.get_running_loop().time()
        assert await mpcc.complete() == {}
        assert asyncio.get_running_loop().time() == begin
        assert pump.batches == [(2, list(range(10)))]

    run(main())


def test_14_never_on_the_producers_stack(loop_factory: Any) -> None:
    """Behaviour 14 and D2: nothing of a pump has run when push, push_many, start or complete()'s call returns."""

    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[Any] = MPCC(1, DAY, 8, 1)
        mpcc.push(0, 0)
        mpcc.start(pump)
        mpcc.push(1, 0)
        mpcc.push_many([2, 3], 0)
        assert pump.batches == []
        await turns()
        assert pump.items() == [0, 1, 2, 3]
        await mpcc.complete()

    run(main(), loop_factory)


@pytest.mark.parametrize("drain", [True, False])
def test_15_complete_waits_for_pumps_in_flight(drain: bool, loop_factory: Any) -> None:
    async def main() -> None:
        gate = asyncio.get_running_loop().create_future()
        pump = Recorder(lambda items, slot: asyncio.shield(gate))
        mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1)
        for _ in range(2):
            gate = asyncio.get_running_loop().create_future()
            pump.batches.clear()
            mpcc.start(pump)
            mpcc.push_many(range(5), 0)
            await turns()
            completion = asyncio.ensure_future(mpcc.complete(drain=drain))
            await turns()
            assert not completion.done()
            assert pump.batches == [(0, [0, 1])]
            gate.set_result(None)
            assert await completion == ({} if drain else {0: [2, 3, 4]})
            assert pump.sizes() == ([2, 2, 1] if drain else [2])  # and D4: not one more
            with pytest.raises(ClosedError):
                mpcc.push(1, 0)  # D13
        assert mpcc.stats().left == (0 if drain else 6)

    run(main(), loop_factory)


def test_17_idle_costs_nothing() -> None:
    """No thread, no timer, no task, however many slots."""

    async def main() -> None:
        threads = threading.active_count()
        loop = asyncio.get_running_loop()
        mpcc: MPCC[Any] = MPCC(10, 5, 4, 1000)
        pump = Recorder()
        mpcc.start(pump)
        for slot in range(1000):
            mpcc.push(slot, slot)
        await asyncio.sleep(30)
        assert len(pump.items()) == 1000
        assert threading.active_count() == threads
        assert len(asyncio.all_tasks()) == 1
        assert not [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        assert not loop._ready  # type: ignore[attr-defined]
        assert mpcc.stats().wakes <= 2
        await mpcc.complete()

    run(main())


def test_18_the_batch_is_the_pumps(loop_factory: Any) -> None:
    async def main() -> None:
        kept: list[list[int]] = []

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            kept.append(items)
            if len(kept) == 2:
                items.clear()
                raise ValueError("with its list emptied")

        failed: list[Any] = []
        mpcc: MPCC[int] = MPCC(3, DAY, 1, 1, on_failure=lambda *arguments: failed.append(arguments))
        mpcc.start(pump)
        mpcc.push_many(range(9), 0)
        await mpcc.complete()
        assert kept == [[0, 1, 2], [], [6, 7, 8]]
        assert failed[0][:2] == (0, [3, 4, 5])

    run(main(), loop_factory)


def test_the_context_is_starts_own(loop_factory: Any) -> None:
    variable = contextvars.ContextVar("variable", default="nobody")

    async def main() -> None:
        seen: list[str] = []

        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
            seen.append(variable.get())
            variable.set("a pump")
            assert asyncio.current_task() is not None
            async with asyncio.timeout(5):
                await asyncio.sleep(0)

        mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1)
        variable.set("start")
        mpcc.start(pump)
        variable.set("producer")
        mpcc.push(1, 0)
        await turns()
        mpcc.push(1, 0)
        await mpcc.complete()
        assert seen == ["start", "start"]

    run(main(), loop_factory)


def test_one_wake_for_many_pushes() -> None:
    async def main() -> None:
        mpcc: MPCC[Any] = MPCC(10, DAY, 4, 8)
        mpcc.start(Recorder())
        await turns()
        for i in range(8000):
            mpcc.push(i, i % 8)
        await turns()
        assert mpcc.stats().wakes <= 1 + 8000 // 10 // 8
        before = mpcc.stats().wakes
        await mpcc.complete()
        assert before >= 1

    run(main())


def test_generic_and_repr() -> None:
    mpcc = MPCC[int](3, 1, 1, 2)
    assert repr(mpcc) == "<MultiProducerConcurrentConsumer new: 2 slots, batches of 3>"
    gc.collect()
    with pytest.raises(RuntimeError):
        mpcc.__init__(3, 1, 1, 2)  # type: ignore[misc]
