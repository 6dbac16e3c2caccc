from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.iova.bits cimport ceil_log2
from dmakit.iova.rcache cimport IovaRcaches
from dmakit.iova.search cimport AugmentedSearch, IovaSearch, LinuxSearch
from dmakit.ledger cimport Ledger

cimport cython

cdef unsigned long long _length(unsigned long long size, int order) noexcept nogil

cdef class IovaAllocator:
    cdef readonly int granule
    cdef readonly int granule_shift
    cdef readonly int cpus
    cdef readonly int online_cpus
    cdef readonly unsigned long long start_pfn
    cdef readonly unsigned long long dma_32bit_pfn
    cdef readonly unsigned long long highest_pfn
    cdef readonly str policy
    cdef readonly long long depot_delay_ns
    cdef readonly Ledger ledger
    cdef readonly FailPoint fail
    cdef readonly IovaSearch search
    cdef readonly IovaRcaches rcaches
    cdef readonly object clock
    cdef signed char[::1] _online
    cdef list _events
    cdef bint _recording
    cdef list _work
    cdef list _work_cpu
    cdef unsigned long long _alloc_fast(
        self, int cpu, unsigned long long size, unsigned long long limit_pfn, bint flush_rcache
    ) noexcept nogil
    @cython.final
    cdef unsigned long long _alloc_near(
        self, int cpu, unsigned long long size, unsigned long long limit_pfn) noexcept nogil
    @cython.final
    cdef unsigned long long _alloc_far(
        self, int cpu, unsigned long long size, unsigned long long limit_pfn, bint flush_rcache) noexcept nogil
    cdef unsigned long long _alloc(self, int cpu, unsigned long long size, unsigned long long limit_pfn) noexcept nogil
    cdef void _free_fast(self, int cpu, unsigned long long pfn, unsigned long long size) noexcept nogil
    cdef bint _free(self, int cpu, unsigned long long pfn) noexcept nogil
    cdef int _reserve(self, unsigned long long lo, unsigned long long hi) noexcept nogil
    cdef void _drain(self, int magazine, int cpu) noexcept nogil
    cdef void _drain_cpu(self, int owner, int cpu) noexcept nogil
    cdef void _flush_rcaches(self, int cpu) noexcept nogil
    cdef void _schedule_depot_work(self, int order, int cpu) noexcept with gil
    cdef void _emit_alloc(self, unsigned long long size, unsigned long long limit, unsigned long long pfn) noexcept with gil
    cdef void _emit_free(self, unsigned long long pfn, unsigned long long size) noexcept with gil
    cdef long long _alloc_many(
        self,
        int cpu,
        unsigned long long* sizes,
        Py_ssize_t n,
        unsigned long long limit_pfn,
        bint flush_rcache,
        unsigned long long* pfns,
    ) noexcept nogil
    cdef Py_ssize_t _cached_run(
        self,
        int cpu,
        unsigned long long size,
        unsigned long long limit_pfn,
        unsigned long long* pfns,
        Py_ssize_t first,
        Py_ssize_t end,
    ) noexcept nogil
    cdef void _free_many(
        self, int cpu, unsigned long long* pfns, unsigned long long* sizes, Py_ssize_t n
    ) noexcept nogil
