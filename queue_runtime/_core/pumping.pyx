# The loop's half of the multi-producer concurrent consumer: when a slot's items go out, the task that takes them, and
# what becomes of them. Everything here but `call` and `post` runs on the event loop's thread. Internal; the class for
# users is in mpcc.pyx.

import asyncio
import sys

from cpython.mem cimport PyMem_Free
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF
from libc.math cimport INFINITY
from libc.stdint cimport uint64_t

from queue_runtime._core.outcome cimport Cancellation, failures_of, resolve
from queue_runtime._core.ring cimport (
    QR_NEVER, qr_bell, qr_bell_answer, qr_bell_free, qr_bell_ring, qr_bell_take, qr_ring, qr_ring_arm, qr_ring_head,
    qr_ring_tail,
)
from queue_runtime._core.slot cimport Carried, Slot

from queue_runtime._core.outcome import logger, time_to_retry
from queue_runtime.errors import ClosedError

cdef extern from *:
    """
    /* A collected MPCC has lost its slots; with no slot left, every push is out of range and touches no ring. */
    static Py_ssize_t qr_count_offset;
    static inquiry qr_pumping_generated_clear;

    static int qr_pumping_clear(PyObject *self) {
        *(Py_ssize_t *)((char *)self + qr_count_offset) = 0;
        return qr_pumping_generated_clear(self);
    }

    static void qr_patch_pumping(PyTypeObject *type, Py_ssize_t count_offset) {
        qr_count_offset = count_offset;
        qr_pumping_generated_clear = type->tp_clear;
        type->tp_clear = qr_pumping_clear;
    }
    """
    void qr_patch_pumping(PyTypeObject *type, Py_ssize_t count_offset)

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object it, object argument, PyObject **result) except PYGEN_ERROR
    unsigned long PyThread_get_thread_ident() noexcept
    object PyObject_Call(object, tuple, dict)
    bint PyCoro_CheckExact(object) noexcept

# Looked up once: each is needed for every batch.
cdef object _Task = asyncio.Task
cdef object _iscoroutine = asyncio.iscoroutine

# A slot that keeps finding full batches lets others have the loop after so many.
cdef int TURN_BUDGET = 16


cdef class Batch:
    """One batch on its way through the pump: the coroutine that its task runs.

    The task steps this object, and this object steps the pump's coroutine: so the end of the batch is seen here
    however it comes, also when the task is cancelled before its first step.
    """

    def __iter__(self):
        return self

    def __await__(self):
        return self

    def __next__(self):
        cdef PyObject *step = NULL
        cdef PySendResult answer
        cdef object value
        if self.ended:  # what it held has its outcome, or is back in the slot
            raise StopIteration
        try:
            if self.pump is None:
                self.begin()
            answer = PyIter_Send(self.pump, None, &step)
        except BaseException as error:
            self.end(None, error)
            if isinstance(error, Exception):
                raise StopIteration
            raise
        value = <object>step
        Py_DECREF(value)
        if answer == PYGEN_NEXT:
            return value
        self.end(value, None)
        raise StopIteration

    def send(self, value):
        return self.__next__()

    def throw(self, exception, *rest):
        try:
            if self.pump is not None:
                return self.pump.throw(exception, *rest)
            raise exception
        except StopIteration as stop:
            self.end(stop.value, None)
            raise StopIteration
        except BaseException as error:
            self.end(None, error)
            if isinstance(error, Exception):
                raise StopIteration
            raise

    def close(self):
        if self.pump is not None:
            self.pump.close()

    @property
    def __qualname__(self):
        """What a task's repr shows."""
        return f"pump of slot {self.slot.number}"

    @property
    def cr_frame(self):
        """The pump's frame, so that a task's stack shows it."""
        return getattr(self.pump, "cr_frame", None)

    cdef int begin(self) except -1:
        cdef list items = self.items
        self.items = None
        pump = self.owner._pump(items, self.slot.number, self.owner._state, self.owner._cancellation)
        # An awaitable that is no coroutine (a future, say) is awaited by one.
        self.pump = pump if PyCoro_CheckExact(pump) or _iscoroutine(pump) else _as_coroutine(pump)
        return 0

    cdef int end(self, object outcome, object error) except -1:
        if not self.ended:
            self.ended = True
            self.pump = None
            self.owner.batch_ended(self, outcome, error)
        return 0


async def _as_coroutine(awaitable):
    return await awaitable


