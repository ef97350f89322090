from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "wire.h" nogil:
    enum:
        WIRE_ATTRIBUTES
        WIRE_BODY
        WIRE_MAX_ATTRIBUTES
        WIRE_MAX_NAME
        WIRE_MAX_SESSION_ID
    const uint64_t WIRE_MAX_SIZE
    const int64_t WIRE_MAX_INSTANT

    ctypedef struct wire_text:
        const uint8_t *data
        size_t size

    ctypedef struct wire_envelope:
        uint32_t at[7]
        uint32_t ascii
        int64_t ttl_us
        int64_t scheduled_us
        int64_t delay_us
        uint64_t size

    ctypedef struct wire_fault:
        const char *field
        const char *problem
        uint64_t offset
        uint64_t claimed
        uint64_t left

    ctypedef struct wire_message:
        wire_text text[5]
        int64_t ttl_us
        int64_t scheduled_us
        int64_t delay_us
        const wire_text *attributes
        size_t attribute_count
        wire_text body

    bint wire_is_printable(const uint8_t *p, size_t size)
    size_t wire_place(const uint8_t *p, size_t size, unsigned bits)
    bint wire_same(const uint8_t *p, const uint8_t *q, size_t size)
    bint wire_check(const uint8_t *data, size_t size, wire_envelope *out, wire_fault *fault)
    bint wire_check_parts(const uint8_t *data, size_t size, size_t beyond, wire_envelope *out, wire_fault *fault)
    wire_text wire_checked_run(const uint8_t *p)
    size_t wire_checked_count(const uint8_t **p)
    uint64_t wire_measure(const wire_message *m)
    uint8_t *wire_write_head(const wire_message *m, uint8_t *out)
    uint8_t *wire_write(const wire_message *m, uint8_t *out)
