from dmakit.consts cimport *

cpdef unsigned long long gap_between(unsigned long long phys, unsigned long long length, unsigned long long following) noexcept nogil
cpdef int lowest_bit(unsigned long long bits) noexcept nogil
cpdef int smaller_bit(int first, int second) noexcept nogil
cpdef unsigned long long segment_room(
    unsigned long long phys, unsigned long long length, unsigned long long max_size, unsigned long long boundary
) noexcept nogil
cpdef bint mergeable(
    unsigned long long phys, unsigned long long length, unsigned long long following, unsigned long long more,
    unsigned long long boundary
) noexcept nogil

cdef class SegmentIter:
    cdef readonly unsigned long long[::1] phys
    cdef readonly unsigned long long[::1] length
    cdef readonly Py_ssize_t count
    cdef readonly Py_ssize_t index
    cdef readonly unsigned long long done
    cdef readonly unsigned long long max_size
    cdef readonly unsigned long long boundary
    cdef readonly unsigned long long paddr
    cdef readonly unsigned long long size
    cdef readonly long long visited
    cdef void _begin(self, unsigned long long[::1] phys, unsigned long long[::1] length, Py_ssize_t count,
                     unsigned long long max_size, unsigned long long boundary) noexcept
    cdef void _aim(self, Py_ssize_t first, Py_ssize_t end) noexcept nogil
    cdef bint _next(self) noexcept nogil
