from dmakit.block.dma_iter cimport BlkDmaIter, typed_device, undo
from dmakit.block.request cimport Payload, Request
from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.dma.window cimport SIZE_BITS
from dmakit.ledger cimport Ledger
from dmakit.nvme.iod cimport Iod
from dmakit.nvme.pool cimport DescriptorPool
from dmakit.nvme.prp cimport PrpWriter
from dmakit.nvme.sgl cimport SglWriter

cdef int _MAX_SEGMENTS
cdef int _RESOURCE
cdef int _IOERR
cdef int _NO_DATA
cdef int _SINGLE_SEGMENT
cdef int _TOO_LONG_FOR_PRP
cdef int _MALFORMED
cdef int _DESCRIPTORS_EXHAUSTED

cdef class RequestMapper:
    cdef readonly object device
    cdef readonly DescriptorPool small
    cdef readonly DescriptorPool large
    cdef readonly Ledger ledger
    cdef readonly bint sgl_supported
    cdef readonly bint meta_sgl_supported
    cdef readonly unsigned long long sgl_threshold
    cdef readonly str rule
    cdef bint by_gap
    cdef readonly object peer
    cdef readonly BlkDmaIter walk
    cdef Device own
    cdef readonly PrpWriter prp
    cdef readonly SglWriter sgl
    cdef int _map_into(self, Iod iod, Request request, int cpu, bint admin) except -1
    cdef int _unmap(self, Iod iod, int cpu) except -1
    cdef int _use_sgls(self, Request request, bint admin) except -1
    cdef int _choice(self, Payload payload, bint forced, bint admin) noexcept nogil
    cdef int _map_payload(self, Iod iod, Payload payload, int choice) except -1
    cdef int _map_data(self, Iod iod, Payload payload, int choice) except? -1 nogil
    cdef int _map_simple(self, Iod iod, Payload payload, int choice) except? -2 nogil
    cdef int _write_prps(self, Iod iod, Payload payload) except? -1 nogil
    cdef int _save(self, Iod iod) except? -1 nogil
    cdef int _write_sgl(self, Iod iod, Payload payload) except? -1 nogil
    cdef bint _of_a_peer(self, unsigned long long phys) except -1 with gil
    cdef unsigned long long _map_by_python(
        self, Iod iod, unsigned long long phys, unsigned long long length) except? 1 with gil
    cdef bint _asked_to_unmap(self) except -1 with gil
    cdef int _map_refused(self, Iod iod, unsigned long long phys, unsigned long long length) except -1 with gil
    cdef int _not_started(self, Iod iod) except -1 with gil
    cdef int _give_up(self, Iod iod, int failed, bint unkept) except -1 with gil
    cdef int _fail(self, Iod iod, object error, int reason) except -1
    cdef int _unmap_payload(self, Iod iod, int cpu) except -1
    cdef int _unmap_data(self, Iod iod, int cpu) except -1 nogil
    cdef int _destroy_window(self, Iod iod, int attrs, int cpu) except -1 nogil
    cdef int _cut(self, Iod iod, int failed) except -1 with gil
    cdef bint _undo(self, Iod iod, int cpu) except -1 with gil
    cdef int _unmap_listed(self, Iod iod, int attrs, int cpu) except -1 nogil
    cdef int _no_list(self, Iod iod) except -1 with gil
    cdef int _unmap_one(
        self, unsigned long long addr, unsigned long long length, int direction, int attrs, int cpu) except -1 nogil
    cdef int _unmap_by_python(
        self, unsigned long long addr, unsigned long long length, int direction, int attrs, int cpu) except -1 with gil
    cdef int _nothing_mapped(self, unsigned long long addr) except -1 with gil
