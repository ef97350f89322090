"""The broker's rules for one queue: a synchronous state machine that is told the time and never waits.

Words. An *entry* is a message in the queue. A *lane* is what is delivered in order of sequence number: the messages
without a session, one session's messages, or the dead letters. A *link* is one receiver's end: it owns the locks of
what it received, and a session link holds its lane. To *advance* is to let everything happen that fell due since the
last call; every call does so first, in the order: session locks, message locks, delays, schedules, times to live,
deduplication ids.

Two times go into each call: `now`, which never goes back, for locks, delays, times to live and deduplication; and
`wall`, in seconds since the epoch, for the stamps that others read and for schedules given as a time of day.
"""

cimport cython
from cpython.list cimport PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.math cimport INFINITY, NAN, fmax, isfinite
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from queue_runtime._core.message cimport (
    Message,
    Receipt,
    ReceivedMessage,
    is_session_id,
    make_received,
    make_receipt,
)
from queue_runtime._core.shelf cimport *

import os
from collections import deque
from datetime import UTC, datetime

from queue_runtime.errors import (
    ClosedError,
    InvalidReceiptError,
    MessageTooLargeError,
    SessionLockedError,
    SessionLockLostError,
    ValidationError,
)

cdef extern from "Python.h":
    PyObject *PyDict_GetItem(object mapping, object key)
    unsigned long long PyLong_AsUnsignedLongLong(object) except? 0xFFFFFFFFFFFFFFFF
    bint PyLong_CheckExact(object)

COMPLETE, ABANDON, DEAD_LETTER, DEFER = range(4)

cdef enum:
    DO_COMPLETE = 0
    DO_ABANDON = 1
    DO_DEAD_LETTER = 2
    DO_DEFER = 3

# A token is the delivery, packed: the number, whether it is a dead letter, and the low bits of the delivery count;
# then masked with the engine's own random bits, so that it is told neither from a receipt nor by counting.
cdef enum:
    COUNT_BITS = 20
    COUNT_MASK = 0xFFFFF

cdef int64_t LAST_NUMBER = <int64_t>1 << 42
cdef str TTL_EXPIRED = "TTLExpired"
cdef str TOO_MANY_DELIVERIES = "MaxDeliveryCountExceeded"

cdef int64_t engines_made = 0
cdef long long links_made = 0

# The two chains that a lane can be in at once.
cdef enum:
    READY = 0       # sessions with a deliverable message and no holder, in the order in which they became so
    HELD = 1        # sessions with a holder, in the order in which their locks end


@cython.final
@cython.no_gc
cdef class Link:
    """One receiver's end. Made by the engine's ``open_link`` and ``accept``; whatever it holds ends with ``close_link``.

    ``waiting`` is for the owner to set when it waits for a message of its session or for the loss of it; the engine
    clears it when it reports the link in ``take_signals``.

    Thread-safety: as for its engine.
    """

    cdef readonly long long receiver_id
    cdef readonly double locked_until   # epoch seconds, of a session
    cdef readonly bint closed
    cdef readonly bint lost
    cdef public bint waiting
    cdef int64_t home                   # the engine's number
    cdef Lane lane
    cdef Chain owned
    cdef Py_ssize_t locks               # length of `owned`; while there are any, the engine owns a reference

    @property
    def session_id(self):
        """The session it holds or held, or None."""
        return None if self.lane is None else self.lane.session_id


@cython.final
@cython.no_gc
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

    def __cinit__(self, session_id):
        self.session_id = session_id
        self.ordered = session_id is not None
        self.back.kind = IN_LANE

    def __dealloc__(self):
        PyMem_Free(self.back.nodes)


cdef struct Lanes:
    PyObject *first
    PyObject *last


cdef void lanes_append(Lanes *chain, Lane lane, int kind) noexcept:
    lane.before[kind] = chain.last
    lane.after[kind] = NULL
    if chain.last != NULL:
        (<Lane>chain.last).after[kind] = <PyObject *>lane
    else:
        chain.first = <PyObject *>lane
    chain.last = <PyObject *>lane


