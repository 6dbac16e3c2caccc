from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.tables cimport TablePages
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef class PageTable:
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
    cdef int _map(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                  Gather gather) noexcept nogil
    cdef unsigned long long _unmap(self, unsigned long long iova, unsigned long long size, Gather gather) noexcept nogil
    cdef unsigned long long _leaf(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _iova_to_phys(self, unsigned long long iova) noexcept nogil
    cdef bint _leaf_across(self, unsigned long long iova) noexcept nogil
    cdef bint _is_near(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef int _map_near(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                       Gather gather) noexcept nogil
    cdef int _map_runs(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                       Gather gather) noexcept nogil
    cdef int _check(self, unsigned long long iova, unsigned long long phys, unsigned long long size,
                    int prot) noexcept nogil
    cdef int _best_level(self, unsigned long long congruence, unsigned long long size) noexcept nogil
    cdef unsigned long long _run_bytes(self, unsigned long long iova, unsigned long long phys, unsigned long long size,
                                       int level) noexcept nogil
    cdef unsigned long long _slot(self, unsigned long long iova, int level) noexcept nogil
    cdef unsigned long long _put(self, unsigned long long at, unsigned long long count, unsigned long long iova,
                                 unsigned long long phys, int level, unsigned long long bits,
                                 Gather gather) noexcept nogil
    cdef bint _is_empty(self, unsigned long long table, int level) noexcept nogil
    cdef void _defer_tree(self, unsigned long long table, int level, Gather gather) noexcept nogil
    cdef unsigned long long _unmap_in(self, unsigned long long table, int level, unsigned long long iova,
                                      unsigned long long last, Gather gather) noexcept nogil
    cdef unsigned long long _clear_leaves(self, unsigned long long at, unsigned long long count,
                                          int level) noexcept nogil
    cdef void _flush_lines(self, unsigned long long at, unsigned long long count) noexcept nogil

cpdef int level_shift(int level) noexcept nogil

cdef unsigned long long _LINE_WORDS
cdef int _LEVEL_BITS
