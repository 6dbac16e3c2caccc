from dmakit.block.request cimport Payload, Request
from dmakit.block.segments cimport SegmentIter
from dmakit.consts cimport *
from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.streaming cimport Streaming

cdef Streaming typed_device(object device, int cpu)

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
    cdef Streaming own
    cdef readonly SegmentIter walk
    cdef readonly int direction
    cdef readonly int attrs
    cdef readonly int cpu
    cdef readonly long long bus_offset
    cdef bint _start_window(self, Payload payload, object state) except *
    cdef bint _link_window(self, IovaState state) except *
    cdef bint _one(self) except *
    cdef void _because(self, int reason) noexcept
    cdef bint _classify(self, object peer) except *
