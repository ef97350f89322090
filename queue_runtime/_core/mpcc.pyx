# The multi-producer concurrent consumer: producers in any thread push into slots, one loop pumps them out in batches.
# Here are its face and the producers' half; pumping.pyx has the loop's half, slot.pyx what one slot holds, outcome.pyx
# what a pump's answer means, ring.h the memory orders. README.md has the words and the invariants.

import asyncio
import contextvars
import math
import os
import sys
import weakref
from datetime import timedelta
from types import GenericAlias

cimport cython
from cpython.mem cimport PyMem_Calloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport INFINITY

from queue_runtime._core.outcome cimport Cancellation, resolve
from queue_runtime._core.pumping cimport CLOSING, COMPLETED, NEW, RUNNING, Pumping
from queue_runtime._core.ring cimport (
    QR_DONE, QR_FULL, QR_SHUT, QR_WAKE, qr_answer, qr_bell_answer, qr_bell_new, qr_ring, qr_ring_close, qr_ring_head,
    qr_ring_push, qr_ring_tail,
)
from queue_runtime._core.slot cimport Carried, Slot

from queue_runtime._core.outcome import MPCCStats, log_failure
from queue_runtime.errors import (
    AlreadyStartedError, ClosedError, QueueFullError, SlotOutOfRangeError, ValidationError, shown,
)

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept
    Py_ssize_t PyLong_AsSsize_t(object) noexcept
    bint PyLong_CheckExact(object) noexcept
    void PyErr_Clear() noexcept
    PyObject **PySequence_Fast_ITEMS(object) noexcept

cdef Py_ssize_t MOST_ITEMS = 1 << 40
cdef Py_ssize_t MOST_SLOTS = 1 << 20
cdef bint EAGER = sys.version_info >= (3, 12)

cdef enum Policy:
    RAISE
    BLOCK
    DROP_OLDEST
    UNBOUNDED

cdef dict POLICIES = {"raise": RAISE, "block": BLOCK, "drop_oldest": DROP_OLDEST, "unbounded": UNBOUNDED}

# Every instance, for the child of a fork, where no loop and no other thread goes on.
# By address: a subclass may define equality.
_instances = weakref.WeakValueDictionary()


def _after_fork_in_child():
    for instance in list(_instances.values()):
        instance._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


cdef Py_ssize_t _count(str field, object value, Py_ssize_t least, Py_ssize_t most) except -1:
    if type(value) is not int or not least <= value <= most:
        raise ValidationError(field, f"{shown(value)} is not a whole number from {least} to {most}")
    return value


cdef double _seconds(str field, object value, bint zero) except -1:
    cdef double seconds
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if type(value) is not int and type(value) is not float:
        raise ValidationError(field, f"{value!r} is not a number of seconds or a timedelta")
    try:
        seconds = value
    except OverflowError:
        seconds = INFINITY
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        raise ValidationError(field, f"{shown(value)} is not a finite time {'of at least' if zero else 'above'} 0 seconds")
    return seconds


