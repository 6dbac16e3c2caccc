from dmakit.consts cimport *
from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.gather cimport ALL_ONES, Gather
from dmakit.iommu.tables cimport TablePages
from dmakit.iommu.tree cimport TableTree, level_shift

cdef class PageTable(TableTree):
    cdef int top_leaf
    cdef int _map(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                  Gather gather) noexcept nogil
    cdef unsigned long long _unmap(self, unsigned long long iova, unsigned long long size, Gather gather) noexcept nogil
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
    cdef long long _put_pages(self, unsigned long long above, unsigned long long count, unsigned long long iova,
                              unsigned long long phys, unsigned long long bits, Gather gather) noexcept nogil
    cdef void _write(self, unsigned long long at, unsigned long long count, unsigned long long phys, int level,
                     unsigned long long bits) noexcept nogil
    cdef void _come_near(self, unsigned long long iova, unsigned long long table) noexcept nogil
    cdef unsigned long long _put(self, unsigned long long at, unsigned long long count, unsigned long long iova,
                                 unsigned long long phys, int level, unsigned long long bits,
                                 Gather gather) noexcept nogil
    cdef unsigned long long _make_room(self, unsigned long long at, unsigned long long count, unsigned long long iova,
                                       int level, Gather gather) noexcept nogil
    cdef unsigned long long _unmap_in(self, unsigned long long table, int level, unsigned long long iova,
                                      unsigned long long last, Gather gather) noexcept nogil
    cdef unsigned long long _clear_leaves(self, unsigned long long at, unsigned long long count,
                                          int level) noexcept nogil
    cdef unsigned long long _leaves_from(self, unsigned long long at, unsigned long long count,
                                         int level) noexcept nogil
    cdef bint _is_inside(self, unsigned long long iova, unsigned long long size) noexcept nogil
