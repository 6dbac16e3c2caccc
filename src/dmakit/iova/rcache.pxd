from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.iova.bits cimport mix
from dmakit.iova.magazine cimport MagazinePool
from dmakit.ledger cimport Ledger

cimport cython

@cython.final
cdef class IovaRcaches:
    cdef readonly Ledger ledger
    cdef readonly MagazinePool pool
    cdef readonly int cpus
    cdef readonly int[::1] loaded
    cdef readonly int[::1] prev
    cdef readonly int[::1] depot
    cdef readonly int[::1] depot_size
    cdef unsigned long long _get(self, int cpu, int order, unsigned long long highest) noexcept nogil
    cdef int _put(self, int cpu, int order, unsigned long long pfn) noexcept nogil
    cdef Py_ssize_t _get_run(
        self,
        int cpu,
        int order,
        unsigned long long highest,
        unsigned long long* pfns,
        Py_ssize_t first,
        Py_ssize_t end,
    ) noexcept nogil
    cdef Py_ssize_t _put_run(
        self, int cpu, int order, unsigned long long* pfns, Py_ssize_t first, Py_ssize_t end
    ) noexcept nogil
    cdef int _depot_pop(self, int order) noexcept nogil
    cdef int _depot_excess(self, int order, int online, int cpu) noexcept nogil