cdef class MultiProducerConcurrentConsumer(Pumping):
    """Collects items from any thread in slots, and hands them to a coroutine in batches, on one event loop.

    A batch goes out when a slot holds ``batch_size`` items, or when its oldest item has waited for ``push_interval``;
    up to ``max_concurrency`` batches of each slot are in the pump at once. Slots share nothing: a batch holds items of
    one slot, in the order in which each producer pushed them, and a slow slot delays no other.

    Parameters
    ----------
    batch_size: most items in a batch, from 1.
    push_interval: most time that an item waits for a full batch, in seconds or as a timedelta, above 0.
    max_concurrency: most pumps at once for each slot, from 1.
    number_of_slots: slots are numbered from 0, and there is at least one.
    overflow: what ``push`` does when a slot is full: ``"raise"`` QueueFullError; ``"block"`` the thread until there is
        room (a thread that runs an event loop gets QueueFullError instead); ``"drop_oldest"``; or ``"unbounded"``.
    slot_capacity: most items that wait in a slot, at least ``batch_size``; by default the next power of two from 8192
        and from four batches. Items that pumps hold, or that a retry put back, come on top.
    low_water: who waits for room is let go when this many items are left in the slot, from ``batch_size - 1`` to
        ``slot_capacity - 1``; half the capacity by default.
    on_failure: called on the loop as ``on_failure(slot_number, items, exceptions)`` once for each batch with items
        that failed for good; by default the failure is logged. A caller of ``push_and_wait`` gets its item's error
        itself, and the item is not reported here.
    retry: called as ``retry(exception, attempt)``, with attempts from 1, for each item that failed; the pause in
        seconds before it is tried again, or None to give up. Its slot pauses as a whole, so that the order is kept.

    Raises
    ------
    ValidationError: for a number out of its range; ``field`` names the parameter.

    Thread-safety: the pushes and ``stats`` may be called from any thread at any time; ``start`` and ``complete``
    belong to the event loop. Child processes of a fork cannot use it: every call there raises ClosedError.

    After D. Marbach's component of that name (2017), with other machinery: see _core/README.md.
    """

    def __init__(self, batch_size, push_interval, max_concurrency, number_of_slots, *, overflow="raise",
                 slot_capacity=None, low_water=None, on_failure=None, retry=None):
        cdef Py_ssize_t capacity, low, number
        cdef Slot slot
        if self._rings is not NULL:
            raise RuntimeError("__init__ was called before")
        self._batch_size = _count("batch_size", batch_size, 1, MOST_ITEMS // 4)
        self._interval = _seconds("push_interval", push_interval, False)
        self._max_concurrency = _count("max_concurrency", max_concurrency, 1, MOST_ITEMS)
        number = _count("number_of_slots", number_of_slots, 1, MOST_SLOTS)
        if type(overflow) is not str or overflow not in POLICIES:
            raise ValidationError("overflow", f"{overflow!r} is none of {', '.join(POLICIES)}")
        self._policy = POLICIES[overflow]
        if slot_capacity is None:
            capacity = 8192
            while capacity < 4 * self._batch_size:
                capacity *= 2
        else:
            capacity = _count("slot_capacity", slot_capacity, self._batch_size, MOST_ITEMS)
        if low_water is None:
            low = max(self._batch_size - 1, capacity // 2)
            low = min(low, capacity - 1)
        else:
            low = _count("low_water", low_water, self._batch_size - 1, capacity - 1)
        for field, function in (("on_failure", on_failure), ("retry", retry)):
            if function is not None and not callable(function):
                raise ValidationError(field, f"{function!r} is not callable")
        self._on_failure = log_failure if on_failure is None else on_failure
        self._retry = retry
        self._slots = tuple([Slot(i, capacity, low, self._policy == DROP_OLDEST) for i in range(number)])
        self._bell = qr_bell_new(number)
        self._rings = <qr_ring **>PyMem_Calloc(number, sizeof(qr_ring *))
        if self._bell is NULL or self._rings is NULL:
            raise MemoryError()
        for slot in self._slots:
            self._rings[slot.number] = slot.ring
        self._count = number
        _instances[<size_t><void *>self] = self

    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    def __repr__(self):
        return (
            f"<{type(self).__name__} {('new', 'running', 'completing', 'completed')[self._phase]}: "
            f"{self._count} slots, batches of {self._batch_size}>"
        )

    # --- pushing: any thread ---

    # A plain method descriptor, which CPython calls faster; the embedded text gives its signature back to `inspect`.
    @cython.binding(False)
    @cython.embedsignature(True)
    @cython.embedsignature.format("clinic")
    def push(self, item, slot_number):
        """Add an item to a slot. Returns at once, except where a full slot's policy is to block the thread.

        Parameters
        ----------
        item: any object.
        slot_number: from 0 to ``number_of_slots - 1``.

        Raises
        ------
        SlotOutOfRangeError: there is no such slot. ValidationError: the slot number is not an int.
        QueueFullError: the slot is full, and the policy is ``"raise"``, or is ``"block"`` on an event loop's thread.
        ClosedError: ``complete`` was called and ``start`` not since, or this is the child of a fork: the item was not
            added. Or the event loop is closed: the item is in its slot and a later ``complete`` returns it.

        Thread-safety: any thread.
        """
        cdef Py_ssize_t number = PyLong_AsSsize_t(slot_number) if PyLong_CheckExact(slot_number) else -1
        cdef qr_answer answer
        if <size_t>number >= <size_t>self._count:
            raise self.bad_slot(slot_number)
        Py_INCREF(item)
        answer = qr_ring_push(self._rings[number], <void *>item)
        if answer == QR_DONE:
            return
        if answer == QR_WAKE:
            self.call(<Slot>self._slots[number])
            return
        Py_DECREF(item)
        self.push_more(<Slot>self._slots[number], [item])

    def push_many(self, items, slot_number):
        """Add items to a slot, in order and next to each other where the policy does not have to wait or drop.

        With ``"raise"`` all are added or none. With ``"block"`` what fits goes in while the rest waits. With
        ``"drop_oldest"``, when there are more than the slot can hold, the first of them are dropped too.

        Parameters
        ----------
        items: a list, a tuple or any iterable.
        slot_number, raises and thread-safety: as for ``push``.
        """
        cdef Slot slot = self.slot_of(slot_number)
        cdef bint reached = False
        cdef qr_answer answer
        if type(items) is not list and type(items) is not tuple:
            items = list(items)
        with cython.critical_section(items):
            if len(items) == 0:
                return
            answer = slot.put(PySequence_Fast_ITEMS(items), len(items), &reached)
        if answer != QR_DONE:
            self.push_more(slot, list(items))
        elif reached:
            self.call(slot)

    async def push_wait(self, item, slot_number):
        """Add an item to a slot, waiting for room where there is none, whatever the policy (nothing is dropped).

        Parameters, raises: as for ``push``, but no QueueFullError. Cancelling it adds nothing.

        Thread-safety: any event loop in any thread.
        """
        cdef Slot slot = self.slot_of(slot_number)
        while not self.try_put(slot, item):
            room = asyncio.get_running_loop().create_future()
            slot.enlist(room)
            try:
                if self.try_put(slot, item):
                    return
                await room
            finally:
                slot.delist(room)

    def submit(self, item, slot_number):
        """Add an item to a slot as ``push`` does, and return an asyncio.Future of the pump's outcome for it.

        The future ends as ``push_and_wait`` would. Nobody has to wait for it, but its error wants to be looked at.

        Parameters, raises: as for ``push``. Thread-safety: any event loop in any thread.
        """
        cdef Slot slot = self.slot_of(slot_number)
        outcome = asyncio.get_running_loop().create_future()
        slot.carries = True
        self.push(Carried(item, outcome), slot_number)
        return outcome

    async def push_and_wait(self, item, slot_number):
        """Add an item to a slot as ``push_wait`` does, and wait for the pump's outcome for it.

        Returns
        -------
        The item's element of the list that the pump returned, or None where it returned None.

        Raises
        ------
        The error that the pump raised, for all its items or for this one (``BatchError``), or put in its list, once no
        retry is left. QueueFullError: the item was dropped. ClosedError: as for ``push``, or ``complete`` left the
        item undelivered. Cancelling it does not take the item back.

        Thread-safety: any event loop in any thread.
        """
        cdef Slot slot = self.slot_of(slot_number)
        outcome = asyncio.get_running_loop().create_future()
        slot.carries = True
        carried = Carried(item, outcome)
        if not self.try_put(slot, carried):
            await self.push_wait(carried, slot_number)
        return await outcome

    cdef bint try_put(self, Slot slot, object item) except -1:
        cdef bint reached = False
        cdef PyObject *cell = <PyObject *>item
        cdef qr_answer answer = slot.put(&cell, 1, &reached)
        if answer != QR_DONE and self._policy == UNBOUNDED and not self._is_forked:
            answer = slot.spill([item], &reached)
        if answer == QR_SHUT:
            raise self.closed()
        if reached:
            self.call(slot)
        return answer == QR_DONE

    cdef int push_more(self, Slot slot, list items) except -1:
        """Push what did not fit, by the policy."""
        cdef bint reached = False
        cdef Py_ssize_t done = 0
        cdef qr_answer answer = QR_FULL
        if self._is_forked:
            raise self.closed()
        if self._policy == UNBOUNDED:
            answer = slot.spill(items, &reached)
        elif self._policy == DROP_OLDEST:
            if len(items) > <Py_ssize_t>slot.ring.capacity:
                done = len(items) - <Py_ssize_t>slot.ring.capacity
            while True:
                answer = slot.put(PySequence_Fast_ITEMS(items) + done, len(items) - done, &reached)
                if answer != QR_FULL:
                    break
                self.tell_dropped(slot.drop_oldest())
            if answer == QR_DONE:
                slot.dropped += done
                slot.skipped += done
        elif self._policy == BLOCK and asyncio._get_running_loop() is None:
            answer = self.push_blocking(slot, items)
        else:
            answer = slot.put(PySequence_Fast_ITEMS(items), len(items), &reached)
        if answer == QR_SHUT:
            raise self.closed()
        if answer == QR_FULL:
            slot.refused += 1
            raise QueueFullError(f"slot {slot.number}", slot.ring.capacity)
        if reached:
            self.call(slot)
        return 0

    cdef qr_answer push_blocking(self, Slot slot, list items):
        cdef Py_ssize_t done = 0, count
        cdef bint reached
        cdef qr_answer answer
        while done < len(items):
            reached = False
            slot.enlist(None)
            try:
                with slot.lock:
                    while True:
                        count = <Py_ssize_t>(slot.ring.capacity - (qr_ring_tail(slot.ring) - qr_ring_head(slot.ring)))
                        count = max(1, min(count, len(items) - done))
                        answer = slot.put(PySequence_Fast_ITEMS(items) + done, count, &reached)
                        if answer != QR_FULL:
                            break
                        slot.room.wait()
            finally:
                slot.delist(None)
            if answer == QR_SHUT:
                return answer
            done += count
            if reached:
                self.call(slot)
        return QR_DONE

    cdef int tell_dropped(self, object cell) except -1:
        if type(cell) is Carried and (<Carried>cell).future is not None:
            resolve((<Carried>cell).future, None, None, QueueFullError("its slot", self._rings[0].capacity))
        return 0

    cdef Slot slot_of(self, object slot_number):
        cdef Py_ssize_t number = PyLong_AsSsize_t(slot_number) if PyLong_CheckExact(slot_number) else -1
        if <size_t>number >= <size_t>self._count:
            raise self.bad_slot(slot_number)
        return <Slot>self._slots[number]

    cdef object bad_slot(self, object slot_number):
        PyErr_Clear()  # of an int too big for C
        if type(slot_number) is int:
            return SlotOutOfRangeError(slot_number, self._count)
        return ValidationError("slot_number", f"{slot_number!r} is not an int from 0 to {self._count - 1}")

    cdef object closed(self):
        if self._is_forked:
            return ClosedError("this consumer belongs to the parent process: after a fork, make a new one")
        return ClosedError("complete() was called: nothing can be pushed until start() is called again")

    def stats(self, slot_number=None):
        """Return the figures of one slot, or of all together, as an ``MPCCStats``.

        Raises SlotOutOfRangeError, ValidationError. Thread-safety: any thread.
        """
        cdef Slot slot
        cdef list figures = [0] * 12
        for slot in self._slots if slot_number is None else (self.slot_of(slot_number),):
            waiting = slot.ready() + len(slot.overflow)
            row = (slot.pushed(), waiting, slot.in_flight, slot.active, slot.batches, slot.delivered, slot.failed,
                   slot.retried, slot.dropped, slot.refused, slot.left, 0)
            figures = [total + figure for total, figure in zip(figures, row)]
        if slot_number is None:
            figures[11] = self._wakes
        return MPCCStats(*figures)

    # --- running: the loop's thread ---

    def start(self, pump, state=None):
        """Begin to pump on the running event loop, in the current context.

        Parameters
        ----------
        pump: called as ``await pump(items, slot_number, state, cancellation)`` in a task of its own for each batch.
            The list ``items`` is the pump's to keep. It returns None when all went well, or a list with a result for
            each item, where an exception fails that item; or it raises ``BatchError`` with an error for some items, or
            anything else to fail them all. ``cancellation.cancelled`` turns true when ``complete`` ran out of time.
        state: handed on to the pump.

        Raises
        ------
        AlreadyStartedError: ``complete`` has not ended since the last start. ValidationError: the pump is not callable.
        ClosedError: this is the child of a fork. RuntimeError: no event loop runs here.

        Thread-safety: the event loop's thread.
        """
        cdef Slot slot
        if self._is_forked:
            raise self.closed()
        if not callable(pump):
            raise ValidationError("pump", f"{pump!r} is not callable")
        if self._phase == RUNNING or self._phase == CLOSING:
            raise AlreadyStartedError("already started: await complete() before starting again")
        if self._count == 0:
            raise RuntimeError("__init__ was not called")
        loop = asyncio.get_running_loop()
        qr_bell_answer(self._bell)  # whoever rings late may have done so on a loop that is closed now
        # All that may run other code comes first: a finalizer may call complete.
        context = contextvars.copy_context()
        cancellation = Cancellation()
        options = {"loop": loop, "name": "mpcc pump"}
        if EAGER:
            options["eager_start"] = True
        left = {}
        time = loop.time
        now = time()
        if self._phase == RUNNING or self._phase == CLOSING:
            raise AlreadyStartedError("already started while this start began")
        self._pump = pump
        self._state = state
        self._context = context
        self._cancellation = cancellation
        self._task_options = options
        self._time = time
        self._floor = -INFINITY
        self._thread = PyThread_get_thread_ident()
        self._discarding = self._expired = False
        self._left = left
        self._unfinished = self._count
        for slot in self._slots:
            slot.finished = slot.idle = False
            slot.base = slot.mark_time = now
            slot.mark = qr_ring_tail(slot.ring)
            slot.resume_at = 0
            slot.deadline = INFINITY
        self._loop = loop
        self._phase = RUNNING
        for slot in self._slots:
            slot.open()
        loop.call_soon(self._look_at_all, loop, context=self._context)

    async def complete(self, drain=True, timeout=None):
        """Stop: refuse pushes, wait for the pumps that run, and hand what is left to the pump or give it back.

        Parameters
        ----------
        drain: pump what the slots hold now; otherwise it is returned. Without a start before, it is returned too.
        timeout: seconds or a timedelta after which ``cancellation`` is set, the pumps that run are cancelled, and
            what they did not finish counts as left. None: no limit.

        Returns
        -------
        dict[int, list]: by slot number, the items that were not delivered, oldest first; no entry where none was left.
        Callers that complete at the same time share one end, and each gets this.

        Raises
        ------
        ValidationError: a bad timeout. RuntimeError: another event loop, still open, is pumping. ClosedError: this is
        the child of a fork.

        Thread-safety: the event loop's thread; on another loop only after the first one was closed. When the caller is
        cancelled, the completion goes on without it. A pump that awaits it waits for itself.
        """
        cdef Slot slot
        limit = None if timeout is None else _seconds("timeout", timeout, True)
        loop = asyncio.get_running_loop()
        if self._is_forked:
            raise self.closed()
        if self._count == 0:
            raise RuntimeError("__init__ was not called")
        if self._phase == NEW or self._phase == COMPLETED:
            self._left = {}
            return self.abandon()
        if self._loop is not loop:
            if not self._loop.is_closed():
                raise RuntimeError("this consumer runs on another event loop: await complete() there")
            return self.abandon()
        if self._phase == RUNNING:
            self._phase = CLOSING
            self._finish = loop.create_future()
            for slot in self._slots:
                slot.close()
        if not drain:
            self._discarding = True
        loop.call_soon(self._look_at_all, loop, context=self._context)
        timer = None if limit is None else loop.call_later(limit, self._expire)
        try:
            # Shielded: other callers wait for it too.
            left = await asyncio.shield(self._finish)
        finally:
            if timer is not None:
                timer.cancel()
        return {number: list(items) for number, items in left.items()}

    def _forked(self):
        cdef Py_ssize_t number
        self._is_forked = True
        # Not the locks: another thread of the parent may have held them.
        for number in range(self._count):
            qr_ring_close(self._rings[number])


MPCC = MultiProducerConcurrentConsumer
