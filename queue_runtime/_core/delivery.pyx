"""A message as it was delivered, and the right to settle it."""

cimport cython
from libc.math cimport INFINITY, NAN, isnan

from queue_runtime._core.body cimport reader_over
from queue_runtime._core.fields cimport as_instant, plain_text
from queue_runtime._core.message cimport BODY, Message

from queue_runtime.errors import InvalidReceiptError, ValidationError, shown

cdef long long MOST = 0x7FFFFFFFFFFFFFFF
# The years 1 to 9999: what a datetime can be.
cdef double FIRST_INSTANT = -62135596800.0
cdef double END_OF_INSTANTS = 253402300800.0


cdef long long whole_number(object value, str field, long long least) except? -1:
    if not PyLong_Check(value):
        raise ValidationError(field, f"must be an int, not {type(value).__name__}")
    if not least <= value <= MOST:
        limit = f"at least {least}" if value < least else "at most 2**63-1"
        raise ValidationError(field, f"must be {limit}, not {shown(value)}")
    return value

cdef extern from "Python.h":
    bint PyLong_Check(object)


@cython.final
@cython.freelist(256)
cdef class Receipt:
    """The right to settle one delivery: immutable, hashable, compared by value.

    Parameters
    ----------
    queue_name:
        The queue that the message came from.
    token:
        What the provider settles by; hashable. It is kept out of ``repr`` and of pickles: an unpickled
        receipt tells where a message came from and settles nothing.
    receiver_id:
        The receiver that it came from, which alone can settle it.

    Thread-safety: any thread may read it.
    """

    def __init__(self, queue_name, token, receiver_id):
        if self.queue_name is not None:
            raise TypeError("a Receipt is immutable")
        self.receiver_id = whole_number(receiver_id, "receiver_id", -MOST - 1)
        self.token = token
        self.queue_name = plain_text(queue_name, "queue_name")

    def __eq__(self, other):
        if self is other:
            return True
        if not isinstance(other, Receipt):
            return NotImplemented
        cdef Receipt that = <Receipt>other
        return (
            self.receiver_id == that.receiver_id and self.queue_name == that.queue_name and self.token == that.token
        )

    def __hash__(self):
        return hash((self.receiver_id, self.token))

    def __repr__(self):
        return f"Receipt(queue_name={self.queue_name!r}, receiver_id={self.receiver_id})"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Receipt, (self.queue_name, None, self.receiver_id)


cdef Receipt make_receipt(str queue_name, object token, long long receiver_id):
    cdef Receipt receipt = Receipt.__new__(Receipt)
    receipt.queue_name = queue_name
    receipt.token = token
    receipt.receiver_id = receiver_id
    return receipt


cdef double time_or_nan(object value, str field) except? -1:
    if value is None:
        return NAN
    cdef double seconds
    try:
        seconds = value
    except OverflowError:
        seconds = INFINITY
    except TypeError:
        raise ValidationError(field, f"must be seconds since the epoch, not {type(value).__name__}") from None
    if not FIRST_INSTANT <= seconds < END_OF_INSTANTS:  # a NaN fails too
        raise ValidationError(field, f"must be seconds since the epoch, in the years 1 to 9999, not {shown(value)}")
    return seconds


