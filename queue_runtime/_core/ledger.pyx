"""What happens in a queue: entries, lanes and locks, and what the passing of time does to them. See engine.pyx."""

cimport cython
from cpython.list cimport PyList_GET_SIZE
from cpython.mem cimport PyMem_Free
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.math cimport INFINITY, NAN, fmax

from queue_runtime._core.delivery cimport make_received
from queue_runtime._core.message cimport Message
from queue_runtime._core.shelf cimport *

import os
from collections import deque

from queue_runtime.errors import ValidationError

cdef str TTL_EXPIRED = "TTLExpired"
cdef str TOO_MANY_DELIVERIES = "MaxDeliveryCountExceeded"

cdef enum:
    PIECE = 1 << 20  # bytes of records that are written at once, about

cdef int64_t LAST_NUMBER = <int64_t>1 << 42

cdef int64_t engines_made = 0

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

    @property
    def session_id(self):
        """The session it holds or held, or None."""
        return None if self.lane is None else self.lane.session_id


@cython.final
@cython.no_gc
cdef class Lane:
    """What is delivered in order of sequence number: one session's, those without a session, or the dead letters."""

    def __cinit__(self, session_id):
        self.session_id = session_id
        self.ordered = session_id is not None
        self.back.kind = IN_LANE

    def __dealloc__(self):
        PyMem_Free(self.back.nodes)


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


cdef int64_t number_of(object given, str field) except -1:
    """A sequence number, cut to what the index can look for."""
    if not isinstance(given, int):
        raise ValidationError(field, f"must be a whole number, not {type(given).__name__}")
    return min(max(0, given), LAST_NUMBER)


cdef void release(Entry *entry) noexcept:
    cdef PyObject *message = entry.message
    cdef PyObject *reason = entry.reason
    cdef PyObject *description = entry.description
    PyMem_Free(entry)
    Py_XDECREF(message)
    Py_XDECREF(reason)
    Py_XDECREF(description)


@cython.no_gc  # it holds messages, lanes and links, none of which can refer back to it
cdef class Ledger:
    """The state of one queue and of its dead-letter queue; ``Engine``, which is made of it, says what may be done.

    Thread-safety: one thread at a time.
    """

    def __cinit__(self):
        global engines_made
        engines_made += 1
        self.number = engines_made  # of no link that this engine did not make, not even a bare one
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

    def __init__(
        self, str name not None, *, double lock_duration, double session_lock_duration, int64_t max_delivery_count,
        bint dead_letter_on_expiration, double deduplication_window, Py_ssize_t capacity, Py_ssize_t max_message_size,
    ):
        if self.name is not None:
            raise TypeError("it is set up already")
        self.secret = int.from_bytes(os.urandom(8), "little")
        self.name = name
        self.lock_duration = lock_duration
        self.session_lock_duration = session_lock_duration
        self.max_delivery_count = max_delivery_count
        self.bury_expired = dead_letter_on_expiration
        self.window = deduplication_window
        self.capacity = capacity
        self.max_message_size = max_message_size

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
        if self.journal is not None:
            self.journal.shrank(<Message>entry.message)
            if not self.written:
                self.journal.forget(self.id, entry)
                self.journal.relax()
        (<Lane>entry.lane).count -= 1
        if entry.spot[IN_TTL] >= 0:
            heap_remove(&self.lives, entry)
        index_remove(&self.indexes[entry.dead], entry)
        release(entry)
        return 0

    cdef int bury(self, Entry *entry, str reason, str description) except -1:
        """Make an entry that stands nowhere a dead letter, with a number of that queue; its lane is to be tended."""
        if self.journal is not None and not self.written:
            self.journal.bury(
                self.id, entry, entry.number if entry.dead else self.indexes[1].last_number + 1, reason, description
            )
            self.journal.relax()
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

    cdef int bury_spent(self, Entry *entry) except -1:
        return self.bury(
            entry, TOO_MANY_DELIVERIES, f"the message was delivered {entry.deliveries} times and never completed"
        )

    cdef int give_back(self, Entry *entry, double now, double delay) except -1:
        """Return an entry that was delivered and is unlocked: to its lane, or to where it has to go instead."""
        if not entry.dead and entry.deliveries >= self.max_delivery_count:
            return self.bury_spent(entry)
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

    cdef void occupy(self, Lane lane, Link link, double now, double wall) noexcept:
        """Make the link the holder of a lane that has none."""
        if lane.is_ready:
            lane.is_ready = False
            lanes_remove(&self.ready, lane, READY)
        lane.holder = link
        lanes_append(&self.held, lane, HELD)
        self.extend(lane, now, wall)

    cdef void extend(self, Lane lane, double now, double wall) noexcept:
        lane.lock_end = now + self.session_lock_duration
        lane.holder.locked_until = wall + self.session_lock_duration
        lanes_remove(&self.held, lane, HELD)
        lanes_append(&self.held, lane, HELD)

    cdef void vacate(self, Lane lane) noexcept:
        lanes_remove(&self.held, lane, HELD)
        lane.holder = None

    cdef int check_home(self, Link link) except -1:
        if link.home != self.number:
            raise ValidationError("link", "belongs to another queue")
        return 0

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
        while self.next_forgotten <= now and self.seen_in_order:  # an infinite time never ends
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

    def attach(self, Journal journal not None, uint32_t id):
        """Keep from now on what changes, in this journal, as the queue of this number."""
        self.journal = journal
        self.id = id

    def tick(self, double now, double wall):
        """Let everything happen that is due."""
        self.advance(now, wall)

    # What is written before it is done.

    cdef Py_ssize_t write_sends(self, list messages, Py_ssize_t start, double wall) except -1:
        """Add records of the messages that there is room for, up to some size; return the index of the first left."""
        cdef Journal journal = self.journal
        cdef Message message
        cdef str name
        cdef set named = set()
        cdef int64_t number = self.indexes[0].last_number
        cdef int64_t room = self.room
        cdef Py_ssize_t i
        journal.begin()
        try:
            for i in range(start, len(messages)):
                message = <Message?>messages[i]
                name = message.c_deduplication_id() if self.window > 0 else None
                if name is not None and (name in self.seen or name in named):
                    continue
                if room <= 0 or journal.used - journal.mark > PIECE:
                    return i
                if name is not None:
                    named.add(name)
                room -= 1
                number += 1
                journal.send(self.id, number, wall, message)
        except BaseException:
            journal.drop()
            raise
        return len(messages)

    cdef int commit(self) except -1:
        error = self.journal.commit()
        if error is not None:
            raise error
        return 0

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
        self.check_home(link)
        return link.closed or link.lost or next_of(link.lane) != NULL

    def take_signals(self):
        """Return the receiver ids of the waiting session links that something happened to, and start a new list."""
        signals = self.signals
        if signals:
            self.signals = []
        return signals

    # Looking.

    def peek(self, Py_ssize_t max_count, from_number, bint dead_letter, double now, double wall):
        """Return at most ``max_count`` messages in whatever state, from this sequence number on, in its order."""
        cdef list peeked = []
        cdef Index *index = &self.indexes[dead_letter]
        cdef Entry *entry
        cdef int64_t place
        self.advance(now, wall)
        if self.journal is not None:
            self.journal.flush()  # the numbers of dead letters that are shown here stay theirs
        place = index_seek(index, number_of(from_number, "from_sequence_number"))
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
