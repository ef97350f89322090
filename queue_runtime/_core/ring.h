/* The ring of one slot, and the bell that calls the loop to slots. Plain C11, header only, no Python.h.

   Words (README.md draws them): a *position* counts claims from 0 and never wraps (63 bits); a *cell* holds one
   pointer, NULL when empty; a producer *claims* positions by moving tail, then *publishes* each cell; the one
   consumer *takes* the published prefix and moves head; the *watermark* wake_at is the position whose claim must
   wake the consumer.

   Every memory order is a macro of its own, so that a test can weaken each alone (-DQR_ORD_X=memory_order_relaxed).
   No operation here waits, allocates (but init) or can fail between a claim and its publication. */
#ifndef QR_RING_H
#define QR_RING_H

#include "port.h"

/* A harness may watch the moments when exactly one thread owns a cell: claimed and not yet published, or taken and
   head not yet moved. */
#ifndef QR_ON_CELL_OWNED
#define QR_ON_CELL_OWNED(ring, position) ((void)0)
#endif

/* --- orders ---------------------------------------------------------------------------------------------------- */

/* Cell, producer's store. Partner: CELL_LOAD. Weaker: the consumer gets a pointer to an object whose contents it
   does not see. */
#ifndef QR_ORD_CELL_STORE
#define QR_ORD_CELL_STORE memory_order_release
#endif
/* Cell, consumer's load. Partner: CELL_STORE. */
#ifndef QR_ORD_CELL_LOAD
#define QR_ORD_CELL_LOAD memory_order_acquire
#endif
/* Head, consumer's store after it emptied the cells. Partner: HEAD_LOAD. Weaker: a producer's item can be overwritten
   by the consumer's late NULL of the lap before: the item is lost and the ring stands still. */
#ifndef QR_ORD_HEAD_STORE
#define QR_ORD_HEAD_STORE memory_order_release
#endif
/* Head, a producer's load when the cached limit is used up. Partner: HEAD_STORE. */
#ifndef QR_ORD_HEAD_LOAD
#define QR_ORD_HEAD_LOAD memory_order_acquire
#endif
/* Limit, store by the producer that read head. Partner: LIMIT_LOAD. It hands on what that producer acquired from
   head; weaker, another producer trusts the limit and breaks as under HEAD_STORE. */
#ifndef QR_ORD_LIMIT_STORE
#define QR_ORD_LIMIT_STORE memory_order_release
#endif
/* Limit, every producer's load. Partner: LIMIT_STORE. */
#ifndef QR_ORD_LIMIT_LOAD
#define QR_ORD_LIMIT_LOAD memory_order_acquire
#endif
/* Tail, the winning compare-and-swap of a claim. Partner: ARM. A claim that comes after the arming in tail's
   modification order sees the watermark that was armed; weaker, it reads the one before and the wake is lost. It
   need not release: what it claims is published by the cells, and as a read-modify-write it carries on the release
   sequence of an ARM for the claims after it. */
#ifndef QR_ORD_CLAIM
#define QR_ORD_CLAIM memory_order_acquire
#endif
/* Tail, the consumer's read-modify-write (of + 0) after it stored the watermark. Partner: CLAIM. A claim either comes
   before it, and is in the tail that it returns, or after it, and sees the watermark: no third way, so no wake is
   lost and no seq_cst is needed. A load in its place would need seq_cst on all four accesses. */
#ifndef QR_ORD_ARM
#define QR_ORD_ARM memory_order_release
#endif
/* Draining flag, taken. Partner: DRAIN_END. Under the drop-oldest policy a producer may be the consumer for a moment;
   weaker, the next consumer reads an old head or finds cells that are not emptied yet. */
#ifndef QR_ORD_DRAIN_TRY
#define QR_ORD_DRAIN_TRY memory_order_acquire
#endif
/* Draining flag, given back. Partner: DRAIN_TRY. */
#ifndef QR_ORD_DRAIN_END
#define QR_ORD_DRAIN_END memory_order_release
#endif
/* Waiters, a producer's + 1 before it looks for room once more. Partner: WAIT_LOOK. The same figure as CLAIM and ARM:
   the + 1 is either seen by the consumer's look, or comes after it and sees the head that the consumer stored.
   Weaker: a producer sleeps beside a ring with room. */
