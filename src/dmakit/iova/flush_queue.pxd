from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.iova.domain cimport IovaDomain
from dmakit.iova.exact cimport exact
from dmakit.ledger cimport Ledger

cdef class FlushTarget:
    cdef void _fq_flush_all(self, int cause) noexcept nogil
    cdef void _fq_free_tables(self, unsigned long long head) noexcept nogil


cdef class CallbackTarget(FlushTarget):
    cdef readonly object on_flush
    cdef readonly object on_free_tables
    cdef void _call_flush(self, int cause) noexcept with gil
    cdef void _call_free_tables(self, unsigned long long head) noexcept with gil


cdef class FlushQueue:
    cdef readonly IovaDomain iovad
    cdef readonly FlushTarget target
    cdef readonly Ledger ledger
    cdef readonly object clock
    cdef readonly int cpus
    cdef readonly int rings
    cdef readonly int size
    cdef readonly long long timeout_ns
    cdef readonly unsigned long long start_cnt
    cdef readonly unsigned long long finish_cnt
    cdef readonly bint timer_on
    cdef readonly int timer_cpu
    cdef readonly unsigned int[::1] head
    cdef readonly unsigned int[::1] tail
    cdef readonly unsigned long long[::1] pfn
    cdef readonly unsigned long long[::1] pages
    cdef readonly unsigned long long[::1] tables
    cdef readonly unsigned long long[::1] counter
    cdef object _timer
    cdef list _events
    cdef bint _recording
    cdef void _queue(
        self, int cpu, unsigned long long pfn, unsigned long long pages, unsigned long long freelist_head
    ) noexcept nogil
    cdef void _free_flushed(self, int ring, int cpu) noexcept nogil
    cdef void _flush_iotlb(self, int cause) noexcept nogil
    cdef void _sweep(self, int cause, int cpu) noexcept nogil
    cdef void _arm(self, int cpu) noexcept with gil
