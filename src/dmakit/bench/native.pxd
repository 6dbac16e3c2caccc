cdef class Empty:
    pass

cdef void _fill(unsigned long long[::1] table, unsigned long long first, unsigned long long step) noexcept nogil
cdef unsigned long long _walk(unsigned long long[::1] table, unsigned long long root, unsigned long long[::1] addresses) noexcept nogil

cdef class _Ready:
    cdef unsigned long long[::1] sq
    cdef unsigned long long[::1] cq
    cdef unsigned int[::1] bar
    cdef unsigned long long sq_start
    cdef unsigned long long cq_start
    cdef unsigned long long entries
    cdef unsigned long long qid
    cdef unsigned long long head
    cdef unsigned long long slot
    cdef unsigned long long phase
    cdef Py_ssize_t tail
    cdef void _answer(self) noexcept nogil