#ifndef QR_ORD_WAIT_BEGIN
#define QR_ORD_WAIT_BEGIN memory_order_acquire
#endif
/* Waiters, the consumer's read-modify-write (of + 0) after it moved head. Partner: WAIT_BEGIN. */
#ifndef QR_ORD_WAIT_LOOK
#define QR_ORD_WAIT_LOOK memory_order_release
#endif
/* Bell's posted flag, set after the slot's bit. Partner: BELL_ANSWER. Weaker: the answer misses the bit, or finds the
   bit and not the published cells. */
#ifndef QR_ORD_BELL_POST
#define QR_ORD_BELL_POST memory_order_release
#endif
/* Bell's posted flag, cleared by the loop before it takes the bits. Partner: BELL_POST. */
#ifndef QR_ORD_BELL_ANSWER
#define QR_ORD_BELL_ANSWER memory_order_acquire
#endif
/* Everything else is relaxed, and each place says why. */

/* --- the ring -------------------------------------------------------------------------------------------------- */

#define QR_CLOSED (UINT64_C(1) << 63) /* in tail: no claim succeeds any more */
#define QR_POSITION (~QR_CLOSED)      /* the rest of tail */
#define QR_NEVER UINT64_MAX           /* a watermark that no claim reaches */

enum qr_answer {
    QR_DONE = 0, /* published */
    QR_WAKE = 1, /* published, and this claim reached the watermark: wake the consumer */
    QR_FULL = 2, /* no room, nothing claimed */
    QR_SHUT = 3  /* closed, nothing claimed */
};

typedef struct qr_ring {
    alignas(QR_LINE) QR_ATOMIC(uint64_t) tail; /* producers: next position to claim, and QR_CLOSED */
    QR_ATOMIC(uint64_t) limit;                 /* producers: head + capacity when one of them last looked */
    alignas(QR_LINE) QR_ATOMIC(uint64_t) head; /* consumer: next position to take */
    QR_ATOMIC(uint64_t) waiters;               /* producers that wait for room */
    QR_ATOMIC(uint64_t) draining;              /* 1 while somebody is the consumer (drop-oldest only) */
    alignas(QR_LINE) QR_ATOMIC(uint64_t) wake_at;
    alignas(QR_LINE) uint64_t capacity; /* most items at a time, as asked for; never changes, like all below */
    uint64_t mask;                      /* cells - 1; cells are a power of two, at least capacity */
    QR_ATOMIC(void *) *cells;
} qr_ring;

/* Make a ring for 1..2^40 items; NULL when out of memory or out of range. Not yet shared. */
static inline qr_ring *qr_ring_new(uint64_t capacity) {
    uint64_t cells = 1;
    if (capacity < 1 || capacity > (UINT64_C(1) << 40)) return NULL;
    while (cells < capacity) cells <<= 1;
    qr_ring *ring = (qr_ring *)qr_alloc_lines(sizeof(qr_ring));
    if (ring == NULL) return NULL;
    /* Zeroed by calloc, which leaves the pages of a big ring untouched until it fills. NULL is all zeros wherever
       CPython runs. */
    ring->cells = (QR_ATOMIC(void *) *)calloc((size_t)cells, sizeof(ring->cells[0]));
    if (ring->cells == NULL) {
        qr_free_lines(ring);
        return NULL;
    }
    qr_atomic_init(&ring->tail, 0);
    qr_atomic_init(&ring->limit, capacity);
    qr_atomic_init(&ring->head, 0);
    qr_atomic_init(&ring->waiters, 0);
    qr_atomic_init(&ring->draining, 0);
    qr_atomic_init(&ring->wake_at, QR_NEVER);
    ring->capacity = capacity;
    ring->mask = cells - 1;
    return ring;
}

/* Free a ring that nobody shares any more. What is left in its cells is the caller's to release before. */
static inline void qr_ring_free(qr_ring *ring) {
    if (ring == NULL) return;
    free((void *)ring->cells);
    qr_free_lines(ring);
}

/* --- producers: any thread ------------------------------------------------------------------------------------- */

