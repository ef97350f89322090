cimport cython
from libc.stdint cimport uint64_t

from queue_runtime._core.outcome cimport Cancellation
from queue_runtime._core.ring cimport qr_bell, qr_ring
from queue_runtime._core.slot cimport Slot

cdef enum State:
    NEW
    RUNNING
    CLOSING
    COMPLETED

cdef class Pumping

@cython.final
cdef class Batch:
    cdef Pumping owner
    cdef Slot slot
    cdef list cells       # as they were in the slot, kept until the end
    cdef list items       # the pump's
    cdef Py_ssize_t kept  # how many of the cells were put back by a retry before
    cdef uint64_t start   # start + i is the position of cell i, from `kept` on
    cdef object pump      # its coroutine, while it runs
    cdef object task
    cdef bint ended

    cdef int begin(self) except -1
    cdef int end(self, object outcome, object error) except -1


cdef class Pumping:
    cdef qr_ring **_rings   # of the slots, which own them
    cdef Py_ssize_t _count
    cdef tuple _slots
    cdef Py_ssize_t _batch_size
    cdef double _interval
    cdef Py_ssize_t _max_concurrency
    cdef int _policy
    cdef object _on_failure
    cdef object _retry
    cdef object __weakref__

    cdef qr_bell *_bell
    cdef unsigned long _thread
    cdef bint _is_forked
    cdef uint64_t _wakes

    # The loop's alone, from start to complete.
    cdef int _phase
    cdef object _loop
    cdef object _time
    cdef object _context
    cdef object _pump
    cdef object _state
    cdef dict _task_options
    cdef Cancellation _cancellation
    cdef set _batches
    cdef object _timer
    cdef double _timer_at
    cdef double _floor      # a timer that fired early made it this late
    cdef bint _discarding
    cdef bint _expired
    cdef dict _left
    cdef Py_ssize_t _unfinished
    cdef object _finish

    cdef int call(self, Slot slot) except -1
    cdef int ring(self, Slot slot) except -1
    cdef int post(self) except -1
    cdef double now(self) except? -1
    cdef int look(self, Slot slot) except -1
    cdef int serve(self, Slot slot) except -1
    cdef int set_mark(self, Slot slot) except -1
    cdef int come_back(self, Slot slot, double when) except -1
    cdef bint hand_out(self, Slot slot) except -1
    cdef int never_mind(self, Batch batch, object error) except -1
    cdef int batch_ended(self, Batch batch, object outcome, object error) except -1
    cdef int settle(self, Batch batch, object outcome, object error) except -1
    cdef int leave(self, Slot slot) except -1
    cdef int note_left(self, Slot slot) except -1
    cdef int finish(self) except -1
    cdef dict abandon(self)
