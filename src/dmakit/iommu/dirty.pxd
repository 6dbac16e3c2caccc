from dmakit.consts cimport *
from dmakit.iommu.bitmap cimport set_range
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.pagetable cimport PageTable
from dmakit.iommu.tree cimport level_shift

cdef class LeafBitScan:
    cdef readonly PageTable table
    cdef readonly Gather gather
    cdef readonly long long found
    cdef unsigned long long bit
    cdef unsigned long long origin
    cdef unsigned long long last
    cdef int page_shift
    cdef bint clear
    cdef bint record
    cdef unsigned long long[::1] bitmap
    cdef long long _run(self) noexcept nogil
    cdef void _scan(self, unsigned long long node, int level, unsigned long long iova,
                    unsigned long long last) noexcept nogil
    cdef void _record(self, unsigned long long first, unsigned long long last) noexcept nogil
