"""Messages as the core holds them: immutable, without a per-object dictionary, and cheap to make by the million."""

cimport cython
from cpython.buffer cimport PyObject_CheckBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.datetime cimport (
    PyDateTime_Check,
    PyDelta_Check,
    import_datetime,
    timedelta_days,
    timedelta_microseconds,
    timedelta_new,
    timedelta_seconds,
)
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_FromObject
from libc.math cimport NAN, isfinite, isnan, rint
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

from queue_runtime._core.wire cimport (
    WIRE_MAX_ATTRIBUTES,
    WIRE_MAX_SESSION_ID,
    wire_checked_count,
    wire_checked_run,
    wire_hash,
    wire_is_printable,
    wire_text,
)

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from queue_runtime.errors import InvalidReceiptError, ValidationError

import_datetime()

cdef extern from "Python.h":
    bint PyUnicode_CheckExact(object)
    bint PyUnicode_IS_COMPACT_ASCII(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)
    unsigned char *PyUnicode_1BYTE_DATA(object)
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *size) except NULL
    str PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    str PyUnicode_DecodeUTF8(const char *text, Py_ssize_t size, const char *errors)
    bint PyBytes_CheckExact(object)
    bint PyDict_CheckExact(object)
    bint PyBool_Check(object)
    bint PyLong_Check(object)
    bint PyFloat_Check(object)

cdef object EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
cdef object NO_ATTRIBUTES = MappingProxyType({})

cdef int64_t MAX_DURATION_US = <int64_t>0x7FFFFFFFFFFFFFFF
# The last microsecond that a datetime can tell, 9999-12-31T23:59:59.999999Z.
cdef int64_t MAX_SCHEDULED_US = <int64_t>253402300799999999

FIELD_NAMES = (
    "body", "attributes", "message_id", "session_id", "correlation_id", "content_type", "time_to_live",
    "scheduled_at", "delay", "deduplication_id",
)


# Message ids: random (version 4) UUIDs from a pool of the system's randomness, a system call per 256 of them.

cdef enum:
    POOL_SIZE = 4096

cdef unsigned char pool[POOL_SIZE]
cdef Py_ssize_t pool_used = POOL_SIZE
cdef char HEX[512]


cdef void fill_hex() noexcept:
    cdef const char *digits = b"0123456789abcdef"
    cdef int value
    for value in range(256):
        HEX[2 * value] = digits[value >> 4]
        HEX[2 * value + 1] = digits[value & 15]


fill_hex()


def _forget_pool():
    """Throw the pool away: after a fork, parent and child must not hand out the same ids."""
    global pool_used
    pool_used = POOL_SIZE


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


cdef str new_message_id():
    global pool_used
    cdef bytes fresh
    while pool_used > POOL_SIZE - 16:
        # os.urandom lets other threads run: they may fill the pool too, and that is harmless, since from the
        # assignment to the use below nothing else runs.
        fresh = os.urandom(POOL_SIZE)
        memcpy(pool, PyBytes_AS_STRING(fresh), POOL_SIZE)
        pool_used = 0
    cdef unsigned char random[16]
    memcpy(random, pool + pool_used, 16)
    pool_used += 16
    random[6] = (random[6] & 0x0F) | 0x40
    random[8] = (random[8] & 0x3F) | 0x80
    cdef str text = PyUnicode_New(36, 127)
    cdef unsigned char *out = PyUnicode_1BYTE_DATA(text)
    cdef int i
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            out[0] = b"-"
            out += 1
        memcpy(out, HEX + 2 * random[i], 2)
        out += 2
    return text


# Checks. Each returns the value as it is kept, or raises ValidationError.

cdef Py_ssize_t utf8_size(str text, str field) except -1:
    """Return the length in UTF-8, and keep that form on the string (CPython does), for the encoder."""
    cdef Py_ssize_t size = 0
    if PyUnicode_IS_COMPACT_ASCII(text):
        return PyUnicode_GET_LENGTH(text)
    try:
        PyUnicode_AsUTF8AndSize(text, &size)
    except UnicodeEncodeError as error:
        raise ValidationError(
            field, f"must be valid Unicode: a lone surrogate at index {error.start} has no UTF-8"
        ) from None
    return size


cdef bint is_session_id(str value) noexcept:
    """Whether this is 1 to 128 printable ASCII characters [C2]."""
    if not PyUnicode_IS_COMPACT_ASCII(value):
        return False
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(value)
    return 1 <= size <= WIRE_MAX_SESSION_ID and wire_is_printable(PyUnicode_1BYTE_DATA(value), size)


