from libc.stdint cimport int64_t, uint8_t

from queue_runtime._core.wire cimport wire_text

cdef str new_message_id()

# Checks of given values. Each returns the value as it is kept, or raises ValidationError.
cdef str plain_text(object value, str field)
cdef Py_ssize_t utf8_size(str text, str field) except -1
cdef bint is_session_id(str value) noexcept
cdef int64_t duration_us(object value, str field, int64_t least) except? -1
cdef int64_t instant_us(object value, str field) except? -1
cdef dict checked_attributes(object given, Py_ssize_t *size)

# Kept values as Python shows them; -1 and NaN are None.
cdef object as_timedelta(int64_t us)
cdef object as_scheduled(int64_t us)
cdef object as_instant(double seconds)

# Values of a checked envelope.
cdef str built_text(wire_text text, bint ascii)
cdef str built_shared(wire_text text, bint ascii)
cdef dict built_attributes(const uint8_t *at, bint ascii)
