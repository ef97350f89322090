/* A small model checker: port.h's atomics over a simulated memory, every schedule of a few threads explored.

   Memory: each atomic is the list of all stores to it, in modification order; each thread has a *view*, the oldest
   store of each atomic that it may still read. A load may read any store from its view on; a plain store may go
   anywhere behind its view, but not between a read-modify-write and what that read. A release store carries the
   thread's view, an acquire load that reads it joins that view, and read-modify-writes carry on what they read (the
   release sequence). This is the view semantics of C11's relaxed, acquire and release accesses (Kang et al., "A
   promising semantics for relaxed-memory concurrency", 2017, without promises, and without seq_cst and fences, which
   ring.h does not use). A plain variable is an atomic whose accesses must see the last store: all else is a race.

   Exploring: a run is a list of choices (who goes on, which store is read, where a store goes); the next run changes
   the last choice that has an alternative. A switch away from a thread that could go on is a preemption, and runs have
   at most a stated number of them; within that, all are explored. */
#ifndef MEMORY_MODEL_H
#define MEMORY_MODEL_H

#include <stdatomic.h> /* the memory_order constants only */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { MOST_PLACES = 40, MOST_STORES = 250, MOST_THREADS = 4, MOST_CHOICES = 4096, MOST_STEPS = 1000 };

/* --- memory ------------------------------------------------------------------------------------------------------ */

typedef struct { uint8_t store[MOST_PLACES]; } model_view; /* the index in stores[] of what is seen, by place */

typedef struct {
    uint64_t value;
    uint8_t place, rank; /* rank: where in the modification order of its place */
    bool glued;          /* a read-modify-write: nothing may come between it and the store before */
    model_view seen;     /* what a thread that acquires it will see */
} model_store;

typedef struct { /* a wake-up that carries what its sender has seen, as a mutex or a pipe does */
    int count;
    model_view seen;
} model_signal;

enum model_state { MODEL_READY, MODEL_WAITING, MODEL_PAUSED, MODEL_OVER };

typedef struct {
    ucontext_t context;
    char stack[64 * 1024];
    enum model_state state;
    model_signal *signal;
    bool up_to_date; /* loads read the last store: what was stored becomes visible after a finite time */
    model_view view;
    void (*body)(int);
    int argument;
} model_thread;

static model_store stores[MOST_STORES];
static int store_count, place_count;
static uint8_t order_of[MOST_PLACES][MOST_STORES], length_of[MOST_PLACES];
static const char *name_of[MOST_PLACES];
static model_thread threads[MOST_THREADS + 1]; /* 0 sets up and checks the end, alone */
static int thread_count, running, preemptions, preemption_limit, step_count;
static ucontext_t explorer;
static const char *failure;

static struct { uint16_t taken, options; } choices[MOST_CHOICES];
static int choice_count, choice_next;

static struct { uint8_t thread, place; const char *what; uint64_t read, written; } trace[MOST_STEPS + 100];
static int trace_count;

/* Give the run up: it broke a promise. */
static void model_fail(const char *why) {
    failure = why;
    if (running != 0) {
        swapcontext(&threads[running].context, &explorer);
        abort();
    }
}

#define MODEL_CHECK(truth, why) do { if (!(truth)) model_fail(why); } while (0)

static int choose(int options) {
    if (options <= 1) return 0;
    if (choice_next == MOST_CHOICES) abort();
    if (choice_next == choice_count) {
        choices[choice_count].taken = 0;
        choices[choice_count++].options = (uint16_t)options;
    }
    if (choices[choice_next].options != options) abort(); /* the scenario is not a function of the choices */
    return choices[choice_next++].taken;
}

static void join(model_view *into, const model_view *from) {
    for (int place = 0; place < place_count; place++)
        if (stores[from->store[place]].rank > stores[into->store[place]].rank) into->store[place] = from->store[place];
}

