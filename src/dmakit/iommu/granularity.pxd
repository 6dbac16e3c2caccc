cdef Py_ssize_t _BLOCK

cdef int coarsen(unsigned long long[::1] words, unsigned long long[::1] out, int shift) except -1
cdef int refine(unsigned long long[::1] words, unsigned long long[::1] out, int shift) except -1
cdef void _convert(unsigned long long[::1] words, unsigned long long[::1] out, int shift,
                   unsigned long long[::1] steps, unsigned long long[::1] block, bint finer) noexcept
cdef void _coarsen(unsigned long long[::1] words, unsigned long long[::1] out, int shift,
                   unsigned long long[::1] steps, unsigned long long[::1] block) noexcept nogil
cdef void _refine(unsigned long long[::1] words, unsigned long long[::1] out, int shift,
                  unsigned long long[::1] steps, unsigned long long[::1] block) noexcept nogil
cdef void _down(unsigned long long[::1] block, unsigned long long[::1] steps) noexcept nogil
cdef void _up(unsigned long long[::1] block, unsigned long long[::1] steps) noexcept nogil
cdef void _coarsen_words(unsigned long long[::1] words, unsigned long long[::1] out, int shift) noexcept nogil
cdef void _refine_words(unsigned long long[::1] words, unsigned long long[::1] out, int shift) noexcept nogil
