"""Receivers that keep locks as a service does, by a clock turned by hand."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from queue_runtime.clock import ManualClock
from queue_runtime.errors import InvalidReceiptError, QueueRuntimeError, SessionLockLostError
from queue_runtime.message import Receipt
from queue_runtime.renewal import LockRenewer

LOCK = 30.0
Lost = list[tuple[int, list[Receipt], QueueRuntimeError | None]]


class Locks:
    """A receiver of a service that keeps locks: one that ran out cannot be renewed."""

    def __init__(self, clock: ManualClock, receiver_id: int = 1, lock_duration: float = LOCK) -> None:
        self.clock = clock
        self.id = receiver_id
        self.queue_name = "orders"
        self.lock_duration = lock_duration
        self.ends: dict[Receipt, float] = {}
        self.calls: list[tuple[float, list[Receipt]]] = []
        self.fault: Callable[[Sequence[Receipt]], list[float | QueueRuntimeError] | None] | None = None
        self.gate: asyncio.Event | None = None

    def take(self, count: int, first: int = 0) -> list[Receipt]:
        receipts = [Receipt("orders", number, self.id) for number in range(first, first + count)]
        self.ends.update(dict.fromkeys(receipts, self.clock.monotonic() + self.lock_duration))
        return receipts

    def is_live(self, receipt: Receipt) -> bool:
        return self.ends[receipt] > self.clock.monotonic()

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        self.calls.append((self.clock.monotonic(), list(receipts)))
        if self.gate is not None:
            await self.gate.wait()
        given = self.fault(receipts) if self.fault is not None else None
        if given is not None:
            return given
        outcomes: list[float | QueueRuntimeError] = []
        for receipt in receipts:
            if self.is_live(receipt):
                self.ends[receipt] = self.clock.monotonic() + self.lock_duration
                outcomes.append(self.clock.time() + self.lock_duration)
            else:
                outcomes.append(InvalidReceiptError(receipt))
        return outcomes


class SessionLocks(Locks):
    """The same with a session lock."""

    session_id = "s"

    def __init__(self, clock: ManualClock, session_lock: float = LOCK, **options: Any) -> None:
        super().__init__(clock, **options)
        self.session_lock_duration = session_lock
        self.skew = 0.0  # of the service's wall clock
        self.locked_until = clock.time() + session_lock
        self.session_calls: list[float] = []
        self.session_faults: list[QueueRuntimeError] = []

    async def renew_session(self) -> float:
        self.session_calls.append(self.clock.monotonic())
        if self.session_faults:
            raise self.session_faults.pop(0)
        wall = self.clock.time() + self.skew
        if self.locked_until <= wall:
            raise SessionLockLostError(self.session_id)
        self.locked_until = wall + self.session_lock_duration
        return self.locked_until


def make(clock: ManualClock, lost: Lost, max_renewal: float = 1e6) -> LockRenewer:
    return LockRenewer(clock, max_renewal, lambda who, receipts, error: lost.append((who, list(receipts), error)))


def pending(clock: ManualClock) -> int:
    """Timers that would still fire."""
    return sum(timer.callback is not None for _, _, timer in clock._timers)
