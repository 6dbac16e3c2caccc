cdef class FaultLog:
    cdef readonly Py_ssize_t capacity
    cdef readonly Py_ssize_t count
    cdef readonly unsigned long long lost
    cdef unsigned long long[::1] iovas
    cdef unsigned long long[::1] infos
    cdef void _add(self, int did, unsigned long long iova, bint write, int source, int reason) noexcept nogil
