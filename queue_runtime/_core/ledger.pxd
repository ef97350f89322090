from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from queue_runtime._core.journal cimport Journal
from queue_runtime._core.shelf cimport HELD_BACK, Chain, Entry, Heap, Index


cdef class Link:
    cdef readonly long long receiver_id
    cdef readonly double locked_until   # epoch seconds, of a session
    cdef readonly bint closed
    cdef readonly bint lost
    cdef public bint waiting
    cdef int64_t home                   # the engine's number
    cdef Lane lane
    cdef Chain owned
    cdef Py_ssize_t locks               # length of `owned`; while there are any, the engine owns a reference


cdef class Lane:
    cdef str session_id                 # None: of messages without a session, or of dead letters
    cdef bint ordered                   # a session: what is held back holds its followers back
    cdef Chain fresh
    cdef Heap back
    cdef int64_t count                  # entries that belong here, in whatever state
    cdef bytes state
    cdef Link holder
    cdef double lock_end
    cdef bint is_ready
    cdef PyObject *before[2]
    cdef PyObject *after[2]


cdef struct Lanes:
    PyObject *first
    PyObject *last


cdef class Ledger:
    cdef readonly str name
    cdef readonly double lock_duration
    cdef readonly double session_lock_duration
    cdef readonly Py_ssize_t capacity
    cdef int64_t max_delivery_count
    cdef bint bury_expired
    cdef double window
    cdef Py_ssize_t max_message_size
    cdef uint64_t secret
    cdef int64_t number
    cdef Index indexes[2]               # of messages, of dead letters
    cdef int64_t tally[2][6]            # entries by State, of messages and of dead letters
    cdef Chain locks
    cdef Heap delays
    cdef Heap agenda
    cdef Heap lives
    cdef Lane plain
    cdef Lane grave
    cdef dict sessions
    cdef Lanes ready
    cdef Lanes held
    cdef set seen
    cdef object seen_in_order           # deque of (end, id)
    cdef double next_forgotten          # when the first of them is forgotten
    cdef list signals
    cdef Journal journal                # None = nothing is kept
    cdef uint32_t id                    # this queue's, in the journal
    cdef bint written                   # what is being done is in the journal already

    cdef int settle_in(self, Entry *entry) except -1
    cdef int hold_back(self, Entry *entry, double due) except -1
    cdef int start_life(self, Entry *entry, double since) except -1
    cdef void lock(self, Entry *entry, Link link, double now, double wall) noexcept
    cdef void unlock(self, Entry *entry) noexcept
    cdef void detach(self, Entry *entry) noexcept
    cdef int forget(self, Entry *entry) except -1
    cdef int bury(self, Entry *entry, str reason, str description) except -1
    cdef int expire(self, Entry *entry) except -1
    cdef int bury_spent(self, Entry *entry) except -1
    cdef int give_back(self, Entry *entry, double now, double delay) except -1
    cdef int tend(self, Lane lane) except -1
    cdef int signal(self, Link link) except -1
    cdef void vacate(self, Lane lane) noexcept
    cdef int check_home(self, Link link) except -1
    cdef int drop_locks(self, Link link, double now) except -1
    cdef int advance(self, double now, double wall) except -1
    cdef int appear(self, Entry *entry, double since) except -1
    cdef void occupy(self, Lane lane, Link link, double now, double wall) noexcept
    cdef Py_ssize_t write_sends(self, list messages, Py_ssize_t start, double wall) except -1
    cdef int commit(self) except -1
    cdef void extend(self, Lane lane, double now, double wall) noexcept


cdef int64_t number_of(object given, str field) except -1
cdef void release(Entry *entry) noexcept


cdef inline Entry *next_of(Lane lane) noexcept:
    """The entry that is delivered next; NULL when there is none, or one that is held back comes first."""
    cdef Entry *entry = lane.fresh.first
    if lane.back.size and (entry == NULL or lane.back.nodes[0].entry.number < entry.number):
        entry = lane.back.nodes[0].entry
        if entry.state == HELD_BACK:
            return NULL
    return entry
