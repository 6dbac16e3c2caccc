from dmakit.consts cimport *
from dmakit.iova.bits cimport mix
from dmakit.iova.domain cimport IovaDomain

cimport cython



@cython.final
cdef class Branch:
    cdef readonly IovaDomain domain
    cdef readonly frozenset done
    cdef readonly frozenset passed
    cdef readonly long long reordered
    cdef readonly unsigned long long answer
    cdef readonly unsigned long long ranges
    cdef readonly bint cached
    cdef readonly bint stale
    cdef void change(self, unsigned long long lo, unsigned long long hi) noexcept
    cdef void _recount(self) noexcept
    cpdef Branch copy(self)
    cpdef tuple state(self)
