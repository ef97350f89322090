"""The clocks: the machine's, and the one that tests turn by hand."""

import asyncio
import time

import pytest

from queue_runtime.clock import ManualClock, SystemClock, settle_tasks, sleep


def test_the_manual_clock_stands_still() -> None:
    clock = ManualClock(start=1000.0)
    assert (clock.time(), clock.monotonic()) == (1000.0, 0.0)
    assert (clock.time(), clock.monotonic()) == (1000.0, 0.0)


async def test_both_times_move_together() -> None:
    clock = ManualClock(start=1000.0)
    await clock.advance(2.5)
    assert (clock.time(), clock.monotonic()) == (1002.5, 2.5)
    await clock.advance(0)
    assert clock.monotonic() == 2.5


async def test_timers_fire_in_order_at_their_time() -> None:
    """Those of the same time in the order in which they were set; one that is set on the way fires on the way."""
    clock = ManualClock()
    fired: list[tuple[str, float]] = []

    def note(name: str) -> None:
        fired.append((name, clock.monotonic()))

    def chain() -> None:
        note("chain")
        clock.call_later(1.0, lambda: note("chained"))

    clock.call_later(3.0, lambda: note("late"))
    clock.call_later(1.0, chain)
    clock.call_later(1.0, lambda: note("second"))
    clock.call_later(-5.0, lambda: note("at once"))
    clock.call_later(9.0, lambda: note("never"))
    assert fired == []
    await clock.advance(4.0)
    assert fired == [("at once", 0.0), ("chain", 1.0), ("second", 1.0), ("chained", 2.0), ("late", 3.0)]
    assert clock.monotonic() == 4.0


async def test_a_cancelled_timer_does_not_fire() -> None:
    clock = ManualClock()
    fired: list[int] = []
    timer = clock.call_later(1.0, lambda: fired.append(1))
    other = clock.call_later(1.0, lambda: fired.append(2))
    timer.cancel()
    timer.cancel()
    await clock.advance(2.0)
    other.cancel()
    assert fired == [2]


async def test_woken_tasks_run_before_time_moves_on() -> None:
    clock = ManualClock()
    seen: list[float] = []

    async def work() -> None:
        for _ in range(3):
            await sleep(clock, 1.0)
            seen.append(clock.monotonic())

    task = asyncio.create_task(work())
    await clock.advance(10.0)
    assert seen == [1.0, 2.0, 3.0]
    assert task.done()


async def test_sleep_ends_early_only_when_cancelled() -> None:
    clock = ManualClock()
    task = asyncio.create_task(sleep(clock, 5.0))
    await clock.advance(4.9)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await clock.advance(1.0)
    await sleep(clock, 0.0)
    await sleep(clock, -1.0)


@pytest.mark.both_loops
async def test_the_system_clock() -> None:
    clock = SystemClock()
    assert abs(clock.time() - time.time()) < 1.0
    assert abs(clock.monotonic() - time.monotonic()) < 1.0
    fired = asyncio.Event()
    cancelled = clock.call_later(0.0, pytest.fail)
    cancelled.cancel()
    started = clock.monotonic()
    clock.call_later(0.02, fired.set)
    await asyncio.wait_for(fired.wait(), 5)
    await sleep(clock, 0.01)
    assert clock.monotonic() - started > 0.025


async def test_settle_tasks_lets_a_chain_of_wakes_finish() -> None:
    reached = []

    async def step(depth: int) -> None:
        await asyncio.sleep(0)
        reached.append(depth)
        if depth:
            await asyncio.create_task(step(depth - 1))

    task = asyncio.create_task(step(5))
    await settle_tasks()
    assert reached == [5, 4, 3, 2, 1, 0]
    assert task.done()
