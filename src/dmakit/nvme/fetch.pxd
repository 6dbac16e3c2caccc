from dmakit.consts cimport *
from dmakit.iommu.port cimport Port
from dmakit.nvme.prp cimport PrpWalker
from dmakit.nvme.sgl cimport SglWalker
from dmakit.turn cimport Turn

cdef int _TRANSFER_ERROR
cdef int _INVALID_FIELD
cdef int _BUFFER
cdef unsigned long long _MOST_BYTES
cdef unsigned long long _ALL_ONES

cdef class DescriptorReader:
    cdef readonly object port
    cdef Port own
    cdef Turn turn
    cdef readonly PrpWalker prp
    cdef readonly SglWalker sgl
    cdef unsigned long long[::1] words
    cdef bint by_prp
    cdef bint refused
    cdef readonly object fault
    cdef unsigned long long[::1] addrs
    cdef unsigned long long[::1] lengths
    cdef Py_ssize_t room
    cdef Py_ssize_t used
    cdef int _read(self, unsigned long long form, unsigned long long low, unsigned long long high, unsigned long long size, bint to_host,
                   bint metadata) except -1 nogil
    cdef int _read_prps(self, unsigned long long prp1, unsigned long long prp2, unsigned long long size) except -1 nogil
    cdef int _read_sgl(self, unsigned long long low, unsigned long long high, unsigned long long size, bint to_host,
                       bint metadata) except -1 nogil
    cdef int _fetch(self, unsigned long long addr, Py_ssize_t count) except? -1 nogil
    cdef int _ask(self, unsigned long long addr, unsigned long long size) except? -1 with gil
    cdef int _add(self) except -1 nogil
    cdef int _widen(self) except -1 with gil
    cdef int _run(
        self, const unsigned long long[::1] forms, const unsigned long long[::1] pointers,
        const unsigned long long[::1] sizes, unsigned long long[::1] bounds, unsigned long long[::1] statuses,
        Py_ssize_t count, bint to_host) except -1
