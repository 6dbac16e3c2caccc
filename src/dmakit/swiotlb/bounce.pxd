from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory
from dmakit.swiotlb.pool cimport SwiotlbPool

cimport cython






cdef unsigned long long _MAPPING_ERROR
cdef unsigned long long _SEGMENT_BYTES

@cython.final
cdef class Swiotlb:
    cdef readonly PhysicalMemory memory
    cdef readonly Ledger ledger
    cdef readonly FailPoint fail
    cdef readonly object grower
    cdef public object events
    cdef readonly SwiotlbPool pool
    cdef readonly bint alone
    cdef readonly list pools
    cdef readonly list transients
    cdef readonly unsigned long long low
    cdef readonly unsigned long long high
    cdef readonly long long used
    cdef readonly long long high_water
    cdef readonly long long transient_slots
    cdef readonly Py_ssize_t areas
    cdef void _widen(self, SwiotlbPool pool) noexcept
    cdef SwiotlbPool _pool_of(self, unsigned long long tlb)
    cdef bint _contains(self, unsigned long long phys) noexcept nogil
    cdef bint _in_some_pool(self, unsigned long long phys) noexcept with gil
    cdef unsigned long long _map(
        self, unsigned long long phys, unsigned long long size, unsigned long long alloc_align_mask,
        unsigned long long min_align_mask, unsigned long long boundary, unsigned long long limit,
        int attrs, int cpu) noexcept nogil
    cdef unsigned long long _claim(
        self, unsigned long long phys, unsigned long long size, unsigned long long align_mask,
        unsigned long long min_align, unsigned long long boundary, unsigned long long limit, int cpu) noexcept nogil
    cdef unsigned long long _ask(
        self, SwiotlbPool pool, Py_ssize_t turn, unsigned long long phys, unsigned long long total,
        unsigned long long offset, unsigned long long align_mask, unsigned long long min_align,
        unsigned long long boundary) noexcept nogil
    cdef unsigned long long _ask_all(
        self, Py_ssize_t turn, Py_ssize_t cpu, unsigned long long phys, unsigned long long total,
        unsigned long long offset, unsigned long long align_mask, unsigned long long min_align,
        unsigned long long boundary) noexcept with gil
    cdef unsigned long long _claim_transient(
        self, unsigned long long phys, unsigned long long total, unsigned long long offset,
        unsigned long long align_mask, unsigned long long min_align, unsigned long long boundary,
        unsigned long long limit) noexcept with gil
    cdef void _count_used(self, Py_ssize_t slots) noexcept nogil
    cdef void _unmap(
        self, unsigned long long tlb, unsigned long long size, int direction, int attrs) noexcept nogil
    cdef Py_ssize_t _release_somewhere(self, unsigned long long tlb) noexcept with gil
    cdef void _bounce(self, unsigned long long tlb, unsigned long long size, bint to_device) noexcept nogil
    cdef unsigned long long _copy_somewhere(
        self, unsigned long long tlb, unsigned long long size, bint to_device) noexcept with gil
    cdef void _sync(self, unsigned long long tlb, unsigned long long size, bint to_device) noexcept nogil
    cdef void _note_bounced(self, unsigned long long phys, unsigned long long size) noexcept with gil
    cdef void _note_mapped(
        self, unsigned long long phys, unsigned long long size, unsigned long long tlb, int attrs) noexcept with gil
    cdef void _note_unmapped(self, unsigned long long tlb, unsigned long long size) noexcept with gil
    cdef void _note_overflow(self, unsigned long long copied, unsigned long long size) noexcept with gil
    cdef void _zero_pads(
        self, unsigned long long tlb, unsigned long long size, unsigned long long granule_mask) noexcept nogil
