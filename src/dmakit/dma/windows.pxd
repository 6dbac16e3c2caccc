from dmakit.dma.exact cimport Words, exact, known, taken
from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.scatter cimport Scatter
from dmakit.dma.window cimport IovaWindow, SIZE_BITS

cdef unsigned long long _ALL_ONES
cdef unsigned long long _SIGN

cdef class Windows(Scatter):
    cdef readonly list states
    cdef long long opened
    cdef IovaWindow window
    cdef Py_ssize_t failed_at
    cdef bint oversized
    cdef IovaState _opened(self, unsigned long long phys, unsigned long long size, int cpu)
    cdef int _state_closed(self, object state) except -1
    cdef unsigned long long _total(
        self, const unsigned long long* phys, const unsigned long long* sizes, Py_ssize_t first,
        Py_ssize_t end) noexcept nogil
    cdef bint _ascending(
        self, const unsigned long long* bounds, Py_ssize_t count, unsigned long long pieces) noexcept nogil
    cdef Py_ssize_t _fill(
        self, IovaWindow window, const unsigned long long* phys, const unsigned long long* sizes, Py_ssize_t first,
        Py_ssize_t end, unsigned long long total, int direction, int attrs, int cpu) except? -1 nogil
    cdef Py_ssize_t _map_run(
        self, const unsigned long long* phys, const unsigned long long* sizes, const unsigned long long* bounds,
        Py_ssize_t count, unsigned long long* states, int direction, int attrs, int cpu) except? -1 nogil
    cdef Py_ssize_t _unmap_run(
        self, unsigned long long* states, Py_ssize_t count, int direction, int attrs, int cpu) except? -1 nogil
