cdef extern from *:
    int leading_zeros "__builtin_clzll"(unsigned long long value) noexcept nogil


cdef int ceil_log2(unsigned long long value) noexcept nogil
cdef int floor_log2(unsigned long long value) noexcept nogil
cdef unsigned long long align_up(unsigned long long value, int order) noexcept nogil
cdef unsigned long long largest_fit(unsigned long long start, unsigned long long end) noexcept nogil
cdef unsigned long long mix(unsigned long long value, unsigned long long word) noexcept nogil
