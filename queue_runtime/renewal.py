"""Keeps the locks of received messages and held sessions alive [C21, C27].

A renewer per client, one scheduler for all of an event loop, and one call for all locks of a receiver that are due. A
lock is watched from the moment its message was received, so a message that waits in a local buffer is covered like one
in a handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from queue_runtime.clock import Clock
from queue_runtime.errors import QueueRuntimeError, QueueTimeoutError, SessionLockLostError
from queue_runtime.message import Receipt
from queue_runtime.providers.base import Receiver, SessionReceiver
from queue_runtime.schedule import (
    LONGEST_CALL,
    SAME,
    TOGETHER,
    Block,
    Scheduler,
    Term,
    Watch,
    first_term,
    next_attempt,
    scheduler_for,
    session_term,
)

logger = logging.getLogger("queue_runtime.renewal")

T = TypeVar("T")

LostCallback = Callable[[int, Sequence[Receipt], QueueRuntimeError | None], None]
"""Told (receiver_id, receipts, error) when locks were lost; without an error, they were renewed for long enough."""


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
    from_threads:
        Whether the receivers renew from threads: then locks outlast a handler that blocks the loop.

    Thread-safety: for the event loop's thread only.
    """

    def __init__(
        self,
        clock: Clock,
        max_renewal: float,
        on_lost: LostCallback,
        *,
        is_settling: Callable[[Receipt], bool] | None = None,
        from_threads: bool = False,
    ) -> None:
        self._clock = clock
        self._max_renewal = max_renewal
        self._on_lost = on_lost
        self._is_settling = is_settling or _is_not_settling
        self.watches: dict[int, Watch] = {}
        self.from_threads = from_threads
        self._scheduler: Scheduler | None = None
        self._closed = False

    @property
    def last_block(self) -> Block | None:
        """The last time in which the event loop was blocked for so long that locks were in danger."""
        return None if self._scheduler is None else self._scheduler.last_block

    def watch(self, receiver: Receiver, receipts: Sequence[Receipt]) -> None:
        """Renew the locks of these receipts from now on."""
        watch = self.watches.get(receiver.id)
        if watch is None:
            watch = self._begin(Watch(self, receiver, receiver.lock_duration))
        if watch.lock_duration <= 0:  # there is none
            return
        now = self._clock.monotonic()
        term = watch.latest
        if term is None or now >= watch.latest_until:
            term = watch.latest = first_term(watch.lock_duration, now, now + self._max_renewal)
            watch.latest_until = now + watch.lock_duration * SAME
        held = watch.held
        for receipt in receipts:
            held[receipt] = term
        if watch.task is None and (watch.due is None or term.renew_at < watch.due):
            self._schedule(watch, term.renew_at)

    def watch_session(self, receiver: SessionReceiver) -> None:
        """Renew the lock of this session until it is dropped."""
        if receiver.session_lock_duration <= 0:  # there is none
            return
        watch = self._begin(Watch(self, receiver, receiver.lock_duration, session=receiver))
        term = watch.session_term = session_term(receiver, self._clock.monotonic(), spread=True)
        self._schedule(watch, term.renew_at)

    def forget(self, receiver_id: int, receipts: Sequence[Receipt]) -> None:
        """Renew these no more: they are settled."""
        watch = self.watches.get(receiver_id)
        if watch is not None:
            for receipt in receipts:
                watch.held.pop(receipt, None)

    def holds(self, receiver_id: int) -> bool:
        """Whether anything of this receiver is renewed still."""
        watch = self.watches.get(receiver_id)
        return watch is not None and (bool(watch.held) or watch.session is not None)

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

    def due(self, watch: Watch) -> None:
        """For the scheduler: the time that was asked for has come."""
        if watch.task is not None:
            watch.is_overdue = True
            watch.task.cancel()
        elif watch.held or watch.session is not None:
            watch.task = asyncio.get_running_loop().create_task(self._renew(watch))
        else:
            return
        self._schedule(watch, self._clock.monotonic() + watch.shortest * LONGEST_CALL)

    def _begin(self, watch: Watch) -> Watch:
        self.watches[watch.receiver.id] = watch
        if not self._closed and (self._scheduler is None or self._scheduler.loop.is_closed()):
            self._scheduler = scheduler_for(self._clock)
            self._scheduler.renewers.add(self)
        return watch

    def _schedule(self, watch: Watch, due: float) -> None:
        if self._scheduler is not None:
            self._scheduler.schedule(watch, due)

    async def _renew(self, watch: Watch) -> None:
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

    async def _renew_session(self, watch: Watch, session: SessionReceiver, term: Term) -> bool:
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
                watch.session_term = next_attempt(term, now, duration)
                return True
            receipts = list(watch.held)
            watch.task = None  # this very task: drop must not cancel it
            self.drop(session.id)
            lost = error if isinstance(error, SessionLockLostError) else SessionLockLostError(session.session_id)
            self._on_lost(session.id, receipts, lost)
            return False
        is_late = began > term.renew_at + duration * TOGETHER
        watch.session_term = session_term(session, self._clock.monotonic(), spread=is_late)
        return True

    async def _renew_messages(self, watch: Watch) -> None:
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
        renewed: dict[float, Term] = {}  # messages of one delivery go on sharing their term
        for receipt, outcome in zip(due, outcomes, strict=True):
            term = watch.held.get(receipt)
            if term is None:  # settled while its renewal was under way
                continue
            if not isinstance(outcome, QueueRuntimeError):
                again = renewed.get(term.give_up_at)
                if again is None:
                    again = renewed[term.give_up_at] = first_term(duration, after, term.give_up_at)
                watch.held[receipt] = again
            elif outcome.is_transient and after < term.ends_at:
                watch.held[receipt] = next_attempt(term, after, duration)
            else:
                self._lose(watch, [receipt], outcome)

    async def _in_time(self, watch: Watch, call: Awaitable[T]) -> T:
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

    def _lose(self, watch: Watch, receipts: list[Receipt], error: QueueRuntimeError | None) -> None:
        """Tell that these are lost, but for those whose settlement is under way: it will say what became of them."""
        lost = []
        for receipt in receipts:
            if self._is_settling(receipt):
                term = watch.held[receipt]
                again = self._clock.monotonic() + watch.lock_duration * TOGETHER
                watch.held[receipt] = Term(again, term.ends_at, term.give_up_at, term.is_last)
            else:
                watch.held.pop(receipt, None)
                lost.append(receipt)
        if lost:
            why = error or "renewed for max_lock_renewal"
            logger.warning("locks lost, queue=%s count=%d: %s", watch.receiver.queue_name, len(lost), why)
            self._on_lost(watch.receiver.id, lost, error)


def _is_not_settling(receipt: Receipt) -> bool:
    return False
