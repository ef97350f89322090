"""Messages as bytes and back. The format, with examples byte by byte, is in docs/envelope.md; wire.h does the work."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from queue_runtime._core.message cimport Message, make_bare
from queue_runtime._core.wire cimport (
    WIRE_MAX_ATTRIBUTES,
    WIRE_MAX_SIZE,
    wire_check,
    wire_envelope,
    wire_fault,
    wire_measure,
    wire_message,
    wire_text,
    wire_write,
)

from queue_runtime.errors import SerializationError, ValidationError

cdef extern from "Python.h":
    bint PyBytes_CheckExact(object)
    bint PyUnicode_IS_COMPACT_ASCII(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)
    unsigned char *PyUnicode_1BYTE_DATA(object)
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *size) except NULL


cdef inline int point(wire_text *text, object value) except -1:
    """Let `text` point at the UTF-8 that `value`, a str or None, keeps for itself."""
    cdef Py_ssize_t size = 0
    if value is None:
        text.data = NULL
        text.size = 0
    elif PyUnicode_IS_COMPACT_ASCII(value):
        text.data = PyUnicode_1BYTE_DATA(value)
        text.size = PyUnicode_GET_LENGTH(value)
    else:
        text.data = <const uint8_t *>PyUnicode_AsUTF8AndSize(value, &size)
        text.size = size
    return 0


cdef int gather(Message message, wire_message *out, wire_text *attributes) except -1:
    """Let `out` point at the message's own bytes, which live as long as the message does."""
    cdef PyObject *name
    cdef PyObject *value
    cdef Py_ssize_t position = 0
    cdef size_t count = 0
    message.check_made()  # and has no wire, or nobody would ask: so every field is there
    point(&out.text[0], message._message_id)
    point(&out.text[1], message._session_id)
    point(&out.text[2], message._correlation_id)
    point(&out.text[3], message._content_type)
    point(&out.text[4], message._deduplication_id)
    out.ttl_us = message.ttl_us
    out.scheduled_us = message.scheduled_us
    out.delay_us = message.delay_us
    if message._attributes is not None:
        while PyDict_Next(message._attributes, &position, &name, &value):
            point(attributes + 2 * count, <object>name)
            point(attributes + 2 * count + 1, <object>value)
            count += 1
    out.attributes = attributes
    out.attribute_count = count
    out.body.data = <const uint8_t *>PyBytes_AS_STRING(message._body)
    out.body.size = PyBytes_GET_SIZE(message._body)
    return 0


cdef Message as_message(object message):
    if type(message) is not Message:
        hint = "; pass its message()" if type(message).__name__ == "ReceivedMessage" else ""
        raise ValidationError("message", f"must be a Message, not {type(message).__name__}{hint}")
    return <Message>message


cdef bytes encoded(Message message):
    cdef wire_message parts
    cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
    cdef uint64_t need
    cdef bytes wire
    gather(message, &parts, attributes)
    need = wire_measure(&parts)
    if need > WIRE_MAX_SIZE:
        raise SerializationError(f"the message needs {need} bytes as an envelope; the limit is {WIRE_MAX_SIZE}")
    wire = PyBytes_FromStringAndSize(NULL, need)
    wire_write(&parts, <uint8_t *>PyBytes_AS_STRING(wire))
    return wire


def encode_envelope(message):
    """Return the message as an envelope.

    The message keeps the bytes: sending it again encodes nothing. A decoded message gives the bytes that it came in.

    Raises
    ------
    ValidationError
        When it is not a Message.
    SerializationError
        When the envelope would be larger than 4 GiB.

    Thread-safety: any thread may call it, with the same message too.
    """
    cdef Message m = as_message(message)
    if m.wire is None:
        m.wire = encoded(m)
    return m.wire


