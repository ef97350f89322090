"""Messages as the core holds them: immutable, without a per-object dictionary, and cheap to make by the million."""

cimport cython
from cpython.buffer cimport PyObject_CheckBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.string cimport memcmp

from queue_runtime._core.body cimport (
    VIEW_FROM,
    copied_run,
    file_body,
    kept_view,
    reader_over,
    view_data,
    view_size,
)
from queue_runtime._core.fields cimport (
    as_scheduled,
    as_timedelta,
    built_attributes,
    built_shared,
    built_text,
    checked_attributes,
    duration_us,
    instant_us,
    is_session_id,
    new_message_id,
    plain_text,
    utf8_size,
)
from queue_runtime._core.wire cimport WIRE_MAX_SESSION_ID, wire_checked_run, wire_text

import sys
from types import MappingProxyType

from queue_runtime.errors import ValidationError

cdef extern from "Python.h":
    Py_ssize_t PyUnicode_GET_LENGTH(object)
    bint PyBytes_CheckExact(object)
    object PyDictProxy_New(object mapping)
    object PyObject_GenericGetAttr(object owner, object name)
    object PyPickleBuffer_FromObject(object)

cdef object NO_ATTRIBUTES = MappingProxyType({})

# Names in code are interned, as these are: comparing the pointers tells which one it is.
cdef str MESSAGE_ID_NAME = sys.intern("message_id")
cdef str SESSION_ID_NAME = sys.intern("session_id")
cdef str CORRELATION_ID_NAME = sys.intern("correlation_id")
cdef str CONTENT_TYPE_NAME = sys.intern("content_type")
cdef str DEDUPLICATION_ID_NAME = sys.intern("deduplication_id")
cdef str TIME_TO_LIVE_NAME = sys.intern("time_to_live")
cdef str ATTRIBUTES_NAME = sys.intern("attributes")
cdef str BODY_NAME = sys.intern("body")

FIELD_NAMES = (
    "body", "attributes", "message_id", "session_id", "correlation_id", "content_type", "time_to_live",
    "scheduled_at", "delay", "deduplication_id",
)