static int insert_store(int place, int rank, uint64_t value, bool glued) {
    if (store_count == MOST_STORES) abort();
    int made = store_count++;
    for (int i = length_of[place]++; i > rank; i--) {
        order_of[place][i] = order_of[place][i - 1];
        stores[order_of[place][i]].rank = (uint8_t)i;
    }
    order_of[place][rank] = (uint8_t)made;
    stores[made] = (model_store){value, (uint8_t)place, (uint8_t)rank, glued, {{0}}};
    for (int i = 0; i < place_count; i++) stores[made].seen.store[i] = order_of[i][0];
    stores[made].seen.store[place] = (uint8_t)made;
    return made;
}

/* Only the first thread makes places, before the others run: so rank 0 is what all have seen. */
static int model_place(uint64_t value, const char *name) {
    if (place_count == MOST_PLACES || running != 0) abort();
    int place = place_count++;
    name_of[place] = name;
    length_of[place] = 0;
    threads[0].view.store[place] = (uint8_t)insert_store(place, 0, value, false);
    return place;
}

/* --- schedule ---------------------------------------------------------------------------------------------------- */

static bool can_run(int thread) {
    model_thread *it = &threads[thread];
    if (it->state == MODEL_WAITING) return it->signal->count > 0;
    if (it->state != MODEL_PAUSED) return it->state == MODEL_READY;
    for (int other = 1; other <= thread_count; other++) {
        enum model_state state = threads[other].state;
        if (state == MODEL_READY || (state == MODEL_WAITING && threads[other].signal->count > 0)) return false;
    }
    return true;
}

static void pass_on(void) {
    int able[MOST_THREADS], count = 0, from = running;
    bool could_go_on = from != 0 && can_run(from);
    if (could_go_on) able[count++] = from;
    if (!could_go_on || preemptions < preemption_limit)
        for (int thread = 1; thread <= thread_count; thread++)
            if (thread != from && can_run(thread)) able[count++] = thread;
    if (count == 0) {
        for (int thread = 1; thread <= thread_count; thread++)
            if (threads[thread].state != MODEL_OVER) failure = "a thread sleeps for ever: a wake was lost";
        running = 0;
        setcontext(&explorer);
    }
    int to = able[choose(count)];
    if (to == from) return;
    if (could_go_on) preemptions++;
    running = to;
    swapcontext(&threads[from].context, &threads[to].context);
}

static void step(void) {
    if (running == 0) return;
    if (++step_count == MOST_STEPS) model_fail("endless");
    pass_on();
}

static void model_wait(model_signal *signal) {
    model_thread *self = &threads[running];
    self->signal = signal;
    self->state = MODEL_WAITING;
    pass_on();
    self->state = MODEL_READY;
    signal->count--;
    join(&self->view, &signal->seen);
}

static void model_post(model_signal *signal) {
    signal->count++;
    join(&signal->seen, &threads[running].view);
}

/* Look again later: when nobody else can go on, and all that was stored has become visible. */
static void model_pause(void) {
    threads[running].state = MODEL_PAUSED;
    pass_on();
    threads[running].state = MODEL_READY;
    threads[running].up_to_date = true;
}

static void thread_main(int thread) {
    threads[thread].body(threads[thread].argument);
    threads[thread].state = MODEL_OVER;
    pass_on();
}

static void model_spawn(void (*body)(int), int argument) {
    if (thread_count == MOST_THREADS) abort();
    model_thread *made = &threads[++thread_count];
    made->body = body;
    made->argument = argument;
    made->state = MODEL_READY;
    made->up_to_date = false;
    getcontext(&made->context);
    made->context.uc_stack.ss_sp = made->stack;
    made->context.uc_stack.ss_size = sizeof made->stack;
    made->context.uc_link = NULL;
    makecontext(&made->context, (void (*)(void))thread_main, 1, thread_count);
}

/* --- accesses ---------------------------------------------------------------------------------------------------- */

static bool acquires(memory_order order) {
    return order == memory_order_acquire || order == memory_order_acq_rel || order == memory_order_seq_cst;
}

