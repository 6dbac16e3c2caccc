from dmakit.consts cimport *
from dmakit.iommu.devtlb cimport DeviceTlb
from dmakit.iommu.unit cimport IommuUnit
from dmakit.memory.physical cimport PhysicalMemory
from dmakit.turn cimport Turn

cdef class Port:
    cdef readonly PhysicalMemory memory
    cdef readonly Turn turn
    cdef readonly int source
    cdef readonly str name
    cdef readonly bint coherent
    cdef readonly object cache
    cdef readonly list peers
    cdef unsigned long long low
    cdef unsigned long long high
    cdef bint routed
    cdef unsigned long long lost
    cdef unsigned long long stopped
    cdef int _take(self, unsigned long long iova, unsigned char* into, unsigned long long size) except? -1 nogil
    cdef int _load(self, unsigned long long iova, unsigned char* into, unsigned long long size) except -1
    cdef int _store(self, unsigned long long iova, const unsigned char* source, unsigned long long size) except -1
    cdef unsigned long long _reach(self, unsigned long long iova, unsigned long long length, bint write) except? 1
    cdef unsigned long long _touch(
        self, unsigned long long iova, unsigned long long length, bint write) except? 1 nogil
    cdef unsigned long long _peer(self, unsigned long long iova) except? 1 with gil
    cdef bint _find_memory(self, unsigned long long phys, unsigned long long length) except? -1 with gil
    cdef int _snoop(self, unsigned long long phys, unsigned long long length, bint write) except -1 with gil
    cdef unsigned long long _locate(self, unsigned long long iova, bint write) noexcept nogil

cdef class DirectPort(Port):
    pass

cdef class DmaPort(Port):
    cdef readonly IommuUnit unit
    cdef readonly int did
    cdef readonly DeviceTlb devtlb
cdef unsigned long long ALL_ONES