def encode_envelope_into(message, buffer, Py_ssize_t offset=0):
    """Write the message's envelope into a writable buffer and return the offset after its last byte.

    Parameters
    ----------
    message:
        A Message. Unlike ``encode_envelope`` this does not make it keep the bytes, but uses those that it has.
    buffer:
        A ``bytearray``, writable ``memoryview`` or any other writable, contiguous buffer.
    offset:
        In bytes, where to begin.

    Raises
    ------
    ValidationError
        When it is not a Message, or when the buffer is read-only, not contiguous or too small: then nothing is written.
    SerializationError
        When the envelope would be larger than 4 GiB.

    Thread-safety: any thread may call it; nothing else may write to that part of the buffer meanwhile.
    """
    cdef Message m = as_message(message)
    cdef wire_message parts
    cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
    cdef uint64_t need
    cdef Py_buffer view
    if m.wire is None:
        gather(m, &parts, attributes)
        need = wire_measure(&parts)
        if need > WIRE_MAX_SIZE:
            raise SerializationError(f"the message needs {need} bytes as an envelope; the limit is {WIRE_MAX_SIZE}")
    else:
        need = PyBytes_GET_SIZE(m.wire)
    if not PyObject_CheckBuffer(buffer):
        raise ValidationError("buffer", f"must be a bytearray or another writable buffer, not {type(buffer).__name__}")
    try:
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE | PyBUF_SIMPLE)
    except (BufferError, ValueError) as error:
        raise ValidationError("buffer", f"must be writable and contiguous: {error}") from None
    try:
        if not 0 <= offset <= view.len:
            raise ValidationError("offset", f"{offset} is outside 0..{view.len}")
        if need > <uint64_t>(view.len - offset):
            raise ValidationError(
                "buffer", f"has room for {view.len - offset} bytes after offset {offset}; the envelope needs {need}"
            )
        if m.wire is None:
            wire_write(&parts, <uint8_t *>view.buf + offset)
        else:
            memcpy(<uint8_t *>view.buf + offset, PyBytes_AS_STRING(m.wire), need)
    finally:
        PyBuffer_Release(&view)
    return offset + <Py_ssize_t>need


cdef int refuse(const wire_fault *fault) except -1:
    field = fault.field.decode()
    problem = fault.problem.decode()
    if fault.claimed:
        problem += f": it claims {fault.claimed} bytes, and {fault.left} are left"
    raise SerializationError(f"not an envelope: {field} {problem}, at byte {fault.offset}")


def decode_envelope(buffer):
    """Return the message that an envelope holds.

    The whole envelope is checked here; ids, attributes and body become Python objects when they are first looked at.

    Parameters
    ----------
    buffer:
        ``bytes``, which the message keeps a reference to, or any other contiguous buffer, which is copied once.

    Raises
    ------
    ValidationError
        When it is no buffer of bytes.
    SerializationError
        When the bytes are not an envelope: with the field, what is wrong with it, and at which byte.

    Thread-safety: any thread may call it; another buffer than ``bytes`` must not change meanwhile.
    """
    cdef wire_envelope checked
    cdef wire_fault fault
    cdef bytes wire
    if PyBytes_CheckExact(buffer):
        wire = <bytes>buffer
    elif isinstance(buffer, str) or not PyObject_CheckBuffer(buffer):
        raise ValidationError("buffer", f"must be bytes or another buffer, not {type(buffer).__name__}")
    else:
        try:
            wire = bytes(memoryview(buffer))
        except (BufferError, ValueError) as error:
            raise ValidationError("buffer", f"cannot be read: {error}") from None
    if not wire_check(<const uint8_t *>PyBytes_AS_STRING(wire), PyBytes_GET_SIZE(wire), &checked, &fault):
        refuse(&fault)
    cdef Message message = make_bare()
    message.wire = wire
    memcpy(message.at, checked.at, sizeof(checked.at))
    message.ascii = checked.ascii
    message.ttl_us = checked.ttl_us
    message.scheduled_us = checked.scheduled_us
    message.delay_us = checked.delay_us
    message._size = checked.size
    return message
