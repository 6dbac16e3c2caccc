cdef class Ledger:
    cdef readonly int cpus
    cdef public long long[::1] counts
    cdef public long long[::1] locks
    cdef void _lock(self, int row, int cpu) noexcept nogil
