cdef class Empty:
    pass

cdef void _fill(unsigned long long[::1] table, unsigned long long first, unsigned long long step) noexcept nogil
cdef unsigned long long _walk(unsigned long long[::1] table, unsigned long long root, unsigned long long[::1] addresses) noexcept nogil
