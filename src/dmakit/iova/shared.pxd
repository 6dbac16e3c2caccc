from dmakit.consts cimport *
from dmakit.iova.bits cimport ceil_log2
from dmakit.iova.domain cimport IovaDomain

cimport cython

cdef extern from *:
    long long test_and_set "__sync_lock_test_and_set"(long long* word, long long value) noexcept nogil
    long long held "__atomic_load_n"(long long* word, int order) noexcept nogil
    void unset "__sync_lock_release"(long long* word) noexcept nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef int _LOOKS
cdef int _APART
cdef int _TAKEN
cdef int _GIVEN

@cython.final
cdef class SharedDomain:
    cdef readonly IovaDomain domain
    cdef readonly int cpus
    cdef long long[::1] _own
    cdef list _locks
    cdef void _enter(self, int lock) noexcept nogil
    cdef void _leave(self, int lock) noexcept nogil
    cdef void _enter_shared(self, int cpu) noexcept nogil
    cdef void _leave_shared(self, int cpu) noexcept nogil
    cdef void _enter_others(self, int cpu) noexcept nogil
    cdef void _leave_others(self, int cpu) noexcept nogil
    cdef void _settle(self, int cpu) noexcept nogil
    cdef unsigned long long _alloc_one(
        self, int cpu, unsigned long long size, unsigned long long limit_pfn, bint flush_rcache
    ) noexcept nogil
    cdef bint _free_one(
        self, int cpu, unsigned long long pfn, unsigned long long size, bint check
    ) noexcept nogil
    cdef Py_ssize_t _alloc_words(
        self, int cpu, object sizes, unsigned long long limit_pfn, bint flush, object pfns
    ) except? -1
    cdef bint _free_words(self, int cpu, object pfns, object sizes) except -1
    cdef long long _alloc_many(
        self,
        int cpu,
        unsigned long long* sizes,
        Py_ssize_t n,
        unsigned long long limit_pfn,
        bint flush_rcache,
        unsigned long long* pfns,
    ) noexcept nogil
    cdef void _free_many(
        self, int cpu, unsigned long long* pfns, unsigned long long* sizes, Py_ssize_t n
    ) noexcept nogil
