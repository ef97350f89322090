from libc.stdint cimport uint8_t

# Bytes from which a body is kept as a view: below, a copy costs about what a view does (bench/bench_bodies.py), and
# does not keep a large buffer alive for the sake of a small part of it.
cdef enum:
    VIEW_FROM = 16384


cdef class Mapping:
    cdef uint8_t *memory
    cdef readonly Py_ssize_t size


# A view of our own of what is large and does not change; None: it has to be copied.
cdef object kept_view(object given)
cdef const uint8_t *view_data(object view) noexcept
cdef Py_ssize_t view_size(object view) noexcept

# Copy; other threads run while much is copied, as its pages may have to be read from a disk.
cdef void copy_run(uint8_t *to, const uint8_t *run, size_t size) noexcept
cdef bytes copied_run(const uint8_t *run, size_t size)

cdef object reader_over(object view)
cdef object file_body(object path)
