"""Large bodies: views of what does not change, mapped files, and a reader over either. None of them copies the body."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

import io
import os
import stat
import sys

from queue_runtime.errors import ValidationError

cdef extern from "Python.h":
    bint PyMemoryView_Check(object)
    Py_buffer *PyMemoryView_GET_BUFFER(object)
    object PyMemoryView_FromObject(object)

cdef extern from "port.h" nogil:
    int qr_map(int fd, size_t size, void **memory)
    void qr_unmap(void *memory, size_t size)

cdef extern from "errno.h":
    int ENOSYS

SMALLEST_VIEW = VIEW_FROM

# Copying so much takes longer than letting other threads run, and their taking the lock back.
cdef enum:
    COPY_APART = 1 << 20


@cython.final
@cython.no_gc  # it refers to nothing
cdef class Mapping:
    """The first ``size`` bytes of an open file, to be read. The descriptor is not kept, and may be closed.

    Raises OSError as ``mmap`` does: with ENOMEM, the process has as many mappings as the system allows.

    Thread-safety: any thread may use it. It lasts until its last view is gone.
    """

    def __cinit__(self, int fd, Py_ssize_t size):
        cdef void *memory = NULL
        cdef int error
        if size <= 0:
            raise ValidationError("size", f"must be at least 1, not {size}")
        with nogil:
            error = qr_map(fd, size, &memory)
        if error:
            raise OSError(error, os.strerror(error))
        self.memory = <uint8_t *>memory
        self.size = size

    def __dealloc__(self):
        if self.memory != NULL:
            with nogil:
                qr_unmap(self.memory, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.memory, self.size, 1, flags)


def map_file(int fd, Py_ssize_t size):
    """Return a read-only view of an open file's first ``size`` bytes; the file may then be closed, and deleted.

    The file must have that size and keep it: reading what was cut off kills the process (SIGBUS). Raises OSError.
    """
    if size == 0:
        return memoryview(b"")
    try:
        return PyMemoryView_FromObject(Mapping(fd, size))
    except OSError as error:
        if error.errno != ENOSYS:
            raise
    from mmap import ACCESS_READ, mmap

    return PyMemoryView_FromObject(mmap(fd, size, access=ACCESS_READ))


cdef object file_body(object path):
    """The content of a regular file, mapped when it is large."""
    cdef int fd
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValidationError("path", "must be a regular file")
        if found.st_size >= VIEW_FROM:
            return map_file(fd, found.st_size)
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


cdef object kept_view(object given):
    # Exact types only. Of these it is known that nobody writes through them, that the memory stays where it is for as
    # long as a view of it exists, and that they refer to nothing: a message with one can be part of no cycle.
    cdef Py_buffer *buffer
    cdef object view
    if not PyMemoryView_Check(given):
        return None
    owner = given.obj
    view = PyMemoryView_FromObject(given)
    buffer = PyMemoryView_GET_BUFFER(view)
    if buffer.len < VIEW_FROM or not buffer.readonly or not view.c_contiguous:
        return None
    if type(owner) is not bytes and type(owner) is not Mapping:
        module = sys.modules.get("mmap")
        if module is None or type(owner) is not module.mmap or not memoryview(owner).readonly:
            return None
    if buffer.ndim != 1 or buffer.itemsize != 1 or view.format != "B":
        view = view.cast("B")
    return view


cdef const uint8_t *view_data(object view) noexcept:
    return <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf


cdef Py_ssize_t view_size(object view) noexcept:
    return PyMemoryView_GET_BUFFER(view).len


cdef void copy_run(uint8_t *to, const uint8_t *run, size_t size) noexcept:
    if size < COPY_APART:
        memcpy(to, run, size)
        return
    with nogil:
        memcpy(to, run, size)


cdef bytes copied_run(const uint8_t *run, size_t size):
    cdef bytes copy = PyBytes_FromStringAndSize(NULL, size)
    copy_run(<uint8_t *>PyBytes_AS_STRING(copy), run, size)
    return copy


class ViewReader(io.RawIOBase):
    """What ``io.BufferedReader`` reads from: a view, from a position on."""

    def __init__(self, view):
        self._view = view
        self._at = 0

    def _left(self):
        self._check_open()
        return self._view[min(self._at, len(self._view)):]

    def _check_open(self):
        if self.closed:
            raise ValueError("the body's reader is closed")

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self._check_open()
        if whence not in (0, 1, 2):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        at = offset + (0, self._at, len(self._view))[whence]
        if at < 0:
            raise ValueError("a position before the body's beginning")
        self._at = at
        return at

    def readinto(self, into):
        into = memoryview(into).cast("B")
        part = self._left()[:len(into)]
        into[:len(part)] = part
        self._at += len(part)
        return len(part)

    def readall(self):
        rest = bytes(self._left())
        self._at += len(rest)
        return rest

    def close(self):
        super().close()
        self._view = memoryview(b"")


cdef object reader_over(object view):
    return io.BufferedReader(ViewReader(view), 65536)
