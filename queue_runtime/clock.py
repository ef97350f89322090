"""The clock that everything else is handed: the real one, and one that tests turn by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from time import monotonic as _monotonic, time as _time
from typing import Protocol, TypeVar

T = TypeVar("T")


class Timer(Protocol):
    """A pending call; ``cancel()`` takes it back and may be called more than once."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What the library asks of a clock. Seconds everywhere."""

    def time(self) -> float:
        """Return the wall-clock time in seconds since the epoch, for timestamps that others read."""
        ...

    def monotonic(self) -> float:
        """Return a time in seconds that never goes back, for durations and deadlines."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call ``callback`` on the running event loop after ``delay`` seconds."""
        ...


class SystemClock:
    """The machine's own clock. Thread-safety: ``call_later`` belongs to the event loop's thread, the rest to any."""

    __slots__ = ()

    # The functions themselves: they are asked several times for each message.
    time = staticmethod(_time)
    monotonic = staticmethod(_monotonic)

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)


class _ManualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that stands still until ``advance`` turns it: tests of locks and delays need no sleep.

    Parameters
    ----------
    start:
        The wall-clock time to begin at, in seconds since the epoch.

    Thread-safety: for one event loop's thread only.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._epoch = start
        self._now = 0.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, _ManualTimer]] = []

    def time(self) -> float:
        return self._epoch + self._now

    def monotonic(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + max(0.0, delay), next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Move on by ``seconds``, calling what falls due on the way, in order, and let woken tasks run."""
        target = self._now + seconds
        await settle_tasks()
        while self._timers and self._timers[0][0] <= target:
            due, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            if timer.callback is not None:
                timer.callback()
            await settle_tasks()
        self._now = target
        await settle_tasks()


def utc(epoch_seconds: float) -> datetime:
    """Return seconds since the epoch as an aware datetime."""
    return datetime.fromtimestamp(epoch_seconds, UTC)


async def settle_tasks(turns: int = 20) -> None:
    """Give the event loop some turns, so that tasks that were just woken get to their next wait."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def sleep(clock: Clock, delay: float) -> None:
    """Sleep ``delay`` seconds of ``clock``."""
    if delay <= 0:
        await asyncio.sleep(0)
        return
    over = asyncio.Event()
    timer = clock.call_later(delay, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()


class Late(Exception):
    """What was awaited did not come back within its time, and was cancelled."""


async def within(clock: Clock, seconds: float, call: Awaitable[T]) -> T:
    """Return what ``call`` returns; cancel it and raise Late when it takes longer than that by ``clock``.

    As ``asyncio.timeout``, which knows only the event loop's own time.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    is_late = False

    def give_up() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = clock.call_later(seconds, give_up)
    try:
        return await call
    except asyncio.CancelledError as error:
        if is_late and task.cancelling() <= cancelled_before + 1:
            raise Late from error
        raise
    finally:
        timer.cancel()
        if is_late:  # taken back also where the call ended otherwise, as if it had not been cancelled
            task.uncancel()
