"""When the locks of a process are renewed next, and the watchdog's way to them [C21].

The renewers of one event loop and clock share a scheduler: a heap of receivers by the time of their next renewal and
one timer. While a handler blocks the loop, the watchdog's thread renews where the provider can do so. It reads what
the loop left behind and writes only the ends of terms: what is settled, lost and due stays the loop's own business,
which it gets back to as soon as it turns.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import threading
import weakref
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from queue_runtime.clock import Clock, SystemClock, Timer
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.message import Receipt
from queue_runtime.providers.base import Receiver, SessionReceiver
from queue_runtime.watchdog import Place, place_of, watchdog

logger = logging.getLogger("queue_runtime.renewal")

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
LATE = 0.1
"""The share of the lock's duration after which a renewal that has not begun means that the loop does not turn."""
LATEST = 1.0
"""Seconds of the same at most."""

SAME = 0.005
"""Messages received within this share of the lock's duration are treated as received together with the first."""
MOST_STALE = 64
"""Entries of the heap that are valid no more and stay in it, beside two for each receiver."""


@dataclass(slots=True)
class Term:
    """When the locks of one delivery, or of a session, are renewed next, and when that ends for good.

    By the monotonic clock: the ends that a service tells are by its own wall clock.
    """

    renew_at: float
    ends_at: float
    """The end of the locks as they are."""
    give_up_at: float
    is_last: bool = False


class Renewer(Protocol):
    """Who has locks renewed."""

    from_threads: bool
    watches: dict[int, Watch]

    def due(self, watch: Watch) -> None:
        """The time that was asked for has come."""
        ...


@dataclass(slots=True, eq=False)
class Watch:
    """What is watched of one receiver."""

    renewer: Renewer
    receiver: Receiver
    lock_duration: float
    held: dict[Receipt, Term] = field(default_factory=dict)
    session: SessionReceiver | None = None
    session_term: Term | None = None
    latest: Term | None = None
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
        own = self.session.session_lock_duration
        return min(self.lock_duration, own) if self.lock_duration > 0 else own


@dataclass(slots=True, eq=False)
class Block:
    """A time in which the event loop did not turn, as far as it was seen."""

    guard: tuple[float, float]
    place: Place
    is_told: bool = False
    seconds: float = 0.0
    """How long it was at least, once it is over."""
    ended_at: float = math.inf
    """By the monotonic clock."""


class Scheduler:
    """What the renewers of one event loop and clock share.

    Thread-safety: for the event loop's thread only; but ``look`` is for the watchdog's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.loop = loop
        self.clock = clock
        self.renewers: set[Renewer] = set()
        self._heap: list[tuple[float, int, Watch]] = []
        self._order = itertools.count()
        self._timer: Timer | None = None
        self._timer_due = 0.0
        self._is_guarded = type(clock) is SystemClock  # no thread waits by any other clock
        self._guard: tuple[float, float] | None = None
        """When the timer is due, and when it is late; replaced by the loop only."""
        self._suspect: tuple[float, float] | None = None
        self._block: Block | None = None
        """Set by the watchdog's thread while the loop is blocked."""
        self._thread_id = 0
        self.last_block: Block | None = None

    def schedule(self, watch: Watch, due: float) -> None:
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
            due = self._timer_due = heap[0][0]
            self._timer = self.clock.call_later(max(0.0, due - self.clock.monotonic()), self._tick)
            if self._is_guarded:
                late = due + min(heap[0][2].shortest * LATE, LATEST)
                self._thread_id = threading.get_ident()
                self._guard = (due, late)
                watchdog.watch(self, late)
        elif self._guard is not None:
            self._guard = None
            self._turned()
            watchdog.leave(self)

    def dropped(self) -> None:
        """A watch was dropped: keep the heap in proportion to those that are left."""
        if len(self._heap) > MOST_STALE:
            watched = sum(len(renewer.watches) for renewer in self.renewers)
            if len(self._heap) > 2 * watched + MOST_STALE:
                self._heap = [entry for entry in self._heap if entry[2].due == entry[0]]
                heapq.heapify(self._heap)

    def leave(self, renewer: Renewer) -> None:
        """Forget a renewer that has dropped all of its watches."""
        self.renewers.discard(renewer)
        self.arm()

    def _tick(self) -> None:
        self._timer = None
        if self._guard is not None:
            self._guard = (math.inf, math.inf)
            self._turned()
        now = self.clock.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, _, watch = heapq.heappop(self._heap)
            if watch.due == due:
                watch.due = None
                watch.renewer.due(watch)
        self.arm()

    def _turned(self) -> None:
        """The loop turns. What the thread reads is set before, so that either sees the other (see ``look``)."""
        block = self._block
        if block is not None:
            self._block = None
            block.ended_at = self.clock.monotonic()
            block.seconds = block.ended_at - block.guard[0]
            if block.is_told:
                self.last_block = block
                logger.warning(
                    "the event loop turns again, after at least %.1f s in %s", block.seconds, block.place.handler
                )

    def look(self, now: float) -> float | None:
        """On the watchdog's thread: see whether the loop turns, and renew when it does not."""
        guard = self._guard
        if self.loop.is_closed():
            return None
        if guard is None:
            return math.inf
        due, late = guard
        if now < late:
            return late
        if not self.loop.is_running():  # nobody's handler blocks it, and its locks end as those of a dead holder do
            return now + 2 * (late - due)
        if self._suspect is not guard:  # this thread may be late as well, after the whole process stood still
            self._suspect = guard
            return now + min(0.05, (late - due) / 2)
        block = self._block
        if block is None or block.guard is not guard:
            place = place_of(self._thread_id)
            if place is not None:  # else nobody blocks it: the machine is slow
                block = self._block = Block(guard, place)
                if self._guard is not guard:  # it turned meanwhile, and may have missed the block
                    self._block = None
                    return now
                block.is_told = True
                _tell(block, now - due, any(renewer.from_threads for renewer in list(self.renewers)))
        again = math.inf
        for renewer in list(self.renewers):
            if renewer.from_threads:
                for watch in list(renewer.watches.values()):
                    again = min(again, _renew_from_thread(watch))
        return again


