# What ring.h offers. None of it touches a Python object or an error indicator.
from libc.stdint cimport uint64_t

cdef extern from "ring.h" nogil:
    const uint64_t QR_NEVER

    cdef enum qr_answer:
        QR_DONE
        QR_WAKE
        QR_FULL
        QR_SHUT

    ctypedef struct qr_ring:
        uint64_t capacity

    qr_ring *qr_ring_new(uint64_t capacity) noexcept
    void qr_ring_free(qr_ring *ring) noexcept

    qr_answer qr_ring_claim(qr_ring *ring, uint64_t count, uint64_t *start) noexcept
    void qr_ring_publish(qr_ring *ring, uint64_t position, void *item) noexcept
    bint qr_ring_reached(qr_ring *ring, uint64_t start, uint64_t count) noexcept
    qr_answer qr_ring_push(qr_ring *ring, void *item) noexcept
    void qr_ring_wait_begin(qr_ring *ring) noexcept
    void qr_ring_wait_end(qr_ring *ring) noexcept

    bint qr_ring_drain_try(qr_ring *ring) noexcept
    void qr_ring_drain_end(qr_ring *ring) noexcept
    size_t qr_ring_take(qr_ring *ring, void **out, size_t most) noexcept
    uint64_t qr_ring_arm(qr_ring *ring, uint64_t wake_at) noexcept
    uint64_t qr_ring_waiters(qr_ring *ring) noexcept
    uint64_t qr_ring_close(qr_ring *ring) noexcept
    void qr_ring_open(qr_ring *ring) noexcept
    uint64_t qr_ring_claim_shut(qr_ring *ring, uint64_t count) noexcept

    uint64_t qr_ring_head(qr_ring *ring) noexcept
    uint64_t qr_ring_tail(qr_ring *ring) noexcept

    ctypedef struct qr_bell:
        uint64_t words

    qr_bell *qr_bell_new(uint64_t slots) noexcept
    void qr_bell_free(qr_bell *bell) noexcept
    bint qr_bell_ring(qr_bell *bell, uint64_t slot) noexcept
    void qr_bell_answer(qr_bell *bell) noexcept
    uint64_t qr_bell_take(qr_bell *bell, uint64_t word) noexcept
