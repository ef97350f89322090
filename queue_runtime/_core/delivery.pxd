from queue_runtime._core.message cimport Message


cdef class Receipt:
    cdef readonly str queue_name
    cdef readonly object token
    cdef readonly long long receiver_id


cdef class ReceivedMessage:
    cdef Message _message
    cdef Receipt _receipt               # None = peeked
    cdef readonly long long delivery_count
    # Seconds since the epoch; NaN = none.
    cdef double enqueued_time
    cdef double first_delivered_time
    cdef double delivered_time
    cdef double locked_until_time
    cdef object _sequence_number        # an int, or None: then `sequence` says
    cdef long long sequence             # -1 = none
    cdef bytes _body                    # a copy that was asked for, of a body that the message holds as a view
    cdef readonly str dead_letter_reason
    cdef readonly str dead_letter_description

    cdef Message whole(self)


cdef Receipt make_receipt(str queue_name, object token, long long receiver_id)

# Nothing is checked here: the caller vouches for the values. `sequence` -1 and times NaN mean none.
cdef ReceivedMessage make_received(
    Message message, Receipt receipt, long long delivery_count, double enqueued_at, double first_delivered_at,
    double delivered_at, double locked_until, long long sequence, str dead_letter_reason, str dead_letter_description,
)
