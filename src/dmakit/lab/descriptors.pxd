from dmakit.consts cimport *
from dmakit.lab.flight cimport Flight
from dmakit.ledger cimport Ledger
from dmakit.nvme.lists cimport ListWriter
from dmakit.nvme.prp cimport PrpWriter
from dmakit.nvme.sgl cimport SglWriter

cdef class DescriptorWriter:
    cdef Ledger ledger
    cdef PrpWriter prp
    cdef SglWriter sgl
    cdef bint sgl_supported
    cdef unsigned long long sgl_threshold
    cdef int _write(self, Flight f) except -1
    cdef bint _meet(self, Flight f) noexcept
    cdef bint _reachable(self, Flight f) noexcept
    cdef int _drop(self, Flight f) noexcept
