from dmakit.iova.domain cimport IovaDomain
from dmakit.trace.operations cimport Operation


cdef class Branch:
    cdef public IovaDomain domain
    cdef public frozenset done
    cdef public frozenset passed
    cdef public long long reordered
    cdef public unsigned long long answer
    cdef public long long ranges
    cdef public bint cached


cdef class Counts:
    cdef public long long allocations
    cdef public long long matched
    cdef public long long adopted
    cdef public long long diverged
    cdef public long long operations
    cdef public long long overlapping
    cdef public long long reordered
    cdef public long long unknown_frees
    cdef public long long width
    cdef public bint capped
    cdef public list divergences


cdef class OrderSearch:
    cdef public list branches
    cdef public bint known
    cdef public bint presumed
    cdef public long long width_limit
    cdef public dict pending
    cdef public Counts counts
    cdef public long long since_merge

cdef int order_of(unsigned long long size) noexcept
cdef unsigned long long _span(unsigned long long size) noexcept
cdef unsigned long long _alloc(IovaDomain domain, Operation op, int cpu, bint flush) noexcept
cdef bint _flushes(Operation op) noexcept
cdef bint _conflict(IovaDomain domain, Operation one, Operation two) noexcept
cdef bint _private(IovaDomain domain, Operation op) noexcept
cdef unsigned long long _next(IovaDomain domain, Operation op) noexcept
cdef bint _hopeless(IovaDomain domain, Operation op) noexcept
