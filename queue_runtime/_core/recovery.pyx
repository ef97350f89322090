"""Queues as the journal's files tell them, and snapshots that take the files' place. docs/persistence.md has the format.

Records may be told twice: a snapshot is taken piece by piece while the queues go on, so that what it says may already
contain what the records after its beginning say. So every record says how things are, not by how much they changed,
and what it says of a message that is gone is passed over.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.math cimport INFINITY, fmax, fmin, isfinite
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from queue_runtime._core.envelope cimport decoded
from queue_runtime._core.journal cimport *
from queue_runtime._core.ledger cimport Lane, Ledger, release
from queue_runtime._core.message cimport Message
from queue_runtime._core.shelf cimport *

from queue_runtime.errors import QueueRuntimeError

journal_set_up()  # each module has its own tables

cdef int64_t MOST_EFFORT = <int64_t>1 << 29  # bytes that a search adds up checksums of

cdef struct Reader:
    const uint8_t *at
    const uint8_t *end
    bint short              # more was asked for than there is


cdef const uint8_t *skip(Reader *r, Py_ssize_t size) noexcept:
    """Pass over so many bytes and return where they begin, or NULL."""
    cdef const uint8_t *at = r.at
    if r.end - at < size:
        r.short = True
        return NULL
    r.at = at + size
    return at


cdef int64_t number(Reader *r, int size) noexcept:
    cdef const uint8_t *at = skip(r, size)
    return 0 if at == NULL else <int64_t>journal_get(at, size)


cdef double time(Reader *r) noexcept:
    cdef const uint8_t *at = skip(r, 8)
    return 0.0 if at == NULL else journal_get_double(at)


cdef bint whole(Reader *r) noexcept:
    """Whether all was there, and nothing more."""
    return not r.short and r.at == r.end


cdef bytes run(Reader *r):
    """A length and so many bytes; None where it says so."""
    cdef int64_t size = number(r, 4)
    cdef const uint8_t *at
    if size == <int64_t>ABSENT:
        return None
    at = skip(r, size)
    return None if at == NULL else PyBytes_FromStringAndSize(<const char *>at, size)


cdef str text(Reader *r):
    cdef bytes found = run(r)
    return None if found is None else found.decode()


cdef Message envelope(Reader *r):
    """All that is left."""
    cdef Py_ssize_t size = r.end - r.at
    return decoded(PyBytes_FromStringAndSize(<const char *>skip(r, size), size))


cdef int set_text(PyObject **place, str given) except -1:
    Py_XDECREF(place[0])
    place[0] = NULL
    if given is not None:
        Py_INCREF(given)
        place[0] = <PyObject *>given
    return 0


cdef Entry *add_entry(Ledger ledger, bint dead, int64_t number, Message message, double enqueued_at) except NULL:
    """An entry that stands in its index only, until ``place_entries``."""
    cdef Index *index = &ledger.indexes[dead]
    cdef Entry *entry
    if number <= index.last_number:
        raise ValueError("its sequence number was given before")
    if not isfinite(enqueued_at):
        raise ValueError("its time is none")
    entry = <Entry *>PyMem_Malloc(sizeof(Entry))
    if entry == NULL:
        raise MemoryError
    memset(entry, 0, sizeof(Entry))
    Py_INCREF(message)
    entry.message = <PyObject *>message
    entry.spot[IN_LANE] = entry.spot[IN_TIME] = entry.spot[IN_TTL] = -1
    entry.expires = INFINITY
    entry.time_to_live = message.ttl_us / 1e6 if message.ttl_us >= 0 else INFINITY
    entry.enqueued_at = enqueued_at
    entry.dead = dead
    entry.state = FRESH
    index.last_number = number - 1
    index_append(index, entry)
    return entry


@cython.final
cdef class Recovery:
    """Reads files of the journal, the oldest first, into the engines that ``make(name)`` returns for new names.

    ``now`` and ``wall`` as for the engine. Until ``finish`` the engines must not be used. ``moved``, where it is given,
    is called with each message of at least ``threshold`` bytes, and returns what is to be kept in its place; its errors
    must be no QueueRuntimeError, or they would be taken for the record's.

    Thread-safety: one thread at a time.
    """

    cdef object make
    cdef double now
    cdef double wall
    cdef object moved
    cdef Py_ssize_t threshold
    cdef readonly dict queues       # number: engine
    cdef dict last                  # number: the last sequence numbers that a snapshot tells
    cdef readonly bint ended        # the snapshot's end was read
    cdef readonly int64_t records

    def __init__(self, make not None, double now, double wall, Py_ssize_t threshold=0, moved=None):
        self.make = make
        self.threshold = threshold
        self.moved = moved
        self.now = now
        self.wall = wall
        self.queues = {}
        self.last = {}

    def feed(self, buffer not None, int64_t segment, int64_t offset):
        """Read the records of one file from ``offset`` on; return where the last right one ends."""
        cdef Py_buffer view
        cdef const uint8_t *data
        cdef int64_t length
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            data = <const uint8_t *>view.buf
            while offset < view.len:
                length = journal_check(data, view.len, segment, offset)
                if length < 0:
                    break
                if not self.understand(data + offset + JOURNAL_FRAME, length):
                    break
                self.records += 1
                offset += JOURNAL_FRAME + length
        finally:
            PyBuffer_Release(&view)
        return offset

    cdef bint understand(self, const uint8_t *payload, int64_t length) except -1:
        """Apply a record; False when it says nothing that could be."""
        cdef Reader r
        r.at = payload
        r.end = payload + length
        r.short = False
        try:
            return self.apply(&r)
        except (ValueError, QueueRuntimeError):
            return False

    cdef bint apply(self, Reader *r) except -1:
        cdef int kind = <int>number(r, 1)
        cdef uint32_t queue = <uint32_t>number(r, 4)
        cdef Ledger ledger
        cdef int64_t last, last_dead
        if kind == END:
            for ledger, last, last_dead in self.last.values():
                ledger.indexes[0].last_number = max(last, ledger.indexes[0].last_number)
                ledger.indexes[1].last_number = max(last_dead, ledger.indexes[1].last_number)
            self.ended = True
            return True
        if kind == QUEUE:
            last, last_dead = number(r, 8), number(r, 8)
            name = text(r)
            if not whole(r) or queue in self.queues or name is None:
                return False
            ledger = self.queues[queue] = self.make(name)
            self.last[queue] = (ledger, last, last_dead)
            return True
        ledger = self.queues.get(queue)
        if ledger is None:
            return False
        if kind == SEND:
            return self.send(ledger, r)
        if kind == STATE:
            return self.state(ledger, r)
        if kind == SEEN:
            since, name = time(r), text(r)
            if not whole(r):
                return False
            self.see(ledger, since, name)
            return True
        return self.change(ledger, kind, r)

    cdef bint send(self, Ledger ledger, Reader *r) except -1:
        cdef int64_t which = number(r, 8)
        cdef double wall = time(r)
        cdef Message message
        if r.short:
            return False
        message = self.message(r)
        add_entry(ledger, False, which, message, wall)
        self.see(ledger, wall, message.c_deduplication_id())
        return True

    cdef Message message(self, Reader *r):
        cdef Message message = envelope(r)
        if self.moved is None or message.c_size() < self.threshold:
            return message
        return <Message?>self.moved(message)

    cdef int see(self, Ledger ledger, double since, str name) except -1:
        cdef double end = self.now + fmin(since + ledger.window - self.wall, ledger.window)
        if name is not None and end > self.now and name not in ledger.seen:
            if ledger.seen_in_order:  # where the wall went back, the later one does not end before
                end = fmax(end, ledger.seen_in_order[len(ledger.seen_in_order) - 1][0])
            ledger.seen.add(name)
            ledger.seen_in_order.append((end, name))
            ledger.next_forgotten = min(ledger.next_forgotten, end)
        return 0

    cdef bint state(self, Ledger ledger, Reader *r) except -1:
        cdef str session_id = text(r)
        cdef bytes state = run(r)
        if session_id is None or not whole(r):
            return False
        lane_of(ledger, session_id).state = state
        return True

    cdef bint change(self, Ledger ledger, int kind, Reader *r) except -1:
        cdef bint dead = number(r, 1) != 0
        cdef int64_t which = number(r, 8)
        cdef Entry *entry
        cdef int64_t count = 0
        cdef double when = 0.0
        cdef str reason = None
        cdef str description = None
        if kind == ENTRY:
            return self.entry(ledger, dead, which, r)
        if kind == DELIVER:
            count, when = number(r, 8), time(r)
        elif kind == BURY:
            count, reason, description = number(r, 8), text(r), text(r)
        elif kind == HOLD:
            when = time(r)
        elif kind != FORGET and kind != DEFER:
            return False
        if not whole(r):
            return False
        entry = index_find(&ledger.indexes[dead], which)
        if entry == NULL:
            return True
        if kind == DELIVER:
            entry.deliveries = count
            entry.first_delivered_at = when
            entry.state = FRESH
        elif kind == FORGET:
            index_remove(&ledger.indexes[dead], entry)
            release(entry)
        elif kind == BURY:
            self.bury(ledger, entry, count, reason, description)
        elif kind == HOLD:
            entry.state = HELD_BACK
            entry.due = when
        else:
            entry.state = DEFERRED
        return True

    cdef int bury(self, Ledger ledger, Entry *entry, int64_t which, str reason, str description) except -1:
        cdef Index *index = &ledger.indexes[1]
        if not entry.dead:
            index_remove(&ledger.indexes[0], entry)
            if which <= index.last_number:  # the snapshot has it as a dead letter, or it was gone by then
                release(entry)
                return 0
            index.last_number = which - 1
            index_append(index, entry)
            entry.dead = True
        entry.state = FRESH
        set_text(&entry.reason, reason)
        set_text(&entry.description, description)
        return 0

    cdef bint entry(self, Ledger ledger, bint dead, int64_t which, Reader *r) except -1:
        cdef int state = <int>number(r, 1)
        cdef double enqueued_at = time(r)
        cdef int64_t deliveries = number(r, 8)
        cdef double first = time(r)
        cdef double due = time(r)
        cdef str reason = text(r)
        cdef str description = text(r)
        cdef Entry *entry
        if r.short:
            return False
        entry = add_entry(ledger, dead, which, self.message(r), enqueued_at)
        entry.state = state if state == HELD_BACK or state == DEFERRED else FRESH
        entry.deliveries = deliveries
        entry.first_delivered_at = first
        entry.due = due
        set_text(&entry.reason, reason)
        set_text(&entry.description, description)
        return True

    def finish(self):
        """Put everything into its place; the engines, which have their journal by now, may be used."""
        for ledger in self.queues.values():
            self.place_all(<Ledger>ledger)

    cdef int place_all(self, Ledger ledger) except -1:
        cdef Index *index
        cdef Entry *entry
        cdef int64_t place
        cdef int dead
        cdef list doomed = []
        cdef dict lanes = {}  # in the order of their first messages: so they will be taken
        for dead in range(2):
            index = &ledger.indexes[dead]
            for place in range(index.head, index.tail):
                entry = index.items[place & index.mask].entry
                if entry != NULL:
                    if self.place_entry(ledger, entry):
                        doomed.append(entry.number)
                    if (<Lane>entry.lane).ordered:
                        lanes[(<Lane>entry.lane).session_id] = <Lane>entry.lane
        for number in doomed:
            ledger.bury_spent(index_find(&ledger.indexes[0], number))
        for lane in [*lanes.values(), *ledger.sessions.values()]:
            ledger.tend(<Lane>lane)
        return 0

    cdef bint place_entry(self, Ledger ledger, Entry *entry) except -1:
        """True: it stands nowhere, and is to be buried, as it was delivered too often."""
        cdef Message message = <Message>entry.message
        cdef str session_id = None if entry.dead else message.c_session_id()
        cdef bint by_wall = message.scheduled_us / 1e6 > entry.enqueued_at
        cdef double delay = 0.0 if message.delay_us < 0 else message.delay_us / 1e6
        # A wall clock that went back since makes no delay longer than it was.
        cdef double left = fmin(entry.enqueued_at + delay - self.wall, delay)
        cdef Lane lane = ledger.grave if entry.dead else ledger.plain
        if session_id is not None:
            lane = lane_of(ledger, session_id)
        entry.lane = <PyObject *>lane
        lane.count += 1
        ledger.journal.grew(message)
        if by_wall:
            left = message.scheduled_us / 1e6 - self.wall
        if not entry.dead and entry.deliveries == 0 and entry.state == FRESH and left > 0:
            entry.by_wall = by_wall
            entry.due = message.scheduled_us / 1e6 if by_wall else self.now + left
            heap_push(&ledger.agenda if by_wall else &ledger.delays, entry, entry.due)
            entry.state = SCHEDULED
            ledger.tally[0][SCHEDULED] += 1
            return False
        if not entry.dead:
            ledger.start_life(entry, self.now + fmin(left, 0.0))
        if entry.state == DEFERRED:
            ledger.tally[entry.dead][DEFERRED] += 1
        elif not entry.dead and entry.deliveries >= ledger.max_delivery_count:
            return True
        elif entry.state == HELD_BACK and entry.due > self.wall:
            ledger.hold_back(entry, self.now + (entry.due - self.wall))
        else:
            ledger.settle_in(entry)
        return False


cdef Lane lane_of(Ledger ledger, str session_id):
    cdef Lane lane = ledger.sessions.get(session_id)
    if lane is None:
        lane = ledger.sessions[session_id] = Lane.__new__(Lane, session_id)
    return lane


def has_record(buffer not None, int64_t segment, int64_t start):
    """Whether a right record begins anywhere at or after ``start``: then what comes before it is no torn end.

    Yes also where that would take too long to find out: what is there may look like long records at each byte.
    """
    cdef Py_buffer view
    cdef const uint8_t *data
    cdef int64_t offset, length
    cdef int64_t effort = 0
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        data = <const uint8_t *>view.buf
        for offset in range(start, view.len - JOURNAL_FRAME):
            length = <int64_t>journal_get(data + offset, 4)
            if length > view.len - offset - JOURNAL_FRAME:
                continue
            effort += length
            if effort > MOST_EFFORT or journal_check(data, view.len, segment, offset) >= 0:
                return True
    finally:
        PyBuffer_Release(&view)
    return False


def checksum(bytes data not None):
    """CRC-32C."""
    return journal_crc(0, <const uint8_t *><char *>data, len(data))


@cython.final
cdef class Snapshot:
    """All that engines hold, as records, piece by piece while they go on.

    What happens after it was made must be in files that are read after it.

    Thread-safety: as for the engines.
    """

    cdef Records records
    cdef list left              # what is still to be told: [ledger, names seen, sessions, ...] of each queue
    cdef int64_t next_number
    cdef bint ended

    def __init__(self, engines not None):
        cdef Ledger ledger
        self.records = Records.__new__(Records)
        self.left = []
        for ledger in engines:
            self.records.queue(
                ledger.id, ledger.name, ledger.indexes[0].last_number, ledger.indexes[1].last_number
            )
            sessions = [lane for lane in ledger.sessions.values() if (<Lane>lane).state is not None]
            seen = list(ledger.seen_in_order)
            seen.reverse()  # told from its end, the oldest first
            self.left.append((ledger, seen, sessions, ledger.indexes[0].last_number))
        self.left.reverse()

    def more(self, Py_ssize_t size, double now, double wall):
        """Return about so many bytes of further records, in a buffer to ``take`` from; None at the end."""
        cdef Ledger ledger
        while self.left and self.records.used < size:
            ledger, seen, sessions, last = self.left[len(self.left) - 1]
            if seen:
                end, name = seen.pop()
                self.records.seen(ledger.id, wall + (end - ledger.window - now), name)
            elif sessions:
                lane = <Lane>sessions.pop()
                self.records.state(ledger.id, (<Lane>lane).session_id, (<Lane>lane).state)
            elif self.tell(ledger, last, size, now, wall):
                self.left.pop()
                self.next_number = 0
        if not self.left and not self.ended:
            self.ended = True
            self.records.end()
        return self.records if self.records.used else None

    cdef bint tell(self, Ledger ledger, int64_t last, Py_ssize_t size, double now, double wall) except -1:
        """Entries from ``next_number`` on, first the messages and then the dead letters; True at their end."""
        cdef bint dead = self.next_number < 0
        cdef Index *index = &ledger.indexes[dead]
        cdef int64_t place = index_seek(index, -self.next_number if dead else self.next_number)
        cdef Entry *entry
        cdef double due
        while place < index.tail:
            entry = index.items[place & index.mask].entry
            place += 1
            if entry == NULL:
                continue
            if not dead and entry.number > last:
                break
            if self.records.used >= size:
                self.next_number = -entry.number if dead else entry.number
                return False
            due = wall + (entry.due - now) if entry.state == HELD_BACK else 0.0
            self.records.entry(ledger.id, entry, due)
        self.next_number = -1
        return dead
