"""The journal of the engine's queues: records in a buffer, and the buffer in a file. docs/persistence.md has the format.

What somebody asked for is written before it is done: ``begin``, the records, ``commit``; where the commit fails, nothing
was done and the file ends where it ended. What happens by itself (a dead letter by the count of its deliveries, the end
of a time to live) is done at once, and its record waits in the buffer for the next commit: until then a recovery would
find it out anew.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.string cimport memcpy

from queue_runtime._core.body cimport view_data, view_size
from queue_runtime._core.envelope cimport gather
from queue_runtime._core.message cimport VIEW
from queue_runtime._core.shelf cimport DEFERRED, HELD_BACK
from queue_runtime._core.wire cimport WIRE_MAX_ATTRIBUTES, wire_measure, wire_message, wire_text, wire_write

import errno
import os

from queue_runtime.errors import ProviderError, SerializationError

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *size) except NULL

journal_set_up()

cdef enum:
    SMALL = 1 << 16          # bytes of buffer that are kept
    PLENTY = 1 << 20         # of waiting records: more are written unasked
    OVERHEAD = 64            # of a message in a snapshot, about

# Of an envelope, so that what is added to it fits the 32 bits of a record's length.
cdef uint64_t LONGEST = 0xFFFF0000

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


cdef Py_ssize_t text_size(str text) except -1:
    cdef Py_ssize_t size = 0
    if text is None:
        return 4
    PyUnicode_AsUTF8AndSize(text, &size)
    return 4 + size


cdef uint8_t *put_text(uint8_t *p, str text) except NULL:
    cdef Py_ssize_t size = 0
    cdef const char *data
    if text is None:
        journal_put(p, <uint64_t>ABSENT, 4)
        return p + 4
    data = PyUnicode_AsUTF8AndSize(text, &size)
    journal_put(p, size, 4)
    memcpy(p + 4, data, size)
    return p + 4 + size


cdef class Records:
    """A buffer of records, each behind the frame of its length and a checksum that is still to be written.

    Every payload begins with its kind (1 byte) and the queue's number (4 bytes).

    Thread-safety: one thread at a time.
    """

    def __dealloc__(self):
        PyMem_Free(self.data)

    cdef uint8_t *add(self, int kind, uint32_t queue, Py_ssize_t size) except NULL:
        """Add a record with ``size`` bytes behind kind and queue; return where these go."""
        cdef Py_ssize_t need = self.used + JOURNAL_FRAME + 5 + size
        cdef Py_ssize_t room
        cdef uint8_t *data
        if need > self.room:
            room = max(need + need // 2, 4096)
            data = <uint8_t *>PyMem_Realloc(self.data, room)
            if data == NULL:
                raise MemoryError
            self.data = data
            self.room = room
        data = self.data + self.used
        journal_put(data, 5 + size, 4)
        data[JOURNAL_FRAME] = kind
        journal_put(data + JOURNAL_FRAME + 1, queue, 4)
        self.used = need
        return data + JOURNAL_FRAME + 5

    cdef int queue(self, uint32_t queue, str name, int64_t last, int64_t last_dead) except -1:
        cdef uint8_t *p = self.add(QUEUE, queue, 16 + text_size(name))
        journal_put(p, last, 8)
        journal_put(p + 8, last_dead, 8)
        put_text(p + 16, name)
        return 0

    cdef int send(self, uint32_t queue, int64_t number, double wall, Message message) except -1:
        cdef wire_message parts
        cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
        cdef Py_ssize_t size = measured(message, &parts, attributes)
        cdef uint8_t *p = self.add(SEND, queue, 16 + size)
        journal_put(p, number, 8)
        journal_put_double(p + 8, wall)
        put_message(p + 16, message, &parts)
        return 0

    cdef int deliver(self, uint32_t queue, Entry *entry) except -1:
        cdef uint8_t *p = self.add(DELIVER, queue, 25)
        put_name(p, entry)
        journal_put(p + 9, entry.deliveries, 8)
        journal_put_double(p + 17, entry.first_delivered_at)
        return 0

    cdef int forget(self, uint32_t queue, Entry *entry) except -1:
        put_name(self.add(FORGET, queue, 9), entry)
        return 0

    cdef int bury(
        self, uint32_t queue, Entry *entry, int64_t dead_number, str reason, str description
    ) except -1:
        cdef uint8_t *p = self.add(BURY, queue, 17 + text_size(reason) + text_size(description))
        put_name(p, entry)
        journal_put(p + 9, dead_number, 8)
        put_text(put_text(p + 17, reason), description)
        return 0

    cdef int hold(self, uint32_t queue, Entry *entry, double due) except -1:
        cdef uint8_t *p = self.add(HOLD, queue, 17)
        put_name(p, entry)
        journal_put_double(p + 9, due)
        return 0

    cdef int defer(self, uint32_t queue, Entry *entry) except -1:
        put_name(self.add(DEFER, queue, 9), entry)
        return 0

    cdef int state(self, uint32_t queue, str session_id, bytes state) except -1:
        cdef Py_ssize_t size = 0 if state is None else PyBytes_GET_SIZE(state)
        cdef uint8_t *p = self.add(STATE, queue, text_size(session_id) + 4 + size)
        p = put_text(p, session_id)
        if state is None:
            journal_put(p, <uint64_t>ABSENT, 4)
        else:
            journal_put(p, size, 4)
            memcpy(p + 4, PyBytes_AS_STRING(state), size)
        return 0

    cdef int seen(self, uint32_t queue, double since, str name) except -1:
        cdef uint8_t *p = self.add(SEEN, queue, 8 + text_size(name))
        journal_put_double(p, since)
        put_text(p + 8, name)
        return 0

    cdef int entry(self, uint32_t queue, Entry *entry, double due) except -1:
        """``due`` by the wall: when what is held back will be back."""
        cdef wire_message parts
        cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
        cdef Message message = <Message>entry.message
        cdef str reason = None if entry.reason == NULL else <str>entry.reason
        cdef str description = None if entry.description == NULL else <str>entry.description
        cdef Py_ssize_t size = measured(message, &parts, attributes)
        cdef uint8_t *p = self.add(ENTRY, queue, 42 + text_size(reason) + text_size(description) + size)
        put_name(p, entry)
        p[9] = entry.state if entry.state == HELD_BACK or entry.state == DEFERRED else 0
        journal_put_double(p + 10, entry.enqueued_at)
        journal_put(p + 18, entry.deliveries, 8)
        journal_put_double(p + 26, entry.first_delivered_at)
        journal_put_double(p + 34, due)
        p = put_text(put_text(p + 42, reason), description)
        put_message(p, message, &parts)
        return 0

    cdef int end(self) except -1:
        self.add(END, 0, 0)
        return 0

    @property
    def size(self):
        """Bytes in the buffer."""
        return self.used

    def take(self, int64_t segment, int64_t offset):
        """Return the records, sealed for that place, and begin anew."""
        journal_seal(self.data, self.used, segment, offset)
        taken = PyBytes_FromStringAndSize(<char *>self.data, self.used)
        self.used = 0
        return taken


cdef void put_name(uint8_t *p, Entry *entry) noexcept:
    """Which entry: whether it is a dead letter, and its number there."""
    p[0] = entry.dead
    journal_put(p + 1, entry.number, 8)


cdef Py_ssize_t measured(Message message, wire_message *parts, wire_text *attributes) except -1:
    cdef uint64_t need
    if message.wire is None:
        gather(message, parts, attributes)
        need = wire_measure(parts)
    else:
        need = PyBytes_GET_SIZE(message.wire)
        if message.built & VIEW:
            need += view_size(message._body)
    if need > LONGEST:
        raise SerializationError(f"the message needs {need} bytes as an envelope, which is too large for the journal")
    return need


cdef void put_message(uint8_t *p, Message message, wire_message *parts) noexcept:
    cdef Py_ssize_t head
    if message.wire is None:
        wire_write(parts, p)
        return
    head = PyBytes_GET_SIZE(message.wire)
    memcpy(p, PyBytes_AS_STRING(message.wire), head)
    if message.built & VIEW:
        memcpy(p + head, view_data(message._body), view_size(message._body))


@cython.final
cdef class Journal(Records):
    """The file that the records go to.

    Parameters
    ----------
    file, segment, offset:
        An open file's descriptor, its number in the journal, and how many bytes it has.
    next_file:
        Called without arguments when ``segment_size`` is reached: returns the descriptor, number and size of the next
        file, or raises OSError. The files are its owner's to close.
    total_bytes:
        What all files have.

    Thread-safety: as for the engines that write to it.
    """

    def __init__(
        self, int file, int64_t segment, int64_t offset, *, object next_file, int64_t segment_size,
        int64_t total_bytes,
    ):
        self.file = file
        self.segment = segment
        self.offset = offset
        self.next_file = next_file
        self.segment_size = segment_size
        self.total_bytes = total_bytes

    cdef void begin(self) noexcept:
        """What is added from here on is somebody's, and goes when its commit fails."""
        self.mark = self.used

    cdef void drop(self) noexcept:
        """Take back what was added after ``begin``."""
        self.used = self.mark

    cdef object commit(self):
        """Write all that is in the buffer; return None, or the error: then what came after ``begin`` is gone."""
        cdef object error = None if self.used == self.mark else self.write()
        if error is None:
            if self.room > PLENTY + SMALL:
                PyMem_Free(self.data)
                self.data = NULL
                self.room = 0
        else:
            self.used = self.mark
        return error

    cdef int relax(self) except -1:
        """After what happened by itself: write when very much waits. Where that fails it goes on waiting."""
        if self.used >= max(PLENTY, self.patience) and self.failure is None:
            # Each attempt costs as much as waits: those that fail have to become rare.
            self.patience = 0 if self.write() is None else 2 * self.used
        return 0

    cdef object write(self):
        cdef int problem = 0
        if self.failure is not None:
            return failed(self.failure)
        if self.used == 0:
            return None
        if self.ragged:
            problem = qr_cut(self.file, self.offset)
            if problem:
                return refusal(problem)
            self.ragged = False
        if self.offset >= self.segment_size:
            try:
                self.turn()
            except OSError as error:
                return refusal_of(error)
        journal_seal(self.data, self.used, self.segment, self.offset)
        # With the interpreter's lock: a write to the page cache takes about a microsecond, and getting the lock back
        # from a busy thread some milliseconds.
        problem = qr_write_at(self.file, self.data, self.used, self.offset)
        if problem:
            self.ragged = qr_cut(self.file, self.offset) != 0
            return refusal(problem)
        self.offset += self.used
        self.written += self.used
        self.total_bytes += self.used
        self.used = 0
        return None

    def turn(self):
        """Go on in the next file."""
        self.file, self.segment, self.offset = self.next_file()
        self.total_bytes += self.offset

    def flush(self):
        """Write what waits; return None, or the error: then it goes on waiting."""
        return self.write()

    def add_queue(self, uint32_t queue, str name not None):
        """Write that there is a new queue; raises what the write does."""
        self.begin()
        self.queue(queue, name, 0, 0)
        error = self.commit()
        if error is not None:
            raise error

    def replaced(self, int64_t gone, int64_t come):
        """Files of so many bytes gave way to a snapshot of so many."""
        self.total_bytes += come - gone

    cdef void grew(self, Message message) noexcept:
        self.live_bytes += message._size + OVERHEAD

    cdef void shrank(self, Message message) noexcept:
        self.live_bytes -= message._size + OVERHEAD


class Gone(OSError):
    """Why a journal takes nothing any more: it was closed, or belongs to another process."""


def failed(error not None):
    """What a caller gets while the journal's owner repairs it, or for good, as it is gone."""
    if isinstance(error, Gone):
        return ProviderError("memory", "journal-failed", f"the journal cannot be written: {error}")
    refused = ProviderError("memory", "journal-failed", f"the journal is being repaired: {error}", is_transient=True)
    refused.retry_after = 1.0
    refused.__cause__ = error
    return refused


cdef object refusal(int problem):
    return refusal_of(OSError(problem, os.strerror(problem)))


def refusal_of(error not None):
    """What a caller gets whose change could not be written."""
    if error.errno in NO_ROOM:
        refused = ProviderError("memory", "no-room", f"the journal's disk is full: {error}", is_transient=True)
        refused.retry_after = 5.0
    else:
        refused = ProviderError("memory", "journal-failed", f"the journal cannot be written: {error}")
    refused.__cause__ = error
    return refused
