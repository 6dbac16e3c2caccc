cdef class SetCache:
    cdef readonly Py_ssize_t capacity
    cdef readonly Py_ssize_t ways
    cdef readonly Py_ssize_t sets
    cdef unsigned long long set_mask
    cdef int way_bits
    cdef readonly str policy
    cdef readonly bint touch
    cdef readonly Py_ssize_t used
    cdef readonly unsigned long long evictions
    cdef unsigned long long[::1] tags
    cdef unsigned long long[::1] values
    cdef int[::1] newer
    cdef int[::1] older
    cdef int[::1] oldest
    cdef long long[::1] live
    cdef Py_ssize_t _find(self, int did, int level, unsigned long long page) noexcept nogil
    cdef void _insert(self, int did, int level, unsigned long long page, unsigned long long value) noexcept nogil
    cdef void _renew(self, Py_ssize_t way) noexcept nogil
    cdef void _put_before(self, Py_ssize_t way, Py_ssize_t at) noexcept nogil
    cdef void _drop(self, Py_ssize_t way) noexcept nogil
    cdef void _drop_all(self) noexcept nogil
    cdef void _drop_domain(self, int did) noexcept nogil
    cdef void _drop_range(self, int did, unsigned long long iova, int mask) noexcept nogil
    cdef void _scan(self, int did, int level, unsigned long long first, unsigned long long last) noexcept nogil

cdef int _LEVELS
