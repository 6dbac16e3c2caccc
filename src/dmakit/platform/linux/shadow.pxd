from dmakit.consts cimport *
from dmakit.iova.tree cimport IovaTree

cdef class ShadowMap:
    cdef readonly IovaTree tree
    cdef unsigned long long[::1] phys
    cdef readonly long long pages
    cdef unsigned long long _at(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _overlap(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef bint _cuts(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _run(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef bint _insert(self, unsigned long long iova, unsigned long long phys, unsigned long long size) noexcept nogil
    cdef void _remove(self, unsigned long long iova, unsigned long long size) noexcept nogil
    cdef bint _grow(self) noexcept with gil
