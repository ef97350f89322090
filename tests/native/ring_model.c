/* The shipped ring.h over the simulated memory of memory_model.h: a few threads, every schedule and every store that a
   weak memory may show. Prints a line per scenario; the exit code is the number of broken ones. */
#include "memory_model.h"

static int owned_cells; /* the first of the plain variables that stand for "this thread alone owns the cell" */
#define QR_ON_CELL_OWNED(ring, position) model_plain(owned_cells + (int)((position) & (ring)->mask), true)
#include "ring.h"

enum { MOST_ITEMS = 8 };

static struct item { int payload, taken; } items[MOST_ITEMS]; /* payload: a plain variable */
static qr_ring *ring;
static model_signal wake, room;
static int accepted, taken_count, last_taken[MOST_ITEMS], wakes;

/* --- what all scenarios share ------------------------------------------------------------------------------------ */

static void begin(uint64_t capacity) {
    accepted = taken_count = wakes = 0;
    memset(items, 0, sizeof items);
    memset(&wake, 0, sizeof wake);
    memset(&room, 0, sizeof room);
    ring = qr_ring_new(capacity);
    for (uint64_t cell = 0; cell <= ring->mask; cell++) MODEL_ADOPT(&ring->cells[cell]);
    owned_cells = place_count;
    for (uint64_t cell = 0; cell <= ring->mask; cell++) model_place(0, "the ownership of a cell");
    for (int i = 0; i < MOST_ITEMS; i++) items[i].payload = model_place(0, "an item's payload");
}

static enum qr_answer push(int number) {
    model_plain(items[number].payload, true);
    enum qr_answer answer = qr_ring_push(ring, &items[number]);
    if (answer <= QR_WAKE) accepted++;
    if (answer == QR_WAKE) wakes++;
    return answer;
}

static void received(struct item *item) {
    MODEL_CHECK(item >= items && item < items + MOST_ITEMS, "what was taken is no item");
    MODEL_CHECK(!item->taken, "an item was taken twice");
    item->taken = 1;
    last_taken[taken_count++] = (int)(item - items);
    model_plain(item->payload, false);
}

static size_t take(size_t most) {
    void *out[MOST_ITEMS];
    size_t count = qr_ring_take(ring, out, most);
    for (size_t i = 0; i < count; i++) received(out[i]);
    if (count > 0) threads[running].up_to_date = false;
    return count;
}

/* The consumer's whole protocol: take, arm, and sleep only if a claim is to wake it. */
static void consume(int total, int batch) {
    while (taken_count < total) {
        if (take(MOST_ITEMS) > 0) continue;
        int left = total - taken_count;
        uint64_t at = qr_ring_head(ring) + (uint64_t)(left < batch ? left : batch);
        if (qr_ring_arm(ring, at) >= at)
            model_pause(); /* claimed, maybe not published yet */
        else
            model_wait(&wake);
    }
}

static void end_with(int total) {
    take(MOST_ITEMS);
    MODEL_CHECK(accepted == total, "a push was refused, or taken when it had to be refused");
    MODEL_CHECK(taken_count == total, "an item was lost");
    MODEL_CHECK(qr_ring_head(ring) == (uint64_t)total && qr_ring_tail(ring) == (uint64_t)total, "head and tail differ");
    qr_ring_free(ring);
}

static void ring_the_consumer(enum qr_answer answer) {
    if (answer == QR_WAKE) model_post(&wake);
}

/* --- wake: two producers, a consumer that sleeps on the watermark ------------------------------------------------ */

static void push_and_wake(int number) { ring_the_consumer(push(number)); }

static void consume_two(int batch) { consume(2, batch); }

static void wake_set_up(void) {
    begin(2);
    model_spawn(push_and_wake, 0);
    model_spawn(push_and_wake, 1);
    model_spawn(consume_two, 1);
}

static void batch_set_up(void) {
    begin(2);
    model_spawn(push_and_wake, 0);
    model_spawn(push_and_wake, 1);
    model_spawn(consume_two, 2);
}

static void two_arrived(void) { end_with(2); }

/* --- many: a claim of two beside a claim of one; the two stay together ------------------------------------------- */

static void push_two_at_once(int first) {
    uint64_t start = 0;
    for (int i = 0; i < 2; i++) model_plain(items[first + i].payload, true);
    MODEL_CHECK(qr_ring_claim(ring, 2, &start) == QR_DONE, "a claim was refused beside room");
    for (int i = 0; i < 2; i++) qr_ring_publish(ring, start + (uint64_t)i, &items[first + i]);
    accepted += 2;
    if (qr_ring_reached(ring, start, 2)) model_post(&wake);
}