static bool releases(memory_order order) {
    return order == memory_order_release || order == memory_order_acq_rel || order == memory_order_seq_cst;
}

static void note(const char *what, int place, uint64_t read, uint64_t written) {
    trace[trace_count].thread = (uint8_t)running;
    trace[trace_count].place = (uint8_t)place;
    trace[trace_count].what = what;
    trace[trace_count].read = read;
    trace[trace_count++].written = written;
}

static bool room_behind(int place, int rank) {
    return rank + 1 == length_of[place] || !stores[order_of[place][rank + 1]].glued;
}

static int oldest(int place) { return stores[threads[running].view.store[place]].rank; }

static void see(int place, int store, memory_order order) {
    model_view *view = &threads[running].view;
    view->store[place] = (uint8_t)store;
    if (acquires(order)) join(view, &stores[store].seen);
}

static uint64_t model_load(int place, memory_order order) {
    step();
    int last = length_of[place] - 1;
    int back = threads[running].up_to_date ? 0 : choose(last - oldest(place) + 1);
    int store = order_of[place][last - back];
    see(place, store, order);
    note("load", place, stores[store].value, stores[store].value);
    return stores[store].value;
}

static void write_at(int place, int rank, uint64_t value, bool glued, memory_order order) {
    model_view *view = &threads[running].view;
    int made = insert_store(place, rank, value, glued);
    if (glued) join(&stores[made].seen, &stores[order_of[place][rank - 1]].seen);
    view->store[place] = (uint8_t)made;
    if (releases(order)) join(&stores[made].seen, view);
}

static void model_store_to(int place, uint64_t value, memory_order order) {
    int ranks[MOST_STORES], count = 0;
    step();
    for (int rank = length_of[place] - 1; rank >= oldest(place); rank--)
        if (room_behind(place, rank)) ranks[count++] = rank + 1;
    write_at(place, ranks[choose(count)], value, false, order);
    note("store", place, 0, value);
}

/* What a read-modify-write may read: a store with room behind it. With `lost`: also any whose value is not `expected`,
   and then nothing is written. No spurious failures: ring.h only goes round again. */
static bool model_update(int place, uint64_t *value, int how, uint64_t operand, memory_order order, memory_order lost) {
    int ranks[MOST_STORES], count = 0;
    step();
    for (int rank = length_of[place] - 1; rank >= oldest(place); rank--) {
        bool fails = how == 'c' && stores[order_of[place][rank]].value != *value;
        if (fails || room_behind(place, rank)) ranks[count++] = rank;
    }
    int rank = ranks[choose(count)];
    int store = order_of[place][rank];
    uint64_t was = stores[store].value;
    bool fails = how == 'c' && was != *value;
    see(place, store, fails ? lost : order);
    *value = was;
    if (fails) {
        note("compare-and-swap lost", place, was, was);
        return false;
    }
    uint64_t now = how == '+' ? was + operand : how == '|' ? was | operand : how == '&' ? was & operand : operand;
    write_at(place, rank + 1, now, true, order);
    note("read-modify-write", place, was, now);
    return true;
}

static uint64_t model_rmw(int place, int how, uint64_t operand, memory_order order) {
    uint64_t value = 0;
    model_update(place, &value, how, operand, order, order);
    return value;
}

/* A plain variable: written or read by whoever has seen its last write, or there is a race. */
static void model_plain(int place, bool writes) {
    note(writes ? "plain write" : "plain read", place, 0, 0);
    if (oldest(place) + 1 != length_of[place]) {
        model_fail("a race on a plain variable: its last write is not ordered before");
        return;
    }
    if (writes) threads[running].view.store[place] = (uint8_t)insert_store(place, length_of[place], 0, false);
}

/* --- port.h's names: an atomic's own memory holds the number of its place, + 1 ----------------------------------- */

