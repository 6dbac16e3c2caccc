from dmakit.consts cimport *
from dmakit.dma.core cimport MapCore, WARN_MAP_ALIGN, WARN_UNMAP_NOTHING, WARN_UNMAP_SIZE

cdef int _NO_IOMMU
cdef int _IDENTITY_DOMAIN
cdef int _IOVA_EXHAUSTED
cdef int _TABLE_MEMORY_EXHAUSTED
cdef int _UNTRUSTED_BOUNCE
cdef int _KMALLOC_BOUNCE
cdef int _MASK_BOUNCE
cdef int _FORCED_BOUNCE
cdef int _NON_COHERENT
cdef int _NONE

cdef class Streaming(MapCore):
    cdef unsigned long long _map_phys(
        self, unsigned long long phys, unsigned long long size, int direction, int attrs, int cpu) except? 0 nogil
    cdef int _unmap_phys(
        self, unsigned long long addr, unsigned long long size, int direction, int attrs, int cpu) except? -1 nogil
    cdef int _sync_single(self, unsigned long long addr, unsigned long long size, int direction, bint for_cpu) except? -1 nogil
    cdef unsigned long long _iommu_map_phys(
        self, unsigned long long phys, unsigned long long size, int direction, int attrs, int cpu) except? 0 nogil
    cdef unsigned long long _iommu_map(
        self, unsigned long long phys, unsigned long long size, int prot, int cpu) except? 0 nogil
    cdef int _iommu_unmap(self, unsigned long long addr, unsigned long long size, int cpu) except? -1 nogil
    cdef int _iommu_unmap_phys(
        self, unsigned long long addr, unsigned long long size, int direction, int attrs, int cpu) except? -1 nogil
    cdef bint _capable(self, unsigned long long addr, unsigned long long size) noexcept nogil
    cdef unsigned long long _direct_map(
        self, unsigned long long phys, unsigned long long size, int direction, int attrs, int cpu) except? 0 nogil
    cdef unsigned long long _direct_bounce(
        self, unsigned long long phys, unsigned long long size, int direction, int attrs, int cpu, int why) except? 0 nogil
    cdef int _direct_unmap(self, unsigned long long addr, unsigned long long size, int direction, int attrs) except? -1 nogil