static void consume_three(int batch) { consume(3, batch); }

static void many_set_up(void) {
    begin(4);
    model_spawn(push_two_at_once, 0);
    model_spawn(push_and_wake, 2);
    model_spawn(consume_three, 2);
}

static void many_finish(void) {
    end_with(3);
    int first = last_taken[0] == 2; /* 0 1 2 or 2 0 1 */
    MODEL_CHECK(last_taken[first] == 0 && last_taken[first + 1] == 1, "items of one claim were parted");
}

/* --- lap: one cell, used again and again; a producer that waits for room ----------------------------------------- */

static void push_in_turn(int count) {
    for (int number = 0; number < count; number++)
        while (push(number) == QR_FULL) {
            qr_ring_wait_begin(ring);
            enum qr_answer again = push(number);
            if (again == QR_FULL) model_wait(&room);
            qr_ring_wait_end(ring);
            if (again != QR_FULL) break;
        }
}

static void take_and_make_room(int total) {
    while (taken_count < total) {
        if (take(1) == 0) {
            model_pause();
            MODEL_CHECK(take(1) == 1, "a producer sleeps beside a ring with room");
        }
        if (qr_ring_waiters(ring) > 0) model_post(&room);
    }
}

static void lap_set_up(void) {
    begin(1);
    model_spawn(push_in_turn, 3);
    model_spawn(take_and_make_room, 3);
}

static void lap_finish(void) {
    end_with(3);
    for (int i = 0; i < 3; i++) MODEL_CHECK(last_taken[i] == i, "items of one producer changed their order");
}

/* --- limit: a full ring is emptied; one producer looks at head, the other trusts its limit ----------------------- */

static void try_push(int number) { (void)push(number); }

static void take_some(int most) { take((size_t)most); }

static void limit_set_up(void) {
    begin(2);
    push(0);
    push(1);
    model_spawn(take_some, 2);
    model_spawn(try_push, 2);
    model_spawn(try_push, 3);
}

static void all_accepted_arrived(void) { end_with(accepted); }

/* --- close: what was claimed before arrives, no claim succeeds after --------------------------------------------- */

static int closed_at;

static void push_until_shut(int first) {
    for (int number = first; number < first + 2; number++) {
        bool was_closed = closed_at >= 0;
        enum qr_answer answer = push(number);
        MODEL_CHECK(!was_closed || answer == QR_SHUT, "a claim succeeded after the close");
    }
}

static void close_and_drain(int unused) {
    (void)unused;
    closed_at = (int)qr_ring_close(ring);
    while (taken_count < closed_at)
        if (take(MOST_ITEMS) == 0) model_pause();
}

static void close_set_up(void) {
    begin(4);
    closed_at = -1;
    model_spawn(push_until_shut, 0);
    model_spawn(push_until_shut, 2);
    model_spawn(close_and_drain, 0);
}

static void close_finish(void) {
    MODEL_CHECK(taken_count == closed_at, "the drain took more or less than its snapshot");
    MODEL_CHECK(qr_ring_closed(ring), "the ring opened by itself");
    qr_ring_open(ring);
    push(4);
    end_with(closed_at + 1);
}

/* --- reopen: items that waited elsewhere come in while the ring is shut, before all that comes after ------------- */

static int reopened;

static void push_twice(int first) {
    for (int number = first; number < first + 2; number++) {
        bool was_shut = closed_at >= 0 && !reopened;
        enum qr_answer answer = push(number);
        MODEL_CHECK(!was_shut || reopened || answer >= QR_FULL, "a claim succeeded after the close");
        ring_the_consumer(answer);
    }
}

static void close_and_reopen(int unused) {
    close_and_drain(unused);
    uint64_t at = qr_ring_claim_shut(ring, 1);
    MODEL_CHECK(at == (uint64_t)closed_at, "a claim of a closed ring went elsewhere");
    model_plain(items[6].payload, true);
    qr_ring_publish(ring, at, &items[6]);
    accepted++;
    reopened = 1;
    qr_ring_open(ring);
    MODEL_CHECK(take(1) == 1 && items[6].taken, "what came in while the ring was shut was not the first");
}

static void reopen_set_up(void) {
    begin(2);
    closed_at = -1;
    reopened = 0;
    model_spawn(push_twice, 0);
    model_spawn(close_and_reopen, 0);
}

/* --- drop: two would-be consumers at a time (drop-oldest) -------------------------------------------------------- */

static int consumer_state;

