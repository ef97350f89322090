"""Messages as bytes and back. The format, with examples byte by byte, is in docs/envelope.md; wire.h does the work."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from queue_runtime._core.body cimport VIEW_FROM, copy_run, kept_view, view_data, view_size
from queue_runtime._core.message cimport BODY, VIEW, Message, make_bare
from queue_runtime._core.wire cimport (
    WIRE_MAX_ATTRIBUTES,
    WIRE_MAX_SIZE,
    wire_check,
    wire_check_parts,
    wire_envelope,
    wire_fault,
    wire_measure,
    wire_message,
    wire_text,
    wire_write,
    wire_write_head,
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
    if message.built & BODY:
        out.body.data = <const uint8_t *>PyBytes_AS_STRING(message._body)
        out.body.size = PyBytes_GET_SIZE(message._body)
        return 0
    return message.body_run(&out.body)


cdef Message as_message(object message):
    if type(message) is not Message:
        hint = "; pass its message()" if type(message).__name__ == "ReceivedMessage" else ""
        raise ValidationError("message", f"must be a Message, not {type(message).__name__}{hint}")
    return <Message>message


cdef inline uint64_t measured(wire_message *parts) except 0:
    cdef uint64_t need = wire_measure(parts)
    if need > WIRE_MAX_SIZE:
        raise SerializationError(f"the message needs {need} bytes as an envelope; the limit is {WIRE_MAX_SIZE}")
    return need


cdef inline void write(const wire_message *parts, uint8_t *out) noexcept:
    if parts.body.size < VIEW_FROM:
        wire_write(parts, out)
    else:
        copy_run(wire_write_head(parts, out), parts.body.data, parts.body.size)


cdef inline bytes encoded(Message message):
    cdef wire_message parts
    cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
    cdef bytes wire
    gather(message, &parts, attributes)
    wire = PyBytes_FromStringAndSize(NULL, measured(&parts))
    write(&parts, <uint8_t *>PyBytes_AS_STRING(wire))
    return wire


cdef void join(Message message, uint8_t *out) noexcept:
    """Write an envelope of which the message has the head, and the body as a view."""
    cdef Py_ssize_t head = PyBytes_GET_SIZE(message.wire)
    memcpy(out, PyBytes_AS_STRING(message.wire), head)
    copy_run(out + head, view_data(message._body), view_size(message._body))


cdef bytes joined(Message message):
    cdef bytes wire = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(message.wire) + view_size(message._body))
    join(message, <uint8_t *>PyBytes_AS_STRING(wire))
    return wire


def encode_envelope(message):
    """Return the message as an envelope.

    The message keeps the bytes: sending it again encodes nothing. A decoded message gives the bytes that it came in.
    From 16 KiB on the bytes are not kept, since they hold the body once more: each call makes one copy of the body.

    Raises
    ------
    ValidationError
        When it is not a Message.
    SerializationError
        When the envelope would be larger than 4 GiB.

    Thread-safety: any thread may call it, with the same message too.
    """
    cdef Message m = as_message(message)
    cdef bytes wire
    if m.wire is not None:
        return joined(m) if m.built & VIEW else m.wire
    wire = encoded(m)
    if PyBytes_GET_SIZE(wire) < VIEW_FROM:
        m.wire = wire
    return wire


def encode_envelope_parts(message):
    """Return the message's envelope in two parts, for a sender that writes several buffers one after another.

    Returns
    -------
    tuple of bytes and memoryview
        What comes before the body's bytes, and the body, which is not copied. Joined they are the envelope.

    Raises ValidationError and SerializationError as ``encode_envelope`` does.

    Thread-safety: any thread may call it, with the same message too.
    """
    cdef Message m = as_message(message)
    cdef wire_message parts
    cdef wire_text attributes[2 * WIRE_MAX_ATTRIBUTES]
    cdef bytes head
    if m.wire is None:
        gather(m, &parts, attributes)
        head = PyBytes_FromStringAndSize(NULL, measured(&parts) - parts.body.size)
        wire_write_head(&parts, <uint8_t *>PyBytes_AS_STRING(head))
    elif m.built & VIEW:
        head = m.wire
    else:
        m.body_run(&parts.body)
        head = m.wire[:PyBytes_GET_SIZE(m.wire) - <Py_ssize_t>parts.body.size]
    return head, m.c_body_view()


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
        need = measured(&parts)
    else:
        need = PyBytes_GET_SIZE(m.wire) + (view_size(m._body) if m.built & VIEW else 0)
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
            write(&parts, <uint8_t *>view.buf + offset)
        elif m.built & VIEW:
            join(m, <uint8_t *>view.buf + offset)
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
        ``bytes``, or a ``memoryview`` of 16 KiB or more over ``bytes`` or over a read-only ``mmap``: the message keeps
        it, and its body is a part of it. Any other contiguous buffer is copied once.

    Raises
    ------
    ValidationError
        When it is no buffer of bytes.
    SerializationError
        When the bytes are not an envelope: with the field, what is wrong with it, and at which byte.

    Thread-safety: any thread may call it; another buffer than ``bytes`` must not change meanwhile.
    """
    if PyBytes_CheckExact(buffer):
        return decoded(<bytes>buffer)
    if isinstance(buffer, str) or not PyObject_CheckBuffer(buffer):
        raise ValidationError("buffer", f"must be bytes or another buffer, not {type(buffer).__name__}")
    try:
        view = kept_view(buffer)
        wire = bytes(memoryview(buffer)) if view is None else None
    except (BufferError, ValueError) as error:
        raise ValidationError("buffer", f"cannot be read: {error}") from None
    return decoded(wire) if view is None else decoded_view(view)


cdef Message decoded(bytes wire):
    cdef wire_envelope checked
    cdef wire_fault fault
    if not wire_check(<const uint8_t *>PyBytes_AS_STRING(wire), PyBytes_GET_SIZE(wire), &checked, &fault):
        refuse(&fault)
    return filled(wire, &checked)


cdef Message decoded_view(object view):
    """A message whose body is a part of this view; what comes before the body is copied.

    Where the view is of a file, somebody may write to it. So what is parsed again later, without a look at its bounds,
    is checked in the copy, and the first check only finds the end of it.
    """
    cdef wire_envelope checked
    cdef wire_fault fault
    cdef const uint8_t *data = view_data(view)
    cdef size_t size = view_size(view)
    cdef size_t start
    cdef bytes head
    cdef Message message
    if not wire_check(data, size, &checked, &fault):
        refuse(&fault)
    # The header of a bin: 0xC4 and a byte, 0xC5 and two, 0xC6 and four.
    start = min(size, <size_t>checked.at[6] + 1 + (<size_t>1 << ((data[checked.at[6]] - 0xC4) & 3)))
    if size - start < VIEW_FROM:  # most of it is attributes
        return decoded(bytes(view))
    head = PyBytes_FromStringAndSize(<const char *>data, start)
    if not wire_check_parts(<const uint8_t *>PyBytes_AS_STRING(head), start, size - start, &checked, &fault):
        refuse(&fault)
    message = filled(head, &checked)
    message._body = view[<Py_ssize_t>start:]
    message.built = VIEW
    return message


cdef inline Message filled(bytes wire, const wire_envelope *checked):
    cdef Message message = make_bare()
    message.wire = wire
    memcpy(message.at, checked.at, sizeof(checked.at))
    message.ascii = checked.ascii
    message.ttl_us = checked.ttl_us
    message.scheduled_us = checked.scheduled_us
    message.delay_us = checked.delay_us
    message._size = checked.size
    return message
