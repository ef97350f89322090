"""Slow, obvious twins of the compiled core: the oracle of the differential tests."""

from __future__ import annotations

from typing import Any


class ModelSlot:
    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.running: list[list[Any]] = []
        self.due = 0  # so many of the waiting go out without a full batch
        self.may_be_early = False  # one short batch: items have no times, see "Time" in _core/README.md


class ModelMPCC:
    """The MPCC with no loop, no thread and no memory limit of its own: every call says what happens next.

    `begun` lists the batches in the order in which their pumps begin in each slot.
    """

    def __init__(self, batch_size: int, max_concurrency: int, number_of_slots: int, capacity: int, overflow: str):
        self.batch_size = batch_size
        self.max_concurrency = max_concurrency
        self.capacity = capacity
        self.overflow = overflow
        self.slots = [ModelSlot() for _ in range(number_of_slots)]
        self.begun: list[list[list[Any]]] = [[] for _ in range(number_of_slots)]
        self.started = False
        self.closed = False
        self.draining = False

    def push(self, items: list[Any], number: int) -> str:
        """'ok', 'full' or 'closed'; nothing happens where it is not ok."""
        slot = self.slots[number]
        if self.closed:
            return "closed"
        room = self.capacity - len(slot.waiting)
        if self.overflow == "raise" and len(items) > room:
            return "full"
        slot.waiting.extend(items)
        if self.overflow == "drop_oldest":
            del slot.waiting[: max(0, len(slot.waiting) - self.capacity)]
        return "ok"

    def start(self) -> None:
        self.started = True
        self.closed = False

    def interval_passes(self) -> None:
        for slot in self.slots:
            slot.due = len(slot.waiting)
            slot.may_be_early = bool(slot.waiting) and len(slot.running) == self.max_concurrency

    def take_early(self, number: int) -> None:
        """Begin the one short batch that may go out early: what came while overdue items waited for a pump."""
        slot = self.slots[number]
        if slot.may_be_early and slot.waiting and len(slot.running) < self.max_concurrency:
            slot.may_be_early = False
            slot.due = len(slot.waiting)
            self.look()

    def look(self) -> None:
        """What the loop does when it gets its turn."""
        if not self.started:
            return
        for number, slot in enumerate(self.slots):
            while slot.waiting and len(slot.running) < self.max_concurrency:
                if len(slot.waiting) < self.batch_size and slot.due <= 0 and not self.draining:
                    break
                batch, slot.waiting = slot.waiting[: self.batch_size], slot.waiting[self.batch_size :]
                slot.due -= len(batch)
                slot.running.append(batch)
                self.begun[number].append(batch)
            slot.may_be_early = slot.may_be_early and bool(slot.waiting)

    def end(self, number: int, which: int) -> None:
        self.slots[number].running.pop(which)

    def complete(self, drain: bool) -> dict[int, list[Any]]:
        """What is returned at once; with `drain` the rest goes out by look() and end()."""
        self.closed = True
        if drain and self.started:
            self.draining = True
            return {}
        left = {number: slot.waiting for number, slot in enumerate(self.slots) if slot.waiting}
        for slot in self.slots:
            slot.waiting = []
        return left

    @property
    def idle(self) -> bool:
        return not any(slot.waiting or slot.running for slot in self.slots)

    def completed(self) -> None:
        self.started = self.draining = False
        for slot in self.slots:
            slot.due = 0
