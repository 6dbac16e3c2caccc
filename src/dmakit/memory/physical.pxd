from dmakit.consts cimport *

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define dmakit_prefetch(address) __builtin_prefetch(address)
    #else
    #define dmakit_prefetch(address) ((void)(address))
    #endif
    #if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
    #define DMAKIT_WIDE __attribute__((target_clones("avx2", "default")))
    #else
    #define DMAKIT_WIDE
    #endif
    """
    ctypedef unsigned long long wide_t "DMAKIT_WIDE unsigned long long"
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

cdef wide_t _fill(unsigned long long* words, Py_ssize_t count, unsigned long long first,
                  unsigned long long step) noexcept nogil
cdef wide_t _or(unsigned long long* words, Py_ssize_t count) noexcept nogil
cdef wide_t _and(unsigned long long* words, Py_ssize_t count) noexcept nogil