cdef class Pumping:
    """The state that both halves share, and the loop's half."""

    def __cinit__(self):
        self._slots = ()
        self._batches = set()
        self._floor = -INFINITY

    def __dealloc__(self):
        qr_bell_free(self._bell)
        PyMem_Free(self._rings)

    cdef int call(self, Slot slot) except -1:
        """Have the loop look at a slot. Any thread; at most one call is under way."""
        try:
            self.ring(slot)
        except ClosedError:
            raise
        except BaseException:
            # A signal's handler raised inside the loop's own code. The claim that reached the watermark is the only
            # one that rings: without this the slot would sleep for ever.
            self.ring(slot)
            raise
        return 0

    cdef int ring(self, Slot slot) except -1:
        time = self._time
        if slot.idle and time is not None:
            slot.rung_at = time()
        if qr_bell_ring(self._bell, slot.number):
            self.post()
        return 0

    cdef int post(self) except -1:
        loop = self._loop
        if loop is None:  # start looks at every slot
            qr_bell_answer(self._bell)
            return 0
        try:
            if PyThread_get_thread_ident() == self._thread:
                loop.call_soon(self._answer, loop, context=self._context)
            else:
                loop.call_soon_threadsafe(self._answer, loop, context=self._context)
        except RuntimeError as error:
            qr_bell_answer(self._bell)
            raise ClosedError("the event loop of this consumer is closed; await complete() on another one, "
                              "which returns what is left") from error
        except BaseException:
            qr_bell_answer(self._bell)
            raise
        self._wakes += 1
        return 0

    def _look_at_all(self, loop):
        if loop is not self._loop:
            return
        for slot in self._slots:
            self.look(slot)

    def _answer(self, loop):
        cdef uint64_t word, bits
        cdef Py_ssize_t number
        if loop is None or loop is not self._loop:  # late, on the loop of an earlier start
            return
        self._thread = PyThread_get_thread_ident()  # a loop may have moved to another thread
        qr_bell_answer(self._bell)
        for word in range(self._bell.words):
            bits = qr_bell_take(self._bell, word)
            number = word * 64
            while bits:
                if bits & 1:
                    self.look(<Slot>self._slots[number])
                bits >>= 1
                number += 1

    cdef double now(self) except? -1:
        return max(<double>self._time(), self._floor)

    cdef int look(self, Slot slot) except -1:
        """Hand out what a slot has ready, as far as it may, and see to it that the loop comes back in time."""
        if slot.in_service or slot.finished or self._is_forked or (self._phase != RUNNING and self._phase != CLOSING):
            return 0  # in_service: a pump ended inside its eager start; the loop below goes on with its place
        slot.in_service = True
        try:
            self.serve(slot)
        except BaseException:
            # Out of a pump that starts eagerly (SystemExit, say), or out of the loop's own code. The loop may go on,
            # and nothing else would bring it back here, or to the slots that this turn had yet to look at.
            if self._loop is not None:
                self._loop.call_soon(self._look_at_all, self._loop, context=self._context)
            raise
        finally:
            slot.in_service = False
        return 0

    cdef int serve(self, Slot slot) except -1:
        cdef int budget = TURN_BUDGET
        cdef Py_ssize_t ready
        cdef uint64_t head
        while True:
            if self._discarding:
                return self.leave(slot) if slot.active == 0 else 0
            if slot.spilled:
                slot.refill()
            ready = slot.ready()
            head = qr_ring_head(slot.ring)
            if ready == 0:
                if self._phase == CLOSING:
                    return self.leave(slot) if slot.active == 0 else 0
                slot.idle = True
                slot.rung_at = slot.deadline = INFINITY
                if qr_ring_arm(slot.ring, head + 1) <= head:
                    return 0
                continue
            if slot.idle or head >= slot.mark:
                self.set_mark(slot)
            if slot.resume_at > 0:
                if self.now() < slot.resume_at:
                    qr_ring_arm(slot.ring, QR_NEVER)
                    return self.come_back(slot, slot.resume_at)
                slot.resume_at = 0
            if slot.active >= self._max_concurrency:
                # The end of a pump comes back.
                qr_ring_arm(slot.ring, QR_NEVER)
                slot.deadline = INFINITY
                return 0
            if ready < self._batch_size and head >= slot.due and not slot.front and self._phase == RUNNING:
                if slot.base + self._interval <= self.now():
                    slot.due = qr_ring_tail(slot.ring)
                elif <Py_ssize_t>(qr_ring_arm(slot.ring, head + self._batch_size) - head) < self._batch_size:
                    return self.come_back(slot, slot.base + self._interval)
                continue
            if budget == 0 or not self.hand_out(slot):
                # Later: others want the loop too, or an item is claimed and not published yet.
                return self.call(slot)
            budget -= 1

    cdef int set_mark(self, Slot slot) except -1:
        """Bound the age of what the slot holds. No item has a time of its own: what is at or beyond the mark came
        after mark_time, so when head reaches the mark, that is the bound for the next ones, and a new mark is set."""
        if slot.idle and slot.rung_at < INFINITY:
            slot.base = slot.rung_at
        else:
            slot.base = slot.mark_time
        slot.idle = False
        slot.mark_time = self.now()
        slot.mark = qr_ring_arm(slot.ring, QR_NEVER)
        return 0

    cdef int come_back(self, Slot slot, double when) except -1:
        """Have the timer look at the slot: one timer for all, moved only when it would be too late."""
        slot.deadline = when
        if self._timer is not None:
            if self._timer_at <= when:
                return 0
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._on_timer, context=self._context)
        return 0

    def _on_timer(self):
        cdef Slot slot, first = None
        cdef double now
        self._timer = None
        if self._phase != RUNNING and self._phase != CLOSING:
            return
        self._floor = self._timer_at
        now = self.now()
        for slot in self._slots:
            if slot.deadline <= now:
                slot.deadline = INFINITY
                self.look(slot)
        for slot in self._slots:
            if first is None or slot.deadline < first.deadline:
                first = slot
        if first.deadline < INFINITY:
            self.come_back(first, first.deadline)

    cdef bint hand_out(self, Slot slot) except -1:
        """Start a pump with the next batch; false when none is published yet."""
        cdef Batch batch = Batch.__new__(Batch)
        cdef Py_ssize_t count
        batch.kept = min(len(slot.front), self._batch_size)
        batch.cells = slot.take(self._batch_size, &batch.start)
        count = len(batch.cells)
        if count == 0:
            return False
        batch.owner = self
        batch.slot = slot
        slot.active += 1
        slot.in_flight += count
        slot.batches += 1
        self._batches.add(batch)
        try:
            slot.let_go()
            batch.items = _items_of(batch.cells) if slot.carries else batch.cells[:]
            self._task_options["context"] = self._context.copy()
            batch.task = PyObject_Call(_Task, (batch,), self._task_options)
        except BaseException as error:
            if not batch.ended:
                self.never_mind(batch, error)
            raise
        if batch.ended:
            batch.task = None
        return True

    cdef int never_mind(self, Batch batch, object error) except -1:
        """Undo the start of a batch. It may have a task, which then finds it ended, or have lost it on the way."""
        cdef Slot slot = batch.slot
        pump = batch.pump
        if pump is not None:  # it began, eagerly: nobody knows how far it came
            batch.end(None, error)
            pump.close()
            return 0
        batch.ended = True
        self._batches.discard(batch)
        slot.active -= 1
        slot.in_flight -= len(batch.cells)
        slot.batches -= 1
        slot.carries = True
        slot.put_back([_carried_of(batch, i) for i in range(len(batch.cells))])
        return 0

    cdef int batch_ended(self, Batch batch, object outcome, object error) except -1:
        cdef Slot slot = batch.slot
        cdef list cells = batch.cells
        slot.active -= 1
        slot.in_flight -= len(cells)
        self._batches.discard(batch)
        batch.task = None
        try:
            if outcome is None and error is None and not slot.carries:
                slot.delivered += len(cells)
            else:
                self.settle(batch, outcome, error)
        finally:
            self.look(slot)
        return 0

    cdef int settle(self, Batch batch, object outcome, object error) except -1:
        """Give every item of a batch its outcome."""
        cdef Slot slot = batch.slot
        cdef dict failures
        cdef object interrupt = None
        cdef bint cut_off = self._expired and isinstance(error, asyncio.CancelledError)
        cdef list again = [], items = [], errors = []
        cdef Carried carried
        cdef Py_ssize_t i
        cdef double longest = 0
        if type(outcome) is list:
            outcome = tuple(outcome)  # the pump may change its own while callbacks run
        try:
            failures = failures_of(outcome, error, len(batch.cells))
        except Exception as unreadable:
            failures = dict.fromkeys(range(len(batch.cells)), unreadable)
        for i, cell in enumerate(batch.cells):
            carried = <Carried>cell if type(cell) is Carried else None
            failure = None if failures is None else failures.get(i)
            if failure is None:
                slot.delivered += 1
                if carried is not None and carried.future is not None:
                    result = outcome[i] if type(outcome) is tuple else None
                    resolve(carried.future, self._loop, result, None)
                continue
            if not cut_off:
                try:
                    pause = time_to_retry(self._retry, failure, 1 if carried is None else carried.attempts + 1)
                except BaseException as error_of_rule:  # SystemExit, say: out of here once every item has its outcome
                    interrupt = error_of_rule
                    pause = None
                if pause is None:
                    slot.failed += 1
                    if carried is not None and carried.future is not None and not carried.future.done():
                        resolve(carried.future, self._loop, None, failure)
                    else:
                        items.append(cell if carried is None else carried.item)
                        errors.append(failure)
                    continue
                longest = max(longest, <double>pause)
                slot.retried += 1
            carried = _carried_of(batch, i)
            carried.attempts += 1
            again.append(carried)
        if again:
            slot.carries = True
            slot.put_back(again)
            if longest > 0:
                slot.resume_at = max(slot.resume_at, self.now() + longest)
        if items:
            try:
                self._on_failure(slot.number, items, errors)
            except Exception:
                logger.exception("on_failure failed for %d items of slot %d", len(items), slot.number)
        if interrupt is not None:
            raise interrupt
        return 0

    # --- ending ---

    def _expire(self):
        """complete()'s time ran out."""
        if self._phase != CLOSING:
            return
        self._expired = self._discarding = True
        self._cancellation.cancel()
        for batch in list(self._batches):
            if (<Batch>batch).task is not None:
                (<Batch>batch).task.cancel()
        self._look_at_all(self._loop)

    cdef int leave(self, Slot slot) except -1:
        """The end of a slot with no pump running: note what it still holds."""
        self.note_left(slot)
        if slot.ready() > 0:
            return self.call(slot)  # claimed and not published yet
        slot.finished = True
        slot.deadline = INFINITY
        self._unfinished -= 1
        if self._unfinished == 0:
            self.finish()
        return 0

    cdef int note_left(self, Slot slot) except -1:
        cdef list cells = slot.take_all()
        if cells:
            slot.left += len(cells)
            self._left.setdefault(slot.number, []).extend(_items_of(cells))
            for cell in cells:
                if type(cell) is Carried and (<Carried>cell).future is not None:
                    resolve((<Carried>cell).future, None, None, ClosedError("complete() left the item undelivered"))
        return 0

    cdef int finish(self) except -1:
        # All of it is read before anything else runs: finalizers may, and may call complete.
        timer, finish, left = self._timer, self._finish, self._left
        self._phase = COMPLETED
        self._timer = None
        self._finish = self._left = self._loop = self._pump = self._state = self._task_options = self._time = None
        self._context = None
        if timer is not None:
            timer.cancel()
        if finish is not None:
            finish.set_result(left)
        return 0

    cdef dict abandon(self):
        """Complete where no pump can run: before a start, or after the loop was closed under us."""
        cdef Slot slot
        cdef Batch batch
        self._left = {} if self._left is None else self._left
        for slot in self._slots:
            slot.close()
        for batch in list(self._batches):
            batch.ended = True
            batch.slot.put_back([_carried_of(batch, i) for i in range(len(batch.cells))])
        self._batches.clear()
        for slot in self._slots:
            self.note_left(slot)
            slot.active = slot.in_flight = 0
            slot.in_service = False
        left = self._left
        self._finish = self._timer = None
        qr_bell_answer(self._bell)
        self.finish()
        return left


cdef list _items_of(list cells):
    return [(<Carried>cell).item if type(cell) is Carried else cell for cell in cells]


cdef Carried _carried_of(Batch batch, Py_ssize_t i):
    cell = batch.cells[i]
    cdef Carried carried = <Carried>cell if type(cell) is Carried else Carried(cell, None)
    if i >= batch.kept:
        carried.position = batch.start + i
    return carried


cdef _patch():
    cdef Pumping sample = Pumping()
    qr_patch_pumping(<PyTypeObject *>Pumping, <char *>&sample._count - <char *><void *>sample)

_patch()
