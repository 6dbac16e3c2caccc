from dmakit.block.segments cimport SegmentIter, gap_between, lowest_bit, mergeable, segment_room, smaller_bit
from dmakit.consts cimport *

cdef class Payload:
    cdef readonly unsigned long long[::1] phys
    cdef readonly unsigned long long[::1] length
    cdef readonly Py_ssize_t first
    cdef readonly Py_ssize_t count
    cdef readonly unsigned long long size
    cdef readonly int gap_bit
    cdef readonly int segments
    cdef readonly unsigned long long max_size
    cdef readonly unsigned long long boundary
    cdef readonly unsigned long long virt_boundary
    cdef int _over(self, unsigned long long[::1] phys, unsigned long long[::1] length) except -1
    cdef void _select(self, Py_ssize_t first, Py_ssize_t end) noexcept nogil
    cdef void _measure(self) noexcept nogil
    cdef bint _may_coalesce(self, unsigned long long merge_boundary, bint gap_rule) noexcept nogil
    cdef void _iterate(self, SegmentIter walk) noexcept

cdef class Request:
    cdef readonly int op
    cdef readonly unsigned long long sector
    cdef readonly int cpu
    cdef readonly int direction
    cdef readonly bint user_command
    cdef readonly object limits
    cdef readonly Payload data
    cdef readonly Payload integrity
    cdef readonly object ranges
    cdef public int tag
    cdef public object context
