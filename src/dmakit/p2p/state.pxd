from dmakit.consts cimport *
from dmakit.ledger cimport Ledger

cimport cython



@cython.final
cdef class P2pState:
    cdef readonly object topology
    cdef readonly object client
    cdef readonly Ledger ledger
    cdef readonly long long lookups
    cdef readonly int map
    cdef readonly long long bus_offset
    cdef readonly unsigned long long start
    cdef readonly unsigned long long end
    cdef void _reset(self) noexcept nogil
    cdef int _map_type(self, unsigned long long phys) noexcept nogil
    cdef int _look_up(self, unsigned long long phys) noexcept