/* Claim `count` (1..capacity) positions in a row, all or none. */
static inline enum qr_answer qr_ring_claim(qr_ring *ring, uint64_t count, uint64_t *start) {
    /* Relaxed: a guess, that the compare-and-swap checks. */
    uint64_t tail = qr_load(&ring->tail, memory_order_relaxed);
    do {
        if (QR_UNLIKELY(tail & QR_CLOSED)) return QR_SHUT;
        if (QR_UNLIKELY(tail + count > qr_load(&ring->limit, QR_ORD_LIMIT_LOAD))) {
            uint64_t limit = qr_load(&ring->head, QR_ORD_HEAD_LOAD) + ring->capacity;
            /* An old tail is a small one: what is full for it is full for the true one. */
            if (tail + count > limit) return QR_FULL;
            /* Two producers may store out of order: a limit too low costs a look at head, nothing else. */
            qr_store(&ring->limit, limit, QR_ORD_LIMIT_STORE);
        }
    } while (!qr_cas_weak(&ring->tail, &tail, tail + count, QR_ORD_CLAIM, memory_order_relaxed));
    *start = tail;
    return QR_DONE;
}

/* Fill a claimed cell: the item, and one reference to it, is the ring's from here. */
static inline void qr_ring_publish(qr_ring *ring, uint64_t position, void *item) {
    QR_ON_CELL_OWNED(ring, position);
    qr_store(&ring->cells[position & ring->mask], item, QR_ORD_CELL_STORE);
}

/* Whether the claim of start..start + count - 1 reached the watermark. Exactly one claim reaches it. */
static inline int qr_ring_reached(qr_ring *ring, uint64_t start, uint64_t count) {
    /* Relaxed: the claim before it acquired (CLAIM, ARM). */
    uint64_t wake_at = qr_load(&ring->wake_at, memory_order_relaxed);
    return start < wake_at && wake_at <= start + count;
}

static inline enum qr_answer qr_ring_push(qr_ring *ring, void *item) {
    uint64_t start;
    enum qr_answer answer = qr_ring_claim(ring, 1, &start);
    if (QR_UNLIKELY(answer != QR_DONE)) return answer;
    qr_ring_publish(ring, start, item);
    return QR_UNLIKELY(qr_ring_reached(ring, start, 1)) ? QR_WAKE : QR_DONE;
}

/* Say that the caller is about to wait for room; it must try once more after this call, and then wait. */
static inline void qr_ring_wait_begin(qr_ring *ring) { qr_fetch_add(&ring->waiters, 1, QR_ORD_WAIT_BEGIN); }

/* Relaxed: a look that still counts it wakes nobody, at no harm. */
static inline void qr_ring_wait_end(qr_ring *ring) { qr_fetch_sub(&ring->waiters, 1, memory_order_relaxed); }

/* --- consumer: one thread at a time ---------------------------------------------------------------------------- */

/* Be the consumer, where others may want to be (drop-oldest). False: somebody else is. Never waits. */
static inline int qr_ring_drain_try(qr_ring *ring) { return qr_exchange(&ring->draining, 1, QR_ORD_DRAIN_TRY) == 0; }

static inline void qr_ring_drain_end(qr_ring *ring) { qr_store(&ring->draining, 0, QR_ORD_DRAIN_END); }

/* Take up to `most` items of the published prefix into `out`, with their references; how many. It stops before a
   cell that is claimed but not published, and does not wait for it: look again later. */
static inline size_t qr_ring_take(qr_ring *ring, void **out, size_t most) {
    /* Relaxed: only the consumer writes it. */
    uint64_t head = qr_load(&ring->head, memory_order_relaxed);
    size_t count = 0;
    while (count < most) {
        QR_ATOMIC(void *) *cell = &ring->cells[(head + count) & ring->mask];
        void *item = qr_load(cell, QR_ORD_CELL_LOAD);
        if (item == NULL) break;
        QR_ON_CELL_OWNED(ring, head + count);
        /* Relaxed: head publishes it. */
        qr_store(cell, NULL, memory_order_relaxed);
        out[count++] = item;
    }
    if (count > 0) qr_store(&ring->head, head + count, QR_ORD_HEAD_STORE);
    return count;
}

/* Set the watermark and return the tail (without QR_CLOSED). When that is the watermark or beyond, no claim will
   wake the consumer: it must act by itself. */
static inline uint64_t qr_ring_arm(qr_ring *ring, uint64_t wake_at) {
    /* Relaxed: the next line releases it. */
    qr_store(&ring->wake_at, wake_at, memory_order_relaxed);
    return qr_fetch_add(&ring->tail, 0, QR_ORD_ARM) & QR_POSITION;
}

