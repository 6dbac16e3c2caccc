from dmakit.consts cimport *
from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.gather cimport ALL_ONES, Gather
from dmakit.iommu.tables cimport TablePages
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef class TableTree:
    cdef readonly PtFormat fmt
    cdef readonly TablePages tables
    cdef readonly PhysicalMemory memory
    cdef readonly Ledger ledger
    cdef readonly int levels
    cdef readonly bint coherent_walker
    cdef readonly unsigned long long root
    cdef readonly unsigned long long aperture_last
    cdef readonly long long table_pages
    cdef unsigned long long near_span
    cdef unsigned long long near_slot
    cdef unsigned long long upper_span
    cdef unsigned long long upper_slot
    cdef unsigned long long _leaf(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _iova_to_phys(self, unsigned long long iova) noexcept nogil
    cdef bint _leaf_across(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _slot(self, unsigned long long iova, int level) noexcept nogil
    cdef void _link(self, unsigned long long slot, unsigned long long table, int level) noexcept nogil
    cdef bint _is_empty(self, unsigned long long table, int level) noexcept nogil
    cdef void _defer_tree(self, unsigned long long table, int level, Gather gather) noexcept nogil
    cdef void _forget_near(self) noexcept nogil
    cdef void _flush_lines(self, unsigned long long at, unsigned long long count) noexcept nogil

cpdef int level_shift(int level) noexcept nogil

cdef unsigned long long _LINE_WORDS
cdef int _LEVEL_BITS
