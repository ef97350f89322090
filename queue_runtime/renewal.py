"""Keeps the locks of received messages and held sessions alive [C21, C27].

The clients of one event loop and clock share a scheduler: a heap of receivers by the time of their next renewal, one
timer, and one call for all locks of a receiver that are due. A lock is watched from the moment its message was
received, so a message that waits in a local buffer is covered like one in a handler.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from queue_runtime.clock import Clock, SystemClock, Timer
from queue_runtime.errors import QueueRuntimeError, QueueTimeoutError, SessionLockLostError
from queue_runtime.message import Receipt
from queue_runtime.providers.base import Receiver, SessionReceiver

logger = logging.getLogger("queue_runtime.renewal")

T = TypeVar("T")

RENEW_AFTER = 0.5
"""The share of a lock's duration after which it is renewed: early enough to try again before it ends."""
TOGETHER = 0.1
"""Locks that fall due within this share of the lock's duration are renewed in the same call."""
SPREAD = TOGETHER
"""The share of a session lock's duration over which first renewals are spread: sessions that were taken at the same
time, or that fell due together while the loop was blocked, would ask the service at the same moment ever after.
Not more than TOGETHER, so that the first messages of a session are still renewed with it."""
LONGEST_CALL = 0.2
"""The share of the lock's duration after which a renewal that has not come back is given up and tried again."""

SAME = 0.005
"""Messages received within this share of the lock's duration are treated as received together with the first."""
MOST_STALE = 64
"""Entries of the heap that are valid no more and stay in it, beside two for each receiver."""

LostCallback = Callable[[int, Sequence[Receipt], QueueRuntimeError | None], None]
"""Told (receiver_id, receipts, error) when locks were lost; without an error, they were renewed for long enough."""


@dataclass(slots=True)
class _Term:
    """When the locks of one delivery, or of a session, are renewed next, and when that ends for good.

    By the monotonic clock: the ends that a service tells are by its own wall clock.
    """

    renew_at: float
    ends_at: float
    """The end of the locks as they are."""
    give_up_at: float
    is_last: bool = False


@dataclass(slots=True, eq=False)
class _Watch:
    """What is watched of one receiver."""

    renewer: LockRenewer
    receiver: Receiver
    lock_duration: float
    held: dict[Receipt, _Term] = field(default_factory=dict)
    session: SessionReceiver | None = None
    session_term: _Term | None = None
    latest: _Term | None = None
    latest_until: float = 0.0
    """Until when what is received shares the latest term."""
    due: float | None = None
    """The time of its valid entry in the heap, None when it has none."""
    task: asyncio.Task[None] | None = None
    is_overdue: bool = False
    """Whether the task's call is being given up."""

    @property
    def shortest(self) -> float:
        """The duration of its shortest lock, in seconds."""
        if self.session is None:
            return self.lock_duration
        return min(self.lock_duration, self.session.session_lock_duration)


class _Scheduler:
    """What the renewers of one event loop and clock share.

    Thread-safety: for the event loop's thread only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.loop = loop
        self.clock = clock
        self.renewers: set[LockRenewer] = set()
        self._heap: list[tuple[float, int, _Watch]] = []
        self._order = itertools.count()
        self._timer: Timer | None = None
        self._timer_due = 0.0

    def schedule(self, watch: _Watch, due: float) -> None:
        """Have the watch's renewer called at that time, and not at an earlier one that was told before."""
        watch.due = due
        heapq.heappush(self._heap, (due, next(self._order), watch))
        if self._timer is None or due < self._timer_due:
            self.arm()

    def arm(self) -> None:
        """See that the timer stands at the first valid entry, and that there is none without one."""
        heap = self._heap
        while heap and heap[0][2].due != heap[0][0]:
            heapq.heappop(heap)
        if self._timer is not None:
            if heap and heap[0][0] == self._timer_due:
                return
            self._timer.cancel()
            self._timer = None
        if heap:
            self._timer_due = heap[0][0]
            self._timer = self.clock.call_later(max(0.0, self._timer_due - self.clock.monotonic()), self._tick)

    def dropped(self) -> None:
        """A watch was dropped: keep the heap in proportion to those that are left."""
        if len(self._heap) > MOST_STALE:
            watched = sum(len(renewer.watches) for renewer in self.renewers)
            if len(self._heap) > 2 * watched + MOST_STALE:
                self._heap = [entry for entry in self._heap if entry[2].due == entry[0]]
                heapq.heapify(self._heap)

    def leave(self, renewer: LockRenewer) -> None:
        """Forget a renewer that has dropped all of its watches."""
        self.renewers.discard(renewer)
        self.arm()

    def _tick(self) -> None:
        self._timer = None
        now = self.clock.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, _, watch = heapq.heappop(self._heap)
            if watch.due == due:
                watch.due = None
                watch.renewer.due(watch)
        self.arm()


_schedulers: weakref.WeakValueDictionary[tuple[int, int], _Scheduler] = weakref.WeakValueDictionary()
"""By the ids of the loop and of the clock; a scheduler keeps both alive, so that no id is taken again before."""


