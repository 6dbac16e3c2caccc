from dmakit.consts cimport *
from dmakit.dma.streaming cimport Streaming

cdef int _IOVA_EXHAUSTED
cdef Py_ssize_t _LONG
cdef int _P2P_NOT_SUPPORTED
cdef int _SG_MERGED
cdef int _SG_NOT_MERGED
cdef int _SG_BUS_LENGTH_OF_HEAD
cdef int _DIRECT_SG_HOST_BRIDGE
cdef unsigned long long _ALL_ONES
cdef unsigned long long _UINT_MASK

cdef class SgMapping:
    cdef readonly Py_ssize_t capacity
    cdef readonly Py_ssize_t entries
    cdef readonly Py_ssize_t count
    cdef readonly int direction
    cdef readonly int attrs
    cdef readonly bint each
    cdef readonly bint live
    cdef readonly unsigned long long[::1] phys
    cdef readonly unsigned long long[::1] length
    cdef readonly unsigned char[::1] kind
    cdef readonly unsigned long long[::1] bus
    cdef readonly unsigned long long[::1] span
    cdef readonly unsigned long long[::1] addr
    cdef readonly unsigned long long[::1] out_length
    cdef readonly unsigned char[::1] out_bus
    cdef unsigned long long _layout(self, unsigned long long granule_mask, unsigned long long boundary) noexcept nogil
    cdef Py_ssize_t _finalise(
        self, unsigned long long iova, unsigned long long granule_mask, unsigned long long boundary,
        unsigned long long max_segment, bint length_of_head) noexcept nogil

cdef class Scatter(Streaming):
    cdef Py_ssize_t _map_sg(self, SgMapping sg, int cpu) except? -1 nogil
    cdef Py_ssize_t _sg_run(self, SgMapping sg, int cpu, bint mapping) except? -1
    cdef int _unmap_sg(self, SgMapping sg, int cpu) except? -1 nogil
    cdef int _sync_sg(self, SgMapping sg, bint for_cpu) except? -1 nogil
    cdef int _classify(self, SgMapping sg) except -1 nogil
    cdef bint _sg_needs_bounce(self, SgMapping sg) noexcept nogil
    cdef Py_ssize_t _map_each(self, SgMapping sg, int cpu) except? -1 nogil
    cdef int _unmap_each(self, SgMapping sg, Py_ssize_t count, int attrs, int cpu) except? -1 nogil
    cdef Py_ssize_t _map_merged(self, SgMapping sg, int cpu) except? -1 nogil
    cdef int _map_runs(self, SgMapping sg, unsigned long long iova, int prot, int cpu) except? -1 nogil
    cdef int _unmap_merged(self, SgMapping sg, int cpu) except? -1 nogil
