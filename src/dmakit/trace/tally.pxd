cimport cython


@cython.final
cdef class Tally:
    cdef public bint known
    cdef public bint presumed
    cdef public long long matched
    cdef public long long adopted
    cdef public long long diverged
    cdef public dict divergence
    cdef void agree(self, bint cached) noexcept
    cdef bint disagree(self, str kind) except -1


@cython.final
cdef class Counts:
    cdef public long long allocations
    cdef public long long operations
    cdef public long long overlapping
    cdef public long long reordered
    cdef public long long unknown_frees
    cdef public long long width
    cdef public bint capped
