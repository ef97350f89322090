/* The bytes of the journal: numbers, checksums, and writing to a file at a place. Plain C11, no Python.h.
 * docs/persistence.md describes the format.
 *
 * A record is its payload's length, a checksum, the payload. The checksum is CRC-32C over the segment's number, the
 * record's offset in its file, and the payload: a record that is found in another place than it was written to is none.
 */
#ifndef QUEUE_RUNTIME_JOURNAL_H
#define QUEUE_RUNTIME_JOURNAL_H

#include <stdint.h>
#include <stddef.h>
#include <string.h>

#include "port.h"

enum { JOURNAL_FRAME = 8 }; /* bytes of length and checksum */

/* ---- numbers, little-endian whatever the machine ---- */

static inline void journal_put(uint8_t *p, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) p[i] = (uint8_t)(value >> (8 * i));
}

static inline uint64_t journal_get(const uint8_t *p, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)p[i] << (8 * i);
    return value;
}

static inline void journal_put_double(uint8_t *p, double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    journal_put(p, bits, 8);
}

static inline double journal_get_double(const uint8_t *p) {
    uint64_t bits = journal_get(p, 8);
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* ---- CRC-32C (Castagnoli), eight bytes a step ---- */

static uint32_t journal_tables[8][256];

/* Fill the tables; before anything else, once. */
static inline void journal_set_up(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ UINT32_C(0x82F63B78) : crc >> 1;
        journal_tables[0][i] = crc;
    }
    for (int table = 1; table < 8; table++)
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t crc = journal_tables[table - 1][i];
            journal_tables[table][i] = crc >> 8 ^ journal_tables[0][crc & 0xFF];
        }
}

static inline uint32_t journal_crc(uint32_t crc, const uint8_t *p, size_t size) {
    crc = ~crc;
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t word = journal_get(p, 8) ^ crc;
        crc = journal_tables[7][word & 0xFF] ^ journal_tables[6][word >> 8 & 0xFF] ^
              journal_tables[5][word >> 16 & 0xFF] ^ journal_tables[4][word >> 24 & 0xFF] ^
              journal_tables[3][word >> 32 & 0xFF] ^ journal_tables[2][word >> 40 & 0xFF] ^
              journal_tables[1][word >> 48 & 0xFF] ^ journal_tables[0][word >> 56];
    }
    for (; size; p++, size--) crc = crc >> 8 ^ journal_tables[0][(crc ^ *p) & 0xFF];
    return ~crc;
}

static inline uint32_t journal_checksum(int64_t segment, int64_t offset, const uint8_t *payload, size_t size) {
    uint8_t place[16];
    journal_put(place, (uint64_t)segment, 8);
    journal_put(place + 8, (uint64_t)offset, 8);
    return journal_crc(journal_crc(0, place, 16), payload, size);
}

/* ---- records ---- */

/* Write the checksums of the records that fill `data`, which is to be written at `offset`. */
static inline void journal_seal(uint8_t *data, size_t size, int64_t segment, int64_t offset) {
    size_t at = 0;
    while (at < size) {
        size_t length = (size_t)journal_get(data + at, 4);
        uint32_t crc = journal_checksum(segment, offset + (int64_t)at, data + at + JOURNAL_FRAME, length);
        journal_put(data + at + 4, crc, 4);
        at += JOURNAL_FRAME + length;
    }
}

/* The payload's length of the record at `offset` of a file of `size` bytes; -1 where there is no whole, right record. */
static inline int64_t journal_check(const uint8_t *data, int64_t size, int64_t segment, int64_t offset) {
    int64_t length;
    if (size - offset < JOURNAL_FRAME) return -1;
    length = (int64_t)journal_get(data + offset, 4);
    if (length == 0 || length > size - offset - JOURNAL_FRAME) return -1;
    if (journal_get(data + offset + 4, 4) !=
        journal_checksum(segment, offset, data + offset + JOURNAL_FRAME, (size_t)length))
        return -1;
    return length;
}

#endif
