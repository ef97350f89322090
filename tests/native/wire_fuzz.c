/* Runs the shipped wire.h over hostile bytes, under -fsanitize=address,undefined: every input lies in a heap block of
 * its exact size, so that a read of one byte too many is caught. What wire_check accepts is read back, measured and
 * written again, into a block of exactly the measured size.
 *
 * usage: wire_fuzz ROUNDS SEED-FILE...   (a seed: a valid envelope)
 */
#include "wire.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t state = 88172645463325252u;

static uint32_t pick(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 20) % below);
}

static unsigned long accepted, refused;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* The first `cut` bytes in a block of their own, the rest said to be elsewhere: an envelope only when that is the body
 * of one, from its first byte on. `head` is where the body begins, or SIZE_MAX when the bytes are no envelope. */
static void look_at_a_part(const uint8_t *bytes, size_t size, size_t cut, size_t head, const wire_envelope *whole) {
    wire_envelope envelope;
    wire_fault fault = {0};
    uint8_t *block = malloc(cut ? cut : 1);
    if (cut) memcpy(block, bytes, cut);
    bool good = wire_check_parts(block, cut, size - cut, &envelope, &fault);
    if (good != (head != SIZE_MAX && (cut == head || cut == size))) fail("a part is judged unlike the whole");
    if (good && (memcmp(envelope.at, whole->at, sizeof envelope.at) || envelope.ascii != whole->ascii ||
                 envelope.size != whole->size))
        fail("a part says something else than the whole");
    if (!good && (fault.field == NULL || fault.problem == NULL)) fail("a part is refused without a reason");
    free(block);
}

static void look_at(const uint8_t *bytes, size_t size) {
    wire_envelope envelope;
    wire_fault fault = {0};
    uint8_t *block = malloc(size ? size : 1);
    if (size) memcpy(block, bytes, size);
    if (!wire_check(block, size, &envelope, &fault)) {
        refused++;
        if (fault.field == NULL || fault.problem == NULL || fault.offset > size) fail("a fault without a reason or a place");
        look_at_a_part(bytes, size, pick((uint32_t)size + 1), SIZE_MAX, &envelope);
        free(block);
        return;
    }
    accepted++;
    wire_text pairs[2 * WIRE_MAX_ATTRIBUTES];
    wire_message message;
    uint64_t total = 0;
    for (int i = 0; i < WIRE_TEXTS; i++) {
        message.text[i] = wire_checked_run(block + envelope.at[i]);
        total += message.text[i].size;
    }
    const uint8_t *p = block + envelope.at[WIRE_ATTRIBUTES];
    message.attribute_count = wire_checked_count(&p);
    message.attributes = pairs;
    for (size_t i = 0; i < 2 * message.attribute_count; i++) {
        pairs[i] = wire_checked_run(p);
        p = pairs[i].data + pairs[i].size;
        total += pairs[i].size;
    }
    if (p != block + envelope.at[WIRE_BODY]) fail("the attributes do not end at the body");
    message.body = wire_checked_run(p);
    total += message.body.size;
    if (total != envelope.size) fail("the size is not the sum of the parts");
    size_t head = (size_t)(message.body.data - block);
    look_at_a_part(bytes, size, head, head, &envelope);
    look_at_a_part(bytes, size, pick((uint32_t)size + 1), head, &envelope);
    message.ttl_us = envelope.ttl_us;
    message.scheduled_us = envelope.scheduled_us;
    message.delay_us = envelope.delay_us;
    uint64_t need = wire_measure(&message);
    if (need > size) fail("the shortest form is longer than what was read");
    uint8_t *again = malloc(need);
    if (wire_write(&message, again) != again + need) fail("measured and written sizes differ");
    wire_envelope second;
    if (!wire_check(again, need, &second, &fault)) fail("what was written is not an envelope");
    if (second.size != envelope.size || second.ascii != envelope.ascii) fail("what was written says something else");
    free(again);
    free(block);
}

static void mutate(const uint8_t *seed, size_t size) {
    static const uint8_t nasty[] = {0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9B, 0xA0, 0xBF, 0xC0, 0xC1, 0xC4, 0xC5,
                                    0xC6, 0xCC, 0xCF, 0xD3, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF};
    uint8_t *copy = malloc(2 * size + 64);
    memcpy(copy, seed, size);
    for (uint32_t edits = 1 + pick(3); edits > 0 && size > 0; edits--) {
        uint32_t at = pick((uint32_t)size), run = 1 + pick(6);
        switch (pick(4)) {
        case 0: copy[at] = (uint8_t)pick(256); break;
        case 1: copy[at] = nasty[pick(sizeof nasty)]; break;
        case 2: /* remove a run */
            if (run > size - at) run = (uint32_t)size - at;
            memmove(copy + at, copy + at + run, size - at - run);
            size -= run;
            break;
        default: /* put a run in */
            memmove(copy + at + run, copy + at, size - at);
            for (uint32_t i = 0; i < run; i++) copy[at + i] = pick(2) ? nasty[pick(sizeof nasty)] : (uint8_t)pick(256);
            size += run;
        }
    }
    look_at(copy, size);
    free(copy);
}

int main(int count, char **arguments) {
    if (count < 3) fail("usage: wire_fuzz ROUNDS SEED-FILE...");
    unsigned long rounds = strtoul(arguments[1], NULL, 10);
    for (int i = 2; i < count; i++) {
        static uint8_t seed[1 << 16];
        FILE *file = fopen(arguments[i], "rb");
        if (file == NULL) fail(arguments[i]);
        size_t size = fread(seed, 1, sizeof seed, file);
        fclose(file);
        unsigned long before = accepted;
        look_at(seed, size);
        if (accepted == before) fail("a seed is not an envelope");
        for (size_t cut = 0; cut < size; cut++) look_at(seed, cut);
        for (unsigned long round = 0; round < rounds; round++) mutate(seed, size);
    }
    for (unsigned long round = 0; round < rounds; round++) {
        uint8_t noise[64] = {0x9B, 0x01};
        uint32_t fixed = pick(2) ? 2 : 0;
        for (uint32_t i = fixed; i < sizeof noise; i++) noise[i] = (uint8_t)pick(256);
        look_at(noise, pick(sizeof noise + 1));
    }
    printf("%lu accepted, %lu refused\n", accepted, refused);
    return 0;
}
