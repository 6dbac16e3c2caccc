from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.memory.physical cimport PhysicalMemory

cdef class PageAllocator:
    cdef readonly PhysicalMemory memory
    cdef readonly FailPoint fail
    cdef readonly unsigned long long start
    cdef readonly unsigned long long size
    cdef readonly int node
    cdef readonly long long free_pages_count
    cdef readonly long long allocated_pages
    cdef readonly double fragmentation
    cdef unsigned long long first
    cdef unsigned long long frames
    cdef unsigned long long threshold
    cdef unsigned long long rng
    cdef unsigned long long window
    cdef unsigned long long last_start
    cdef unsigned long long last_end
    cdef unsigned long long[::1] heads
    cdef unsigned char[::1] state
    cdef unsigned long long _alloc(self, int order) noexcept nogil
    cdef unsigned long long _alloc_after(self, unsigned long long phys, int order) noexcept nogil
    cdef void _free(self, unsigned long long phys, int order) noexcept nogil
    cdef unsigned long long _random(self) noexcept nogil
    cdef void _push(self, unsigned long long block, int order) noexcept nogil
    cdef void _unlink(self, unsigned long long block, int order) noexcept nogil
    cdef int _free_order_at(self, unsigned long long frame, int order) noexcept nogil
    cdef unsigned long long _take(self, unsigned long long frame, int order, int held) noexcept nogil
    cdef unsigned long long _from_lists(self, int order) noexcept nogil
    cdef unsigned long long _at(self, unsigned long long frame, int order) noexcept nogil
    cdef unsigned long long _scattered(self, int order) noexcept nogil
    cdef unsigned long long _apart(self, int order) noexcept nogil
    cdef bint _neighbour(self, unsigned long long frame, int order) noexcept nogil

cdef unsigned long long _WINDOW
cdef int _PROBES
cdef int _ALLOCATED
cdef int _LINK_BITS
cdef unsigned long long _LINK_MASK
cdef unsigned long long _WORD