cdef void lanes_remove(Lanes *chain, Lane lane, int kind) noexcept:
    if lane.before[kind] != NULL:
        (<Lane>lane.before[kind]).after[kind] = lane.after[kind]
    else:
        chain.first = lane.after[kind]
    if lane.after[kind] != NULL:
        (<Lane>lane.after[kind]).before[kind] = lane.before[kind]
    else:
        chain.last = lane.before[kind]


cdef inline Entry *next_of(Lane lane) noexcept:
    """The entry that is delivered next; NULL when there is none, or one that is held back comes first."""
    cdef Entry *entry = lane.fresh.first
    if lane.back.size and (entry == NULL or lane.back.nodes[0].entry.number < entry.number):
        entry = lane.back.nodes[0].entry
        if entry.state == HELD_BACK:
            return NULL
    return entry


cdef void release(Entry *entry) noexcept:
    cdef PyObject *message = entry.message
    cdef PyObject *reason = entry.reason
    cdef PyObject *description = entry.description
    PyMem_Free(entry)
    Py_XDECREF(message)
    Py_XDECREF(reason)
    Py_XDECREF(description)


@cython.final
@cython.no_gc  # it holds messages, lanes and links, none of which can refer back to it
cdef class Engine:
    """One queue and its dead-letter queue.

    Parameters
    ----------
    name:
        The queue's name, for receipts.
    lock_duration, session_lock_duration:
        Seconds that a delivery and a session stay locked.
    max_delivery_count:
        A message that comes back after so many deliveries becomes a dead letter.
    dead_letter_on_expiration:
        Whether a message whose time to live is over becomes a dead letter; otherwise it is dropped.
    deduplication_window:
        Seconds for which a deduplication id is remembered; 0 remembers none.
    capacity:
        Messages that the queue holds at most, and dead letters as well. Dead letters beyond that take the room of
        messages, so that none is lost and twice the capacity bounds everything.
    max_message_size:
        Bytes of one message.

    Thread-safety: one thread at a time.
    """

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

    def __cinit__(
        self, str name not None, *, double lock_duration, double session_lock_duration, int64_t max_delivery_count,
        bint dead_letter_on_expiration, double deduplication_window, Py_ssize_t capacity, Py_ssize_t max_message_size,
    ):
        global engines_made
        engines_made += 1
        self.number = engines_made
        self.secret = int.from_bytes(os.urandom(8), "little")
        self.name = name
        self.lock_duration = lock_duration
        self.session_lock_duration = session_lock_duration
        self.max_delivery_count = max_delivery_count
        self.bury_expired = dead_letter_on_expiration
        self.window = deduplication_window
        self.capacity = capacity
        self.max_message_size = max_message_size
        self.indexes[0].mask = self.indexes[1].mask = -1
        self.delays.kind = self.agenda.kind = IN_TIME
        self.lives.kind = IN_TTL
        self.plain = Lane.__new__(Lane, None)
        self.grave = Lane.__new__(Lane, None)
        self.sessions = {}
        self.seen = set()
        self.seen_in_order = deque()
        self.next_forgotten = INFINITY
        self.signals = []

    def __dealloc__(self):
        cdef Entry *entry
        cdef int64_t place
        cdef int which
        cdef Link link
        for which in range(2):
            for place in range(self.indexes[which].head, self.indexes[which].tail):
                entry = self.indexes[which].items[place & self.indexes[which].mask].entry
                if entry != NULL:
                    if entry.state == LOCKED:
                        self.unlock(entry)
                    release(entry)
            PyMem_Free(self.indexes[which].items)
        PyMem_Free(self.delays.nodes)
        PyMem_Free(self.agenda.nodes)
        PyMem_Free(self.lives.nodes)
        while self.held.first != NULL:  # a holder and its lane refer to each other
            link = (<Lane>self.held.first).holder
            link.lost = True
            self.vacate(link.lane)

    # Entries: in and out of their places.

    cdef int settle_in(self, Entry *entry) except -1:
        """Put an entry that stands nowhere among the ready ones of its lane."""
        cdef Lane lane = <Lane>entry.lane
        if lane.fresh.last == NULL or lane.fresh.last.number < entry.number:
            chain_append(&lane.fresh, entry, LINE)
            entry.state = FRESH
        else:
            heap_push(&lane.back, entry, <double>entry.number)
            entry.state = RETURNED
        self.tally[entry.dead][entry.state] += 1
        return 0

    cdef int hold_back(self, Entry *entry, double due) except -1:
        cdef Lane lane = <Lane>entry.lane
        entry.due = due
        entry.by_wall = False
        heap_push(&self.delays, entry, due)
        if lane.ordered:
            heap_push(&lane.back, entry, <double>entry.number)
        entry.state = HELD_BACK
        self.tally[entry.dead][HELD_BACK] += 1
        return 0

    cdef int start_life(self, Entry *entry, double since) except -1:
        """Start the time to live, which counts from when the message is to be visible."""
        if entry.time_to_live != INFINITY:
            entry.expires = since + entry.time_to_live
            heap_push(&self.lives, entry, entry.expires)
        return 0

    cdef void lock(self, Entry *entry, Link link, double now, double wall) noexcept:
        entry.state = LOCKED
        entry.link = <PyObject *>link
        entry.lock_end = now + self.lock_duration
        entry.deliveries += 1
        if entry.deliveries == 1:
            entry.first_delivered_at = wall
        chain_append(&self.locks, entry, LINE)
        chain_append(&link.owned, entry, OWN)
        if link.locks == 0:
            Py_INCREF(link)
        link.locks += 1
        self.tally[entry.dead][LOCKED] += 1

    cdef void unlock(self, Entry *entry) noexcept:
        cdef Link link = <Link>entry.link
        chain_remove(&self.locks, entry, LINE)
        chain_remove(&link.owned, entry, OWN)
        entry.link = NULL
        link.locks -= 1
        if link.locks == 0:
            Py_DECREF(link)

    cdef void detach(self, Entry *entry) noexcept:
        """Take an entry out of where its state says that it stands."""
        cdef Lane lane = <Lane>entry.lane
        if entry.state == LOCKED:
            self.unlock(entry)
        elif entry.state == FRESH:
            chain_remove(&lane.fresh, entry, LINE)
        elif entry.state == RETURNED:
            heap_remove(&lane.back, entry)
        elif entry.state == HELD_BACK:
            heap_remove(&self.delays, entry)
            if lane.ordered:
                heap_remove(&lane.back, entry)
        elif entry.state == SCHEDULED:
            heap_remove(&self.agenda if entry.by_wall else &self.delays, entry)
        self.tally[entry.dead][entry.state] -= 1

    cdef int forget(self, Entry *entry) except -1:
        """Free an entry that stands nowhere; its lane is still to be tended."""
        (<Lane>entry.lane).count -= 1
        if entry.spot[IN_TTL] >= 0:
            heap_remove(&self.lives, entry)
        index_remove(&self.indexes[entry.dead], entry)
        release(entry)
        return 0

    cdef int bury(self, Entry *entry, str reason, str description) except -1:
        """Make an entry that stands nowhere a dead letter, with a number of that queue; its lane is to be tended."""
        if not entry.dead:
            (<Lane>entry.lane).count -= 1
            if entry.spot[IN_TTL] >= 0:
                heap_remove(&self.lives, entry)
            entry.expires = INFINITY
            index_remove(&self.indexes[0], entry)
            entry.dead = True
            entry.lane = <PyObject *>self.grave
            self.grave.count += 1
            index_append(&self.indexes[1], entry)
        Py_XDECREF(entry.reason)
        Py_XDECREF(entry.description)
        entry.reason = entry.description = NULL
        if reason is not None:
            Py_INCREF(reason)
            entry.reason = <PyObject *>reason
        if description is not None:
            Py_INCREF(description)
            entry.description = <PyObject *>description
        return self.settle_in(entry)

    cdef int expire(self, Entry *entry) except -1:
        if self.bury_expired:
            return self.bury(entry, TTL_EXPIRED, "the message outlived its time to live")
        return self.forget(entry)

    cdef int give_back(self, Entry *entry, double now, double delay) except -1:
        """Return an entry that was delivered and is unlocked: to its lane, or to where it has to go instead."""
        if not entry.dead and entry.deliveries >= self.max_delivery_count:
            return self.bury(
                entry, TOO_MANY_DELIVERIES, f"the message was delivered {entry.deliveries} times and never completed"
            )
        if entry.expires <= now:
            return self.expire(entry)
        if delay > 0:
            return self.hold_back(entry, now + delay)
        return self.settle_in(entry)

    # Lanes.

    cdef int tend(self, Lane lane) except -1:
        """After a change in a lane: keep the list of ready sessions right, signal its holder, drop it when empty."""
        cdef bint deliverable
        if not lane.ordered:
            return 0
        deliverable = next_of(lane) != NULL
        if lane.holder is not None:
            if deliverable:
                self.signal(lane.holder)
            return 0
        if deliverable != lane.is_ready:
            lane.is_ready = deliverable
            if deliverable:
                lanes_append(&self.ready, lane, READY)
            else:
                lanes_remove(&self.ready, lane, READY)
        if lane.count == 0 and lane.state is None:
            self.sessions.pop(lane.session_id, None)
        return 0

    cdef int signal(self, Link link) except -1:
        if link.waiting:
            link.waiting = False
            self.signals.append(link.receiver_id)
        return 0

    cdef void vacate(self, Lane lane) noexcept:
        lanes_remove(&self.held, lane, HELD)
        lane.holder = None

    cdef int drop_locks(self, Link link, double now) except -1:
        cdef Entry *entry
        cdef Lane lane
        while link.owned.first != NULL:
            entry = link.owned.first
            lane = <Lane>entry.lane
            self.detach(entry)
            self.give_back(entry, now, 0.0)
            self.tend(lane)
        return 0

    # Time.

    cdef int advance(self, double now, double wall) except -1:
        cdef Entry *entry
        cdef Lane lane
        cdef Link link
        cdef double since
        while self.held.first != NULL and (<Lane>self.held.first).lock_end <= now:
            lane = <Lane>self.held.first
            link = lane.holder
            link.lost = True
            self.signal(link)
            self.vacate(lane)
            self.drop_locks(link, now)
            self.tend(lane)
        while self.locks.first != NULL and self.locks.first.lock_end <= now:
            entry = self.locks.first
            lane = <Lane>entry.lane
            self.detach(entry)
            self.give_back(entry, now, 0.0)
            self.tend(lane)
        while self.delays.size and self.delays.nodes[0].key <= now:
            self.appear(self.delays.nodes[0].entry, self.delays.nodes[0].key)
        while self.agenda.size and self.agenda.nodes[0].key <= wall + 1e-6:  # told in microseconds
            since = now - (wall - self.agenda.nodes[0].key)
            self.appear(self.agenda.nodes[0].entry, since)
        while self.lives.size and self.lives.nodes[0].key <= now:
            entry = self.lives.nodes[0].entry
            heap_remove(&self.lives, entry)
            if entry.state != LOCKED:  # a locked one may still be completed; it expires when it comes back
                lane = <Lane>entry.lane
                self.detach(entry)
                self.expire(entry)
                self.tend(lane)
        while self.next_forgotten <= now:
            self.seen.discard(self.seen_in_order.popleft()[1])
            self.next_forgotten = self.seen_in_order[0][0] if self.seen_in_order else INFINITY
        return 0

    cdef int appear(self, Entry *entry, double since) except -1:
        """What was held back or scheduled falls due."""
        cdef Lane lane = <Lane>entry.lane
        cdef bint starts = entry.state == SCHEDULED
        self.detach(entry)
        if starts:
            self.start_life(entry, since)
        self.settle_in(entry)
        return self.tend(lane)

    def next_due(self, double now, double wall):
        """Return the seconds until something happens by itself; infinite when nothing will."""
        cdef double due = INFINITY
        if self.held.first != NULL:
            due = min(due, (<Lane>self.held.first).lock_end)
        if self.locks.first != NULL:
            due = min(due, self.locks.first.lock_end)
        if self.delays.size:
            due = min(due, self.delays.nodes[0].key)
        if self.lives.size:
            due = min(due, self.lives.nodes[0].key)
        due -= now
        if self.agenda.size:
            due = min(due, self.agenda.nodes[0].key - wall)
        return fmax(due, 0.0)

    def tick(self, double now, double wall):
        """Let everything happen that is due."""
        self.advance(now, wall)

    # What a waiting caller asks before it looks again.

    @property
    def room(self):
        """How many more messages can be sent; never negative."""
        cdef int64_t overflow = max(0, self.indexes[1].live - self.capacity)
        return max(0, self.capacity - self.indexes[0].live - overflow)

    @property
    def has_plain(self):
        """Whether a message without a session is ready."""
        return next_of(self.plain) != NULL

    @property
    def has_dead(self):
        """Whether a dead letter is ready."""
        return next_of(self.grave) != NULL

    @property
    def has_session(self):
        """Whether a session without a holder has a message that is ready."""
        return self.ready.first != NULL

    def is_ready(self, Link link not None):
        """Whether a receive on this link would return at once: with a message or with an error."""
        return link.closed or link.lost or next_of(link.lane) != NULL

    def take_signals(self):
        """Return the receiver ids of the waiting session links that something happened to, and start a new list."""
        signals = self.signals
        if signals:
            self.signals = []
        return signals

    # Sending.

    def check(self, messages not None):
        """Raise MessageTooLargeError or ValidationError if any of these cannot be sent."""
        cdef Py_ssize_t size
        for message in messages:
            if type(message) is not Message:
                raise ValidationError("messages", f"must be of type Message, not {type(message).__name__}")
            size = (<Message>message).c_size()
            if size > self.max_message_size:
                raise MessageTooLargeError(size, self.max_message_size)

    def send(self, messages not None, Py_ssize_t start, double now, double wall):
        """Take messages from index ``start`` on, as long as there is room; return the index of the first not taken."""
        cdef Message message
        cdef Lane lane
        cdef Py_ssize_t i = start
        cdef Py_ssize_t count = len(messages)
        cdef int64_t room
        cdef str session_id, deduplication_id
        self.advance(now, wall)
        room = self.room
        while i < count:
            message = <Message?>messages[i]
            deduplication_id = message.c_deduplication_id()
            if deduplication_id is not None and self.window > 0:
                if deduplication_id in self.seen:
                    i += 1
                    continue
            if room <= 0:
                break
            if deduplication_id is not None and self.window > 0:
                self.seen.add(deduplication_id)
                self.seen_in_order.append((now + self.window, deduplication_id))
                self.next_forgotten = min(self.next_forgotten, now + self.window)
            session_id = message.c_session_id()
            if session_id is None:
                lane = self.plain
            else:
                lane = self.lane_of(session_id)
            self.take(message, lane, now, wall)
            room -= 1
            i += 1
        return i

    cdef Lane lane_of(self, str session_id):
        """The session's lane, made when there is none; one without a message has to be tended."""
        cdef PyObject *found = PyDict_GetItem(self.sessions, session_id)
        if found != NULL:
            return <Lane>found
        cdef Lane lane = Lane.__new__(Lane, session_id)
        self.sessions[session_id] = lane
        return lane

    cdef int take(self, Message message, Lane lane, double now, double wall) except -1:
        cdef double at
        cdef Entry *entry = <Entry *>PyMem_Malloc(sizeof(Entry))
        if entry == NULL:
            raise MemoryError
        memset(entry, 0, sizeof(Entry))
        Py_INCREF(message)
        entry.message = <PyObject *>message
        entry.lane = <PyObject *>lane
        entry.spot[IN_LANE] = entry.spot[IN_TIME] = entry.spot[IN_TTL] = -1
        entry.expires = INFINITY
        entry.time_to_live = message.ttl_us / 1e6 if message.ttl_us >= 0 else INFINITY
        entry.enqueued_at = wall
        index_append(&self.indexes[0], entry)
        lane.count += 1
        at = message.scheduled_us / 1e6
        if message.scheduled_us >= 0 and at > wall:
            entry.due = at
            entry.by_wall = True
            heap_push(&self.agenda, entry, at)
            entry.state = SCHEDULED
            self.tally[0][SCHEDULED] += 1
        elif message.delay_us > 0:
            entry.due = now + message.delay_us / 1e6
            heap_push(&self.delays, entry, entry.due)
            entry.state = SCHEDULED
            self.tally[0][SCHEDULED] += 1
        else:
            self.start_life(entry, now)
            self.settle_in(entry)
        return self.tend(lane)

    # Links.

    def open_link(self, bint dead_letter=False):
        """Open a receiver's end: of the messages without a session, or of the dead letters."""
        return self.new_link(self.grave if dead_letter else self.plain)

    cdef Link new_link(self, Lane lane):
        global links_made
        cdef Link link = Link.__new__(Link)
        links_made += 1
        link.receiver_id = links_made
        link.home = self.number
        link.lane = lane
        return link

    def accept(self, str session_id, double now, double wall):
        """Take this session, or with None the session that has been ready for longest; None when none is.

        Raises SessionLockedError when it is held, and ValidationError when it is no session id.
        """
        cdef Lane lane
        cdef Link link
        self.advance(now, wall)
        if session_id is None:
            if self.ready.first == NULL:
                return None
            lane = <Lane>self.ready.first
        else:
            if not is_session_id(session_id):
                raise ValidationError("session_id", "must be 1 to 128 printable ASCII characters")
            lane = self.lane_of(session_id)
            if lane.holder is not None:
                raise SessionLockedError(session_id, datetime.fromtimestamp(lane.holder.locked_until, UTC))
        if lane.is_ready:
            lane.is_ready = False
            lanes_remove(&self.ready, lane, READY)
        link = self.new_link(lane)
        lane.holder = link
        self.extend(lane, now, wall)
        lanes_append(&self.held, lane, HELD)
        return link

    cdef void extend(self, Lane lane, double now, double wall) noexcept:
        lane.lock_end = now + self.session_lock_duration
        lane.holder.locked_until = wall + self.session_lock_duration

    def close_link(self, Link link not None, double now, double wall):
        """Give back all that the link holds, at once. Safe to call twice."""
        self.check_home(link)
        self.advance(now, wall)
        if link.closed:
            return
        link.closed = True
        if link.lane.holder is link:
            self.vacate(link.lane)
        self.drop_locks(link, now)
        if link.lane.holder is None and not link.lost:
            self.tend(link.lane)

    cdef int check_home(self, Link link) except -1:
        if link.home != self.number:
            raise ValidationError("link", "belongs to another queue")
        return 0

    cdef int check_open(self, Link link, double now, double wall) except -1:
        """Advance; then raise unless the link can be used."""
        self.check_home(link)
        self.advance(now, wall)
        if link.closed:
            raise ClosedError("the receiver is closed")
        if link.lost:
            raise SessionLockLostError(link.lane.session_id)
        return 0

    def renew_session(self, Link link not None, double now, double wall):
        """Extend the session's lock; return its new end in epoch seconds."""
        self.check_open(link, now, wall)
        if not link.lane.ordered:
            raise ValidationError("link", "holds no session")
        lanes_remove(&self.held, link.lane, HELD)
        self.extend(link.lane, now, wall)
        lanes_append(&self.held, link.lane, HELD)
        return link.locked_until

    def get_state(self, Link link not None, double now, double wall):
        """Return the state of the link's session; None when there is none."""
        self.check_open(link, now, wall)
        return link.lane.state

    def set_state(self, Link link not None, bytes state, double now, double wall):
        """Set the state of the link's session; None removes it. Raises MessageTooLargeError above that limit."""
        self.check_open(link, now, wall)
        if not link.lane.ordered:
            raise ValidationError("link", "holds no session")
        if state is not None and len(state) > self.max_message_size:
            raise MessageTooLargeError(len(state), self.max_message_size)
        link.lane.state = state

    # Receiving and settling.

    def receive(self, Link link not None, Py_ssize_t max_count, double now, double wall):
        """Lock and return at most ``max_count`` of the link's messages, in order of sequence number."""
        cdef list received = []
        cdef Entry *entry
        self.check_open(link, now, wall)
        while PyList_GET_SIZE(received) < max_count:
            entry = next_of(link.lane)
            if entry == NULL:
                break
            received.append(self.deliver(entry, link, now, wall))
        return received

    def receive_deferred(self, Link link not None, numbers not None, double now, double wall):
        """Lock and return the link's deferred messages of these sequence numbers, leaving out what is not there."""
        cdef list received = []
        cdef Entry *entry
        cdef int64_t number
        self.check_open(link, now, wall)
        for number in [min(max(0, int(given)), LAST_NUMBER) for given in numbers]:
            entry = index_find(&self.indexes[link.lane is self.grave], number)
            if entry == NULL or entry.state != DEFERRED or entry.lane != <PyObject *>link.lane:
                continue
            if not entry.dead and entry.deliveries >= self.max_delivery_count:
                self.detach(entry)
                self.give_back(entry, now, 0.0)
            else:
                received.append(self.deliver(entry, link, now, wall))
        return received

    cdef ReceivedMessage deliver(self, Entry *entry, Link link, double now, double wall):
        cdef uint64_t token
        self.detach(entry)
        self.lock(entry, link, now, wall)
        token = (<uint64_t>entry.number << 1 | entry.dead) << COUNT_BITS | (entry.deliveries & COUNT_MASK)
        return make_received(
            <Message>entry.message, make_receipt(self.name, token ^ self.secret, link.receiver_id), entry.deliveries,
            entry.enqueued_at, entry.first_delivered_at, fmax(wall, entry.first_delivered_at),
            wall + self.lock_duration, entry.number,
            None if entry.reason == NULL else <str>entry.reason,
            None if entry.description == NULL else <str>entry.description,
        )

    cdef Entry *find(self, Receipt receipt, Link link) noexcept:
        """The entry that this receipt has locked through this link, or NULL."""
        cdef uint64_t token
        cdef Entry *entry
        if receipt.receiver_id != link.receiver_id or not PyLong_CheckExact(receipt.token):
            return NULL
        if receipt.queue_name is not self.name and receipt.queue_name != self.name:
            return NULL
        try:
            token = PyLong_AsUnsignedLongLong(receipt.token) ^ self.secret
        except OverflowError:
            return NULL
        entry = index_find(&self.indexes[token >> COUNT_BITS & 1], <int64_t>(token >> (COUNT_BITS + 1)))
        if entry == NULL or entry.link != <PyObject *>link:
            return NULL
        return entry if <uint64_t>entry.deliveries & COUNT_MASK == token & COUNT_MASK else NULL

    cdef list check_receipts(self, Link link, receipts):
        cdef list listed = receipts if type(receipts) is list else list(receipts)
        self.check_home(link)
        for receipt in listed:
            if type(receipt) is not Receipt:
                raise ValidationError("receipts", f"must be of type Receipt, not {type(receipt).__name__}")
        return listed

    cdef object refusal(self, Link link, receipt):
        if link.lost:
            return SessionLockLostError(link.lane.session_id)
        if link.closed:
            return InvalidReceiptError(receipt, "its receiver is closed")
        return InvalidReceiptError(receipt)

    def settle(
        self, Link link not None, int action, receipts not None, double now, double wall, double delay=0.0,
        str reason=None, str description=None,
    ):
        """Settle what these receipts have locked; return for each, in order, None or the error.

        ``action`` is COMPLETE, ABANDON, DEAD_LETTER or DEFER; ``delay``, in seconds, is of an abandon.
        """
        cdef list outcomes = []
        cdef list listed = self.check_receipts(link, receipts)
        cdef Entry *entry
        cdef Lane lane
        if not DO_COMPLETE <= action <= DO_DEFER:
            raise ValidationError("action", f"must be from 0 to 3, not {action}")
        if not (isfinite(delay) and delay >= 0):
            raise ValidationError("delay", f"must be a number of seconds, finite and not negative, not {delay!r}")
        self.advance(now, wall)
        for receipt in listed:
            entry = self.find(<Receipt>receipt, link)
            if entry == NULL:
                outcomes.append(self.refusal(link, receipt))
                continue
            lane = <Lane>entry.lane
            self.detach(entry)
            if action == DO_COMPLETE:
                self.forget(entry)
            elif action == DO_ABANDON:
                self.give_back(entry, now, delay)
            elif action == DO_DEAD_LETTER:
                self.bury(entry, reason, description)
            elif entry.expires <= now:
                self.expire(entry)
            else:
                entry.state = DEFERRED
                self.tally[entry.dead][DEFERRED] += 1
            if lane.ordered:
                self.tend(lane)
            outcomes.append(None)
        return outcomes

    def renew(self, Link link not None, receipts not None, double now, double wall):
        """Extend the locks; return for each receipt, in order, the new end in epoch seconds, or the error."""
        cdef list outcomes = []
        cdef Entry *entry
        cdef list listed = self.check_receipts(link, receipts)
        self.advance(now, wall)
        for receipt in listed:
            entry = self.find(<Receipt>receipt, link)
            if entry == NULL:
                outcomes.append(self.refusal(link, receipt))
                continue
            chain_remove(&self.locks, entry, LINE)
            entry.lock_end = now + self.lock_duration
            chain_append(&self.locks, entry, LINE)
            outcomes.append(wall + self.lock_duration)
        return outcomes

    # Looking.

    def peek(self, Py_ssize_t max_count, from_number, bint dead_letter, double now, double wall):
        """Return at most ``max_count`` messages in whatever state, from this sequence number on, in its order."""
        cdef list peeked = []
        cdef Index *index = &self.indexes[dead_letter]
        cdef Entry *entry
        cdef int64_t place
        self.advance(now, wall)
        place = index_seek(index, min(max(0, int(from_number)), LAST_NUMBER))
        while place < index.tail and PyList_GET_SIZE(peeked) < max_count:
            entry = index.items[place & index.mask].entry
            place += 1
            if entry != NULL:
                peeked.append(make_received(
                    <Message>entry.message, None, entry.deliveries, entry.enqueued_at, NAN, NAN, NAN, entry.number,
                    None if entry.reason == NULL else <str>entry.reason,
                    None if entry.description == NULL else <str>entry.description,
                ))
        return peeked

    def counts(self, double now, double wall):
        """Return how many messages are active, in flight, scheduled (or held back), deferred, and dead."""
        self.advance(now, wall)
        cdef int64_t *tally = self.tally[0]
        return (
            tally[FRESH] + tally[RETURNED], tally[LOCKED], tally[SCHEDULED] + tally[HELD_BACK], tally[DEFERRED],
            self.indexes[1].live,
        )