cdef str plain_text(object value, str field):
    """A str and not one of a subclass, whose methods could answer anything."""
    if PyUnicode_CheckExact(value):
        return <str>value
    if not isinstance(value, str):
        raise ValidationError(field, f"must be a str, not {type(value).__name__}")
    return <str>PyUnicode_FromObject(value)


cdef int64_t duration_us(object value, str field, int64_t least) except? -1:
    cdef double seconds
    cdef object exact
    cdef int64_t us
    if PyDelta_Check(value):
        exact = (
            (<object><long long>timedelta_days(value) * 86400 + timedelta_seconds(value)) * 1000000
            + timedelta_microseconds(value)
        )
    elif PyBool_Check(value):
        raise ValidationError(field, "must be seconds or a timedelta, not bool")
    elif PyLong_Check(value):
        exact = value * 1000000
    elif PyFloat_Check(value):
        seconds = value
        if not isfinite(seconds):
            raise ValidationError(field, f"must be finite, not {value!r}")
        exact = int(rint(seconds * 1e6)) if -1e15 < seconds < 1e15 else int(seconds) * 1000000
    else:
        raise ValidationError(field, f"must be seconds or a timedelta, not {type(value).__name__}")
    if exact < least:
        limit = "must not be negative" if least == 0 else "must be at least a microsecond"
        raise ValidationError(field, f"{limit}, not {value!r}")
    if exact > MAX_DURATION_US:
        raise ValidationError(field, "must be at most 2**63-1 microseconds (about 292,000 years)")
    us = exact
    return us


