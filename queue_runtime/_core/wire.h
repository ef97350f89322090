/* The envelope's bytes: a bounded msgpack reader and writer. Plain C11, no Python.h, no allocation, no recursion,
 * no state, so that a harness can run the shipped code under sanitizers. docs/envelope.md describes the format:
 *
 *   [1, message_id, session_id, correlation_id, content_type, time_to_live, scheduled_at, delay, deduplication_id,
 *    {attribute: value, ...}, body]
 *
 * Words: a *text* is a run of UTF-8 bytes; a *fault* says what is wrong with given bytes, and where.
 * The shape is fixed, so nesting never goes deeper than array > map > str; anything nested elsewhere is of a wrong type.
 */
#ifndef QUEUE_RUNTIME_WIRE_H
#define QUEUE_RUNTIME_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    WIRE_VERSION = 1,
    WIRE_ELEMENTS = 11,
    WIRE_MAX_ATTRIBUTES = 256,
    WIRE_MAX_NAME = 1024, /* bytes of an attribute's name */
    WIRE_MAX_SESSION_ID = 128,
};

/* An envelope is addressed by 32-bit offsets. */
#define WIRE_MAX_SIZE UINT32_MAX
/* The last microsecond of the year 9999. */
#define WIRE_MAX_INSTANT INT64_C(253402300799999999)

/* The texts first, then attributes and body: the order of the bits of Message.built. */
enum {
    WIRE_MESSAGE_ID,
    WIRE_SESSION_ID,
    WIRE_CORRELATION_ID,
    WIRE_CONTENT_TYPE,
    WIRE_DEDUPLICATION_ID,
    WIRE_TEXTS,
    WIRE_ATTRIBUTES = WIRE_TEXTS,
    WIRE_BODY,
    WIRE_FIELDS,
};

typedef struct {
    const uint8_t *data; /* NULL = nil */
    size_t size;
} wire_text;

/* What an envelope says; the reader only notes where each field starts. */
typedef struct {
    uint32_t at[WIRE_FIELDS]; /* offset of the field's first byte, its msgpack header */
    uint32_t ascii;           /* bit of each text field that is ASCII; of WIRE_ATTRIBUTES: all names and values are */
    int64_t ttl_us, scheduled_us, delay_us; /* -1 = none */
    uint64_t size;            /* bytes of the body and of every text */
} wire_envelope;

typedef struct {
    const char *field;
    const char *problem;
    uint64_t offset;
    uint64_t claimed, left; /* with claimed > 0: a length that the bytes do not hold */
} wire_fault;

/* ---- text ---- */

static inline uint64_t wire_load64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

