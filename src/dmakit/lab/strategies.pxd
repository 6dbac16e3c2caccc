from dmakit.block.request cimport Request
from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.dma.scatter cimport SgMapping
from dmakit.lab.descriptors cimport DescriptorWriter
from dmakit.lab.flight cimport Flight, Ranges
from dmakit.ledger cimport Ledger
from dmakit.nvme.iod cimport Iod
from dmakit.nvme.mapping cimport RequestMapper

cdef int _VECTOR_BYTES
cdef int _SG_ENTRY_BYTES
cdef int _SINGLE_SEGMENT
cdef int _STRATEGY
cdef int _SG_MERGED
cdef int _SG_NOT_MERGED
cdef int _PREMAPPED

cdef class Strategy:
    cdef readonly object rig
    cdef readonly Device device
    cdef readonly Ledger ledger
    cdef readonly object peer
    cdef readonly list layouts
    cdef readonly bint watched
    cdef DescriptorWriter writer
    cdef int _map(self, Flight f) except -1
    cdef int _unmap(self, Flight f) except -1
    cdef int _ranges(self, Flight f) except -1
    cdef int _release(self, Flight f) except -1

cdef class Page(Strategy):
    cdef bint bus
    cdef int attrs
    cdef int _reason(self, Flight f) noexcept
    cdef int _batch(self, Flight f) except -1
    cdef int _each(self, Flight f) except -1

cdef class Direct(Page):
    cdef int why

cdef class Sg(Strategy):
    cdef list entries
    cdef list tables
    cdef list idle
    cdef int peer_reason
    cdef SgMapping _mapped(self, Flight f)

cdef class SgNoMerge(Page):
    pass

cdef class TwoStep(Strategy):
    cdef RequestMapper mapper
    cdef list requests

cdef class Premap(Strategy):
    cdef dict registered
    cdef Ranges windows
