cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

from queue_runtime._core.ring cimport qr_answer, qr_ring


@cython.final
cdef class Carried:
    cdef object item
    cdef object future
    cdef int attempts
    cdef uint64_t position


@cython.final
cdef class Slot:
    # Shared by producers and the loop.
    cdef qr_ring *ring
    cdef readonly Py_ssize_t number
    cdef bint carries           # a Carried may be among the cells
    cdef bint shares_drain      # producers may take too (drop-oldest)
    cdef bint closed            # under lock
    cdef bint spilled           # overflow holds items, and the ring is shut; under lock
    cdef object lock
    cdef object room            # a condition on lock: threads that wait for room
    cdef object waiters         # futures that wait for room; under lock
    cdef object overflow        # what the ring had no room for (unbounded); under lock
    cdef uint64_t low_water
    cdef double rung_at         # loop time when the idle slot's first item called

    # The loop's alone.
    cdef list front             # Carried items put back by a retry, oldest first
    cdef Py_ssize_t active      # pumps that run
    cdef Py_ssize_t in_flight   # items that they hold
    cdef bint in_service
    cdef bint idle
    cdef bint finished
    cdef uint64_t mark          # what is at or beyond this position came after mark_time
    cdef double mark_time
    cdef double base            # no item in the slot came before this time
    cdef double deadline        # when the timer must look at the slot
    cdef double resume_at       # end of a retry's pause; 0: none
    cdef uint64_t due           # positions below are pumped without waiting for a full batch

    # Counters.
    cdef uint64_t batches
    cdef uint64_t delivered
    cdef uint64_t failed
    cdef uint64_t retried
    cdef uint64_t dropped
    cdef uint64_t skipped       # dropped before they were ever in the ring
    cdef uint64_t refused
    cdef uint64_t left

    cdef Py_ssize_t ready(self) noexcept
    cdef uint64_t pushed(self)
    cdef list take(self, Py_ssize_t most, uint64_t *start)
    cdef list take_all(self)
    cdef int put_back(self, list carried) except -1
    cdef qr_answer put(self, PyObject **items, Py_ssize_t count, bint *reached) noexcept
    cdef qr_answer spill(self, list items, bint *reached)
    cdef int refill(self) except -1
    cdef object drop_oldest(self)
    cdef int close(self) except -1
    cdef int open(self) except -1
    cdef int let_go(self) except -1
    cdef int let_all_go(self) except -1
    cdef int enlist(self, object future) except -1
    cdef int delist(self, object future) except -1
