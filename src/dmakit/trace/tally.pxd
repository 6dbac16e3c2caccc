cimport cython


@cython.final
cdef class Tally:
    cdef readonly bint known
    cdef readonly bint presumed
    cdef readonly long long matched
    cdef readonly long long adopted
    cdef readonly long long diverged
    cdef readonly dict divergence
    cdef void agree(self, bint cached) noexcept
    cdef bint disagree(self, str kind) except -1


@cython.final
cdef class Counts:
    cdef readonly long long allocations
    cdef readonly long long operations
    cdef readonly long long overlapping
    cdef public long long reordered
    cdef readonly long long unknown_frees
    cdef readonly long long width
    cdef readonly bint capped
