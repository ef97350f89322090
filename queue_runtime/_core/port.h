/* What differs between compilers and systems: every #ifdef of the core's C is here. Plain C11, no Python.h. */
#ifndef QR_PORT_H
#define QR_PORT_H

/* For pwrite and off_t under -std=c11; Python's own headers define it too, where they come first. */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <stdalign.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* Two 64-byte lines: x86 fetches lines in pairs, and some ARM cores have 128-byte lines. */
#define QR_LINE 128

#if defined(__GNUC__) || defined(__clang__)
#define QR_LIKELY(x) __builtin_expect(!!(x), 1)
#define QR_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define QR_LIKELY(x) (x)
#define QR_UNLIKELY(x) (x)
#endif

/* The atomic operations, each with its order written out. A harness that simulates a weak memory may define
   QR_ATOMICS_SUPPLIED and bring these names, QR_ATOMIC and the memory_order constants of its own. */
#ifndef QR_ATOMICS_SUPPLIED
#include <stdatomic.h>
#define QR_ATOMIC(type) _Atomic(type)
#define qr_atomic_init(p, v) atomic_init((p), (v))
#define qr_load(p, order) atomic_load_explicit((p), (order))
#define qr_store(p, v, order) atomic_store_explicit((p), (v), (order))
#define qr_exchange(p, v, order) atomic_exchange_explicit((p), (v), (order))
#define qr_fetch_add(p, v, order) atomic_fetch_add_explicit((p), (v), (order))
#define qr_fetch_sub(p, v, order) atomic_fetch_sub_explicit((p), (v), (order))
#define qr_fetch_or(p, v, order) atomic_fetch_or_explicit((p), (v), (order))
#define qr_fetch_and(p, v, order) atomic_fetch_and_explicit((p), (v), (order))
#define qr_cas_weak(p, expected, v, won, lost) \
    atomic_compare_exchange_weak_explicit((p), (expected), (v), (won), (lost))
#endif

/* Write all of it at a place in a file, or return the errno: then the file may have a part of it. */
#if defined(_WIN32)
#include <io.h>
static inline int qr_write_at(int file, const void *data, size_t size, int64_t offset) {
    const char *from = (const char *)data;
    if (_lseeki64(file, offset, 0) < 0) return errno;
    while (size) {
        int wrote = _write(file, from, size < (1u << 30) ? (unsigned)size : 1u << 30);
        if (wrote <= 0) return wrote ? errno : EIO;
        from += wrote;
        size -= (size_t)wrote;
    }
    return 0;
}
static inline int qr_cut(int file, int64_t size) { return _chsize_s(file, size); }
#else
#include <unistd.h>
static inline int qr_write_at(int file, const void *data, size_t size, int64_t offset) {
    const char *from = (const char *)data;
    while (size) {
        ssize_t wrote = pwrite(file, from, size, (off_t)offset);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return wrote ? errno : EIO;
        from += wrote;
        offset += wrote;
        size -= (size_t)wrote;
    }
    return 0;
}
static inline int qr_cut(int file, int64_t size) {
    int done;
    do done = ftruncate(file, (off_t)size);
    while (done < 0 && errno == EINTR);
    return done < 0 ? errno : 0;
}
#endif

#if defined(_WIN32)
#include <malloc.h>
static inline void *qr_alloc_lines(size_t size) { return _aligned_malloc(size, QR_LINE); }
static inline void qr_free_lines(void *memory) { _aligned_free(memory); }
#else
static inline void *qr_alloc_lines(size_t size) {
    /* aligned_alloc wants a multiple of the alignment. */
    return aligned_alloc(QR_LINE, (size + QR_LINE - 1) / QR_LINE * QR_LINE);
}
static inline void qr_free_lines(void *memory) { free(memory); }
#endif

/* A file's first bytes, mapped to be read. The descriptor may be closed afterwards: nothing of it is kept. Returns 0
   or the errno. ENOSYS: not on this system. */
#if defined(_WIN32)
static inline int qr_map(int fd, size_t size, void **memory) { (void)fd, (void)size, (void)memory; return ENOSYS; }
static inline void qr_unmap(void *memory, size_t size) { (void)memory, (void)size; }
#else
#include <sys/mman.h>
static inline int qr_map(int fd, size_t size, void **memory) {
    void *mapped = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return errno;
    *memory = mapped;
    return 0;
}
static inline void qr_unmap(void *memory, size_t size) { munmap(memory, size); }
#endif

#endif
