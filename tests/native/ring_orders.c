/* One scene per pair of memory orders, played by real threads over the shipped ring.h under ThreadSanitizer. The acts
   of a scene are put in turn by a relaxed counter, which orders nothing for the sanitizer: so only the ring's own
   orders can make the plain accesses of one act visible to the next, and a missing one is a reported race, always.
   Arguments: the scenes to play; none: all. Exit code 1: a wrong answer; 66: the sanitizer's. */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#define MOST_CELLS 4
static long owned[MOST_CELLS]; /* plain: written by the one thread that owns the cell */
#define QR_ON_CELL_OWNED(ring, position) (owned[(position) & (ring)->mask] += 1)
#include "ring.h"

#define CHECK(truth) \
    do { \
        if (!(truth)) { \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #truth); \
            exit(1); \
        } \
    } while (0)

static qr_ring *ring;
static qr_bell *bell;
static long plain[4]; /* what one act writes and a later one reads or writes */
static atomic_int turn;

static void await_turn(int act) {
    while (atomic_load_explicit(&turn, memory_order_relaxed) != act) sched_yield();
}

static void next_turn(void) { atomic_fetch_add_explicit(&turn, 1, memory_order_relaxed); }

static long take(size_t most) {
    void *out[MOST_CELLS];
    return (long)qr_ring_take(ring, out, most);
}

static int push(void) { return qr_ring_push(ring, &plain[0]); }

/* --- cell: an item's contents go from producer to consumer ------------------------------------------------------- */

static void cell_1(void) {
    plain[0] = 7;
    CHECK(push() == QR_DONE);
}

static void cell_2(void) {
    void *out;
    CHECK(qr_ring_take(ring, &out, 1) == 1);
    CHECK(*(long *)out == 7);
}

/* --- head: an emptied cell goes from the consumer to the producer of the next lap -------------------------------- */

static void one_cell_full(void) {
    ring = qr_ring_new(1);
    CHECK(push() == QR_DONE && push() == QR_FULL);
}

static void head_1(void) { CHECK(take(1) == 1); }

static void head_2(void) { CHECK(push() == QR_DONE); }

/* --- limit: … and on to a producer that looked at the limit only ------------------------------------------------- */

static void two_cells_full(void) {
    ring = qr_ring_new(2);
    CHECK(push() == QR_DONE && push() == QR_DONE);
}

static void limit_1(void) { CHECK(take(2) == 2); }

static void limit_2(void) { CHECK(push() == QR_DONE); }

static void limit_3(void) { CHECK(push() == QR_DONE); }

/* --- wake: what the consumer did before it armed is seen by the claim after: so is the watermark ----------------- */

static void wake_1(void) {
    plain[1] = 7;
    CHECK(qr_ring_arm(ring, 1) == 0);
}

static void wake_2(void) {
    CHECK(push() == QR_WAKE);
    CHECK(plain[1] == 7);
}

/* --- close, open: they carry the arming on to the claims after them ---------------------------------------------- */

static void close_2(void) {
    CHECK(qr_ring_close(ring) == 0 && push() == QR_SHUT);
    qr_ring_open(ring);
}

/* --- wait: a producer about to sleep sees what the consumer did before it looked for sleepers -------------------- */

static void wait_1(void) {
    CHECK(take(1) == 1);
    plain[1] = 7; /* after the head was stored, so that only the look can carry it */
    CHECK(qr_ring_waiters(ring) == 0);
}

static void wait_2(void) {
    qr_ring_wait_begin(ring);
    CHECK(plain[1] == 7);
    CHECK(push() == QR_DONE);
    qr_ring_wait_end(ring);
}

/* --- drain: the consumer's state goes from one consumer to the next ---------------------------------------------- */

static void drain_1(void) {
    CHECK(qr_ring_drain_try(ring));
    CHECK(!qr_ring_drain_try(ring));
    plain[1] += 1;
    CHECK(take(1) == 1);
    qr_ring_drain_end(ring);
}

/* --- bell: two ring, one of them posts; who answers sees what both did before ------------------------------------ */

static void bell_1(void) {
    plain[1] = 7;
    CHECK(qr_bell_ring(bell, 1) == 1);
}

static void bell_2(void) {
    plain[2] = 8;
    CHECK(qr_bell_ring(bell, 65) == 0);
}

static void bell_3(void) {
    qr_bell_answer(bell);
    CHECK(qr_bell_take(bell, 0) == UINT64_C(1) << 1 && qr_bell_take(bell, 1) == UINT64_C(1) << 1);
    CHECK(plain[1] == 7 && plain[2] == 8);
}

/* --- the stage --------------------------------------------------------------------------------------------------- */

static void empty_ring(void) { ring = qr_ring_new(4); }

static const struct scene {
    const char *name;
    void (*set_up)(void);
    void (*acts[3])(void);
} scenes[] = {
    {"cell", empty_ring, {cell_1, cell_2, NULL}},
    {"head", one_cell_full, {head_1, head_2, NULL}},
    {"limit", two_cells_full, {limit_1, limit_2, limit_3}},
    {"wake", empty_ring, {wake_1, wake_2, NULL}},
    {"close", empty_ring, {wake_1, close_2, wake_2}},
    {"wait", one_cell_full, {wait_1, wait_2, NULL}},
    {"drain", two_cells_full, {drain_1, drain_1, NULL}},
    {"bell", empty_ring, {bell_1, bell_2, bell_3}},
};

static const struct scene *scene;

static void *play_act(void *number) {
    int act = (int)(intptr_t)number;
    await_turn(act);
    scene->acts[act]();
    next_turn();
    return NULL;
}

int main(int count, char **names) {
    int played = 0;
    for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
        int wanted = count == 1;
        for (int name = 1; name < count; name++) wanted |= strcmp(names[name], scenes[i].name) == 0;
        if (!wanted) continue;
        played++;
        scene = &scenes[i];
        fprintf(stderr, "scene %s\n", scene->name);
        memset(plain, 0, sizeof plain);
        atomic_store(&turn, 0);
        bell = qr_bell_new(70);
        scene->set_up();
        CHECK(ring != NULL && bell != NULL);
        pthread_t actors[3];
        int acts = scene->acts[2] == NULL ? 2 : 3;
        for (int act = 0; act < acts; act++)
            CHECK(pthread_create(&actors[act], NULL, play_act, (void *)(intptr_t)act) == 0);
        for (int act = 0; act < acts; act++) pthread_join(actors[act], NULL);
        qr_ring_free(ring);
        qr_bell_free(bell);
    }
    return count > 1 && played != count - 1 ? 99 : 0;
}
