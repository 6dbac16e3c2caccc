cimport cython


@cython.final
cdef class MidLife:
    cdef readonly set found
    cdef bint looking
    cdef dict bits
    cdef list fresh
    cdef long long fresh_at
    cpdef given(self, long long at, unsigned long long iovad, unsigned long long pfn)
    cpdef freed(self, long long at, unsigned long long iovad, unsigned long long pfn)
    cdef _settle(self)
