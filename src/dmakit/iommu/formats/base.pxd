from dmakit.consts cimport *
from dmakit.memory.physical cimport PhysicalMemory

cdef class PtFormat:
    cdef readonly str name
    cdef readonly int min_levels
    cdef readonly int max_levels
    cdef readonly bint sign_extended
    cdef readonly bint dirty_tracking
    cdef readonly int output_bits
    cdef readonly unsigned long long page_sizes
    cdef readonly unsigned long long present_bits
    cdef readonly unsigned long long read_bit
    cdef readonly unsigned long long write_bit
    cdef readonly unsigned long long large_bit
    cdef readonly unsigned long long accessed_bit
    cdef readonly unsigned long long dirty_bit
    cdef readonly unsigned long long flushed_bit
    cdef readonly unsigned long long address_mask
    cdef readonly unsigned long long table_bits
    cdef readonly unsigned long long leaf_bits
    cdef readonly unsigned long long leaf_read_bits
    cdef readonly unsigned long long leaf_write_bits
    cdef unsigned long long _leaf_bits(self, int prot) noexcept nogil
    cdef int _prot(self, unsigned long long entry) noexcept nogil
    cdef bint _is_leaf(self, unsigned long long entry, int level) noexcept nogil
    cdef void _fill(self, PhysicalMemory memory, unsigned long long at, unsigned long long count,
                    unsigned long long phys, int level, unsigned long long bits) noexcept nogil
