cimport cython

@cython.final
cdef class FailPoint:
    cdef readonly long long countdown
    cdef readonly bint fired
    cdef readonly long long uses
    cdef bint _hit(self) noexcept nogil