static void drop_one(int unused) {
    (void)unused;
    if (!qr_ring_drain_try(ring)) return;
    model_plain(consumer_state, true);
    MODEL_CHECK(take(1) == 1, "the consumer did not see what was there");
    qr_ring_drain_end(ring);
}

static void push_dropping_one(int number) {
    if (push(number) == QR_FULL) {
        drop_one(0);
        (void)push(number);
    }
}

static void drop_set_up(void) {
    begin(2);
    consumer_state = model_place(0, "what belongs to the consumer");
    push(0);
    push(1);
    model_spawn(drop_one, 0);
    model_spawn(push_dropping_one, 2);
}

static void drop_finish(void) {
    MODEL_CHECK(qr_ring_drain_try(ring), "the consumer's flag was left behind");
    end_with(accepted);
}

/* --- bell: two slots ring, the loop answers; what came before a ring is seen by the answer after it -------------- */

static qr_bell *bell;
static int letter[2], rang[2];

static void ring_the_bell(int slot) {
    model_plain(letter[slot], true);
    int post = qr_bell_ring(bell, (uint64_t)slot);
    rang[slot] = 1;
    if (post) {
        wakes++;
        model_post(&wake);
    }
}

static void answer_the_bell(int unused) {
    int done[2] = {0, 0};
    uint64_t seen = 0;
    (void)unused;
    while (!done[0] || !done[1]) {
        model_wait(&wake);
        MODEL_CHECK(--wakes == 0, "more than one wake was under way");
        qr_bell_answer(bell);
        int before[2] = {rang[0], rang[1]}; /* exact: nobody runs between an access and what follows it here */
        seen |= qr_bell_take(bell, 0); /* a bit may come early, its wake after it */
        for (int slot = 0; slot < 2; slot++) {
            if (!before[slot] || done[slot]) continue;
            MODEL_CHECK(seen >> slot & 1, "a bell was rung and its bit not found");
            model_plain(letter[slot], false);
            done[slot] = 1;
        }
    }
}

static void bell_set_up(void) {
    begin(1);
    bell = qr_bell_new(2);
    rang[0] = rang[1] = 0;
    for (int slot = 0; slot < 2; slot++) letter[slot] = model_place(0, "what was written before the ring of the bell");
    model_spawn(ring_the_bell, 0);
    model_spawn(ring_the_bell, 1);
    model_spawn(answer_the_bell, 0);
}

static void bell_finish(void) {
    qr_bell_free(bell);
    end_with(0);
}

/* --- slot: the ring and the bell together, as the loop uses them ------------------------------------------------- */

static void push_and_ring(int number) {
    if (push(number) == QR_WAKE && qr_bell_ring(bell, 0)) model_post(&wake);
}

static void serve_two(int unused) {
    (void)unused;
    while (taken_count < 2) {
        uint64_t at = qr_ring_head(ring) + 1;
        if (qr_ring_arm(ring, at) < at) {
            do {
                model_wait(&wake);
                qr_bell_answer(bell);
            } while (qr_bell_take(bell, 0) == 0);
        }
        while (take(MOST_ITEMS) == 0) model_pause();
    }
}

static void slot_set_up(void) {
    begin(2);
    bell = qr_bell_new(1);
    model_spawn(push_and_ring, 0);
    model_spawn(push_and_ring, 1);
    model_spawn(serve_two, 0);
}

static void slot_finish(void) {
    qr_bell_free(bell);
    end_with(2);
}

static const struct {
    const char *name;
    void (*set_up)(void);
    void (*finish)(void);
    int preemptions;
} scenarios[] = {
    {"wake", wake_set_up, two_arrived, 3},
    {"batch", batch_set_up, two_arrived, 3},
    {"many", many_set_up, many_finish, 2},
    {"lap", lap_set_up, lap_finish, 4},
    {"limit", limit_set_up, all_accepted_arrived, 4},
    {"close", close_set_up, close_finish, 2},
    {"reopen", reopen_set_up, all_accepted_arrived, 4},
    {"drop", drop_set_up, drop_finish, 4},
    {"bell", bell_set_up, bell_finish, 5},
    {"slot", slot_set_up, slot_finish, 2},
};

/* Arguments: the scenarios to run; none: all. */
int main(int count, char **names) {
    int broken = 0, known = 0;
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++) {
        bool wanted = count == 1;
        for (int name = 1; name < count; name++) wanted |= strcmp(names[name], scenarios[i].name) == 0;
        if (!wanted) continue;
        known++;
        broken += !model_explore(scenarios[i].name, scenarios[i].set_up, scenarios[i].finish, scenarios[i].preemptions);
    }
    if (count > 1 && known != count - 1) return 99;
    return broken;
}