static inline uint32_t wire_load32(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

#define WIRE_EVERY(byte) (UINT64_C(0x0101010101010101) * (byte))

static inline bool wire_is_ascii(const uint8_t *p, size_t size) {
    uint64_t seen = 0;
    if (size >= 8) {
        size_t i = 0;
        for (; i + 32 <= size; i += 32)
            seen |= wire_load64(p + i) | wire_load64(p + i + 8) | wire_load64(p + i + 16) | wire_load64(p + i + 24);
        for (; i + 8 < size; i += 8) seen |= wire_load64(p + i);
        seen |= wire_load64(p + size - 8); /* the tail overlaps: no loop over single bytes */
        return !(seen & WIRE_EVERY(0x80));
    }
    if (size >= 4) return !((wire_load32(p) | wire_load32(p + size - 4)) & 0x80808080u);
    for (size_t i = 0; i < size; i++) seen |= p[i];
    return !(seen & 0x80);
}

/* The length of the well-formed prefix (Unicode 15, table 3-7): no surrogates, nothing overlong or over U+10FFFF. */
static inline size_t wire_utf8_prefix(const uint8_t *p, size_t size) {
    size_t i = 0;
    while (i < size) {
        uint8_t lead = p[i];
        if (lead < 0x80) {
            i++;
            continue;
        }
        size_t more = lead >= 0xC2 && lead <= 0xDF ? 1 : (lead & 0xF0) == 0xE0 ? 2 : lead >= 0xF0 && lead <= 0xF4 ? 3 : 0;
        if (more == 0 || size - i <= more) return i;
        uint8_t second = p[i + 1];
        uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (second < low || second > high) return i;
        for (size_t k = 2; k <= more; k++)
            if ((p[i + k] & 0xC0) != 0x80) return i;
        i += more + 1;
    }
    return size;
}

/* Bytes outside 0x20..0x7E in this word, as a number that is zero when there are none. */
static inline uint64_t wire_unprintable(uint64_t word) {
    uint64_t delete = word ^ WIRE_EVERY(0x7F); /* a zero byte where word has 0x7F */
    return (((word - WIRE_EVERY(0x20)) & ~word) | ((delete - WIRE_EVERY(0x01)) & ~delete) | word) & WIRE_EVERY(0x80);
}

/* Whether it is all printable ASCII, 0x20 to 0x7E. */
static inline bool wire_is_printable(const uint8_t *p, size_t size) {
    uint64_t bad = 0;
    if (size >= 8) {
        for (size_t i = 0; i + 8 < size; i += 8) bad |= wire_unprintable(wire_load64(p + i));
        return !(bad | wire_unprintable(wire_load64(p + size - 8)));
    }
    for (size_t i = 0; i < size; i++) bad |= p[i] < 0x20 || p[i] > 0x7E;
    return !bad;
}

/* The first and the last eight bytes, which overlap in a text of less than sixteen. */
static inline void wire_ends(const uint8_t *p, size_t size, uint64_t *first, uint64_t *last) {
    if (size >= 8) {
        *first = wire_load64(p);
        *last = wire_load64(p + size - 8);
    } else if (size >= 4) {
        *first = wire_load32(p);
        *last = wire_load32(p + size - 4);
    } else {
        *first = size ? p[0] : 0;
        *last = size ? (uint64_t)p[size / 2] << 8 | p[size - 1] : 0;
    }
}

/* A place in a table of 2^bits texts; of long texts only the ends count. */
static inline size_t wire_place(const uint8_t *p, size_t size, unsigned bits) {
    uint64_t first, last;
    wire_ends(p, size, &first, &last);
    return (size_t)((first ^ (last << 19 | last >> 45) ^ size) * UINT64_C(0x9E3779B97F4A7C15) >> (64 - bits));
}

/* Whether two texts of one size are the same; up to 16 bytes, their ends are all of them. */
static inline bool wire_same(const uint8_t *p, const uint8_t *q, size_t size) {
    uint64_t p_first, p_last, q_first, q_last;
    wire_ends(p, size, &p_first, &p_last);
    wire_ends(q, size, &q_first, &q_last);
    return p_first == q_first && p_last == q_last && (size <= 16 || memcmp(p, q, size) == 0);
}

/* ---- reading ----
 * Each reader takes the position of its item, p, with start <= p <= end, and returns the position after it, again
 * within these, or NULL when it found fault. */

typedef struct {
    const uint8_t *start, *end;
    wire_fault *fault;
} wire_reader;

static inline const uint8_t *wire_fail(const wire_reader *r, const char *field, const char *problem,
                                       const uint8_t *where) {
    r->fault->field = field;
    r->fault->problem = problem;
    r->fault->offset = (uint64_t)(where - r->start);
    r->fault->claimed = r->fault->left = 0;
    return NULL;
}

static inline const uint8_t *wire_missing(const wire_reader *r, const char *field) {
    return wire_fail(r, field, "is missing: the bytes end here", r->end);
}

/* Read the big-endian length or number of `width` bytes that follows the lead byte at `header`. */
static inline const uint8_t *wire_number(const wire_reader *r, const uint8_t *header, const char *field, unsigned width,
                                         uint64_t *value) {
    const uint8_t *p = header + 1;
    if ((size_t)(r->end - p) < width) return wire_fail(r, field, "is cut off: the bytes end inside its header", header);
    uint64_t number = 0;
    for (unsigned i = 0; i < width; i++) number = number << 8 | p[i];
    *value = number;
    return p + width;
}

/* Take the run of `size` bytes at p, whose header is at `header`. */
static inline const uint8_t *wire_run(const wire_reader *r, const uint8_t *p, const uint8_t *header, const char *field,
                                      uint64_t size, wire_text *run) {
    size_t left = (size_t)(r->end - p);
    if (left < size) {
        wire_fail(r, field, "is cut off", header);
        r->fault->claimed = size;
        r->fault->left = left;
        return NULL;
    }
    run->data = p;
    run->size = (size_t)size;
    return p + size;
}

/* Read a str, or nil where that is allowed, and check that it is UTF-8. Clears *ascii when it is not ASCII. */
static inline const uint8_t *wire_read_text(const wire_reader *r, const uint8_t *p, const char *field, bool optional,
                                            wire_text *text, bool *ascii) {
    const uint8_t *header = p;
    uint64_t size;
    if (p == r->end) return wire_missing(r, field);
    uint8_t lead = *p;
    if ((lead & 0xE0) == 0xA0) {
        size = lead & 0x1F;
        p++;
    } else if (lead == 0xC0 && optional) {
        text->data = NULL;
        text->size = 0;
        return p + 1;
    } else if (lead >= 0xD9 && lead <= 0xDB) {
        if (!(p = wire_number(r, header, field, 1u << (lead - 0xD9), &size))) return NULL;
    } else {
        return wire_fail(r, field, optional ? "must be a str or nil" : "must be a str", header);
    }
    if (!(p = wire_run(r, p, header, field, size, text))) return NULL;
    if (!wire_is_ascii(text->data, (size_t)size)) {
        size_t good = wire_utf8_prefix(text->data, (size_t)size);
        if (good < size) return wire_fail(r, field, "is not valid UTF-8", text->data + good);
        *ascii = false;
    }
    return p;
}

/* Read an int of any width, or nil, which is -1. */
static inline const uint8_t *wire_read_int(const wire_reader *r, const uint8_t *p, const char *field, int64_t least,
                                           int64_t most, int64_t *value) {
    const uint8_t *header = p;
    uint64_t number;
    if (p == r->end) return wire_missing(r, field);
    uint8_t lead = *p;
    if (lead == 0xC0) {
        *value = -1;
        return p + 1;
    }
    if (lead <= 0x7F) {
        number = lead;
        p++;
    } else if (lead >= 0xCC && lead <= 0xCF) {
        if (!(p = wire_number(r, header, field, 1u << (lead - 0xCC), &number))) return NULL;
    } else if (lead >= 0xD0 && lead <= 0xD3) {
        unsigned width = 1u << (lead - 0xD0);
        if (!(p = wire_number(r, header, field, width, &number))) return NULL;
        if (number >> (8 * width - 1)) return wire_fail(r, field, "must not be negative", header);
    } else if (lead >= 0xE0) {
        return wire_fail(r, field, "must not be negative", header);
    } else {
        return wire_fail(r, field, "must be an int or nil", header);
    }
    if (number < (uint64_t)least) return wire_fail(r, field, "is too small", header);
    if (number > (uint64_t)most) return wire_fail(r, field, "is too large", header);
    *value = (int64_t)number;
    return p;
}

/* Read the header of an array (fix 0x90, wide 0xDC) or a map (fix 0x80, wide 0xDE). */
static inline const uint8_t *wire_read_count(const wire_reader *r, const uint8_t *p, const char *field,
                                             const char *problem, uint8_t fix, uint8_t wide, uint64_t *count) {
    if (p == r->end) return wire_missing(r, field);
    uint8_t lead = *p;
    if ((lead & 0xF0) == fix) {
        *count = lead & 0x0F;
        return p + 1;
    }
    if (lead == wide || lead == wide + 1) return wire_number(r, p, field, lead == wide ? 2 : 4, count);
    return wire_fail(r, field, problem, p);
}

/* Names are compared pair by pair, after their ends were: with both limits, 256 of 1024 bytes, the worst that hostile
 * names can cost is 33 MB of memcmp, about two milliseconds. */
static inline const uint8_t *wire_read_attributes(const wire_reader *r, const uint8_t *p, wire_envelope *out) {
    static const char *const name_of = "name of an attribute";
    const uint8_t *header = p;
    uint64_t count, first, last;
    uint64_t prints[WIRE_MAX_ATTRIBUTES];
    wire_text names[WIRE_MAX_ATTRIBUTES];
    bool ascii = true;
    out->at[WIRE_ATTRIBUTES] = (uint32_t)(header - r->start);
    if (!(p = wire_read_count(r, p, "attributes", "must be a map", 0x80, 0xDE, &count))) return NULL;
    if (count > WIRE_MAX_ATTRIBUTES) return wire_fail(r, "attributes", "has more than 256 entries", header);
    for (size_t i = 0; i < count; i++) {
        wire_text name, value;
        header = p;
        if (!(p = wire_read_text(r, p, name_of, false, &name, &ascii))) return NULL;
        if (name.size == 0) return wire_fail(r, name_of, "must not be empty", header);
        if (name.size > WIRE_MAX_NAME) return wire_fail(r, name_of, "is longer than 1024 bytes", header);
        wire_ends(name.data, name.size, &first, &last);
        names[i] = name;
        prints[i] = first ^ (last << 19 | last >> 45) ^ name.size;
        for (size_t k = 0; k < i; k++)
            if (prints[k] == prints[i] && names[k].size == name.size && !memcmp(names[k].data, name.data, name.size))
                return wire_fail(r, name_of, "is there twice", header);
        if (!(p = wire_read_text(r, p, "value of an attribute", false, &value, &ascii))) return NULL;
        out->size += name.size + value.size;
    }
    out->ascii |= (uint32_t)ascii << WIRE_ATTRIBUTES;
    return p;
}

/* Read the text of field number `index`. */
static inline const uint8_t *wire_read_field(const wire_reader *r, const uint8_t *p, wire_envelope *out, int index,
                                             const char *field, bool optional, bool may_be_empty, wire_text *text) {
    const uint8_t *header = p;
    bool ascii = true;
    out->at[index] = (uint32_t)(header - r->start);
    if (!(p = wire_read_text(r, p, field, optional, text, &ascii))) return NULL;
    if (!may_be_empty && text->data != NULL && text->size == 0) return wire_fail(r, field, "must not be empty", header);
    out->ascii |= (uint32_t)ascii << index;
    out->size += text->size;
    return p;
}

/* Check a whole envelope in one pass; the last `beyond` bytes of it, all of the body, are not at data + size but
 * elsewhere, and are not looked at. False: `fault` says what is wrong; `out` is then of no use. */
static inline bool wire_check_parts(const uint8_t *data, size_t size, size_t beyond, wire_envelope *out,
                                    wire_fault *fault) {
    const wire_reader reader = {data, data + size, fault};
    const wire_reader *r = &reader;
    const uint8_t *p = data, *header;
    wire_text text;
    uint64_t length;
    int64_t version;
    out->ascii = 0;
    out->size = 0;
    if ((uint64_t)size + beyond > WIRE_MAX_SIZE) return wire_fail(r, "envelope", "is larger than 4 GiB", p);
    if (size >= 2 && data[0] == (0x90 | WIRE_ELEMENTS) && data[1] == WIRE_VERSION) {
        p += 2;
    } else {
        if (!(p = wire_read_count(r, p, "envelope", "must be an array", 0x90, 0xDC, &length))) return false;
        if (length == 0) return wire_fail(r, "version", "is missing: the array is empty", data);
        header = p;
        if (!(p = wire_read_int(r, p, "version", 0, INT64_MAX, &version))) return false;
        if (version != WIRE_VERSION) return wire_fail(r, "version", "is not 1, the one known here", header);
        if (length != WIRE_ELEMENTS) return wire_fail(r, "envelope", "must have 11 elements", data);
    }
    if (!(p = wire_read_field(r, p, out, WIRE_MESSAGE_ID, "message_id", false, false, &text))) return false;
    if (!(p = wire_read_field(r, p, out, WIRE_SESSION_ID, "session_id", true, false, &text))) return false;
    if (text.size > WIRE_MAX_SESSION_ID)
        return wire_fail(r, "session_id", "is longer than 128 characters", data + out->at[WIRE_SESSION_ID]);
    if (!wire_is_printable(text.data, text.size))
        return wire_fail(r, "session_id", "must be printable ASCII", data + out->at[WIRE_SESSION_ID]);
    if (!(p = wire_read_field(r, p, out, WIRE_CORRELATION_ID, "correlation_id", true, true, &text))) return false;
    if (!(p = wire_read_field(r, p, out, WIRE_CONTENT_TYPE, "content_type", true, true, &text))) return false;
    if (!(p = wire_read_int(r, p, "time_to_live", 1, INT64_MAX, &out->ttl_us))) return false;
    if (!(p = wire_read_int(r, p, "scheduled_at", 0, WIRE_MAX_INSTANT, &out->scheduled_us))) return false;
    header = p;
    if (!(p = wire_read_int(r, p, "delay", 0, INT64_MAX, &out->delay_us))) return false;
    if (out->delay_us >= 0 && out->scheduled_us >= 0)
        return wire_fail(r, "delay", "excludes scheduled_at, which is there too", header);
    if (!(p = wire_read_field(r, p, out, WIRE_DEDUPLICATION_ID, "deduplication_id", true, false, &text))) return false;
    if (!(p = wire_read_attributes(r, p, out))) return false;

    header = p;
    out->at[WIRE_BODY] = (uint32_t)(header - data);
    if (p == r->end) return wire_missing(r, "body");
    if (*p < 0xC4 || *p > 0xC6) return wire_fail(r, "body", "must be a bin", header);
    if (!(p = wire_number(r, header, "body", 1u << (*p - 0xC4), &length))) return false;
    if (beyond && p != r->end) return wire_fail(r, "body", "does not begin where it was found before", header);
    uint64_t left = (uint64_t)(r->end - p) + beyond;
    if (left < length) {
        wire_fail(r, "body", "is cut off", header);
        fault->claimed = length;
        fault->left = left;
        return false;
    }
    out->size += length;
    if (left > length) return wire_fail(r, "envelope", "has bytes after its end", p + length);
    return true;
}

static inline bool wire_check(const uint8_t *data, size_t size, wire_envelope *out, wire_fault *fault) {
    return wire_check_parts(data, size, 0, out, fault);
}

/* ---- reading what wire_check accepted: no bounds are looked at again ---- */

/* Return the run (str, bin or nil) whose header is at `p`; the bytes after it start at its data + size, or p + 1. */
static inline wire_text wire_checked_run(const uint8_t *p) {
    wire_text run;
    uint8_t lead = *p++;
    unsigned width = 0;
    if ((lead & 0xE0) == 0xA0) {
        run.data = p;
        run.size = lead & 0x1F;
        return run;
    }
    if (lead == 0xD9) {
        run.size = *p++;
        run.data = p;
        return run;
    }
    if (lead == 0xC0) {
        run.data = NULL;
        run.size = 0;
        return run;
    }
    width = 1u << (lead >= 0xD9 ? lead - 0xD9 : lead - 0xC4);
    run.size = 0;
    for (unsigned i = 0; i < width; i++) run.size = run.size << 8 | *p++;
    run.data = p;
    return run;
}

/* Return the number of entries of the map whose header is at `*p`, and step over that header. */
static inline size_t wire_checked_count(const uint8_t **p) {
    uint8_t lead = *(*p)++;
    unsigned width = lead == 0xDE ? 2 : lead == 0xDF ? 4 : 0;
    size_t count = width ? 0 : lead & 0x0F;
    for (unsigned i = 0; i < width; i++) count = count << 8 | *(*p)++;
    return count;
}

/* ---- writing: always the shortest form ---- */

typedef struct {
    wire_text text[WIRE_TEXTS];
    int64_t ttl_us, scheduled_us, delay_us; /* -1 = none */
    const wire_text *attributes;            /* name, value, name, value, ... */
    size_t attribute_count;
    wire_text body;
} wire_message;

static inline uint64_t wire_text_size(wire_text text) {
    if (text.data == NULL) return 1;
    return text.size + (text.size < 32 ? 1u : text.size < 256 ? 2u : text.size < 65536 ? 3u : 5u);
}

static inline uint64_t wire_int_size(int64_t value) {
    if (value < 128) return 1;
    return value < 256 ? 2 : value < 65536 ? 3 : value <= UINT32_MAX ? 5 : 9;
}

/* The exact number of bytes that wire_write will write. Above WIRE_MAX_SIZE it must not be called. */
static inline uint64_t wire_measure(const wire_message *m) {
    uint64_t size = 2;
    for (int i = 0; i < WIRE_TEXTS; i++) size += wire_text_size(m->text[i]);
    size += wire_int_size(m->ttl_us) + wire_int_size(m->scheduled_us) + wire_int_size(m->delay_us);
    size += m->attribute_count < 16 ? 1 : 3;
    for (size_t i = 0; i < 2 * m->attribute_count; i++) size += wire_text_size(m->attributes[i]);
    return size + m->body.size + (m->body.size < 256 ? 2 : m->body.size < 65536 ? 3 : 5);
}

static inline uint8_t *wire_put(uint8_t *out, uint64_t value, unsigned width) {
    for (unsigned i = width; i-- > 0; value >>= 8) out[i] = (uint8_t)value;
    return out + width;
}

/* Copy a run. Short ones by two overlapping words each: a call of memcpy costs more than they do. */
static inline uint8_t *wire_put_run(uint8_t *out, wire_text run) {
    const uint8_t *from = run.data;
    size_t size = run.size;
    if (size >= 16) {
        if (size <= 32) {
            memcpy(out, from, 16);
            memcpy(out + size - 16, from + size - 16, 16);
        } else {
            memcpy(out, from, size);
        }
    } else if (size >= 8) {
        memcpy(out, from, 8);
        memcpy(out + size - 8, from + size - 8, 8);
    } else if (size >= 4) {
        memcpy(out, from, 4);
        memcpy(out + size - 4, from + size - 4, 4);
    } else {
        for (size_t i = 0; i < size; i++) out[i] = from[i];
    }
    return out + size;
}

static inline uint8_t *wire_put_text(uint8_t *out, wire_text text) {
    if (text.data == NULL) {
        *out++ = 0xC0;
        return out;
    }
    if (text.size < 32) {
        *out++ = (uint8_t)(0xA0 | text.size);
    } else {
        unsigned log = text.size < 256 ? 0 : text.size < 65536 ? 1 : 2;
        *out++ = (uint8_t)(0xD9 + log);
        out = wire_put(out, text.size, 1u << log);
    }
    return wire_put_run(out, text);
}

static inline uint8_t *wire_put_int(uint8_t *out, int64_t value) {
    if (value < 128) {
        *out++ = value < 0 ? 0xC0 : (uint8_t)value;
        return out;
    }
    unsigned log = value < 256 ? 0 : value < 65536 ? 1 : value <= UINT32_MAX ? 2 : 3;
    *out++ = (uint8_t)(0xCC + log);
    return wire_put(out, (uint64_t)value, 1u << log);
}

/* Write the envelope up to the body's bytes; `out` has room for wire_measure(m) - m->body.size bytes. Return the end of
 * what was written. */
static inline uint8_t *wire_write_head(const wire_message *m, uint8_t *out) {
    *out++ = 0x90 | WIRE_ELEMENTS;
    *out++ = WIRE_VERSION;
    for (int i = WIRE_MESSAGE_ID; i <= WIRE_CONTENT_TYPE; i++) out = wire_put_text(out, m->text[i]);
    out = wire_put_int(out, m->ttl_us);
    out = wire_put_int(out, m->scheduled_us);
    out = wire_put_int(out, m->delay_us);
    out = wire_put_text(out, m->text[WIRE_DEDUPLICATION_ID]);
    if (m->attribute_count < 16) {
        *out++ = (uint8_t)(0x80 | m->attribute_count);
    } else {
        *out++ = 0xDE;
        out = wire_put(out, m->attribute_count, 2);
    }
    for (size_t i = 0; i < 2 * m->attribute_count; i++) out = wire_put_text(out, m->attributes[i]);
    unsigned log = m->body.size < 256 ? 0 : m->body.size < 65536 ? 1 : 2;
    *out++ = (uint8_t)(0xC4 + log);
    return wire_put(out, m->body.size, 1u << log);
}

/* Write the envelope; `out` has room for wire_measure(m) bytes. Return the end of what was written. */
static inline uint8_t *wire_write(const wire_message *m, uint8_t *out) {
    return wire_put_run(wire_write_head(m, out), m->body);
}

#endif
