cimport cython


@cython.final
cdef class Cancellation:
    cdef object event

    cdef int cancel(self) except -1


cdef dict failures_of(object outcome, object error, Py_ssize_t count)
cdef int resolve(object future, object home, object result, object error) except -1
