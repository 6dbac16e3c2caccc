from dmakit.consts cimport *
from dmakit.iommu.iotlb cimport Iotlb

cdef class DeviceTlb:
    cdef readonly int source
    cdef readonly int queue_depth
    cdef readonly int did
    cdef readonly unsigned long long invalidations
    cdef readonly Iotlb cache
    cdef unsigned long long _lookup(self, unsigned long long iova, bint write) noexcept nogil
    cdef void _fill(self, unsigned long long iova, unsigned long long word) noexcept nogil
    cdef void _invalidate(self, unsigned long long iova, int mask) noexcept nogil
