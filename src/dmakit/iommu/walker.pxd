from dmakit.consts cimport *
from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.psc cimport PagingStructureCache
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef class Walker:
    cdef PhysicalMemory memory
    cdef PagingStructureCache psc
    cdef Ledger ledger
    cdef readonly int domains
    cdef readonly unsigned long long[::1] contexts
    cdef void _set_dirty(self, int did, bint on) noexcept nogil
    cdef unsigned long long _walk(self, int did, unsigned long long iova, bint write) noexcept nogil
    cdef unsigned long long _leaf(
        self, Py_ssize_t base, Py_ssize_t at, int level, unsigned long long permissions, bint write
    ) noexcept nogil
