# One slot: a ring, what waits in front of it and behind it, and who waits for room. Internal; mpcc.pyx drives it.
#
# Ownership: a cell holds one strong reference. `put` makes it before the cell is published, `take` hands it over to
# the list that it returns. What a producer drops is released by that producer, after the cell is empty.

import threading
from collections import deque

from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libc.math cimport INFINITY

from queue_runtime._core.ring cimport (
    QR_DONE, QR_NEVER, QR_SHUT, qr_answer, qr_ring, qr_ring_arm, qr_ring_claim, qr_ring_claim_shut,
    qr_ring_close, qr_ring_drain_end, qr_ring_drain_try, qr_ring_free, qr_ring_head, qr_ring_new, qr_ring_open,
    qr_ring_publish, qr_ring_reached, qr_ring_tail, qr_ring_take, qr_ring_wait_begin, qr_ring_wait_end,
    qr_ring_waiters,
)

cdef extern from *:
    """
    /* The collector cannot see into a C ring. So the slot's type gets a tp_traverse that visits the published cells
       before it does what Cython generated, and a tp_clear that empties them. Both run when no ring operation is
       under way: those neither release the GIL nor allocate, and a free-threaded build stops the world. */
    static Py_ssize_t qr_ring_offset;
    static traverseproc qr_generated_traverse;
    static inquiry qr_generated_clear;

    static qr_ring *qr_ring_of(PyObject *slot) { return *(qr_ring **)((char *)slot + qr_ring_offset); }

    static int qr_slot_traverse(PyObject *slot, visitproc visit, void *arg) {
        qr_ring *ring = qr_ring_of(slot);
        if (ring != NULL) {
            uint64_t tail = qr_ring_tail(ring);
            for (uint64_t position = qr_ring_head(ring); position < tail; position++)
                Py_VISIT((PyObject *)qr_ring_peek(ring, position));
        }
        return qr_generated_traverse(slot, visit, arg);
    }

    static void qr_empty(qr_ring *ring) {
        void *item;
        /* A decref may run any code; each one comes after its cell is empty. */
        while (qr_ring_take(ring, &item, 1) == 1) Py_DECREF((PyObject *)item);
    }

    static int qr_slot_clear(PyObject *slot) {
        qr_ring *ring = qr_ring_of(slot);
        if (ring != NULL) {
            qr_ring_close(ring);
            qr_empty(ring);
        }
        return qr_generated_clear(slot);
    }

    static void qr_patch_slot(PyTypeObject *type, Py_ssize_t ring_offset) {
        qr_ring_offset = ring_offset;
        qr_generated_traverse = type->tp_traverse;
        qr_generated_clear = type->tp_clear;
        type->tp_traverse = qr_slot_traverse;
        type->tp_clear = qr_slot_clear;
    }

    static PyObject **qr_list_items(PyObject *list) { return ((PyListObject *)list)->ob_item; }
    """
    void qr_empty(qr_ring *ring)
    void qr_patch_slot(PyTypeObject *type, Py_ssize_t ring_offset)
    PyObject **qr_list_items(object) noexcept

cdef extern from "Python.h":
    list PyList_New(Py_ssize_t size)
    int PyList_SetSlice(object, Py_ssize_t low, Py_ssize_t high, PyObject *) except -1


cdef class Carried:
    """An item with something attached: a caller that waits for its outcome, or the attempts made so far."""

    def __cinit__(self, object item, object future):
        self.item = item
        self.future = future


