cdef extern from *:
    """
    #if defined(__GNUC__)
    #define dmakit_prefetch(address) __builtin_prefetch(address)
    #else
    #define dmakit_prefetch(address) ((void)(address))
    #endif
    """
    void prefetch "dmakit_prefetch" (const void *address) noexcept nogil

cdef class PhysicalMemory:
    cdef readonly unsigned long long span
    cdef readonly object view
    cdef readonly unsigned char[::1] data
    cdef readonly unsigned long long[::1] words
    cdef readonly unsigned long long[::1] page_link
    cdef readonly list regions
    cdef void _copy(self, unsigned long long target, unsigned long long source, unsigned long long size) noexcept nogil
    cdef void _zero(self, unsigned long long phys, unsigned long long size) noexcept nogil
    cdef void _ascend(self, unsigned long long at, Py_ssize_t count, unsigned long long first,
                      unsigned long long step) noexcept nogil
    cdef unsigned long long _union(self, unsigned long long at, Py_ssize_t count) noexcept nogil
    cdef unsigned long long _common(self, unsigned long long at, Py_ssize_t count) noexcept nogil

cdef void _fill(unsigned long long[::1] words, unsigned long long at, Py_ssize_t count, unsigned long long first,
                unsigned long long step) noexcept nogil
cdef unsigned long long _or(unsigned long long[::1] words, unsigned long long at, Py_ssize_t count) noexcept nogil
cdef unsigned long long _and(unsigned long long[::1] words, unsigned long long at, Py_ssize_t count) noexcept nogil
