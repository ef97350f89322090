/* Real threads, as many at a time as they like, over the shipped ring.h, for the sanitizers: every item is a heap block
   with plain contents, freed by whoever takes it. Arguments: items per producer, then the trials to run (none: all). */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define MOST_CELLS 64
static long owned[MOST_CELLS]; /* plain: written by the one thread that owns the cell; one ring uses it */
static struct qr_ring *watched;
#define QR_ON_CELL_OWNED(ring, position) \
    do { \
        if ((ring) == watched) owned[(position) & (ring)->mask] += 1; \
    } while (0)
#include "ring.h"

#define CHECK(truth) \
    do { \
        if (!(truth)) { \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #truth); \
            exit(1); \
        } \
    } while (0)

enum { PRODUCERS = 3, SLOTS = 70, PATIENCE_S = 20 };

typedef struct {
    int producer, slot;
    long number, check;
    long group, left; /* push_many: which claim, and how many of it follow */
} item;

/* --- sleep and wake: a counting signal, that gives up after PATIENCE_S ------------------------------------------- */

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    long count;
} signal_t;

#define SIGNAL_MADE \
    { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 }

static signal_t wake = SIGNAL_MADE, room = SIGNAL_MADE;

static void post(signal_t *signal, long count) {
    pthread_mutex_lock(&signal->mutex);
    signal->count += count;
    pthread_cond_broadcast(&signal->changed);
    pthread_mutex_unlock(&signal->mutex);
}

/* How many signals are left. */
static long await(signal_t *signal) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE_S;
    pthread_mutex_lock(&signal->mutex);
    while (signal->count == 0)
        if (pthread_cond_timedwait(&signal->changed, &signal->mutex, &until) == ETIMEDOUT) {
            fprintf(stderr, "a wake was lost\n");
            exit(1);
        }
    long left = --signal->count;
    pthread_mutex_unlock(&signal->mutex);
    return left;
}

/* --- what the trials share --------------------------------------------------------------------------------------- */

static qr_ring *ring, *rings[SLOTS];
static qr_bell *bell;
static pthread_barrier_t barrier;
static long per_producer, next_number[SLOTS][PRODUCERS], taken_count, turns;
static int last_producer;

static void begin(uint64_t capacity) {
    wake.count = room.count = 0;
    taken_count = turns = 0;
    last_producer = -1;
    memset(next_number, 0, sizeof next_number);
    ring = watched = qr_ring_new(capacity);
    CHECK(ring != NULL && ring->mask < MOST_CELLS);
}

static item *new_item(int producer, int slot, long number) {
    item *made = malloc(sizeof *made);
    CHECK(made != NULL);
    *made = (item){producer, slot, number, number * 31 + producer, 0, 0};
    return made;
}

/* Whole, once, in the order of its producer; `gaps`: some may have gone elsewhere. */
static void received(item *it, int gaps) {
    CHECK(it->check == it->number * 31 + it->producer);
    CHECK(gaps ? it->number >= next_number[it->slot][it->producer] : it->number == next_number[it->slot][it->producer]);
    next_number[it->slot][it->producer] = it->number + 1;
    turns += it->producer != last_producer;
    last_producer = it->producer;
    taken_count++;
    free(it);
}

static void push_or_wait(item *it) {
    for (;;) {
        enum qr_answer answer = qr_ring_push(ring, it);
        if (answer == QR_FULL) {
            qr_ring_wait_begin(ring);
            answer = qr_ring_push(ring, it);
            if (answer == QR_FULL) await(&room);
            qr_ring_wait_end(ring);
        }
        if (answer == QR_WAKE) post(&wake, 1);
        if (answer != QR_FULL) return;
    }
}

static long take_from(qr_ring *from, size_t most, int gaps) {
    void *out[MOST_CELLS];
    size_t count = qr_ring_take(from, out, most);
    for (size_t i = 0; i < count; i++) received(out[i], gaps);
    return (long)count;
}

/* Take all there is to come, asleep until `batch` items are claimed. */
static void consume(long total, long batch) {
    while (taken_count < total) {
        if (take_from(ring, MOST_CELLS, 0) > 0) {
            long waiting = (long)qr_ring_waiters(ring);
            if (waiting > 0) post(&room, waiting);
            continue;
        }
        long left = total - taken_count;
        uint64_t at = qr_ring_head(ring) + (uint64_t)(left < batch ? left : batch);
        if (qr_ring_arm(ring, at) >= at)
            sched_yield(); /* claimed, not published yet */
        else
            await(&wake);
    }
}