@cython.final
@cython.freelist(256)
cdef class ReceivedMessage:
    """A message as it was delivered: immutable; it has every field of ``Message``, and how it was delivered.

    Parameters
    ----------
    message:
        The message that was sent.
    receipt:
        What settles this delivery; None when it was only peeked at.
    delivery_count:
        How often it was delivered, this time included: at least 1, or 0 when it was only peeked at.
    enqueued_at:
        When the service took it, in seconds since the epoch, as are the other times. Read back as aware datetimes.
    first_delivered_at, delivered_at:
        When it was first handed over, and this time; None when it was only peeked at.
    locked_until:
        When others may get it again; None when it was only peeked at.
    sequence_number:
        Its place in the queue, where the provider has one.
    dead_letter_reason, dead_letter_description:
        Why it is in the dead-letter queue, when read from there.

    Raises
    ------
    ValidationError
        Naming the field and its limit.

    Thread-safety: any thread may read it.
    """

    def __cinit__(self):
        self.enqueued_time = self.first_delivered_time = self.delivered_time = self.locked_until_time = NAN
        self.sequence = -1

    def __init__(
        self, *, message, receipt, delivery_count, enqueued_at, first_delivered_at, delivered_at, locked_until,
        sequence_number=None, dead_letter_reason=None, dead_letter_description=None,
    ):
        if self._message is not None:
            raise TypeError("a ReceivedMessage is immutable")
        if type(message) is not Message:
            raise ValidationError("message", f"must be a Message, not {type(message).__name__}")
        if receipt is not None and type(receipt) is not Receipt:
            raise ValidationError("receipt", f"must be a Receipt or None, not {type(receipt).__name__}")
        cdef long long count = whole_number(delivery_count, "delivery_count", receipt is not None)
        if enqueued_at is None:
            raise ValidationError("enqueued_at", "must be seconds since the epoch, not None")
        self.enqueued_time = time_or_nan(enqueued_at, "enqueued_at")
        self.first_delivered_time = time_or_nan(first_delivered_at, "first_delivered_at")
        self.delivered_time = time_or_nan(delivered_at, "delivered_at")
        self.locked_until_time = time_or_nan(locked_until, "locked_until")
        if self.first_delivered_time > self.delivered_time:
            raise ValidationError("first_delivered_at", "must not be after delivered_at")
        if sequence_number is not None and (not PyLong_Check(sequence_number) or sequence_number < 0):
            raise ValidationError("sequence_number", f"must be an int and not negative, not {shown(sequence_number)}")
        if dead_letter_reason is not None:
            dead_letter_reason = plain_text(dead_letter_reason, "dead_letter_reason")
        if dead_letter_description is not None:
            dead_letter_description = plain_text(dead_letter_description, "dead_letter_description")
        self._sequence_number = sequence_number
        self.dead_letter_reason = dead_letter_reason
        self.dead_letter_description = dead_letter_description
        self._receipt = receipt
        self.delivery_count = count
        self._message = message

    cdef Message whole(self):
        if self._message is None:
            raise ValidationError("message", "was made without its constructor; use ReceivedMessage(...)")
        return self._message

    def message(self):
        """Return the message as it was sent, for forwarding."""
        return self.whole()

    @property
    def body(self):
        """The payload as bytes. Where the message holds it as a view, this delivery keeps the one copy of it."""
        cdef Message message = self.whole()
        if self._body is not None:
            return self._body
        cdef bytes body = message.c_body()
        if not message.built & BODY:
            self._body = body
        return body

    @property
    def body_view(self):
        """A read-only memoryview of the payload, without a copy; it may be kept for longer than the message."""
        return self.whole().c_body_view()

    def open_body(self):
        """Return a binary file to read the payload from, without a copy of the whole; it may outlive the message."""
        return reader_over(self.whole().c_body_view())

    @property
    def attributes(self):
        """A read-only mapping of str to str."""
        return self.whole().attributes

    @property
    def message_id(self):
        """The sender's id of the message."""
        return self.whole().c_message_id()

    @property
    def session_id(self):
        """The session, or None."""
        return self.whole().c_session_id()

    @property
    def correlation_id(self):
        """The correlation id, or None."""
        return self.whole().c_correlation_id()

    @property
    def content_type(self):
        """The content type, or None."""
        return self.whole().c_content_type()

    @property
    def time_to_live(self):
        """How long it may be delivered, as a timedelta, or None: for ever."""
        return self.whole().time_to_live

    @property
    def scheduled_at(self):
        """The time from which it might be delivered, in UTC, or None."""
        return self.whole().scheduled_at

    @property
    def delay(self):
        """How long it stayed invisible after it was sent, as a timedelta, or None."""
        return self.whole().delay

    @property
    def deduplication_id(self):
        """The deduplication id, or None."""
        return self.whole().c_deduplication_id()

    @property
    def size(self):
        """Bytes of the body and of all ids, attribute names and values in UTF-8."""
        return self.whole().c_size()

    @property
    def enqueued_at(self):
        """When the service took it, in UTC."""
        return as_instant(self.enqueued_time)

    @property
    def first_delivered_at(self):
        """When it was first delivered, in UTC, or None."""
        return as_instant(self.first_delivered_time)

    @property
    def delivered_at(self):
        """When it was delivered this time, in UTC, or None."""
        return as_instant(self.delivered_time)

    @property
    def locked_until(self):
        """When others may get it again, in UTC, or None. A renewal of the lock does not change it."""
        return as_instant(self.locked_until_time)

    @property
    def receipt(self):
        """The right to settle this delivery. Raises InvalidReceiptError for a message that was only peeked at."""
        if self._receipt is None:
            raise InvalidReceiptError("the receipt of a peeked message", "there is none: it was not received")
        return self._receipt

    @property
    def sequence_number(self):
        """Its place in the queue, or None."""
        if self._sequence_number is not None:
            return self._sequence_number
        return None if self.sequence < 0 else self.sequence

    def __eq__(self, other):
        if self is other:
            return True
        if not isinstance(other, ReceivedMessage):
            return NotImplemented
        return delivery_of(self) == delivery_of(<ReceivedMessage>other)

    def __hash__(self):
        return hash((self.message_id, self.delivery_count))

    def __repr__(self):
        if self._message is None:
            return "<ReceivedMessage made without its constructor>"
        text = f"ReceivedMessage({self._message!r}, delivery_count={self.delivery_count}"
        if self.sequence_number is not None:
            text += f", sequence_number={self.sequence_number}"
        if self.dead_letter_reason is not None:
            text += f", dead_letter_reason={self.dead_letter_reason!r}"
        return f"{text}, receipt={self._receipt!r})"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _restore_received, delivery_of(self)


