from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from queue_runtime._core.message cimport Message
from queue_runtime._core.shelf cimport Entry

cdef extern from "journal.h":
    enum:
        JOURNAL_FRAME
    void journal_set_up()
    void journal_put(uint8_t *p, uint64_t value, int bytes)
    uint64_t journal_get(const uint8_t *p, int bytes)
    void journal_put_double(uint8_t *p, double value)
    double journal_get_double(const uint8_t *p)
    uint32_t journal_crc(uint32_t crc, const uint8_t *p, size_t size)
    void journal_seal(uint8_t *data, size_t size, int64_t segment, int64_t offset)
    int64_t journal_check(const uint8_t *data, int64_t size, int64_t segment, int64_t offset)

cdef extern from "port.h":
    int qr_write_at(int file, const void *data, size_t size, int64_t offset)
    int qr_cut(int file, int64_t size)

# What a record says. Numbers of the file format: never changed, only added.
cdef enum:
    QUEUE = 1       # a queue, its name, and the last sequence numbers that it gave
    SEND = 2
    DELIVER = 3
    FORGET = 4      # completed, or dropped at the end of its time to live
    BURY = 5        # became a dead letter, or got other reasons as one
    HOLD = 6        # abandoned with a delay
    DEFER = 7
    STATE = 8       # of a session
    SEEN = 9        # a deduplication id; only in snapshots
    ENTRY = 10      # a message as it stands; only in snapshots
    END = 11        # of a snapshot

cdef enum:
    ABSENT = 0xFFFFFFFF  # the length of a text that is None


cdef class Records:
    cdef uint8_t *data
    cdef Py_ssize_t used
    cdef Py_ssize_t room

    cdef uint8_t *add(self, int kind, uint32_t queue, Py_ssize_t size) except NULL
    cdef int queue(self, uint32_t queue, str name, int64_t last, int64_t last_dead) except -1
    cdef int send(self, uint32_t queue, int64_t number, double wall, Message message) except -1
    cdef int deliver(self, uint32_t queue, Entry *entry) except -1
    cdef int forget(self, uint32_t queue, Entry *entry) except -1
    cdef int bury(
        self, uint32_t queue, Entry *entry, int64_t dead_number, str reason, str description
    ) except -1
    cdef int hold(self, uint32_t queue, Entry *entry, double due) except -1
    cdef int defer(self, uint32_t queue, Entry *entry) except -1
    cdef int state(self, uint32_t queue, str session_id, bytes state) except -1
    cdef int seen(self, uint32_t queue, double since, str name) except -1
    cdef int entry(self, uint32_t queue, Entry *entry, double due) except -1
    cdef int end(self) except -1


cdef class Journal(Records):
    cdef readonly int64_t segment       # the number of the file that is written to
    cdef readonly int64_t offset        # bytes in it
    cdef readonly int64_t written       # bytes ever written: what a wait for the disk goes by
    cdef readonly int64_t total_bytes   # in all files
    cdef public int64_t live_bytes      # about what a snapshot would need
    cdef public int64_t segment_size
    cdef object next_file
    cdef int file
    cdef Py_ssize_t mark                # below it in the buffer: what happened by itself, and may wait
    cdef bint ragged                    # behind `offset` there may be a part of what could not be written
    cdef Py_ssize_t patience            # bytes that wait before `relax` tries again what failed
    cdef public object failure          # an OSError: why nothing can be written for now

    cdef void begin(self) noexcept
    cdef void drop(self) noexcept
    cdef object commit(self)
    cdef object write(self)
    cdef int relax(self) except -1
    cdef void grew(self, Message message) noexcept
    cdef void shrank(self, Message message) noexcept