static void with_producers(void *(*producer)(void *), void (*consumer)(void)) {
    pthread_t made[PRODUCERS];
    CHECK(pthread_barrier_init(&barrier, NULL, PRODUCERS) == 0);
    for (int i = 0; i < PRODUCERS; i++) CHECK(pthread_create(&made[i], NULL, producer, (void *)(intptr_t)i) == 0);
    consumer();
    for (int i = 0; i < PRODUCERS; i++) pthread_join(made[i], NULL);
    pthread_barrier_destroy(&barrier);
}

static void end(void) {
    CHECK(qr_ring_head(ring) == qr_ring_tail(ring));
    CHECK(turns > PRODUCERS); /* or the producers ran one after the other and nothing was shown */
    qr_ring_free(ring);
}

/* --- push: a bounded ring, producers that wait for room, a consumer that sleeps on the watermark ----------------- */

static void *push_all(void *number) {
    int producer = (int)(intptr_t)number;
    pthread_barrier_wait(&barrier);
    for (long i = 0; i < per_producer; i++) push_or_wait(new_item(producer, 0, i));
    return NULL;
}

static void consume_each(void) { consume(PRODUCERS * per_producer, 1); }

static void consume_batches(void) { consume(PRODUCERS * per_producer, 7); }

static void trial_push(void) {
    begin(8);
    with_producers(push_all, consume_each);
    end();
    begin(13); /* not a power of two: more cells than room */
    with_producers(push_all, consume_batches);
    end();
}

/* --- many: claims of 1 to 5 items, which arrive without another between them ------------------------------------- */

static void *push_groups(void *number) {
    int producer = (int)(intptr_t)number;
    pthread_barrier_wait(&barrier);
    for (long i = 0, size; i < per_producer; i += size) {
        size = i % 5 + 1 < per_producer - i ? i % 5 + 1 : per_producer - i;
        item *group[5];
        for (long j = 0; j < size; j++) {
            group[j] = new_item(producer, 0, i + j);
            group[j]->group = i + 1;
            group[j]->left = size - 1 - j;
        }
        uint64_t start = 0;
        enum qr_answer answer;
        while ((answer = qr_ring_claim(ring, (uint64_t)size, &start)) == QR_FULL) sched_yield();
        CHECK(answer == QR_DONE);
        for (long j = 0; j < size; j++) qr_ring_publish(ring, start + (uint64_t)j, group[j]);
        if (qr_ring_reached(ring, start, (uint64_t)size)) post(&wake, 1);
    }
    return NULL;
}

static void consume_groups(void) {
    item open = {0};
    while (taken_count < PRODUCERS * per_producer) {
        void *out;
        if (qr_ring_take(ring, &out, 1) == 1) {
            item *it = out;
            if (open.left > 0)
                CHECK(it->producer == open.producer && it->group == open.group && it->left == open.left - 1);
            open = *it;
            received(it, 0);
        } else if (qr_ring_arm(ring, qr_ring_head(ring) + 1) > qr_ring_head(ring))
            sched_yield();
        else
            await(&wake);
    }
    CHECK(open.left == 0);
}

static void trial_many(void) {
    begin(16);
    with_producers(push_groups, consume_groups);
    end();
}

/* --- close: in the middle; what was accepted is what the snapshot holds, no more, no less; then open again ------- */

static long accepted[PRODUCERS], close_after;

static void *push_until_shut(void *number) {
    int producer = (int)(intptr_t)number;
    pthread_barrier_wait(&barrier);
    for (accepted[producer] = 0;;) {
        item *it = new_item(producer, 0, accepted[producer]);
        enum qr_answer answer = qr_ring_push(ring, it);
        if (answer <= QR_WAKE) {
            accepted[producer]++;
            continue;
        }
        free(it);
        if (answer == QR_SHUT) return NULL;
        sched_yield();
    }
}

static void close_in_the_middle(void) {
    /* Not before every producer was there: on a busy machine one may be done before the next begins. */
    while (taken_count < close_after || !next_number[0][0] || !next_number[0][1] || !next_number[0][2])
        if (take_from(ring, 5, 0) == 0) sched_yield();
    long closed_at = (long)qr_ring_close(ring);
    while (taken_count < closed_at)
        if (take_from(ring, MOST_CELLS, 0) == 0) sched_yield();
    CHECK(taken_count == closed_at && take_from(ring, MOST_CELLS, 0) == 0);
}

static void trial_close(void) {
    begin(32);
    for (int time = 0; time < 5; time++) {
        qr_ring_open(ring);
        memset(next_number, 0, sizeof next_number);
        long before = taken_count = (long)qr_ring_tail(ring);
        close_after = before + per_producer;
        with_producers(push_until_shut, close_in_the_middle);
        CHECK(before + accepted[0] + accepted[1] + accepted[2] == taken_count);
    }
    end();
}