cdef object time_or_none(double seconds):
    return None if isnan(seconds) else seconds


cdef tuple delivery_of(ReceivedMessage self):
    return (
        self.whole(), self._receipt, self.delivery_count, time_or_none(self.enqueued_time),
        time_or_none(self.first_delivered_time), time_or_none(self.delivered_time),
        time_or_none(self.locked_until_time), self.sequence_number, self.dead_letter_reason,
        self.dead_letter_description,
    )


def _restore_received(
    message, receipt, delivery_count, enqueued_at, first_delivered_at, delivered_at, locked_until, sequence_number,
    dead_letter_reason, dead_letter_description,
):
    """Unpickle through the constructor."""
    return ReceivedMessage(
        message=message, receipt=receipt, delivery_count=delivery_count, enqueued_at=enqueued_at,
        first_delivered_at=first_delivered_at, delivered_at=delivered_at, locked_until=locked_until,
        sequence_number=sequence_number, dead_letter_reason=dead_letter_reason,
        dead_letter_description=dead_letter_description,
    )


cdef ReceivedMessage make_received(
    Message message, Receipt receipt, long long delivery_count, double enqueued_at, double first_delivered_at,
    double delivered_at, double locked_until, long long sequence, str dead_letter_reason, str dead_letter_description,
):
    cdef ReceivedMessage received = ReceivedMessage.__new__(ReceivedMessage)
    received._message = message
    received._receipt = receipt
    received.delivery_count = delivery_count
    received.enqueued_time = enqueued_at
    received.first_delivered_time = first_delivered_at
    received.delivered_time = delivered_at
    received.locked_until_time = locked_until
    received.sequence = sequence
    received.dead_letter_reason = dead_letter_reason
    received.dead_letter_description = dead_letter_description
    return received
