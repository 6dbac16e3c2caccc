from dmakit.iommu.caches cimport SetCache

cdef class Iotlb(SetCache):
    cdef readonly Py_ssize_t hit
    cdef unsigned long long _lookup(self, int did, unsigned long long iova) noexcept nogil
