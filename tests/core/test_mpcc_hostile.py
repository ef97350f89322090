"""What others do wrong: interrupts at the worst moment, answers that change, objects half made, ties that break."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from loops import JumpingLoop, Recorder, run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import AlreadyStartedError, BatchError, SlotOutOfRangeError, ValidationError

DAY = 86400


class InterruptedLoop(JumpingLoop):
    """Raises KeyboardInterrupt once, as a signal's handler does, on the `count`-th entry to one of its methods."""

    method = ""
    count = 0
    before: Callable[[], None] | None = None

    def interrupt(self, method: str, count: int = 1) -> None:
        self.method, self.count = method, count

    def _enter(self, method: str) -> None:
        if method == self.method:
            self.count -= 1
            if self.count == 0:
                self.method = ""
                raise KeyboardInterrupt

    def time(self) -> float:
        self._enter("time")
        return super().time()

    def call_soon(self, *arguments: Any, **options: Any) -> Any:
        self._enter("call_soon")
        if self.before is not None:
            self.before()
        return super().call_soon(*arguments, **options)

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> Any:
        self._enter("call_soon_threadsafe")
        return super().call_soon_threadsafe(*arguments, **options)


@pytest.fixture
def loop() -> Iterator[InterruptedLoop]:
    loop = InterruptedLoop()
    yield loop
    loop.close()
    gc.collect()  # asyncio logs what became of interrupted tasks, and pytest catches the log


def go_on(loop: InterruptedLoop, seconds: float = 5) -> None:
    """Without a task of its own, which an interrupt might hit."""
    stop = loop.call_later(seconds, loop.stop)
    try:
        loop.run_forever()
    finally:
        stop.cancel()


async def started(mpcc: MPCC[Any], pump: Any) -> None:
    mpcc.start(pump)
    await turns()


@pytest.mark.parametrize("method", ["time", "call_soon", "call_soon_threadsafe"])
def test_an_interrupted_push_still_wakes_the_loop(loop: InterruptedLoop, method: str) -> None:
    """Only one push reaches the watermark: were its wake lost, the slot would sleep for ever."""
    pump = Recorder()
    mpcc: MPCC[int] = MPCC(2, 1, 1, 2)
    loop.run_until_complete(started(mpcc, pump))
    caught: list[bool] = []

    def push() -> None:
        loop.interrupt(method)
        try:
            mpcc.push(1, 0)
        except KeyboardInterrupt:
            caught.append(True)

    if method == "call_soon_threadsafe":
        thread = threading.Thread(target=push)
        thread.start()
        thread.join()
    else:
        push()
    assert caught
    mpcc.push(2, 0)
    mpcc.push(3, 1)
    go_on(loop)
    assert pump.items(0) == [1, 2]
    assert pump.items(1) == [3]
    assert loop.run_until_complete(mpcc.complete()) == {}


