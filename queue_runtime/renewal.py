"""Keeps the locks of received messages and held sessions alive [C21, C27].

One scheduler per client: a heap of receivers by the time of their next renewal, one timer, and one call for all
locks of a receiver that are due. A lock is watched from the moment its message was received, so a message that
waits in a local buffer is covered like one in a handler.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from queue_runtime.clock import Clock, Timer
from queue_runtime.errors import QueueRuntimeError, SessionLockLostError
from queue_runtime.message import Receipt
from queue_runtime.providers.base import Receiver, SessionReceiver

logger = logging.getLogger("queue_runtime.renewal")

RENEW_AFTER = 0.5
"""The share of a lock's duration after which it is renewed: early enough to try again before it ends."""
TOGETHER = 0.1
"""Locks that fall due within this share of the lock's duration are renewed in the same call."""

SAME = 0.005
"""Messages received within this share of the lock's duration are treated as received together with the first."""
MOST_STALE = 64
"""Entries of the heap that are valid no more and stay in it, beside one for each receiver."""

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


class LockRenewer:
    """Renews locks until their messages are settled, up to a longest time.

    Parameters
    ----------
    clock:
        Where times and timers come from.
    max_renewal:
        Seconds from the receipt of a message after which its lock is renewed no more.
    on_lost:
        Called when a lock was lost. It must not raise.

    Thread-safety: for the event loop's thread only.
    """

    def __init__(self, clock: Clock, max_renewal: float, on_lost: LostCallback) -> None:
        self._clock = clock
        self._max_renewal = max_renewal
        self._on_lost = on_lost
        self._watches: dict[int, _Watch] = {}
        self._heap: list[tuple[float, int, _Watch]] = []
        self._order = itertools.count()
        self._timer: Timer | None = None
        self._timer_due = 0.0
        self._closed = False

    def watch(self, receiver: Receiver, receipts: Sequence[Receipt]) -> None:
        """Renew the locks of these receipts from now on."""
        watch = self._watches.get(receiver.id)
        if watch is None:
            watch = self._watches[receiver.id] = _Watch(receiver, receiver.lock_duration)
        now = self._clock.monotonic()
        term = watch.latest
        if term is None or now >= watch.latest_until:
            term = watch.latest = self._term(watch.lock_duration, now, now + self._max_renewal)
            watch.latest_until = now + watch.lock_duration * SAME
        held = watch.held
        for receipt in receipts:
            held[receipt] = term
        if watch.task is None and (watch.due is None or term.renew_at < watch.due):
            self._schedule(watch, term.renew_at)

    def watch_session(self, receiver: SessionReceiver) -> None:
        """Renew the lock of this session until it is dropped."""
        term = self._term(receiver.session_lock_duration, self._clock.monotonic(), math.inf)
        watch = _Watch(receiver, receiver.lock_duration, session=receiver, session_term=term)
        self._watches[receiver.id] = watch
        self._schedule(watch, term.renew_at)

    def forget(self, receiver_id: int, receipts: Sequence[Receipt]) -> None:
        """Renew these no more: they are settled."""
        watch = self._watches.get(receiver_id)
        if watch is not None:
            for receipt in receipts:
                watch.held.pop(receipt, None)

    def drop(self, receiver_id: int) -> None:
        """Renew nothing of this receiver any more: it is closed."""
        watch = self._watches.pop(receiver_id, None)
        if watch is not None:
            watch.due = None
            if watch.task is not None:
                watch.task.cancel()
            if len(self._heap) > 2 * len(self._watches) + MOST_STALE:
                self._heap = [entry for entry in self._heap if entry[2].due == entry[0]]
                heapq.heapify(self._heap)

    async def close(self) -> None:
        """Stop all renewal, for good."""
        self._closed = True
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for receiver_id in list(self._watches):
            self.drop(receiver_id)
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _term(self, lock_duration: float, now: float, give_up_at: float) -> _Term:
        renew_at, ends_at = now + lock_duration * RENEW_AFTER, now + lock_duration
        if renew_at < give_up_at:
            return _Term(renew_at, ends_at, give_up_at)
        return _Term(ends_at, ends_at, give_up_at, True)

    def _schedule(self, watch: _Watch, due: float) -> None:
        if self._closed:
            return
        watch.due = due
        heapq.heappush(self._heap, (due, next(self._order), watch))
        if self._timer is None or due < self._timer_due:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and self._heap[0][2].due != self._heap[0][0]:
            heapq.heappop(self._heap)
        if self._heap:
            self._timer_due = self._heap[0][0]
            self._timer = self._clock.call_later(max(0.0, self._timer_due - self._clock.monotonic()), self._tick)

    def _tick(self) -> None:
        now = self._clock.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, _, watch = heapq.heappop(self._heap)
            if watch.due == due:
                watch.due = None
                if watch.held or watch.session is not None:
                    watch.task = asyncio.get_running_loop().create_task(self._renew(watch))
        self._timer = None
        self._arm()

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
            if self._watches.get(watch.receiver.id) is watch:
                times = [term.renew_at for term in watch.held.values()]
                if watch.session_term is not None:
                    times.append(watch.session_term.renew_at)
                if times:
                    self._schedule(watch, max(min(times), self._clock.monotonic() + pause))

    async def _renew_session(self, watch: _Watch, session: SessionReceiver, term: _Term) -> bool:
        """Renew the session lock when it is due; say whether the session is still held."""
        duration = session.session_lock_duration
        if term.renew_at > self._clock.monotonic() + duration * TOGETHER:
            return True
        try:
            await session.renew_session()
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
        watch.session_term = self._term(duration, self._clock.monotonic(), math.inf)
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
            outcomes = list(await watch.receiver.renew(due))
        except QueueRuntimeError as error:
            outcomes = [error] * len(due)
        after = self._clock.monotonic()
        for receipt, outcome in zip(due, outcomes, strict=True):
            term = watch.held.get(receipt)
            if term is None:  # settled while its renewal was under way
                continue
            if not isinstance(outcome, QueueRuntimeError):
                watch.held[receipt] = self._term(duration, after, term.give_up_at)
            elif outcome.is_transient and after < term.ends_at:
                watch.held[receipt] = _next_attempt(term, after, duration)
            else:
                self._lose(watch, [receipt], outcome)

    def _lose(self, watch: _Watch, receipts: list[Receipt], error: QueueRuntimeError | None) -> None:
        for receipt in receipts:
            watch.held.pop(receipt, None)
        why = error or "renewed for max_lock_renewal"
        logger.warning("locks lost, queue=%s count=%d: %s", watch.receiver.queue_name, len(receipts), why)
        self._on_lost(watch.receiver.id, receipts, error)


def _next_attempt(term: _Term, now: float, duration: float) -> _Term:
    """After a renewal failed for a passing reason: try again soon, at the latest at the locks' end."""
    return _Term(min(now + duration * TOGETHER, term.ends_at), term.ends_at, term.give_up_at)