/* How many producers wait for room, after head was moved. */
static inline uint64_t qr_ring_waiters(qr_ring *ring) { return qr_fetch_add(&ring->waiters, 0, QR_ORD_WAIT_LOOK); }

/* Let no more claims succeed; the tail at this moment, which is all that is ever to be taken until qr_ring_open.
   Relaxed: it and the claims are read-modify-writes of one word, which puts them in one order by itself. */
static inline uint64_t qr_ring_close(qr_ring *ring) {
    return qr_fetch_or(&ring->tail, QR_CLOSED, memory_order_relaxed) & QR_POSITION;
}

static inline void qr_ring_open(qr_ring *ring) { qr_fetch_and(&ring->tail, QR_POSITION, memory_order_relaxed); }

/* Claim `count` positions of a ring that is closed to everybody else; the caller knows that there is room, and no
   other call of this, close or open runs at the same time. It is how items that waited elsewhere come in, in order,
   before the ring is opened again. Relaxed: the consumer itself calls it, and publishes what it claims. */
static inline uint64_t qr_ring_claim_shut(qr_ring *ring, uint64_t count) {
    return qr_fetch_add(&ring->tail, count, memory_order_relaxed) & QR_POSITION;
}

/* --- anybody: figures that may be old when they arrive, hence relaxed -------------------------------------------- */

static inline uint64_t qr_ring_head(qr_ring *ring) { return qr_load(&ring->head, memory_order_relaxed); }

static inline uint64_t qr_ring_tail(qr_ring *ring) { return qr_load(&ring->tail, memory_order_relaxed) & QR_POSITION; }

static inline int qr_ring_closed(qr_ring *ring) {
    return (qr_load(&ring->tail, memory_order_relaxed) & QR_CLOSED) != 0;
}

/* What is published at a position, or NULL; for the garbage collector, which runs when nobody else does. */
static inline void *qr_ring_peek(qr_ring *ring, uint64_t position) {
    return qr_load(&ring->cells[position & ring->mask], memory_order_relaxed);
}

/* --- the bell -------------------------------------------------------------------------------------------------- */

/* A bit per slot that wants the loop, and one flag: a wake is posted and not yet answered. So at most one wake is
   under way, however many threads push to however many slots. */
typedef struct qr_bell {
    alignas(QR_LINE) QR_ATOMIC(uint64_t) posted;
    alignas(QR_LINE) uint64_t words; /* how many; never changes */
    QR_ATOMIC(uint64_t) *bits;
} qr_bell;

static inline qr_bell *qr_bell_new(uint64_t slots) {
    qr_bell *bell = (qr_bell *)qr_alloc_lines(sizeof(qr_bell));
    if (bell == NULL) return NULL;
    bell->words = (slots + 63) / 64;
    bell->bits = (QR_ATOMIC(uint64_t) *)qr_alloc_lines((size_t)bell->words * sizeof(bell->bits[0]));
    if (bell->bits == NULL) {
        qr_free_lines(bell);
        return NULL;
    }
    for (uint64_t i = 0; i < bell->words; i++) qr_atomic_init(&bell->bits[i], 0);
    qr_atomic_init(&bell->posted, 0);
    return bell;
}

static inline void qr_bell_free(qr_bell *bell) {
    if (bell == NULL) return;
    qr_free_lines((void *)bell->bits);
    qr_free_lines(bell);
}

/* Ask for the loop's attention to a slot. True: the caller must post the wake; false: one is under way. */
static inline int qr_bell_ring(qr_bell *bell, uint64_t slot) {
    /* Relaxed: the post below releases it. */
    qr_fetch_or(&bell->bits[slot / 64], UINT64_C(1) << (slot % 64), memory_order_relaxed);
    return qr_exchange(&bell->posted, 1, QR_ORD_BELL_POST) == 0;
}

/* The loop came. Call it before the bits are taken: a ring after it posts anew. */
static inline void qr_bell_answer(qr_bell *bell) { (void)qr_exchange(&bell->posted, 0, QR_ORD_BELL_ANSWER); }

/* Take one word of bits. Relaxed: the answer before it acquired; a bit that is set later comes with a wake of its own,
   and if it is taken here already, the slot's ring is looked at by a read-modify-write of tail (ARM), which the ringing
   claim precedes. */
static inline uint64_t qr_bell_take(qr_bell *bell, uint64_t word) {
    return qr_exchange(&bell->bits[word], 0, memory_order_relaxed);
}

#endif
