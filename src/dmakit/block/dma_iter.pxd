from dmakit.block.request cimport Payload, Request
from dmakit.block.segments cimport SegmentIter
from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.window cimport IovaWindow, SIZE_BITS

cdef int _RESOURCE
cdef int _INVAL
cdef int _COALESCED
cdef int _GAP_IN_MERGE_BOUNDARY
cdef int _NO_VIRT_BOUNDARY
cdef int _NO_IOMMU
cdef int _IDENTITY_DOMAIN
cdef int _IOVA_EXHAUSTED
cdef int _P2P_BUS
cdef int _P2P_HOST_BRIDGE
cdef int _P2P_NOT_SUPPORTED

cdef Device typed_device(object device, int cpu)
cdef bint undo(Device own, object device, object state, unsigned long long mapped, int direction, int map_type,
               int cpu) except -1

cdef class BlkDmaIter:
    cdef readonly unsigned long long addr
    cdef readonly unsigned long long len
    cdef readonly int status
    cdef readonly int reason
    cdef readonly int map_type
    cdef readonly unsigned long long mapped
    cdef readonly object state
    cdef readonly object device
    cdef readonly object error
    cdef Device own
    cdef IovaWindow window
    cdef IovaWindow spare
    cdef IovaState opened
    cdef bint plain
    cdef readonly bint windowed
    cdef object peer
    cdef readonly SegmentIter walk
    cdef readonly int direction
    cdef readonly int attrs
    cdef readonly int cpu
    cdef readonly long long bus_offset
    cdef bint _start(self, Payload payload, object device, int direction, bint by_gap, object peer, int cpu) except -1
    cdef int _prepare(self, Payload payload, object device, object peer, int cpu) except -1
    cdef bint _begin(self, Payload payload, int direction, bint by_gap) except -1 nogil
    cdef bint _next(self) except -1 nogil
    cdef unsigned long long _merge_boundary(self) except? 1 nogil
    cdef unsigned long long _boundary_by_python(self) except? 1 with gil
    cdef bint _open(self, unsigned long long size) except -1 nogil
    cdef bint _open_state(self, unsigned long long size) except -1 with gil
    cdef bint _without(self, bint translating, bint identity) noexcept nogil
    cdef int _without_objects(self) except -1
    cdef void _aim(self, Py_ssize_t first, Py_ssize_t end, int cpu) noexcept nogil
    cdef bint _start_window(self, unsigned long long size) except -1 nogil
    cdef bint _link_window(self) except -1 nogil
    cdef bint _link_refused(self, int failed, unsigned long long mapped) except -1 with gil
    cdef bint _link_by_python(self) except -1 with gil
    cdef bint _lost(self, unsigned long long mapped, object error) except -1
    cdef bint _refused(self, object error, int status) except -1
    cdef bint _one(self) except -1 nogil
    cdef bint _map_refused(self) except -1 with gil
    cdef bint _one_by_python(self) except -1 with gil
    cdef void _because(self, int reason) noexcept nogil
    cdef bint _classify(self) except -1 with gil
