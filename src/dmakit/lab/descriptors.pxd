from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.iommu.port cimport Port
from dmakit.lab.flight cimport Flight
from dmakit.ledger cimport Ledger
from dmakit.nvme.lists cimport ListWriter
from dmakit.nvme.prp cimport PrpWalker, PrpWriter
from dmakit.nvme.sgl cimport SglWalker, SglWriter

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

cdef class DescriptorReader:
    cdef Device device
    cdef Port port
    cdef PrpWalker prp
    cdef SglWalker sgl
    cdef unsigned long long[::1] words
    cdef unsigned long long[::1] addr
    cdef unsigned long long[::1] length
    cdef Py_ssize_t count
    cdef int _fetch(self, Flight f) except -1
    cdef int _fetch_prp(self, Flight f) except -1
    cdef int _fetch_sgl(self, Flight f) except -1
    cdef int _read(self, unsigned long long addr, Py_ssize_t count) except -1
