from dmakit.consts cimport *
from dmakit.iova.bits cimport largest_fit, mix

cimport cython


@cython.final
cdef class IovaTree:
    cdef readonly bint augmented
    cdef readonly unsigned long long start
    cdef readonly unsigned long long[::1] lo
    cdef readonly unsigned long long[::1] hi
    cdef readonly unsigned long long[::1] fit
    cdef readonly unsigned long long[::1] best
    cdef readonly int[::1] left
    cdef readonly int[::1] right
    cdef readonly int[::1] parent
    cdef readonly int[::1] height
    cdef readonly int[::1] prev
    cdef readonly int[::1] next
    cdef readonly int root
    cdef readonly int unused
    cdef readonly int fresh
    cdef readonly int capacity
    cdef readonly long long count
    cdef readonly long long visited
    cdef bint _grow(self) noexcept with gil
    cdef int _take(self) noexcept nogil
    cdef int _insert_before(self, int above, unsigned long long lo, unsigned long long hi) noexcept nogil
    cdef void _remove(self, int node) noexcept nogil
    cdef void _extend_down(self, int node, unsigned long long lo) noexcept nogil
    cdef int _find(self, unsigned long long pfn) noexcept nogil
    cdef int _first_ending_at(self, unsigned long long pfn) noexcept nogil
    cdef int _first_starting_at(self, unsigned long long pfn) noexcept nogil
    cdef unsigned long long _gap_start(self, int node) noexcept nogil
    cdef int _highest_fit_below(self, int node, unsigned long long size) noexcept nogil
    cdef int _descend(self, int node, unsigned long long size) noexcept nogil
    cdef void _unlink(self, int node) noexcept nogil
    cdef void _replace(self, int old, int new) noexcept nogil
    cdef void _refit(self, int node) noexcept nogil
    cdef void _pull(self, int node) noexcept nogil
    cdef int _rotate_left(self, int node) noexcept nogil
    cdef int _rotate_right(self, int node) noexcept nogil
    cdef int _rebalance(self, int node) noexcept nogil
    cdef void _retrace(self, int node) noexcept nogil
