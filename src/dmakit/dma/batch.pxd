from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.streaming cimport Streaming

cdef unsigned long long _ALL_ONES

cdef unsigned long long _bytes(const unsigned long long[::1] sizes, Py_ssize_t count) noexcept nogil
cdef Py_ssize_t _link_run(
    IovaState state, const unsigned long long[::1] phys, const unsigned long long[::1] sizes, unsigned long long offset,
    int direction, int attrs, int cpu) except? -1
cdef Py_ssize_t _map_run(
    Streaming device, const unsigned long long[::1] phys, const unsigned long long[::1] sizes, unsigned long long[::1] out,
    int direction, int attrs, int cpu) except? -1
cdef Py_ssize_t _sync_run(
    Streaming device, const unsigned long long[::1] addresses, const unsigned long long[::1] sizes, int direction,
    bint for_cpu) except? -1
cdef Py_ssize_t _window_run(
    IovaState state, const unsigned long long[::1] offsets, const unsigned long long[::1] sizes, Py_ssize_t first,
    bint syncing, int direction, int attrs, int cpu) except? -1
cdef int _runs(
    const unsigned long long[::1] offsets, const unsigned long long[::1] sizes, Py_ssize_t first, Py_ssize_t end,
    object found) except -1
cdef Py_ssize_t _beyond(
    const unsigned long long[::1] starts, const unsigned long long[::1] sizes, unsigned long long end) noexcept nogil
cdef Py_ssize_t _unmap_run(
    Streaming device, const unsigned long long[::1] addresses, const unsigned long long[::1] sizes, Py_ssize_t count,
    int direction, int attrs, int cpu) except? -1