def _scheduler_for(clock: Clock) -> _Scheduler:
    """Return the scheduler of the running loop; every SystemClock is the same clock."""
    loop = asyncio.get_running_loop()
    key = (id(loop), 0 if type(clock) is SystemClock else id(clock))
    scheduler = _schedulers.get(key)
    if scheduler is None:
        scheduler = _schedulers[key] = _Scheduler(loop, clock)
    return scheduler


class LockRenewer:
    """Renews the locks of one client until their messages are settled, up to a longest time.

    Parameters
    ----------
    clock:
        Where times and timers come from.
    max_renewal:
        Seconds from the receipt of a message after which its lock is renewed no more.
    on_lost:
        Called when a lock was lost. It must not raise.
    is_settling:
        Whether a settlement of this receipt is under way. What its renewal comes to then says nothing: a lock that
        is gone may have gone with its message.

    Thread-safety: for the event loop's thread only.
    """

    def __init__(
        self,
        clock: Clock,
        max_renewal: float,
        on_lost: LostCallback,
        *,
        is_settling: Callable[[Receipt], bool] | None = None,
    ) -> None:
        self._clock = clock
        self._max_renewal = max_renewal
        self._on_lost = on_lost
        self._is_settling = is_settling or _is_not_settling
        self.watches: dict[int, _Watch] = {}
        self._scheduler: _Scheduler | None = None
        self._closed = False

    def watch(self, receiver: Receiver, receipts: Sequence[Receipt]) -> None:
        """Renew the locks of these receipts from now on."""
        watch = self.watches.get(receiver.id)
        if watch is None:
            watch = self._begin(_Watch(self, receiver, receiver.lock_duration))
        now = self._clock.monotonic()
        term = watch.latest
        if term is None or now >= watch.latest_until:
            term = watch.latest = _term(watch.lock_duration, now, now + self._max_renewal)
            watch.latest_until = now + watch.lock_duration * SAME
        held = watch.held
        for receipt in receipts:
            held[receipt] = term
        if watch.task is None and (watch.due is None or term.renew_at < watch.due):
            self._schedule(watch, term.renew_at)

    def watch_session(self, receiver: SessionReceiver) -> None:
        """Renew the lock of this session until it is dropped."""
        watch = self._begin(_Watch(self, receiver, receiver.lock_duration, session=receiver))
        term = watch.session_term = _session_term(receiver, self._clock.monotonic(), spread=True)
        self._schedule(watch, term.renew_at)

    def forget(self, receiver_id: int, receipts: Sequence[Receipt]) -> None:
        """Renew these no more: they are settled."""
        watch = self.watches.get(receiver_id)
        if watch is not None:
            for receipt in receipts:
                watch.held.pop(receipt, None)

    def drop(self, receiver_id: int) -> None:
        """Renew nothing of this receiver any more: it is closed."""
        watch = self.watches.pop(receiver_id, None)
        if watch is not None:
            watch.due = None
            watch.is_overdue = False
            if watch.task is not None:
                watch.task.cancel()
            if self._scheduler is not None:
                self._scheduler.dropped()

    async def close(self) -> None:
        """Stop all renewal, for good."""
        self._closed = True
        tasks = [watch.task for watch in self.watches.values() if watch.task is not None]
        for receiver_id in list(self.watches):
            self.drop(receiver_id)
        if self._scheduler is not None:
            self._scheduler.leave(self)
            self._scheduler = None
        await asyncio.gather(*tasks, return_exceptions=True)

    def due(self, watch: _Watch) -> None:
        """For the scheduler: the time that was asked for has come."""
        if watch.task is not None:
            watch.is_overdue = True
            watch.task.cancel()
        elif watch.held or watch.session is not None:
            watch.task = asyncio.get_running_loop().create_task(self._renew(watch))
        else:
            return
        self._schedule(watch, self._clock.monotonic() + watch.shortest * LONGEST_CALL)

    def _begin(self, watch: _Watch) -> _Watch:
        self.watches[watch.receiver.id] = watch
        if not self._closed and (self._scheduler is None or self._scheduler.loop.is_closed()):
            self._scheduler = _scheduler_for(self._clock)
            self._scheduler.renewers.add(self)
        return watch

    def _schedule(self, watch: _Watch, due: float) -> None:
        if self._scheduler is not None:
            self._scheduler.schedule(watch, due)

    async def _renew(self, watch: _Watch) -> None:
        pause = 0.001
        try:
            session, term = watch.session, watch.session_term
            if session is not None and term is not None and not await self._renew_session(watch, session, term):
                return
            await self._renew_messages(watch)
        except Exception:
            # An adapter that breaks its contract must not end renewal for good, nor be called all the time.
            logger.exception("renewal failed unexpectedly, queue=%s", watch.receiver.queue_name)
            pause = watch.lock_duration * TOGETHER
        finally:
            watch.task = None
            watch.due = None
            if self.watches.get(watch.receiver.id) is watch and self._scheduler is not None:
                times = [term.renew_at for term in watch.held.values()]
                if watch.session_term is not None:
                    times.append(watch.session_term.renew_at)
                if times:
                    self._scheduler.schedule(watch, max(min(times), self._clock.monotonic() + pause))
                self._scheduler.arm()  # no longer for the end of the call

    async def _renew_session(self, watch: _Watch, session: SessionReceiver, term: _Term) -> bool:
        """Renew the session lock when it is due; say whether the session is still held."""
        duration = session.session_lock_duration
        began = self._clock.monotonic()
        if term.renew_at > began + duration * TOGETHER:
            return True
        try:
            await self._in_time(watch, session.renew_session())
        except QueueRuntimeError as error:
            now = self._clock.monotonic()
            if error.is_transient and now < term.ends_at:
                watch.session_term = _next_attempt(term, now, duration)
                return True
            receipts = list(watch.held)
            watch.task = None  # this very task: drop must not cancel it
            self.drop(session.id)
            lost = error if isinstance(error, SessionLockLostError) else SessionLockLostError(session.session_id)
            self._on_lost(session.id, receipts, lost)
            return False
        is_late = began > term.renew_at + duration * TOGETHER
        watch.session_term = _session_term(session, self._clock.monotonic(), spread=is_late)
        return True

    async def _renew_messages(self, watch: _Watch) -> None:
        duration = watch.lock_duration
        now = self._clock.monotonic()
        horizon = now + duration * TOGETHER
        over = [receipt for receipt, term in watch.held.items() if term.is_last and term.renew_at <= now]
        due = [receipt for receipt, term in watch.held.items() if not term.is_last and term.renew_at <= horizon]
        if over:
            self._lose(watch, over, None)
        if not due:
            return
        try:
            outcomes = list(await self._in_time(watch, watch.receiver.renew(due)))
        except QueueRuntimeError as error:
            outcomes = [error] * len(due)
        after = self._clock.monotonic()
        renewed: dict[float, _Term] = {}  # messages of one delivery go on sharing their term
        for receipt, outcome in zip(due, outcomes, strict=True):
            term = watch.held.get(receipt)
            if term is None:  # settled while its renewal was under way
                continue
            if not isinstance(outcome, QueueRuntimeError):
                again = renewed.get(term.give_up_at)
                if again is None:
                    again = renewed[term.give_up_at] = _term(duration, after, term.give_up_at)
                watch.held[receipt] = again
            elif outcome.is_transient and after < term.ends_at:
                watch.held[receipt] = _next_attempt(term, after, duration)
            else:
                self._lose(watch, [receipt], outcome)

    async def _in_time(self, watch: _Watch, call: Awaitable[T]) -> T:
        """Await a call of the watch's task; raise QueueTimeoutError when it is given up."""
        self._schedule(watch, self._clock.monotonic() + watch.shortest * LONGEST_CALL)
        try:
            return await call
        except asyncio.CancelledError:
            if not watch.is_overdue:
                raise
            if watch.task is not None:
                watch.task.uncancel()
            raise QueueTimeoutError("the renewal of a lock did not come back in time") from None
        finally:
            watch.is_overdue = False

    def _lose(self, watch: _Watch, receipts: list[Receipt], error: QueueRuntimeError | None) -> None:
        """Tell that these are lost, but for those whose settlement is under way: it will say what became of them."""
        lost = []
        for receipt in receipts:
            if self._is_settling(receipt):
                term = watch.held[receipt]
                again = self._clock.monotonic() + watch.lock_duration * TOGETHER
                watch.held[receipt] = _Term(again, term.ends_at, term.give_up_at, term.is_last)
            else:
                watch.held.pop(receipt, None)
                lost.append(receipt)
        if lost:
            why = error or "renewed for max_lock_renewal"
            logger.warning("locks lost, queue=%s count=%d: %s", watch.receiver.queue_name, len(lost), why)
            self._on_lost(watch.receiver.id, lost, error)


def _is_not_settling(receipt: Receipt) -> bool:
    return False


def _term(duration: float, now: float, give_up_at: float) -> _Term:
    renew_at, ends_at = now + duration * RENEW_AFTER, now + duration
    if renew_at < give_up_at:
        return _Term(renew_at, ends_at, give_up_at)
    return _Term(ends_at, ends_at, give_up_at, True)


def _session_term(session: SessionReceiver, now: float, *, spread: bool) -> _Term:
    duration = session.session_lock_duration
    # Multiples of the golden ratio fall evenly into the interval, however many there are (Knuth 3, 6.4, theorem S).
    early = session.id * 0.6180339887498949 % 1.0 * SPREAD if spread else 0.0
    return _Term(now + duration * (RENEW_AFTER - early), now + duration, math.inf)


def _next_attempt(term: _Term, now: float, duration: float) -> _Term:
    """After a renewal failed for a passing reason: try again soon, at the latest at the locks' end."""
    return _Term(min(now + duration * TOGETHER, term.ends_at), term.ends_at, term.give_up_at)