/* --- drop: producers that take the oldest item out of a full ring, beside the consumer --------------------------- */

static atomic_long dropped, finished;

static void *push_dropping(void *number) {
    int producer = (int)(intptr_t)number;
    pthread_barrier_wait(&barrier);
    for (long i = 0; i < per_producer; i++) {
        item *it = new_item(producer, 0, i);
        while (qr_ring_push(ring, it) == QR_FULL) {
            void *oldest;
            if (!qr_ring_drain_try(ring)) {
                sched_yield();
                continue;
            }
            if (qr_ring_take(ring, &oldest, 1) == 1) {
                free(oldest);
                atomic_fetch_add_explicit(&dropped, 1, memory_order_relaxed);
            }
            qr_ring_drain_end(ring);
        }
    }
    atomic_fetch_add_explicit(&finished, 1, memory_order_relaxed);
    return NULL;
}

static void consume_what_is_left(void) {
    for (int last = 0; !last;) {
        last = atomic_load_explicit(&finished, memory_order_relaxed) == PRODUCERS;
        if (!qr_ring_drain_try(ring)) {
            last = 0;
            continue;
        }
        take_from(ring, MOST_CELLS, 1);
        qr_ring_drain_end(ring);
        sched_yield();
    }
}

static void trial_drop(void) {
    begin(4);
    atomic_store(&dropped, 0);
    atomic_store(&finished, 0);
    with_producers(push_dropping, consume_what_is_left);
    take_from(ring, MOST_CELLS, 1);
    CHECK(taken_count + atomic_load(&dropped) == PRODUCERS * per_producer);
    turns = PRODUCERS + 1; /* who dropped what says nothing of it */
    end();
}

/* --- bell: 70 slots, one loop, one wake under way at most -------------------------------------------------------- */

static void *push_to_slots(void *number) {
    int producer = (int)(intptr_t)number;
    long numbers[SLOTS] = {0};
    pthread_barrier_wait(&barrier);
    for (long i = 0; i < per_producer; i++) {
        int slot = (int)((i * 37 + producer * 11) % SLOTS);
        item *it = new_item(producer, slot, numbers[slot]++);
        enum qr_answer answer;
        while ((answer = qr_ring_push(rings[slot], it)) == QR_FULL) sched_yield();
        if (answer == QR_WAKE && qr_bell_ring(bell, (uint64_t)slot)) post(&wake, 1);
    }
    return NULL;
}

static void serve_slot(int slot) {
    for (;;) {
        while (take_from(rings[slot], MOST_CELLS, 0) > 0) continue;
        uint64_t at = qr_ring_head(rings[slot]) + 1;
        if (qr_ring_arm(rings[slot], at) < at) return;
        sched_yield();
    }
}

static void serve_slots(void) {
    for (int slot = 0; slot < SLOTS; slot++) serve_slot(slot);
    while (taken_count < PRODUCERS * per_producer) {
        CHECK(await(&wake) == 0);
        qr_bell_answer(bell);
        for (uint64_t word = 0; word < bell->words; word++)
            for (uint64_t bits = qr_bell_take(bell, word), bit = 0; bits >> bit; bit++) {
                if (bits >> bit & 1) serve_slot((int)(word * 64 + bit));
                if (bit == 63) break;
            }
    }
}

static void trial_bell(void) {
    begin(4);
    bell = qr_bell_new(SLOTS);
    CHECK(bell != NULL && bell->words == 2);
    for (int slot = 0; slot < SLOTS; slot++) CHECK((rings[slot] = qr_ring_new(4)) != NULL);
    with_producers(push_to_slots, serve_slots);
    for (int slot = 0; slot < SLOTS; slot++) {
        CHECK(qr_ring_head(rings[slot]) == qr_ring_tail(rings[slot]));
        qr_ring_free(rings[slot]);
    }
    qr_bell_free(bell);
    end();
}

int main(int count, char **arguments) {
    static const struct {
        const char *name;
        void (*run)(void);
    } trials[] = {
        {"push", trial_push}, {"many", trial_many}, {"close", trial_close}, {"drop", trial_drop}, {"bell", trial_bell},
    };
    int ran = 0;
    CHECK(count >= 2);
    CHECK((per_producer = atol(arguments[1])) > 0);
    for (size_t i = 0; i < sizeof trials / sizeof trials[0]; i++) {
        int wanted = count == 2;
        for (int name = 2; name < count; name++) wanted |= strcmp(arguments[name], trials[i].name) == 0;
        if (!wanted) continue;
        fprintf(stderr, "trial %s\n", trials[i].name);
        trials[i].run();
        ran++;
    }
    return count > 2 && ran != count - 2 ? 99 : 0;
}
