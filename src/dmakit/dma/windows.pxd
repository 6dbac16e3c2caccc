from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.scatter cimport Scatter
from dmakit.dma.window cimport IovaWindow

cdef class Windows(Scatter):
    cdef readonly dict states
    cdef IovaWindow window
    cdef Py_ssize_t failed_at
    cdef bint oversized
    cdef IovaState _opened(self, unsigned long long phys, unsigned long long size, int cpu)
    cdef unsigned long long _total(
        self, const unsigned long long[::1] phys, const unsigned long long[::1] sizes, Py_ssize_t first,
        Py_ssize_t end) noexcept nogil
    cdef bint _ascending(self, const unsigned long long[::1] bounds, Py_ssize_t pieces) noexcept nogil
    cdef Py_ssize_t _fill(
        self, IovaWindow window, const unsigned long long[::1] phys, const unsigned long long[::1] sizes,
        Py_ssize_t first, Py_ssize_t end, int direction, int attrs, int cpu) except? -1 nogil
    cdef Py_ssize_t _map_run(
        self, const unsigned long long[::1] phys, const unsigned long long[::1] sizes,
        const unsigned long long[::1] bounds, unsigned long long[::1] states, int direction, int attrs,
        int cpu) except? -1 nogil
    cdef Py_ssize_t _unmap_run(self, unsigned long long[::1] states, int direction, int attrs, int cpu) except? -1 nogil
