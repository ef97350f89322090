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
from cpython.ref cimport Py_INCREF
from libc.math cimport INFINITY, fmax, isfinite
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from queue_runtime._core.delivery cimport Receipt, ReceivedMessage, make_received, make_receipt
from queue_runtime._core.fields cimport is_session_id
from queue_runtime._core.journal cimport Journal
from queue_runtime._core.ledger cimport Lane, Ledger, Link, next_of, number_of
from queue_runtime._core.message cimport Message
from queue_runtime._core.shelf cimport *

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

cdef struct Asked:
    uint64_t token
    bint is_token
    bint is_renewed


cdef long long links_made = 0


@cython.final
@cython.no_gc  # it holds messages, lanes and links, none of which can refer back to it
cdef class Engine(Ledger):
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

    Thread-safety: one thread at a time, but for ``renew_from_thread`` and ``renew_session_from_thread``, which any
    thread may call at any time (the README's section on threads says why).
    """

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
        """Take messages from index ``start`` on, as long as there is room; return the index of the first not taken.

        With a journal it also stops where that cannot be written, and raises its error when that is at ``start``.
        """
        self.advance(now, wall)
        if self.journal is not None:
            return self.send_written(list(messages), start, now, wall)
        return self.take_all(messages, start, len(messages), now, wall)

    cdef Py_ssize_t take_all(self, messages, Py_ssize_t start, Py_ssize_t count, double now, double wall) except -1:
        cdef Message message
        cdef Lane lane
        cdef Py_ssize_t i = start
        cdef int64_t room = self.room
        cdef str session_id, deduplication_id
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

    cdef Py_ssize_t send_written(self, list messages, Py_ssize_t start, double now, double wall) except -1:
        """Write what ``take_all`` will take, then take it: piece by piece, so that the buffer stays small."""
        cdef Py_ssize_t done = start
        cdef Py_ssize_t end
        while done < len(messages):
            end = self.write_sends(messages, done, wall)
            if end == done:
                break
            error = self.journal.commit()
            if error is not None:
                if done == start:
                    raise error
                break
            done = self.take_all(messages, done, end, now, wall)
        return done

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
        if self.journal is not None:
            self.journal.grew(message)
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
        link = self.new_link(lane)
        self.occupy(lane, link, now, wall)
        return link

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
        self.extend(link.lane, now, wall)
        return link.locked_until

    def renew_session_from_thread(self, Link link not None, double now, double wall):
        """As ``renew_session``, from any thread, and without an advance: for while the engine's own is blocked."""
        cdef Lane lane = link.lane
        self.check_home(link)
        if link.closed:
            raise ClosedError("the receiver is closed")
        if not lane.ordered:
            raise ValidationError("link", "holds no session")
        # From here to the last change nothing runs but C: no other thread sees it half done.
        if link.lost or lane.lock_end <= now:
            raise SessionLockLostError(lane.session_id)
        # Never before the last in the chain: who waited for the interpreter's lock may bring an earlier time.
        self.extend(lane, fmax(now, (<Lane>self.held.last).lock_end - self.session_lock_duration), wall)
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
        if self.journal is not None:
            self.journal.begin()
            self.journal.state(self.id, link.lane.session_id, state)
            self.commit()
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
        if self.journal is not None and received:
            self.keep_deliveries(received, link, False)
        return received

    cdef int keep_deliveries(self, list received, Link link, bint deferred) except -1:
        """Write the deliveries before anybody sees them; where that fails, they did not happen."""
        cdef Entry *entry
        cdef list entries = [(<ReceivedMessage>message)._receipt for message in received]
        self.journal.begin()
        for receipt in entries:
            self.journal.deliver(self.id, self.find(<Receipt>receipt, link))
        error = self.journal.commit()
        if error is None:
            return 0
        for receipt in entries:
            entry = self.find(<Receipt>receipt, link)
            self.detach(entry)
            entry.deliveries -= 1
            if deferred:
                entry.state = DEFERRED
                self.tally[entry.dead][DEFERRED] += 1
            else:
                self.settle_in(entry)
        raise error

    def receive_deferred(self, Link link not None, numbers not None, double now, double wall):
        """Lock and return the link's deferred messages of these sequence numbers, leaving out what is not there."""
        cdef list received = []
        cdef Entry *entry
        cdef int64_t number
        self.check_open(link, now, wall)
        for number in [number_of(given, "sequence_numbers") for given in numbers]:
            entry = index_find(&self.indexes[link.lane is self.grave], number)
            if entry == NULL or entry.state != DEFERRED or entry.lane != <PyObject *>link.lane:
                continue
            if not entry.dead and entry.deliveries >= self.max_delivery_count:
                self.detach(entry)
                self.give_back(entry, now, 0.0)
            else:
                received.append(self.deliver(entry, link, now, wall))
        if self.journal is not None and received:
            self.keep_deliveries(received, link, True)
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

    cdef bint read_token(self, Receipt receipt, Link link, uint64_t *token) noexcept:
        """Unmask the receipt's token; false when it cannot be one of this link's."""
        if receipt.receiver_id != link.receiver_id or not PyLong_CheckExact(receipt.token):
            return False
        if receipt.queue_name is not self.name and receipt.queue_name != self.name:
            return False
        try:
            token[0] = PyLong_AsUnsignedLongLong(receipt.token) ^ self.secret
        except OverflowError:
            return False
        return True

    cdef Entry *locked_by(self, uint64_t token, Link link) noexcept:
        """The entry whose delivery this is, if the link has it locked, or NULL."""
        cdef Entry *entry = index_find(
            &self.indexes[token >> COUNT_BITS & 1], <int64_t>(token >> (COUNT_BITS + 1))
        )
        if entry == NULL or entry.link != <PyObject *>link:
            return NULL
        return entry if <uint64_t>entry.deliveries & COUNT_MASK == token & COUNT_MASK else NULL

    cdef Entry *find(self, Receipt receipt, Link link) noexcept:
        """The entry that this receipt has locked through this link, or NULL."""
        cdef uint64_t token
        return self.locked_by(token, link) if self.read_token(receipt, link, &token) else NULL

    cdef list check_receipts(self, Link link, receipts):
        cdef list listed = list(receipts)  # a copy: what was checked is what is used
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
        cdef list listed = self.check_receipts(link, receipts)
        if not DO_COMPLETE <= action <= DO_DEFER:
            raise ValidationError("action", f"must be from 0 to 3, not {action}")
        if not (isfinite(delay) and delay >= 0):
            raise ValidationError("delay", f"must be a number of seconds, finite and not negative, not {delay!r}")
        self.advance(now, wall)
        if self.journal is None:
            return self.settle_all(link, action, listed, now, delay, reason, description)
        error = self.write_settlements(link, action, listed, now, wall, delay, reason, description)
        if error is not None:
            return [self.refusal(link, one) if self.find(<Receipt>one, link) == NULL else error for one in listed]
        self.written = action == DO_COMPLETE or action == DO_DEAD_LETTER  # the rest happens by itself
        try:
            return self.settle_all(link, action, listed, now, delay, reason, description)
        finally:
            self.written = False

    cdef object write_settlements(
        self, Link link, int action, list receipts, double now, double wall, double delay, str reason, str description
    ):
        """Write what ``settle_all`` will do; return None, or the error: then nothing is to be done."""
        cdef Journal journal = self.journal
        cdef Entry *entry
        cdef int64_t dead_number = self.indexes[1].last_number
        cdef set named = set()
        journal.begin()
        try:
            for receipt in receipts:
                entry = self.find(<Receipt>receipt, link)
                if entry == NULL or receipt in named:
                    continue
                named.add(receipt)
                if action == DO_COMPLETE:
                    journal.forget(self.id, entry)
                elif action == DO_DEAD_LETTER:
                    dead_number += not entry.dead
                    journal.bury(self.id, entry, entry.number if entry.dead else dead_number, reason, description)
                elif entry.expires > now:
                    if action == DO_DEFER:
                        journal.defer(self.id, entry)
                    elif delay > 0:
                        journal.hold(self.id, entry, wall + delay)
        except BaseException as error:
            journal.drop()
            if isinstance(error, UnicodeEncodeError):
                raise ValidationError("reason", "it or the description cannot be written as UTF-8") from None
            raise
        return journal.commit()

    cdef list settle_all(
        self, Link link, int action, list receipts, double now, double delay, str reason, str description
    ):
        cdef list outcomes = []
        cdef Entry *entry
        cdef Lane lane
        for receipt in receipts:
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

    def renew_from_thread(self, Link link not None, receipts not None, double now, double wall):
        """As ``renew``, from any thread, and without an advance: for while the engine's own is blocked."""
        cdef list listed = self.check_receipts(link, receipts)
        cdef Py_ssize_t count = PyList_GET_SIZE(listed)
        cdef Py_ssize_t i
        cdef Entry *entry
        cdef double end
        cdef Asked *asked = <Asked *>PyMem_Malloc((count + 1) * sizeof(Asked))
        if asked == NULL:
            raise MemoryError
        try:
            for i in range(count):
                asked[i].is_token = self.read_token(<Receipt>listed[i], link, &asked[i].token)
                asked[i].is_renewed = False
            # From here to the last change nothing runs but C: no other thread sees it half done.
            end = now + self.lock_duration
            if self.locks.last != NULL:  # who waited for the interpreter's lock may bring an earlier time
                end = fmax(end, self.locks.last.lock_end)
            for i in range(count):
                entry = self.locked_by(asked[i].token, link) if asked[i].is_token else NULL
                if entry != NULL and entry.lock_end > now:
                    chain_remove(&self.locks, entry, LINE)
                    entry.lock_end = end
                    chain_append(&self.locks, entry, LINE)
                    asked[i].is_renewed = True
            return [
                wall + self.lock_duration if asked[i].is_renewed else self.refusal(link, listed[i])
                for i in range(count)
            ]
        finally:
            PyMem_Free(asked)
