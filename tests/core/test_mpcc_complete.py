"""Ends and beginnings: what the original got wrong (D1-D13), closed loops, forks, interpreter exit."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from loops import LOOPS, Recorder, run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import ClosedError, ValidationError

DAY = 86400


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns every 10 µs instead of 5 ms, so that races happen within a short test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_d1_no_timer_or_task_is_left_per_batch() -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        mpcc: MPCC[Any] = MPCC(10, 60, 1, 4)
        mpcc.start(Recorder(lambda items, slot: asyncio.sleep(0)))
        for i in range(4000):
            mpcc.push(i, i % 4)
            if i % 37 == 0:
                await turns(5)
        await turns(50)
        assert len(loop._scheduled) <= 2
        assert len(asyncio.all_tasks()) == 1
        await mpcc.complete()
        gc.collect()
        assert not [handle for handle in loop._scheduled if not handle.cancelled()]

    run(main())


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_d3_start_races_push(name: str) -> None:
    async def main() -> None:
        for _ in range(30):
            pump = Recorder()
            mpcc: MPCC[int] = MPCC(10, DAY, 4, 1)
            begun = threading.Event()

            def produce(mpcc: MPCC[int] = mpcc, begun: threading.Event = begun) -> None:
                for i in range(500):
                    mpcc.push(i, 0)
                    if i == 100:
                        begun.set()

            thread = threading.Thread(target=produce)
            thread.start()
            begun.wait()
            mpcc.start(pump)
            while len(pump.items()) < 500:  # by size alone: 500 is 50 full batches
                await asyncio.sleep(0)
            thread.join()
            assert pump.items() == list(range(500))
            await mpcc.complete()

    run(main(), LOOPS[name])


def test_d4_discard_pumps_nothing_more() -> None:
    async def main() -> None:
        pump = Recorder()
        mpcc: MPCC[int] = MPCC(2, DAY, 1, 1)
        mpcc.start(pump)
        await turns()
        mpcc.push_many(range(5), 0)
        assert await mpcc.complete(drain=False) == {0: [0, 1, 2, 3, 4]}
        await asyncio.sleep(2 * DAY)
        assert pump.batches == []

    run(main())


def test_d5_cancelled_only_when_the_time_ran_out() -> None:
    async def main() -> None:
        seen: list[bool] = []

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            seen.append(cancellation.cancelled)
            if items[0] == 4:
                told = asyncio.ensure_future(cancellation.wait())
                try:
                    await asyncio.sleep(100)
                finally:
                    seen.append(cancellation.cancelled)
                    await told

        mpcc: MPCC[int] = MPCC(2, DAY, 1, 2)
        mpcc.start(pump)
        mpcc.push_many(range(8), 0)
        mpcc.push("other", 1)
        begin = asyncio.get_running_loop().time()
        assert await mpcc.complete(timeout=7) == {0: [4, 5, 6, 7]}
        assert asyncio.get_running_loop().time() == begin + 7
        assert seen == [False, False, False, False, True] or sorted(seen) == [False] * 4 + [True]
        stats = mpcc.stats()
        assert (stats.delivered, stats.left, stats.failed) == (5, 4, 0)

    run(main())


def test_a_pump_that_finishes_in_spite_of_the_timeout() -> None:
    async def main() -> None:
        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                assert cancellation.cancelled

        mpcc: MPCC[int] = MPCC(2, DAY, 1, 1)
        mpcc.start(pump)
        mpcc.push_many(range(3), 0)
        assert await mpcc.complete(timeout=1) == {0: [2]}
        assert mpcc.stats().delivered == 2

    run(main())


def test_left_items_are_in_order() -> None:
    """Cancelled batches first, whatever order they end in, then what a retry put back, then the rest."""

    async def main() -> None:
        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(10 - items[0])

        mpcc: MPCC[int] = MPCC(2, DAY, 3, 1, retry=lambda error, attempt: 1.0)
        mpcc.start(pump)
        mpcc.push_many(range(9), 0)
        assert await mpcc.complete(timeout=1) == {0: list(range(9))}

    run(main())


@pytest.mark.parametrize("timeout", [-1, float("nan"), True, "1"])
def test_bad_timeout(timeout: Any) -> None:
    mpcc: MPCC[int] = MPCC(2, DAY, 3, 1)
    with pytest.raises(ValidationError, match="timeout"):
        run(mpcc.complete(timeout=timeout))
    mpcc.push(1, 0)  # nothing was done


@pytest.mark.usefixtures("fast_switching")
@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("overflow", ["raise", "unbounded", "block"])
def test_d6_push_races_complete(name: str, drain: bool, overflow: Any) -> None:
    """D6 and D7: every push was accepted and delivered (or returned), or raised; the drain ends while they push."""

    async def main() -> None:
        raced = 0
        room = 1 << 20 if overflow == "raise" else 64
        for _ in range(6):
            pump = Recorder(lambda items, slot: asyncio.sleep(0))
            mpcc: MPCC[Any] = MPCC(50, 0.001, 2, 2, overflow=overflow, slot_capacity=room)
            mpcc.start(pump)
            accepted: list[list[Any]] = [[], []]
            refused = [0, 0]
            ready = threading.Barrier(3)

            def produce(
                me: int, mpcc: Any = mpcc, accepted: Any = accepted, refused: Any = refused, ready: Any = ready
            ) -> None:
                ready.wait()
                for i in range(1 << 20):
                    try:
                        mpcc.push((me, i), me)
                    except ClosedError:
                        refused[me] += 1
                        if refused[me] > 3:
                            return
                    else:
                        assert not refused[me]
                        accepted[me].append((me, i))

            threads = [threading.Thread(target=produce, args=(me,)) for me in range(2)]
            for thread in threads:
                thread.start()
            await asyncio.to_thread(ready.wait)
            await asyncio.sleep(0.002)
            left = await mpcc.complete(drain=drain)
            for thread in threads:
                await asyncio.to_thread(thread.join)
            raced += min(refused) > 0  # every producer was still at it when complete came
            for me in range(2):
                assert pump.items(me) + left.get(me, []) == accepted[me]
            if drain:
                assert left == {}
        assert raced == 6

    run(main(), LOOPS[name])


def test_d9_a_slow_slot_blocks_no_other() -> None:
    async def main() -> None:
        gate = asyncio.get_running_loop().create_future()
        pump = Recorder(lambda items, slot: gate if slot == 0 else asyncio.sleep(0))
        mpcc: MPCC[int] = MPCC(2, 1, 1, 2)
        mpcc.start(pump)
        for i in range(20):
            mpcc.push(i, 0)
            mpcc.push(i, 1)
            await turns(5)
        assert pump.items(0) == [0, 1]
        assert pump.items(1) == list(range(20))
        gate.set_result(None)
        await mpcc.complete()

    run(main())


def test_d10_leftovers_do_not_wait_for_a_push() -> None:
    async def main() -> None:
        gates = [asyncio.get_running_loop().create_future() for _ in range(5)]
        pump = Recorder(lambda items, slot: gates[items[0] // 10])
        mpcc: MPCC[int] = MPCC(10, DAY, 1, 1)
        mpcc.start(pump)
        mpcc.push_many(range(50), 0)
        for i, gate in enumerate(gates):
            await turns()
            assert len(pump.batches) == i + 1
            gate.set_result(None)
        await turns()
        assert mpcc.stats().waiting == 0
        await mpcc.complete()

    run(main())


def test_d11_overdue_items_go_when_a_pump_ends() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        begun: list[float] = []

        async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
            begun.append(loop.time() - begin)
            await asyncio.sleep(25)

        mpcc: MPCC[int] = MPCC(10, 10, 1, 1)
        mpcc.start(pump)
        mpcc.push(0, 0)
        await asyncio.sleep(11)
        mpcc.push(1, 0)
        await asyncio.sleep(50)
        assert begun == [10, 35]
        await mpcc.complete()

    run(main())


def test_d12_slots_are_bounded_each() -> None:
    mpcc: MPCC[int] = MPCC(10, 1, 1, 2, slot_capacity=10)
    mpcc.push_many(range(10), 0)
    mpcc.push_many(range(10), 1)
    assert mpcc.stats(0).waiting == mpcc.stats(1).waiting == 10


def test_concurrent_completes_share_one_end() -> None:
    async def main() -> None:
        mpcc: MPCC[int] = MPCC(2, DAY, 1, 1)
        mpcc.start(Recorder(lambda items, slot: asyncio.sleep(3)))
        mpcc.push_many(range(7), 0)
        await turns()
        cancelled = asyncio.ensure_future(mpcc.complete())
        await turns()
        cancelled.cancel()
        answers = await asyncio.gather(mpcc.complete(), mpcc.complete(timeout=4), mpcc.complete())
        assert answers == [{0: [2, 3, 4, 5, 6]}] * 3
        assert answers[0] is not answers[1]
        assert await mpcc.complete() == {}

    run(main())


def test_a_closed_loop_and_a_new_one() -> None:
    """A push that has to call the closed loop raises; nothing is lost, batches in flight included."""
    mpcc: MPCC[Any] = MPCC(2, DAY, 1, 2)
    pump = Recorder(lambda items, slot: asyncio.sleep(DAY))

    async def first() -> None:
        mpcc.start(pump)
        await turns()
        mpcc.push_many([0, 1, 2], 0)
        await turns()

    loop = asyncio.SelectorEventLoop()
    loop.run_until_complete(first())
    with pytest.raises(RuntimeError, match="another event loop"):
        run(mpcc.complete())
    pending = asyncio.all_tasks(loop)
    loop.close()
    for task in pending:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    with pytest.raises(ClosedError, match="loop of this consumer is closed"):
        mpcc.push("called", 1)
    mpcc.push(3, 0)  # its pump runs, so far as anybody knows, and will come back to it
    again = Recorder()

    async def second() -> None:
        assert await mpcc.complete() == {0: [0, 1, 2, 3], 1: ["called"]}
        mpcc.start(again)
        mpcc.push(99, 0)
        assert await mpcc.complete() == {}

    run(second())
    assert again.items() == [99]


def test_after_a_fork_the_child_cannot_use_it() -> None:
    mpcc: MPCC[int] = MPCC(2, DAY, 1, 1, overflow="unbounded")
    mpcc.push(1, 0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (lambda: mpcc.push(2, 0), lambda: mpcc.push_many([2], 0), lambda: run(mpcc.complete())):
                with pytest.raises(ClosedError, match="fork"):
                    call()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    mpcc.push(2, 0)
    assert run(mpcc.complete()) == {0: [1, 2]}


EXITS = {
    "never started": "",
    "loop closed with pumps in flight": "asyncio.run(main())",
    "loop stopped": "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); loop.close()",
    "in a cycle": "mpcc.push(mpcc, 0); import builtins; builtins.kept = mpcc",
    "a thread blocked": "threading.Thread(target=fill, daemon=True).start(); time.sleep(0.05)",
}


@pytest.mark.parametrize("how", EXITS)
def test_exit_with_full_slots(how: str) -> None:
    code = f"""
import asyncio, threading, time
from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
mpcc = MPCC(10, 3600, 2, 2, overflow="block", slot_capacity=100)
async def pump(items, slot, state, cancellation):
    pass
async def main():
    mpcc.start(pump)
    for i in range(5): mpcc.push(object(), 0)
    await asyncio.sleep(0.01)
def fill():
    while True: mpcc.push(object(), 1)
for i in range(95): mpcc.push(object(), 0)
{EXITS[how]}
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
