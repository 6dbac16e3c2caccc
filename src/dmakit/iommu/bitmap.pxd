from dmakit.iommu.granularity cimport coarsen, refine
from dmakit.turn cimport Turn

cdef extern from *:
    """
    #define _prefetch_to_write(place) __builtin_prefetch(place, 1)
    #define _LOW_63 0x7FFFFFFFFFFFFFFFULL
    #if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
    #define DMAKIT_EACH_CPU __attribute__((target_clones("popcnt", "default")))
    #else
    #define DMAKIT_EACH_CPU
    #endif
    """
    ctypedef unsigned long long total_t "DMAKIT_EACH_CPU unsigned long long"
    const unsigned long long _LOW_63
    int __builtin_popcountll(unsigned long long) noexcept nogil
    int __builtin_ctzll(unsigned long long) noexcept nogil
    void __builtin_prefetch(const void *) noexcept nogil
    void _prefetch_to_write(const void *) noexcept nogil

cdef Py_ssize_t _BLOCK

cdef total_t _count(unsigned long long[::1] words) noexcept nogil
cdef void _merge(unsigned long long[::1] target, unsigned long long[::1] source) noexcept nogil
cdef void _take(unsigned long long[::1] target, unsigned long long[::1] source) noexcept nogil
cdef void _clear(unsigned long long[::1] words) noexcept nogil
cdef unsigned long long _mask(int low, int width) noexcept nogil
cdef void set_range(unsigned long long[::1] words, unsigned long long first, unsigned long long last) noexcept nogil
cdef void _clear_range(unsigned long long[::1] words, unsigned long long first,
                       unsigned long long last) noexcept nogil
cdef inline Py_ssize_t _emit(unsigned long long word, unsigned long long base, unsigned long long[::1] out,
                             Py_ssize_t at) noexcept nogil
cdef inline Py_ssize_t _thin(unsigned long long[::1] words, unsigned short[::1] places, unsigned long long[::1] out,
                             Py_ssize_t at) noexcept nogil
cdef inline Py_ssize_t _thin_edges(unsigned long long[::1] words, unsigned short[::1] places,
                                   unsigned long long[::1] edges, unsigned long long before) noexcept nogil

cdef class Bitmap:
    cdef readonly unsigned long long bits
    cdef readonly object words
    cdef readonly Py_ssize_t stop
    cdef readonly Turn turn
    cdef unsigned long long[::1] marks
    cdef Py_ssize_t _set_many(self, const unsigned long long[::1] pages)
    cdef Py_ssize_t _scan_pages(self, unsigned long long[::1] marks, Py_ssize_t start,
                                unsigned long long[::1] out, unsigned short[::1] places) noexcept
    cdef Py_ssize_t _scan_runs(self, unsigned long long[::1] marks, Py_ssize_t start, unsigned long long[::1] out,
                               unsigned short[::1] places, unsigned long long[::1] edges) noexcept