@cython.final
@cython.no_gc  # it holds str, bytes and a dict of str, and so cannot be part of a cycle: the collector may skip it
@cython.freelist(256)
cdef class Message:
    """A message to send: immutable, compared by value.

    Parameters
    ----------
    body:
        The payload. ``bytes`` are kept as they are. A ``memoryview`` of 16 KiB or more over ``bytes`` or over a
        read-only ``mmap`` is kept as a view, and with it all that it is a part of. Any other buffer, a ``bytearray``
        for one, is copied once.
    attributes:
        A mapping of str to str: at most 256, with names of 1 to 1024 bytes in UTF-8. Copied; read back as a read-only mapping.
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
        cdef uint32_t known = EVERY_FIELD
        if self.built or self.wire is not None:  # a second call of __init__
            raise TypeError("a Message is immutable; use replace() for a changed copy")
        self.built = TAKEN
        if PyBytes_CheckExact(body):
            self._body = body
            size = PyBytes_GET_SIZE(body)
        elif isinstance(body, str) or not PyObject_CheckBuffer(body):
            raise ValidationError("body", f"must be bytes, bytearray or memoryview, not {type(body).__name__}")
        else:
            try:
                self._body = kept_view(body)
                if self._body is None:
                    self._body = bytes(memoryview(body))
                    size = PyBytes_GET_SIZE(self._body)
                else:
                    known ^= BODY | VIEW
                    size = view_size(self._body)
            except (BufferError, ValueError) as error:
                raise ValidationError("body", f"cannot be read: {error}") from None
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
        self.built |= known

    # For the core. The first test is the whole cost once a field exists.

    cdef int check_made(self) except -1:
        if not self.built & EVERY_FIELD and self.wire is None:
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
            self._content_type = built_shared(wire_checked_run(wire + self.at[3]), ascii)
        elif field == DEDUPLICATION_ID:
            self._deduplication_id = built_text(wire_checked_run(wire + self.at[4]), ascii)
        else:
            self._attributes = built_attributes(wire + self.at[5], ascii)
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
            return self.read_body()
        return <bytes>self._body

    cdef bytes read_body(self):
        cdef wire_text body
        self.body_run(&body)
        if body.size >= VIEW_FROM:
            return copied_run(body.data, body.size)
        cdef bytes copy = PyBytes_FromStringAndSize(<const char *>body.data, body.size)
        self._body = copy
        self.built |= BODY
        return copy

    cdef int body_run(self, wire_text *body) except -1:
        if self.built & BODY:
            body.data = <const uint8_t *>PyBytes_AS_STRING(self._body)
            body.size = PyBytes_GET_SIZE(self._body)
        elif self.built & VIEW:
            body.data = view_data(self._body)
            body.size = view_size(self._body)
        else:
            self.check_made()
            body[0] = wire_checked_run(<const uint8_t *>PyBytes_AS_STRING(self.wire) + self.at[6])
        return 0

    cdef object c_body_view(self):
        cdef wire_text body
        cdef Py_ssize_t start
        if self.built & (BODY | VIEW):
            return memoryview(self._body)
        self.body_run(&body)
        start = body.data - <const uint8_t *>PyBytes_AS_STRING(self.wire)
        return memoryview(self.wire)[start:start + <Py_ssize_t>body.size]

    cdef Py_ssize_t c_size(self) except -1:
        self.check_made()
        return self._size

    cdef object attributes_view(self):
        cdef dict attributes = self.c_attributes()
        if attributes is None:
            return NO_ATTRIBUTES
        if self._attributes_view is None:
            self._attributes_view = PyDictProxy_New(attributes)
        return self._attributes_view

    # For everybody.

    @classmethod
    def from_file(cls, path, **fields):
        """Make a message whose body is the content of a file; from 16 KiB on, the file is mapped and not read.

        The file may be renamed or deleted meanwhile. It must not be written to or truncated while the message or a
        view of its body exists: a change shows in the body, and reading what was cut off kills the process (SIGBUS).
        Mapped bytes are in the page cache, not in the process's own memory. No descriptor is kept.

        Parameters
        ----------
        path:
            A regular file.
        fields:
            The other fields, as the constructor takes them.

        Raises
        ------
        OSError
            When the file cannot be opened or mapped.
        ValidationError
            When it is no regular file, and as the constructor does.

        Thread-safety: any thread may call it. It opens a file: keep it off the event loop where that may take long.
        """
        if "body" in fields:
            raise ValidationError("body", "is the file's content, and cannot be given too")
        return Message(body=file_body(path), **fields)

    def __getattribute__(self, name):
        # A short cut to the properties below: the search for a property costs more than most of them do.
        if name is BODY_NAME:
            return self.c_body()
        if name is MESSAGE_ID_NAME:
            return self.c_message_id()
        if name is SESSION_ID_NAME:
            return self.c_session_id()
        if name is ATTRIBUTES_NAME:
            return self.attributes_view()
        if name is CORRELATION_ID_NAME:
            return self.c_correlation_id()
        if name is CONTENT_TYPE_NAME:
            return self.c_content_type()
        if name is DEDUPLICATION_ID_NAME:
            return self.c_deduplication_id()
        if name is TIME_TO_LIVE_NAME:
            return as_timedelta(self.ttl_us)
        return PyObject_GenericGetAttr(self, name)

    @property
    def body(self):
        """The payload as bytes.

        Where a payload of 16 KiB or more is held as a view, or inside the envelope that it was decoded from, each look
        makes a copy that is not kept: then look once, or use ``body_view`` or ``open_body()``.
        """
        return self.c_body()

    @property
    def body_view(self):
        """A read-only memoryview of the payload, without a copy; it may be kept for longer than the message."""
        return self.c_body_view()

    def open_body(self):
        """Return a binary file to read the payload from, without a copy of the whole; it may outlive the message."""
        return reader_over(self.c_body_view())

    @property
    def attributes(self):
        """A read-only mapping of str to str."""
        return self.attributes_view()

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
        return as_scheduled(self.scheduled_us)

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
        fields = dict(zip(FIELD_NAMES, fields_of(self, shared_body(self))))
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
            and same_body(self, that)
        )

    def __hash__(self):
        return hash(self.c_message_id())

    def __repr__(self):
        # Neither the body nor the attributes' values: either may be secret.
        if not self.built & EVERY_FIELD and self.wire is None:
            return "<Message made without its constructor>"
        cdef wire_text body
        self.body_run(&body)
        text = f"Message(message_id={self.c_message_id()!r}"
        if self.c_session_id() is not None:
            text += f", session_id={self.c_session_id()!r}"
        return f"{text}, {body.size} bytes, {len(self.attributes)} attributes)"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _restore_message, fields_of(self, self.c_body())

    def __reduce_ex__(self, protocol):
        body = shared_body(self)
        if PyBytes_CheckExact(body) or protocol < 5:
            return self.__reduce__()
        # No copy beside the pickle; and none at all for who passes buffers out of band.
        return _restore_message, fields_of(self, PyPickleBuffer_FromObject(body))


cdef object shared_body(Message self):
    """The body for another message: as it is, and a large one that is no bytes object as a view."""
    cdef wire_text run
    self.body_run(&run)
    if self.built & BODY or run.size < VIEW_FROM:
        return self.c_body()
    return self.c_body_view()


cdef bint same_body(Message one, Message other) except -1:
    cdef wire_text a, b
    one.body_run(&a)
    other.body_run(&b)
    return a.size == b.size and memcmp(a.data, b.data, a.size) == 0


cdef tuple fields_of(Message self, object body):
    cdef dict attributes = self.c_attributes()
    return (
        body, attributes and attributes.copy(), self.c_message_id(), self.c_session_id(),
        self.c_correlation_id(), self.c_content_type(), self.time_to_live, self.scheduled_at, self.delay,
        self.c_deduplication_id(),
    )


def _restore_message(*fields):
    """Unpickle through the constructor, so that a pickle cannot carry what the constructor refuses [C3]."""
    return Message(**dict(zip(FIELD_NAMES, fields)))


cdef Message make_bare():
    """A message without fields, for the decoder to fill."""
    return Message.__new__(Message)