def _tell(block: Block, seconds: float, renews: bool) -> None:
    logger.warning(
        "the event loop has been blocked for at least %.1f s by %s; %s; it is in %s",
        seconds,
        block.place.handler,
        "its locks are renewed from another thread" if renews else "no lock can be renewed until it turns",
        block.place.stack,
    )


def _renew_from_thread(watch: Watch) -> float:
    """On the watchdog's thread: renew what is due of one receiver; return the time of the next renewal."""
    now = monotonic()
    again = math.inf
    session, term = watch.session, watch.session_term
    if session is not None and term is not None and term.ends_at > now:
        duration = session.session_lock_duration
        if term.ends_at - duration * RENEW_AFTER <= now + duration * TOGETHER:
            try:
                session.renew_session_from_thread()
                term.ends_at = now + duration
            except QueueRuntimeError as error:
                logger.info("a session was not renewed from the watchdog's thread: %s", error)
        again = max(term.ends_at - duration * RENEW_AFTER, now + duration * TOGETHER)
    duration = watch.lock_duration
    soon = now + duration * (RENEW_AFTER + TOGETHER)
    # What ran out, or was renewed for long enough, is left to the loop, which tells that it is lost.
    kept = {
        receipt: term
        for receipt, term in watch.held.copy().items()
        if not term.is_last and term.ends_at > now and term.give_up_at > now
    }
    due = [receipt for receipt, term in kept.items() if term.ends_at <= soon]
    if due:
        try:
            outcomes = watch.receiver.renew_from_thread(due)
        except QueueRuntimeError as error:
            outcomes = [error] * len(due)
        for receipt, outcome in zip(due, outcomes, strict=True):
            if isinstance(outcome, QueueRuntimeError):
                logger.info("a lock was not renewed from the watchdog's thread: %s", outcome)
            else:
                kept[receipt].ends_at = now + duration
    if kept:
        ends = min(term.ends_at for term in kept.values())
        again = min(again, max(ends - duration * RENEW_AFTER, now + duration * TOGETHER))
    return again


_schedulers: weakref.WeakValueDictionary[tuple[int, int], Scheduler] = weakref.WeakValueDictionary()
"""By the ids of the loop and of the clock; a scheduler keeps both alive, so that no id is taken again before."""


def scheduler_for(clock: Clock) -> Scheduler:
    """Return the scheduler of the running loop; every SystemClock is the same clock."""
    loop = asyncio.get_running_loop()
    key = (id(loop), 0 if type(clock) is SystemClock else id(clock))
    scheduler = _schedulers.get(key)
    if scheduler is None:
        scheduler = _schedulers[key] = Scheduler(loop, clock)
    return scheduler


def first_term(duration: float, now: float, give_up_at: float) -> Term:
    renew_at, ends_at = now + duration * RENEW_AFTER, now + duration
    if renew_at < give_up_at:
        return Term(renew_at, ends_at, give_up_at)
    return Term(ends_at, ends_at, give_up_at, True)


def session_term(session: SessionReceiver, now: float, *, spread: bool) -> Term:
    duration = session.session_lock_duration
    # Multiples of the golden ratio fall evenly into the interval, however many there are (Knuth 3, 6.4, theorem S).
    early = session.id * 0.6180339887498949 % 1.0 * SPREAD if spread else 0.0
    return Term(now + duration * (RENEW_AFTER - early), now + duration, math.inf)


def next_attempt(term: Term, now: float, duration: float) -> Term:
    """After a renewal failed for a passing reason: try again soon, at the latest at the locks' end."""
    return Term(min(now + duration * TOGETHER, term.ends_at), term.ends_at, term.give_up_at)
