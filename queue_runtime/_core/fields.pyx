"""The fields of a message: fresh ids, the checks of given values, and building values from a checked envelope."""

from cpython.bytes cimport PyBytes_AS_STRING
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
from libc.math cimport isfinite, isnan, rint
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy

from queue_runtime._core.wire cimport (
    WIRE_MAX_ATTRIBUTES,
    WIRE_MAX_INSTANT,
    WIRE_MAX_NAME,
    WIRE_MAX_SESSION_ID,
    wire_checked_count,
    wire_checked_run,
    wire_is_printable,
    wire_place,
    wire_same,
    wire_text,
)

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from queue_runtime.errors import ValidationError, shown

import_datetime()

cdef extern from "Python.h":
    bint PyUnicode_CheckExact(object)
    bint PyUnicode_IS_COMPACT_ASCII(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)
    unsigned char *PyUnicode_1BYTE_DATA(object)
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *size) except NULL
    str PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    str PyUnicode_DecodeUTF8(const char *text, Py_ssize_t size, const char *errors)
    bint PyDict_CheckExact(object)
    bint PyBool_Check(object)
    bint PyLong_Check(object)
    bint PyFloat_Check(object)

cdef object EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
cdef int64_t MAX_DURATION_US = <int64_t>0x7FFFFFFFFFFFFFFF


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
        if len(fresh) != POOL_SIZE:  # a test's stand-in, say
            raise RuntimeError(f"os.urandom({POOL_SIZE}) returned {len(fresh)} bytes")
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
        raise ValidationError(field, f"{limit}, not {shown(value)}")
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
    us = (since.days * 86400 + since.seconds) * 1000000 + since.microseconds
    if us > WIRE_MAX_INSTANT:  # in a zone west of UTC the last year ends later
        raise ValidationError(field, "must not be after 9999-12-31T23:59:59.999999Z")
    return us


cdef object as_timedelta(int64_t us):
    if us < 0:
        return None
    cdef int64_t seconds = us // 1000000
    return timedelta_new(<int>(seconds // 86400), <int>(seconds % 86400), <int>(us % 1000000))


cdef object as_scheduled(int64_t us):
    return None if us < 0 else EPOCH + as_timedelta(us)


cdef object as_instant(double seconds):
    return None if isnan(seconds) else datetime.fromtimestamp(seconds, UTC)


cdef dict checked_attributes(object given, Py_ssize_t *size):
    """Copy the attributes, or return None when there are none; add their length in UTF-8 to `size`."""
    cdef PyObject *key
    cdef PyObject *value
    cdef Py_ssize_t position = 0
    cdef Py_ssize_t length, total = 0
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
            length = utf8_size(<str><object>key, "attributes")
            if not 1 <= length <= WIRE_MAX_NAME:
                raise ValidationError("attributes", f"has a name of {length} bytes; it must have 1 to {WIRE_MAX_NAME}")
            total += length + utf8_size(<str><object>value, "attributes")
        else:
            plain = False
            break
    if plain:
        size[0] += total
        return attributes.copy()
    exact = {plain_text(name, "attributes"): plain_text(text, "attributes") for name, text in attributes.items()}
    return checked_attributes(exact, size)


# Building fields of a decoded message. The wire was checked as a whole, so nothing here can find fault with it.

cdef enum:
    SHARED_BITS = 8
    LONGEST_SHARED = 32

# Attribute names and content types are the same few in most messages: these are kept, so that they (and their hashes)
# are made once. A text has one place, by its bytes, and a newcomer takes it over: the memory is bounded.
cdef list shared = [None] * (1 << SHARED_BITS)


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


cdef str built_shared(wire_text text, bint ascii):
    cdef str found
    cdef size_t place
    if not ascii or text.data is NULL or text.size > LONGEST_SHARED:
        return built_text(text, ascii)
    place = wire_place(text.data, text.size, SHARED_BITS)
    kept = shared[place]
    if kept is not None:
        found = <str>kept
        if <size_t>PyUnicode_GET_LENGTH(found) == text.size and wire_same(
            PyUnicode_1BYTE_DATA(found), text.data, text.size
        ):
            return found
    found = built_text(text, True)
    shared[place] = found
    return found


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
        attributes[built_shared(name, ascii)] = built_text(value, ascii)
    return attributes