/* Zeroed memory is no place yet: MODEL_ADOPT makes one of it, holding 0. */
static int model_made(uintptr_t held) {
    if (held == 0 || held > (uintptr_t)place_count) {
        fprintf(stderr, "an atomic that the model was not told of\n");
        abort();
    }
    return (int)held - 1;
}
#define MODEL_ADOPT(p) do { if (*(p) == 0) qr_atomic_init(p, 0); } while (0)

#define QR_ATOMICS_SUPPLIED
#define QR_ATOMIC(type) type
#define PLACE(p) model_made((uintptr_t)(*(p)))
#define TYPED(p, v) ((__typeof__(*(p)))(uintptr_t)(v))
#define qr_atomic_init(p, v) ((void)(*(p) = TYPED(p, model_place((uint64_t)(uintptr_t)(v), #p) + 1)))
#define qr_load(p, order) TYPED(p, model_load(PLACE(p), (order)))
#define qr_store(p, v, order) model_store_to(PLACE(p), (uint64_t)(uintptr_t)(v), (order))
#define qr_exchange(p, v, order) TYPED(p, model_rmw(PLACE(p), '=', (uint64_t)(uintptr_t)(v), (order)))
#ifdef MODEL_ADD_0_IS_LOAD /* a mutant of its own: arm and look by a load */
#define qr_fetch_add(p, v, order) \
    ((v) == 0 ? model_load(PLACE(p), memory_order_acquire) : model_rmw(PLACE(p), '+', (v), (order)))
#else
#define qr_fetch_add(p, v, order) model_rmw(PLACE(p), '+', (v), (order))
#endif
#define qr_fetch_sub(p, v, order) model_rmw(PLACE(p), '+', UINT64_C(0) - (uint64_t)(v), (order))
#define qr_fetch_or(p, v, order) model_rmw(PLACE(p), '|', (v), (order))
#define qr_fetch_and(p, v, order) model_rmw(PLACE(p), '&', (v), (order))
#define qr_cas_weak(p, expected, v, won, lost) model_update(PLACE(p), (expected), 'c', (v), (won), (lost))

/* --- explore ----------------------------------------------------------------------------------------------------- */

static void print_trace(void) {
    for (int i = 0; i < trace_count; i++) {
        if (trace[i].thread == 0) continue;
        printf("    thread %d: %s %s", trace[i].thread, trace[i].what, name_of[trace[i].place]);
        if (strncmp(trace[i].what, "plain", 5) != 0)
            printf(" %llx -> %llx", (unsigned long long)trace[i].read, (unsigned long long)trace[i].written);
        printf("\n");
    }
}

/* Run all schedules; false, with the one that failed printed, when a promise is broken. `set_up` makes the places and
   spawns; `finish` checks what is there when all threads are over, having seen all that they did. */
static bool model_explore(const char *name, void (*set_up)(void), void (*finish)(void), int preemptions_at_most) {
    unsigned long runs = 0;
    preemption_limit = preemptions_at_most;
    choice_count = 0;
    for (;;) {
        store_count = place_count = thread_count = running = preemptions = step_count = trace_count = choice_next = 0;
        failure = NULL;
        set_up();
        for (int thread = 1; thread <= thread_count; thread++) threads[thread].view = threads[0].view;
        running = choose(thread_count) + 1;
        swapcontext(&explorer, &threads[running].context); /* until all are over, asleep or one failed */
        running = 0;
        for (int thread = 1; thread <= thread_count; thread++) join(&threads[0].view, &threads[thread].view);
        if (failure == NULL) finish();
        runs++;
        if (failure != NULL) {
            printf("%s: BROKEN in run %lu: %s\n", name, runs, failure);
            print_trace();
            return false;
        }
        while (choice_count > 0 && choices[choice_count - 1].taken + 1 == choices[choice_count - 1].options)
            choice_count--;
        if (choice_count == 0) break;
        choices[choice_count - 1].taken++;
    }
    printf("%s: ok, %lu runs, at most %d preemptions\n", name, runs, preemptions_at_most);
    return true;
}

#endif
