from dmakit.block.dma_iter cimport typed_device
from dmakit.block.request cimport Payload, Request
from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.nvme.iod cimport Iod
from dmakit.nvme.mapping cimport RequestMapper

cdef int _ROW
cdef int _SLOT
cdef int _TAKEN
cdef int _MAX_SEGMENTS
cdef unsigned long long _LONGEST
cdef int _INVAL
cdef int _NO_DATA

cdef class RowMapper:
    cdef readonly RequestMapper mapper
    cdef Payload payload
    cdef Iod iod
    cdef unsigned long long[::1] vectors
    cdef long long[::1] free_next
    cdef Py_ssize_t free_first
    cdef Py_ssize_t slots
    cdef int _map_one(self) except? -1 nogil
    cdef int _store(self, unsigned long long[::1] rows, Py_ssize_t at) except -1 nogil
    cdef int _load(self, unsigned long long[::1] rows, Py_ssize_t at, int cpu) except? -1 nogil
    cdef Py_ssize_t _keep(self) except -1 nogil
    cdef bint _known(self, unsigned long long slot, unsigned long long count) noexcept nogil
    cdef int _recall(self, Py_ssize_t slot, Py_ssize_t count) except -1 nogil
    cdef int _widen(self) except -1 with gil
    cdef Py_ssize_t _wrong(self, const unsigned long long[::1] directions, const unsigned long long[::1] cpus,
                           const unsigned long long[::1] bounds, Py_ssize_t count,
                           unsigned long long cpu_count) noexcept nogil
    cdef bint _exist(self, const unsigned long long[::1] cpus, Py_ssize_t count, unsigned long long cpu_count) noexcept nogil
    cdef Py_ssize_t _map_run(
        self, const unsigned long long[::1] directions, const unsigned long long[::1] cpus,
        const unsigned long long[::1] bounds, unsigned long long[::1] rows, Py_ssize_t count) except? -1
    cdef Py_ssize_t _unmap_run(
        self, unsigned long long[::1] rows, const unsigned long long[::1] cpus, Py_ssize_t count) except? -1
