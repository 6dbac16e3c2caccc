from dmakit.consts cimport *
from dmakit.iommu.caches cimport SetCache

cdef class PagingStructureCache(SetCache):
    cdef unsigned long long _deepest(self, int did, unsigned long long iova, int levels) noexcept nogil
    cdef void _remember(
        self, int did, int level, unsigned long long iova, unsigned long long table, unsigned long long permissions
    ) noexcept nogil
