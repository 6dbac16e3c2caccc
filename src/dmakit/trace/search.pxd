from dmakit.consts cimport *
from dmakit.iova.bits cimport ceil_log2
from dmakit.iova.domain cimport IovaDomain
from dmakit.trace.branch cimport Branch
from dmakit.trace.operation cimport Operation
from dmakit.trace.tally cimport Counts, Tally

cdef class OrderSearch:
    cdef readonly list branches
    cdef readonly list tallies
    cdef readonly long long width_limit
    cdef readonly dict pending
    cdef readonly Counts counts
    cdef readonly long long since_merge
    cpdef begin(self, long long key, Operation op)
    cpdef end(self, long long key)

cdef int order_of(unsigned long long size) noexcept
cdef unsigned long long _span(unsigned long long size) noexcept
cdef unsigned long long _alloc(IovaDomain domain, Operation op, int cpu, bint flush) noexcept
cdef bint _flushes(Operation op) noexcept
cdef bint _conflict(IovaDomain domain, Operation one, Operation two) noexcept
cdef bint _private(IovaDomain domain, Operation op) noexcept
cdef unsigned long long _next(IovaDomain domain, Operation op) noexcept
cdef bint _hopeless(IovaDomain domain, Operation op) noexcept
