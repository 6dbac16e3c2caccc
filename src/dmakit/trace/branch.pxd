from dmakit.consts cimport *
from dmakit.iova.bits cimport mix
from dmakit.iova.domain cimport IovaDomain

cimport cython



@cython.final
cdef class Branch:
    cdef public IovaDomain domain
    cdef public frozenset done
    cdef public frozenset passed
    cdef public long long reordered
    cdef public unsigned long long answer
    cdef public unsigned long long ranges
    cdef public bint cached
    cdef public bint stale
    cdef void change(self, unsigned long long lo, unsigned long long hi) noexcept
    cdef void _recount(self) noexcept
    cpdef Branch copy(self)
    cpdef tuple state(self)
