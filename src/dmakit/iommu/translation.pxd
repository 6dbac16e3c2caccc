from dmakit.consts cimport *
from dmakit.iommu.devtlb cimport DeviceTlb
from dmakit.iommu.faults cimport FaultLog
from dmakit.iommu.invalidation cimport _devtlb_mask
from dmakit.iommu.iotlb cimport Iotlb
from dmakit.iommu.lane cimport BatchLane
from dmakit.iommu.psc cimport PagingStructureCache
from dmakit.iommu.walker cimport Walker
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef unsigned long long _output(unsigned long long word, unsigned long long iova) noexcept nogil

cdef class Translator:
    cdef readonly PhysicalMemory memory
    cdef readonly Ledger ledger
    cdef readonly unsigned long long no_phys
    cdef readonly Iotlb iotlb
    cdef readonly PagingStructureCache psc
    cdef readonly Walker walker
    cdef BatchLane lane
    cdef readonly FaultLog fault_log
    cdef readonly list devtlbs
    cdef readonly int last_reason
    cdef unsigned long long _resolve(self, int did, unsigned long long iova, bint write) noexcept nogil
    cdef unsigned long long _translate(self, int did, unsigned long long iova, bint write, int source) noexcept nogil
    cdef unsigned long long _translate_ats(self, DeviceTlb devtlb, unsigned long long iova, bint write) noexcept nogil
    cdef Py_ssize_t _translate_many(
        self, int did, const unsigned long long[::1] iovas, unsigned long long[::1] out, bint write, int source
    ) noexcept
    cdef void _execute(self, unsigned long long low, unsigned long long high) noexcept nogil
    cdef void _execute_devtlb(self, unsigned long long low, unsigned long long high) noexcept with gil
