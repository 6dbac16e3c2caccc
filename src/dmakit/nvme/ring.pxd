cdef int _NOTHING
cdef int _BAD_QUEUE
cdef int _BAD_COMMAND
cdef int _BAD_HEAD
cdef unsigned long long _LIVE

cdef class Ring:
    cdef readonly int qid
    cdef readonly int entries
    cdef readonly int free_count
    cdef readonly int tail
    cdef readonly int rung
    cdef readonly int head
    cdef readonly int told
    cdef readonly int sq_head
    cdef readonly unsigned long long phase
    cdef readonly unsigned long long submitted
    cdef readonly unsigned long long completed
    cdef readonly int lie
    cdef readonly unsigned long long lie_low
    cdef readonly unsigned long long lie_high
    cdef unsigned long long result
    cdef unsigned long long status
    cdef unsigned long long[::1] sq
    cdef unsigned long long[::1] sq_pages
    cdef unsigned long long[::1] cq
    cdef unsigned long long[::1] cq_pages
    cdef unsigned long long[::1] cids
    cdef unsigned long long[::1] tags
    cdef unsigned long long[::1] deadlines
    cdef unsigned long long[::1] idle
    cdef unsigned int[::1] bar
    cdef readonly bint mapped
    cdef object write32
    cdef readonly unsigned long long sq_doorbell
    cdef readonly unsigned long long cq_doorbell
    cdef int _slot(self, unsigned long long tag, unsigned long long deadline) noexcept nogil
    cdef unsigned long long _next(self) noexcept nogil
    cdef int _look(self) noexcept nogil
    cdef int _drop(self, int slot) noexcept nogil
    cdef void _put(self, unsigned long long first, unsigned long long low, unsigned long long high,
                   unsigned long long lba, unsigned long long last) noexcept nogil
    cdef Py_ssize_t _submit(self, unsigned long long first, unsigned long long[::1] lbas,
                            unsigned long long[::1] counts, unsigned long long[::1] low, unsigned long long[::1] high,
                            unsigned long long[::1] tags, Py_ssize_t n, unsigned long long deadline) noexcept nogil
    cdef Py_ssize_t _reap(self, unsigned long long[::1] slots, unsigned long long[::1] tags,
                          unsigned long long[::1] statuses, unsigned long long[::1] results,
                          Py_ssize_t n) noexcept nogil
    cdef int _ring_mapped(self) noexcept nogil
    cdef int _tell_mapped(self) noexcept nogil
