from dmakit.consts cimport *
from dmakit.iommu.gather cimport Gather
from dmakit.ledger cimport Ledger
from dmakit.memory.pages cimport PageAllocator
from dmakit.memory.physical cimport PhysicalMemory

cdef class TablePages:
    cdef readonly PageAllocator pages
    cdef readonly PhysicalMemory memory
    cdef readonly Ledger ledger
    cdef readonly long long in_use
    cdef unsigned long long _new(self) noexcept nogil
    cdef unsigned long long _new_around(self, unsigned long long first, unsigned long long size) noexcept nogil
    cdef void _defer(self, unsigned long long table, Gather gather) noexcept nogil
    cdef long long _free_list(self, unsigned long long head) noexcept nogil
