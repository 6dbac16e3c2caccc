from dmakit.consts cimport *
from dmakit.iommu.devtlb cimport DeviceTlb
from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.invalidation cimport InvalidationQueue, _devtlb_high, _devtlb_low, _iotlb_low, _piotlb_low, _range_high
from dmakit.iommu.translation cimport Translator
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef int _block_mask(unsigned long long start, unsigned long long end) noexcept nogil

cdef class IommuUnit(Translator):
    cdef readonly bint caching_mode
    cdef readonly bint coherent_walker
    cdef readonly int max_mask
    cdef readonly int first_domain_id
    cdef readonly InvalidationQueue queue
    cdef readonly bint ats
    cdef public object events
    cdef void _set_root(self, int did, unsigned long long root, int levels) noexcept nogil
    cdef void _flush_range(
        self, int did, unsigned long long start, unsigned long long end, bint ih, int cause, int cpu
    ) noexcept nogil
    cdef void _flush_all(self, int did, int cause, int cpu) noexcept nogil
    cdef void _sync_range(self, int did, unsigned long long start, unsigned long long end, int cpu) noexcept nogil
    cdef void _inv_pages(
        self, int did, unsigned long long addr, int mask, bint ih, int cause, int cpu
    ) noexcept nogil
    cdef void _inv_domain(self, int did, int cause, int cpu) noexcept nogil
    cdef void _inv_global(self, int cause, int cpu) noexcept nogil
    cdef void _push_iotlb(
        self, int did, unsigned long long addr, int mask, bint ih, int cause, int cpu
    ) noexcept nogil
    cdef void _push_devtlbs(self, int did, unsigned long long addr, int mask, int cpu) noexcept with gil
    cdef void _push_devtlb(self, DeviceTlb devtlb, unsigned long long addr, int mask, int cpu) noexcept nogil
    cdef void _push(self, unsigned long long low, unsigned long long high, int cpu) noexcept nogil
    cdef void _submit(self, int cpu) noexcept nogil
    cdef void _note_flush(
        self, int did, unsigned long long start, unsigned long long end, unsigned long long addr, int mask
    ) noexcept with gil
    cdef void _note_sync(
        self, unsigned long long start, unsigned long long end, unsigned long long addr, int mask
    ) noexcept with gil
    cdef void _note_qi(self, unsigned long long low, unsigned long long high) noexcept with gil