cdef class Slot:
    def __cinit__(self, Py_ssize_t number, uint64_t capacity, uint64_t low_water, bint shares_drain):
        self.ring = qr_ring_new(capacity)
        if self.ring is NULL:
            raise MemoryError(f"a slot of {capacity} items")
        self.number = number
        self.low_water = low_water
        self.shares_drain = shares_drain
        # Reentrant: a finalizer that runs while this thread holds it may push.
        self.lock = threading.RLock()
        self.room = threading.Condition(self.lock)
        self.waiters = deque()
        self.overflow = deque()
        self.front = []
        self.rung_at = INFINITY
        self.deadline = INFINITY

    def __dealloc__(self):
        # Needs no lock: nobody has a reference any more.
        if self.ring is not NULL:
            qr_empty(self.ring)
            qr_ring_free(self.ring)

    cdef Py_ssize_t ready(self) noexcept:
        cdef uint64_t head = qr_ring_head(self.ring)
        return len(self.front) + <Py_ssize_t>(qr_ring_tail(self.ring) - head)

    cdef uint64_t pushed(self):
        return qr_ring_tail(self.ring) + <uint64_t>len(self.overflow) + self.skipped

    # The consumer's.

    cdef list take(self, Py_ssize_t most, uint64_t *start):
        """Up to `most` items, what was put back first; start[0] + i is the position of the i-th that was not.

        Where producers may wait for room, the caller lets them go, once it has the items in a safe place.
        """
        cdef list ahead = None, cells
        cdef Py_ssize_t wanted, got
        if self.front:
            ahead = self.front[:most]
            del self.front[:most]
            most -= len(ahead)
        wanted = min(most, <Py_ssize_t>(qr_ring_tail(self.ring) - qr_ring_head(self.ring)))
        # Allocated before, so that nothing can run or fail while cells change hands.
        cells = PyList_New(wanted)
        if self.shares_drain and not qr_ring_drain_try(self.ring):
            got = 0
        else:
            start[0] = qr_ring_head(self.ring) - (0 if ahead is None else len(ahead))
            got = qr_ring_take(self.ring, <void **>qr_list_items(cells), wanted)
            if self.shares_drain:
                qr_ring_drain_end(self.ring)
        if got < wanted:
            PyList_SetSlice(cells, got, wanted, NULL)
        return cells if ahead is None else ahead + cells

    cdef list take_all(self):
        cdef list cells = []
        cdef uint64_t start = 0
        cdef Py_ssize_t count = -1
        while len(cells) > count:
            count = len(cells)
            if self.spilled:
                self.refill()
            cells += self.take(self.ready(), &start)
        return cells

    cdef int put_back(self, list carried) except -1:
        # By position: of two batches that failed, the older one may have failed later.
        self.front = sorted(self.front + carried, key=_position)
        return 0

    cdef int refill(self) except -1:
        """Move what overflowed into the ring, as far as it goes; open it again when nothing is left outside."""
        cdef object item
        cdef uint64_t position
        cdef Py_ssize_t count
        with self.lock:
            count = <Py_ssize_t>(self.ring.capacity - (qr_ring_tail(self.ring) - qr_ring_head(self.ring)))
            count = min(count, len(self.overflow))
            position = qr_ring_claim_shut(self.ring, count)
            while count > 0:
                item = self.overflow.popleft()
                Py_INCREF(item)
                qr_ring_publish(self.ring, position, <void *>item)
                position += 1
                count -= 1
            if not self.overflow:
                self.spilled = False
                if not self.closed:
                    qr_ring_open(self.ring)
        return 0

    cdef int close(self) except -1:
        with self.lock:
            self.closed = True
            qr_ring_close(self.ring)
        self.let_all_go()
        return 0

    cdef int open(self) except -1:
        with self.lock:
            self.closed = False
            qr_ring_arm(self.ring, QR_NEVER)
            if not self.spilled:  # or else refill opens it
                qr_ring_open(self.ring)
        return 0

    cdef int let_go(self) except -1:
        """After head moved: wake those who wait for room, once there is enough of it (hysteresis)."""
        if qr_ring_waiters(self.ring) > 0 and qr_ring_tail(self.ring) - qr_ring_head(self.ring) <= self.low_water:
            self.let_all_go()
        return 0

    cdef int let_all_go(self) except -1:
        with self.lock:
            self.room.notify_all()
            waiting = list(self.waiters)
            self.waiters.clear()
        for future in waiting:
            _release(future)
        return 0

    # The producers'.

    cdef qr_answer put(self, PyObject **items, Py_ssize_t count, bint *reached) noexcept:
        """Push `count` items, all or none; reached[0]: the loop must be called."""
        cdef uint64_t start
        cdef Py_ssize_t i
        cdef qr_answer answer
        answer = qr_ring_claim(self.ring, count, &start)
        if answer == QR_DONE:
            for i in range(count):
                Py_INCREF(<object>items[i])
                qr_ring_publish(self.ring, start + i, items[i])
            reached[0] = qr_ring_reached(self.ring, start, count)
        return answer

    cdef qr_answer spill(self, list items, bint *reached):
        """Push with no bound. While anything is outside, the ring is shut, so that the order is kept."""
        cdef qr_answer answer
        with self.lock:
            if self.closed:
                return QR_SHUT
            answer = self.put(qr_list_items(items), len(items), reached)
            if answer != QR_DONE:
                # The first one outside calls; after that the loop knows.
                reached[0] = not self.spilled
                qr_ring_close(self.ring)
                self.spilled = True
                self.overflow.extend(items)
        return QR_DONE

    cdef object drop_oldest(self):
        """Take the oldest item out, for the caller to release; None when another thread is taking."""
        cdef void *cell = NULL
        cdef object item = None
        if not qr_ring_drain_try(self.ring):
            return None
        if qr_ring_take(self.ring, &cell, 1) == 1:
            self.dropped += 1
        qr_ring_drain_end(self.ring)
        if cell is not NULL:
            item = <object>cell
            Py_DECREF(item)
        return item

    cdef int enlist(self, object future) except -1:
        """Count one who waits for room: a future to be set, or (None) a thread on `room`."""
        with self.lock:
            qr_ring_wait_begin(self.ring)
            if future is not None:
                self.waiters.append(future)
        return 0

    cdef int delist(self, object future) except -1:
        with self.lock:
            qr_ring_wait_end(self.ring)
            if future is not None and future in self.waiters:
                self.waiters.remove(future)
        return 0


def _position(Carried carried):
    return carried.position


def _set_none(future):
    if not future.done():
        future.set_result(None)


def _release(future):
    try:
        future.get_loop().call_soon_threadsafe(_set_none, future)
    except RuntimeError:
        pass  # its loop is closed, and nobody waits any more


cdef _patch():
    cdef Slot sample = Slot(0, 1, 0, False)
    qr_patch_slot(<PyTypeObject *>Slot, <char *>&sample.ring - <char *><void *>sample)

_patch()