@pytest.mark.parametrize("count", range(1, 7))
def test_an_interrupted_loop_goes_on_with_every_slot(
    loop: InterruptedLoop, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever in its turn the interrupt comes: nothing is lost, and the other slots are not forgotten."""

    async def answer(items: list[Any], slot: int) -> None:
        if sys.version_info >= (3, 12):  # an eager task calls nobody before its pump first waits
            await asyncio.sleep(0)

    failed: list[int] = []
    pump = Recorder(answer)
    mpcc: MPCC[int] = MPCC(2, 1, 1, 3, on_failure=lambda slot, items, errors: failed.extend(items))
    loop.run_until_complete(started(mpcc, pump))
    for number in range(3):
        mpcc.push_many(range(5), number)
    loop.interrupt("call_soon", count)
    try:
        go_on(loop)
    except KeyboardInterrupt:
        assert loop.method == ""
    else:  # CPython 3.12 and 3.13 make a SystemError of what interrupts an eager start, and the loop logs that
        assert sys.version_info >= (3, 12)
        assert "SystemError" in caplog.text
    go_on(loop)
    assert [pump.items(number) for number in range(3)] == [[0, 1, 2, 3, 4]] * 3
    stats = mpcc.stats()
    assert (stats.delivered + len(failed), stats.waiting, stats.in_flight, stats.pumps) == (15, 0, 0, 0)
    assert len(failed) in ((0,) if sys.version_info < (3, 12) else (0, 1, 2))  # of a pump that had begun
    assert pump.running == dict.fromkeys(range(3), 0)
    assert loop.run_until_complete(mpcc.complete()) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["pump", "on_failure", "retry"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_that_wants_out_loses_nothing(
    loop: InterruptedLoop, where: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves the loop, as everywhere in asyncio; every item has its outcome, and every slot goes on after it."""
    got: list[tuple[int, int]] = []

    async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
        got.extend((slot, item) for item in items)
        if slot == 0 and 3 in items:
            raise error if where == "pump" else KeyError

    def on_failure(slot: int, items: list[int], errors: list[BaseException]) -> None:
        failed.extend(items)
        if where == "on_failure":
            raise error

    def retry(exception: BaseException, attempt: int) -> None:
        if where == "retry":
            raise error

    failed: list[int] = []
    mpcc: MPCC[int] = MPCC(2, 1, 1, 3, on_failure=on_failure, retry=retry)
    loop.run_until_complete(started(mpcc, pump))
    for number in range(3):
        mpcc.push_many(range(6), number)
    with pytest.raises(error):
        go_on(loop)
    go_on(loop)
    assert failed == [2, 3]
    assert sorted(got) == [(slot, item) for slot in range(3) for item in range(6)]
    stats = mpcc.stats()
    assert (stats.delivered, stats.failed, stats.waiting, stats.in_flight) == (16, 2, 0, 0)
    assert loop.run_until_complete(mpcc.complete()) == {}


def test_an_answer_that_changes_while_it_is_read() -> None:
    """A pump may keep the list that it returned: outcomes are of the moment when it returned."""
    answer: list[Any] = [KeyError(), *range(1, 40)]

    def retry(exception: BaseException, attempt: int) -> None:
        answer.clear()

    async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> list[Any]:
        return answer

    async def main() -> list[Any]:
        mpcc: MPCC[int] = MPCC(40, 1, 1, 1, retry=retry)
        mpcc.start(pump)
        waiting = [mpcc.push_and_wait(number, 0) for number in range(40)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        await mpcc.complete()
        return outcomes

    first, *others = run(main())
    assert isinstance(first, KeyError)
    assert others == list(range(1, 40))


def test_an_answer_that_cannot_be_read_fails_its_batch() -> None:
    class HalfMade(BatchError):
        def __init__(self) -> None:
            """Forgets the failures."""

    async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
        if items == [1]:
            raise HalfMade

    async def main() -> None:
        mpcc: MPCC[int] = MPCC(1, 1, 1, 1)
        mpcc.start(pump)
        with pytest.raises(AttributeError, match="failures"):
            await mpcc.push_and_wait(1, 0)
        await mpcc.push_and_wait(2, 0)
        assert await mpcc.complete() == {}

    run(main())


def test_what_overflowed_before_the_start_keeps_its_place(loop: InterruptedLoop) -> None:
    """Order: a push, from another thread, say, must not take the room that the first batch leaves behind."""

    async def answer(items: list[Any], slot: int) -> None:
        await asyncio.sleep(0)

    pump = Recorder(answer)
    mpcc: MPCC[int] = MPCC(2, 1, 1, 1, overflow="unbounded", slot_capacity=2)
    mpcc.push_many([0, 1], 0)
    mpcc.push_many([2, 3, 4], 0)

    def push() -> None:
        if mpcc.stats().in_flight:
            loop.before = None
            mpcc.push(5, 0)

    async def main() -> None:
        mpcc.start(pump)
        loop.before = push
        await asyncio.sleep(5)
        await mpcc.complete()

    loop.run_until_complete(main())
    assert loop.before is None
    assert pump.items() == [0, 1, 2, 3, 4, 5]


def test_a_pump_that_pushes_at_once_comes_after_what_overflowed() -> None:
    got: list[int] = []

    async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
        if not got:
            mpcc.push(5, 0)
        got.extend(items)

    mpcc: MPCC[int] = MPCC(2, 1, 1, 1, overflow="unbounded", slot_capacity=2)

    async def main() -> None:
        mpcc.push_many([0, 1], 0)
        mpcc.push_many([2, 3, 4], 0)
        mpcc.start(pump)
        await asyncio.sleep(5)
        await mpcc.complete()

    run(main())
    assert got == [0, 1, 2, 3, 4, 5]


def test_a_task_of_a_pump_can_be_stepped_by_others() -> None:
    """Whoever plays with the coroutine of a pump's task gets an exception, and harms nobody else."""
    errors: list[type[BaseException]] = []

    async def pump(items: list[int], slot: int, state: Any, cancellation: Any) -> None:
        await asyncio.sleep(1)

    async def main() -> None:
        mpcc: MPCC[int] = MPCC(1, 1, 2, 1)
        mpcc.start(pump)
        mpcc.push_many([1, 2], 0)
        while mpcc.stats().pumps < 2:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            coroutine: Any = task.get_coro()
            for throw in (lambda: coroutine.throw(), lambda: coroutine.throw(KeyError("thrown"))):  # noqa: B023
                try:
                    throw()
                except BaseException as error:
                    errors.append(type(error))
            for _ in range(2):
                with pytest.raises(StopIteration):
                    coroutine.send(None)
        await turns()
        assert mpcc.stats().in_flight == 0
        assert await mpcc.complete() == {}

    run(main())
    assert errors == [TypeError, StopIteration] * 2


def test_one_that_was_never_made() -> None:
    bare: MPCC[int] = MPCC.__new__(MPCC)
    assert "new" in repr(bare)
    assert bare.stats().pushed == 0

    async def nothing(*arguments: Any) -> None: ...

    async def main() -> None:
        for push in (bare.push, bare.submit):
            with pytest.raises(SlotOutOfRangeError):
                push(1, 0)
        with pytest.raises(SlotOutOfRangeError):
            bare.push_many([1], 0)
        with pytest.raises(SlotOutOfRangeError):
            await bare.push_wait(1, 0)
        with pytest.raises(RuntimeError, match="__init__"):
            bare.start(nothing)
        with pytest.raises(RuntimeError, match="__init__"):
            await bare.complete()
        with pytest.raises(ValidationError):
            bare.__init__(0, 1, 1, 1)  # type: ignore[misc]
        with pytest.raises(RuntimeError, match="__init__"):
            await bare.complete()
        bare.__init__(1, 1, 1, 1)  # type: ignore[misc]
        bare.push(1, 0)
        assert await bare.complete() == {0: [1]}

    run(main())


def test_equal_ones_are_still_two() -> None:
    """A subclass may define equality, and so have no hash; after a fork each of two equal ones is the parent's."""

    class Alike(MPCC[int]):
        def __eq__(self, other: object) -> bool:
            return True

    pair = [Alike(1, 1, 1, 1), Alike(1, 1, 1, 1)]
    child = os.fork()
    if child == 0:
        refused = 0
        for each in pair:
            try:
                each.push(1, 0)
            except Exception as error:
                refused += "fork" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


@pytest.mark.parametrize("huge", [10**5000, -(10**5000)], ids=["positive", "negative"])
def test_numbers_too_long_to_print(huge: int) -> None:
    with pytest.raises(ValueError, match="digits"):
        str(huge)
    for arguments in ((huge, 1, 1, 1), (1, huge, 1, 1), (1, 1, huge, 1), (1, 1, 1, huge)):
        with pytest.raises(ValidationError):
            MPCC(*arguments)
    with pytest.raises(SlotOutOfRangeError):
        MPCC[int](1, 1, 1, 1).push(1, huge)


def test_a_wake_that_its_old_loop_never_answered_holds_up_no_new_one() -> None:
    """A producer that fell behind may ring on a loop that has ended; the next start begins with a silent bell."""
    pump = Recorder()
    mpcc: MPCC[int] = MPCC(2, 1, 1, 1)
    loop = InterruptedLoop()
    loop.run_until_complete(started(mpcc, pump))
    reached, go = threading.Event(), threading.Event()

    class Slow(InterruptedLoop):
        """Never runs; only its class is borrowed, for a producer that stands still on its way to the loop."""

        def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> Any:
            reached.set()
            assert go.wait(10)
            return super().call_soon_threadsafe(*arguments, **options)

    loop.__class__ = Slow
    producer = threading.Thread(target=mpcc.push, args=(1, 0))
    producer.start()
    assert reached.wait(10)
    assert loop.run_until_complete(mpcc.complete()) == {}
    go.set()
    producer.join()
    loop.close()
    assert pump.items() == [1]

    async def main() -> None:
        mpcc.start(pump)
        await turns()
        mpcc.push(2, 0)
        await asyncio.sleep(5)
        assert pump.items() == [1, 2]
        await mpcc.complete()

    run(main())


def test_a_wake_of_an_old_loop_is_not_answered_there() -> None:
    pump = Recorder()
    mpcc: MPCC[int] = MPCC(1, 1, 1, 1)
    old, new = JumpingLoop(), JumpingLoop()
    old.run_until_complete(started(mpcc, pump))
    late: list[Callable[[], Any]] = []
    schedule = old.call_soon
    old.call_soon = lambda *call, **options: late.append(lambda: schedule(*call, **options))  # type: ignore[assignment, func-returns-value, misc]
    mpcc.push(1, 0)  # its wake is held up ...
    old.call_soon = schedule  # type: ignore[method-assign]
    assert old.run_until_complete(mpcc.complete()) == {}
    new.run_until_complete(started(mpcc, pump))
    mpcc.push(2, 0)
    for call in late:  # ... until the consumer has moved to another loop
        call()
    old.run_until_complete(turns())
    assert pump.items() == [1]
    assert mpcc.stats().pumps == 0
    new.run_until_complete(turns())
    assert pump.items() == [1, 2]
    new.run_until_complete(mpcc.complete())
    old.close()
    new.close()


def test_a_completion_inside_the_end_of_another() -> None:
    """The end calls the loop's code, and there a finalizer may run that steps a complete() of its own."""
    left: list[Any] = []

    class Nosy(asyncio.TimerHandle):
        __slots__ = ()

        def cancel(self) -> None:
            if not left:
                left.append(None)
                with pytest.raises(StopIteration) as stop:
                    mpcc.complete().send(None)
                left.append(stop.value.value)
            super().cancel()

    class NosyLoop(JumpingLoop):
        def call_at(self, *arguments: Any, **options: Any) -> Any:
            timer = super().call_at(*arguments, **options)
            timer.__class__ = Nosy
            return timer

    pump = Recorder()
    mpcc: MPCC[int] = MPCC(2, DAY, 1, 1)

    async def main() -> Any:
        mpcc.start(pump)
        mpcc.push(1, 0)
        await turns()
        return await asyncio.wait_for(mpcc.complete(), 5)

    assert run(main(), NosyLoop) == {}
    assert left == [None, {}]
    assert pump.items() == [1]


@pytest.mark.parametrize("what", ["complete", "start"])
def test_a_start_during_which_others_call(what: str) -> None:
    """It asks the loop for the time, and there a finalizer may run that completes, or starts."""
    mpcc: MPCC[int] = MPCC(1, DAY, 1, 1)
    inner, outer = Recorder(), Recorder()

    class NosyLoop(JumpingLoop):
        asked = False

        def time(self) -> float:
            if self.asked:
                self.asked = False
                if what == "start":
                    mpcc.start(inner)
                else:
                    with pytest.raises(StopIteration):
                        mpcc.complete().send(None)
            return super().time()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, NosyLoop)
        loop.asked = True
        if what == "start":
            with pytest.raises(AlreadyStartedError):
                mpcc.start(outer)
        else:
            mpcc.start(outer)
        assert not loop.asked
        mpcc.push(1, 0)
        await turns()
        assert (inner if what == "start" else outer).items() == [1]
        assert await asyncio.wait_for(mpcc.complete(), 5) == {}

    run(main(), NosyLoop)


def test_intervals_at_the_ends_of_what_a_float_holds() -> None:
    pump = Recorder()

    async def main() -> None:
        for interval in (5e-324, sys.float_info.max, timedelta.max, 10**300):
            mpcc: MPCC[int] = MPCC(2, interval, 1, 1)
            mpcc.start(pump)
            mpcc.push(1, 0)
            await turns()
            await mpcc.complete(timeout=interval)

    run(main())
    assert pump.items() == [1] * 4
