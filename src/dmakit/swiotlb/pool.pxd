from dmakit.consts cimport *
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cimport cython




cdef unsigned long long _NO_ORIGIN

@cython.final
cdef class SwiotlbPool:
    cdef readonly PhysicalMemory memory
    cdef readonly Ledger ledger
    cdef readonly unsigned long long start
    cdef readonly unsigned long long end
    cdef readonly Py_ssize_t slots
    cdef readonly Py_ssize_t areas
    cdef readonly Py_ssize_t area_slots
    cdef readonly bint transient
    cdef readonly unsigned short[::1] free_run
    cdef readonly unsigned short[::1] pad_slots
    cdef readonly unsigned long long[::1] left
    cdef readonly unsigned long long[::1] origin
    cdef readonly long long[::1] area_index
    cdef readonly long long[::1] area_used
    cdef Py_ssize_t _search(
        self, Py_ssize_t area, unsigned long long phys, unsigned long long size, unsigned long long align_mask,
        unsigned long long min_align, unsigned long long boundary) noexcept nogil
    cdef void _take(self, Py_ssize_t slot, Py_ssize_t needed, unsigned long long size) noexcept nogil
    cdef void _repair(self, Py_ssize_t slot, Py_ssize_t run) noexcept nogil
    cdef unsigned long long _place(self, Py_ssize_t slot, unsigned long long phys, unsigned long long offset) noexcept nogil
    cdef Py_ssize_t _release(self, unsigned long long tlb) noexcept nogil
    cdef unsigned long long _copy_slots(self, unsigned long long tlb, unsigned long long size, bint to_device) noexcept nogil
