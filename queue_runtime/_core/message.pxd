from libc.stdint cimport int64_t, uint32_t

from queue_runtime._core.wire cimport wire_text

# Bits of Message.built: which fields exist as Python objects. A decoded message starts with none of them.
cdef enum:
    MESSAGE_ID = 1
    SESSION_ID = 2
    CORRELATION_ID = 4
    CONTENT_TYPE = 8
    DEDUPLICATION_ID = 16
    ATTRIBUTES = 32
    BODY = 64
    EVERY_FIELD = 127
    TAKEN = 128  # the constructor was called, and failed if no other bit is set
    VIEW = 256   # the body is a view, and BODY stays clear: bytes of it are not kept


cdef class Message:
    # Read the fields through the methods below: behind a clear bit of `built` there is nothing yet.
    cdef str _message_id
    cdef str _session_id
    cdef str _correlation_id
    cdef str _content_type
    cdef str _deduplication_id
    cdef dict _attributes           # never handed out: only copies and read-only views of it are
    cdef object _attributes_view
    cdef object _body               # behind BODY bytes, behind VIEW a memoryview, never handed out nor released
    cdef bytes wire                 # the envelope that this was decoded from or last encoded to, or None; of a VIEW,
                                    # what comes before the body's bytes
    cdef uint32_t at[7]             # where in `wire` each field starts, in the order of the bits above
    cdef uint32_t built
    cdef uint32_t ascii             # of a decoded message: which fields are ASCII in `wire`
    cdef Py_ssize_t _size
    cdef readonly int64_t ttl_us        # microseconds, -1 = none
    cdef readonly int64_t scheduled_us  # microseconds since the epoch, -1 = none
    cdef readonly int64_t delay_us      # microseconds, -1 = none

    cdef int build(self, uint32_t field) except -1
    cdef str c_message_id(self)
    cdef str c_session_id(self)         # None = no session
    cdef str c_correlation_id(self)
    cdef str c_content_type(self)
    cdef str c_deduplication_id(self)
    cdef dict c_attributes(self)        # None = no attributes; the caller must not change it
    cdef bytes c_body(self)             # of a large body that is not kept as bytes, a copy each time
    cdef bytes read_body(self)
    cdef int body_run(self, wire_text *body) except -1  # where the body is, for as long as the message lives
    cdef object c_body_view(self)
    cdef object attributes_view(self)
    cdef Py_ssize_t c_size(self) except -1
    cdef int check_made(self) except -1


# A message without fields, for the decoder to fill.
cdef Message make_bare()
