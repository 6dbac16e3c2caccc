from dmakit.consts cimport *
from dmakit.turn cimport Turn

cdef class Ledger:
    cdef readonly int cpus
    cdef readonly long long[::1] counts
    cdef readonly long long[::1] locks
    cdef void _lock(self, int row, int cpu) noexcept nogil
    cdef readonly Turn turn
    cdef void _alone(self) noexcept