cdef int64_t instant_us(object value, str field) except? -1:
    if not PyDateTime_Check(value):
        raise ValidationError(field, f"must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise ValidationError(field, "must be an aware datetime, such as datetime.now(UTC)")
    since = value - EPOCH
    if since < timedelta(0):
        raise ValidationError(field, "must not be before 1970-01-01T00:00:00Z")
    return (since.days * 86400 + since.seconds) * 1000000 + since.microseconds


cdef object as_timedelta(int64_t us):
    if us < 0:
        return None
    cdef int64_t seconds = us // 1000000
    return timedelta_new(<int>(seconds // 86400), <int>(seconds % 86400), <int>(us % 1000000))


cdef object as_instant(double seconds):
    return None if isnan(seconds) else datetime.fromtimestamp(seconds, UTC)


cdef dict checked_attributes(object given, Py_ssize_t *size):
    """Copy the attributes, or return None when there are none; add their length in UTF-8 to `size`."""
    cdef PyObject *key
    cdef PyObject *value
    cdef Py_ssize_t position = 0
    cdef bint plain = True
    cdef dict attributes
    if PyDict_CheckExact(given):
        attributes = <dict>given
    elif isinstance(given, Mapping):
        attributes = dict(given)
    else:
        raise ValidationError("attributes", f"must be a mapping of str to str, not {type(given).__name__}")
    if not attributes:
        return None
    if len(attributes) > WIRE_MAX_ATTRIBUTES:
        raise ValidationError("attributes", f"has {len(attributes)} entries; the limit is {WIRE_MAX_ATTRIBUTES}")
    while PyDict_Next(attributes, &position, &key, &value):
        if PyUnicode_CheckExact(<object>key) and PyUnicode_CheckExact(<object>value):
            if PyUnicode_GET_LENGTH(<object>key) == 0:
                raise ValidationError("attributes", "has an empty name")
            size[0] += utf8_size(<str><object>key, "attributes") + utf8_size(<str><object>value, "attributes")
        else:
            plain = False
            break
    if plain:
        return attributes.copy()
    exact = {plain_text(name, "attributes"): plain_text(text, "attributes") for name, text in attributes.items()}
    return checked_attributes(exact, size)


# Building fields of a decoded message. The wire was checked as a whole, so nothing here can find fault with it.

cdef enum:
    NAMES_KEPT = 256
    LONGEST_NAME_KEPT = 32

# Attribute names are the same few in most messages: these are kept, so that they (and their hashes) are made once.
# A name has one place, by its bytes, and a newcomer takes it over: the memory is bounded.
cdef list kept_names = [None] * NAMES_KEPT


cdef str built_text(wire_text text, bint ascii):
    cdef str built
    if text.data is NULL:
        return None
    if not ascii:
        return PyUnicode_DecodeUTF8(<const char *>text.data, text.size, NULL)
    if text.size == 0:
        return ""
    built = PyUnicode_New(text.size, 127)
    memcpy(PyUnicode_1BYTE_DATA(built), text.data, text.size)
    return built


cdef str built_name(wire_text text, bint ascii):
    cdef str name
    cdef size_t place
    if not ascii or text.size > LONGEST_NAME_KEPT:
        return built_text(text, ascii)
    place = wire_hash(text.data, text.size) % NAMES_KEPT
    kept = kept_names[place]
    if kept is not None:
        name = <str>kept
        if (
            <size_t>PyUnicode_GET_LENGTH(name) == text.size
            and memcmp(PyUnicode_1BYTE_DATA(name), text.data, text.size) == 0
        ):
            return name
    name = built_text(text, True)
    kept_names[place] = name
    return name


cdef dict built_attributes(const uint8_t *at, bint ascii):
    cdef size_t count = wire_checked_count(&at)
    cdef wire_text name, value
    cdef dict attributes
    if count == 0:
        return None
    attributes = {}
    for _ in range(count):
        name = wire_checked_run(at)
        value = wire_checked_run(name.data + name.size)
        at = value.data + value.size
        attributes[built_name(name, ascii)] = built_text(value, ascii)
    return attributes


@cython.final
@cython.no_gc  # it holds str, bytes and a dict of str, and so cannot be part of a cycle: the collector may skip it
@cython.freelist(256)
cdef class Message:
    """A message to send: immutable, compared by value.

    Parameters
    ----------
    body:
        The payload. ``bytes`` are kept as they are; a ``bytearray`` or ``memoryview`` is copied.
    attributes:
        A mapping of str to str, at most 256, names not empty. Copied; read back as a read-only mapping.
    message_id:
        Any non-empty str. By default a new random UUID.
    session_id:
        1 to 128 printable ASCII characters: messages of one session are processed in order. None: no session.
    correlation_id, content_type:
        For the receiver; any str.
    time_to_live:
        Seconds, or a timedelta, after which it is no longer delivered; at least a microsecond.
    scheduled_at:
        An aware datetime, not before 1970: invisible until then. Read back in UTC. Excludes ``delay``.
    delay:
        Seconds, or a timedelta, that it stays invisible after it was sent; not negative. Excludes ``scheduled_at``.
    deduplication_id:
        A non-empty str: a second message with it, within the queue's window, is accepted and not delivered.

    Times are kept in whole microseconds.

    Raises
    ------
    ValidationError
        Naming the field and its limit.

    Thread-safety: any thread may read it.
    """

    def __cinit__(self):
        self.ttl_us = self.scheduled_us = self.delay_us = -1

    def __init__(
        self, *, body, attributes=None, message_id=None, session_id=None, correlation_id=None, content_type=None,
        time_to_live=None, scheduled_at=None, delay=None, deduplication_id=None,
    ):
        cdef Py_ssize_t size = 0
        if self.built or self.wire is not None:  # a second call of __init__
            raise TypeError("a Message is immutable; use replace() for a changed copy")
        if PyBytes_CheckExact(body):
            self._body = <bytes>body
        elif isinstance(body, str) or not PyObject_CheckBuffer(body):
            raise ValidationError("body", f"must be bytes, bytearray or memoryview, not {type(body).__name__}")
        else:
            self._body = bytes(memoryview(body))
        size = len(self._body)
        if attributes is not None:
            self._attributes = checked_attributes(attributes, &size)
        if message_id is None:
            self._message_id = new_message_id()
            size += 36
        else:
            self._message_id = plain_text(message_id, "message_id")
            if PyUnicode_GET_LENGTH(self._message_id) == 0:
                raise ValidationError("message_id", "must not be empty")
            size += utf8_size(self._message_id, "message_id")
        if session_id is not None:
            self._session_id = plain_text(session_id, "session_id")
            if not is_session_id(self._session_id):
                raise ValidationError("session_id", f"must be 1 to {WIRE_MAX_SESSION_ID} printable ASCII characters")
            size += PyUnicode_GET_LENGTH(self._session_id)
        if correlation_id is not None:
            self._correlation_id = plain_text(correlation_id, "correlation_id")
            size += utf8_size(self._correlation_id, "correlation_id")
        if content_type is not None:
            self._content_type = plain_text(content_type, "content_type")
            size += utf8_size(self._content_type, "content_type")
        if deduplication_id is not None:
            self._deduplication_id = plain_text(deduplication_id, "deduplication_id")
            if PyUnicode_GET_LENGTH(self._deduplication_id) == 0:
                raise ValidationError("deduplication_id", "must not be empty")
            size += utf8_size(self._deduplication_id, "deduplication_id")
        if time_to_live is not None:
            self.ttl_us = duration_us(time_to_live, "time_to_live", 1)
        if scheduled_at is not None:
            if delay is not None:
                raise ValidationError("delay", "excludes scheduled_at: give one of them")
            self.scheduled_us = instant_us(scheduled_at, "scheduled_at")
        elif delay is not None:
            self.delay_us = duration_us(delay, "delay", 0)
        self._size = size
        # Last: a constructor that raised leaves an object that answers nothing.
        self.built = EVERY_FIELD

    # For the core. The first test is the whole cost once a field exists.

    cdef int check_made(self) except -1:
        if not self.built and self.wire is None:
            raise ValidationError("message", "was made without its constructor; use Message(...)")
        return 0

    cdef int build(self, uint32_t field) except -1:
        """Make the Python object of one field from the wire."""
        cdef const uint8_t *wire
        cdef bint ascii = self.ascii & field
        self.check_made()
        wire = <const uint8_t *>PyBytes_AS_STRING(self.wire)
        if field == MESSAGE_ID:
            self._message_id = built_text(wire_checked_run(wire + self.at[0]), ascii)
        elif field == SESSION_ID:
            self._session_id = built_text(wire_checked_run(wire + self.at[1]), ascii)
        elif field == CORRELATION_ID:
            self._correlation_id = built_text(wire_checked_run(wire + self.at[2]), ascii)
        elif field == CONTENT_TYPE:
            self._content_type = built_text(wire_checked_run(wire + self.at[3]), ascii)
        elif field == DEDUPLICATION_ID:
            self._deduplication_id = built_text(wire_checked_run(wire + self.at[4]), ascii)
        elif field == ATTRIBUTES:
            self._attributes = built_attributes(wire + self.at[5], ascii)
        else:
            body = wire_checked_run(wire + self.at[6])
            self._body = PyBytes_FromStringAndSize(<const char *>body.data, body.size)
        # Last: two threads that look first at the same time both build, and both values are right.
        self.built |= field
        return 0

    cdef str c_message_id(self):
        if not self.built & MESSAGE_ID:
            self.build(MESSAGE_ID)
        return self._message_id

    cdef str c_session_id(self):
        if not self.built & SESSION_ID:
            self.build(SESSION_ID)
        return self._session_id

    cdef str c_correlation_id(self):
        if not self.built & CORRELATION_ID:
            self.build(CORRELATION_ID)
        return self._correlation_id

    cdef str c_content_type(self):
        if not self.built & CONTENT_TYPE:
            self.build(CONTENT_TYPE)
        return self._content_type

    cdef str c_deduplication_id(self):
        if not self.built & DEDUPLICATION_ID:
            self.build(DEDUPLICATION_ID)
        return self._deduplication_id

    cdef dict c_attributes(self):
        if not self.built & ATTRIBUTES:
            self.build(ATTRIBUTES)
        return self._attributes

    cdef bytes c_body(self):
        if not self.built & BODY:
            self.build(BODY)
        return self._body

    cdef Py_ssize_t c_size(self) except -1:
        self.check_made()
        return self._size

    # For everybody.

    @property
    def body(self):
        """The payload."""
        return self.c_body()

    @property
    def body_view(self):
        """A read-only memoryview of the payload, without a copy: of a decoded message, on the bytes it came in."""
        cdef wire_text body
        cdef Py_ssize_t start
        if self.built & BODY or self.wire is None:
            return memoryview(self.c_body())
        body = wire_checked_run(<const uint8_t *>PyBytes_AS_STRING(self.wire) + self.at[6])
        start = body.data - <const uint8_t *>PyBytes_AS_STRING(self.wire)
        return memoryview(self.wire)[start:start + <Py_ssize_t>body.size]

    @property
    def attributes(self):
        """A read-only mapping of str to str."""
        cdef dict attributes = self.c_attributes()
        if attributes is None:
            return NO_ATTRIBUTES
        if self._attributes_view is None:
            self._attributes_view = MappingProxyType(attributes)
        return self._attributes_view

    @property
    def message_id(self):
        """The sender's id of the message, the same on both sides of every provider."""
        return self.c_message_id()

    @property
    def session_id(self):
        """The session, or None."""
        return self.c_session_id()

    @property
    def correlation_id(self):
        """The correlation id, or None."""
        return self.c_correlation_id()

    @property
    def content_type(self):
        """The content type, or None."""
        return self.c_content_type()

    @property
    def time_to_live(self):
        """How long it may be delivered, as a timedelta, or None: for ever."""
        return as_timedelta(self.ttl_us)

    @property
    def scheduled_at(self):
        """The time from which it may be delivered, in UTC, or None."""
        return None if self.scheduled_us < 0 else EPOCH + as_timedelta(self.scheduled_us)

    @property
    def delay(self):
        """How long it stays invisible after it was sent, as a timedelta, or None."""
        return as_timedelta(self.delay_us)

    @property
    def deduplication_id(self):
        """The deduplication id, or None."""
        return self.c_deduplication_id()

    @property
    def size(self):
        """Bytes of the body and of all ids, attribute names and values in UTF-8: what size limits apply to."""
        return self.c_size()

    def replace(self, **changes):
        """Return a copy with these fields changed; the message id stays unless it is given.

        Raises
        ------
        ValidationError
            For a bad value, or for a name that is no field.
        """
        fields = dict(zip(FIELD_NAMES, fields_of(self)))
        for name in changes:
            if name not in fields:
                raise ValidationError(name, "is not a field of Message")
        fields.update(changes)
        return Message(**fields)

    def __eq__(self, other):
        if self is other:
            return True
        if not isinstance(other, Message):
            return NotImplemented
        cdef Message that = <Message>other
        if self.wire is not None and self.wire is that.wire:
            return True
        return (
            self.c_message_id() == that.c_message_id()
            and self.ttl_us == that.ttl_us
            and self.scheduled_us == that.scheduled_us
            and self.delay_us == that.delay_us
            and self.c_session_id() == that.c_session_id()
            and self.c_correlation_id() == that.c_correlation_id()
            and self.c_content_type() == that.c_content_type()
            and self.c_deduplication_id() == that.c_deduplication_id()
            and self.c_attributes() == that.c_attributes()
            and self.c_body() == that.c_body()
        )

    def __hash__(self):
        return hash(self.c_message_id())

    def __repr__(self):
        # Neither the body nor the attributes' values: either may be secret.
        if not self.built and self.wire is None:
            return "<Message made without its constructor>"
        text = f"Message(message_id={self.c_message_id()!r}"
        if self.c_session_id() is not None:
            text += f", session_id={self.c_session_id()!r}"
        return f"{text}, {self.body_view.nbytes} bytes, {len(self.attributes)} attributes)"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _restore_message, fields_of(self)


cdef tuple fields_of(Message self):
    cdef dict attributes = self.c_attributes()
    return (
        self.c_body(), attributes and attributes.copy(), self.c_message_id(), self.c_session_id(),
        self.c_correlation_id(), self.c_content_type(), self.time_to_live, self.scheduled_at, self.delay,
        self.c_deduplication_id(),
    )


def _restore_message(*fields):
    """Unpickle through the constructor, so that a pickle cannot carry what the constructor refuses [C3]."""
    return Message(**dict(zip(FIELD_NAMES, fields)))


cdef Message make_bare():
    """A message without fields, for the decoder to fill."""
    return Message.__new__(Message)


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
        self.queue_name = plain_text(queue_name, "queue_name")
        self.token = token
        self.receiver_id = receiver_id

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
    cdef double seconds = value
    if not isfinite(seconds):
        raise ValidationError(field, f"must be finite seconds since the epoch, not {value!r}")
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
        cdef long long count = delivery_count
        if count < (receipt is not None):
            raise ValidationError("delivery_count", f"must be at least {int(receipt is not None)}, not {count}")
        if enqueued_at is None:
            raise ValidationError("enqueued_at", "must be seconds since the epoch, not None")
        self.enqueued_time = time_or_nan(enqueued_at, "enqueued_at")
        self.first_delivered_time = time_or_nan(first_delivered_at, "first_delivered_at")
        self.delivered_time = time_or_nan(delivered_at, "delivered_at")
        self.locked_until_time = time_or_nan(locked_until, "locked_until")
        if self.first_delivered_time > self.delivered_time:
            raise ValidationError("first_delivered_at", "must not be after delivered_at")
        if sequence_number is not None:
            if not PyLong_Check(sequence_number) or sequence_number < 0:
                raise ValidationError("sequence_number", f"must be an int and not negative, not {sequence_number!r}")
            self._sequence_number = sequence_number
        if dead_letter_reason is not None:
            self.dead_letter_reason = plain_text(dead_letter_reason, "dead_letter_reason")
        if dead_letter_description is not None:
            self.dead_letter_description = plain_text(dead_letter_description, "dead_letter_description")
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
        """The payload."""
        return self.whole().c_body()

    @property
    def body_view(self):
        """A read-only memoryview of the payload, without a copy."""
        return self.whole().body_view

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
