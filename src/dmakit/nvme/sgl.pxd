from dmakit.consts cimport *
from dmakit.nvme.lists cimport ListWriter
from dmakit.nvme.pool cimport DescriptorPool

cdef int _PER_SMALL
cdef int _MAX_DESCRIPTORS
cdef unsigned long long _BUCKET
cdef unsigned long long _LAST_SEGMENT
cdef int _MAX_ENTRIES
cdef unsigned long long _LENGTH_MASK
cdef int _BAD_SEGMENT
cdef int _BAD_NUMBER
cdef int _BAD_TYPE
cdef int _BAD_GRAIN
cdef int _BAD_DATA_LENGTH
cdef int _BAD_META_LENGTH

cdef class SglWriter(ListWriter):
    cdef readonly unsigned long long low
    cdef readonly unsigned long long high
    cdef readonly int entries
    cdef readonly int room
    cdef int _begin(self, int entries, bint coalesced) except? -1 nogil
    cdef int _feed(self, unsigned long long addr, unsigned long long length) noexcept nogil
    cdef void _finish(self) noexcept nogil
    cdef bint _look(self, unsigned long long chain, int entries) noexcept nogil
    cdef int _build(self, const unsigned long long[::1] addrs, const unsigned long long[::1] lengths, Py_ssize_t first,
                    Py_ssize_t end) except? -1 nogil
    cdef unsigned long long _word(self, bint high) noexcept nogil

cdef class SglWalker:
    cdef readonly unsigned long long[::1] addr
    cdef readonly unsigned long long[::1] length
    cdef readonly Py_ssize_t count
    cdef readonly unsigned long long left
    cdef readonly unsigned long long segment_addr
    cdef readonly unsigned long long segment_bytes
    cdef readonly int descriptors
    cdef readonly int status
    cdef readonly bint dword
    cdef readonly bint bit_bucket
    cdef readonly bint longer
    cdef bint last
    cdef bint discard
    cdef int short_status
    cdef bint was_last
    cdef Py_ssize_t space
    cdef int _begin(self, unsigned long long low, unsigned long long high, unsigned long long size, bint to_host,
                    bint metadata) except -1 nogil
    cdef int _descriptor(self, unsigned long long low, unsigned long long high, bint final) except -1 nogil
    cdef int _point(self, unsigned long long addr, unsigned long long length, bint last) noexcept nogil
    cdef int _data(self, unsigned long long addr, unsigned long long length, bint bucket) except -1 nogil
    cdef void _enter(self) noexcept nogil
    cdef int _part(self, const unsigned long long[::1] words, Py_ssize_t count, bint final) except -1 nogil
    cdef void _close(self) noexcept nogil
    cdef int _append(self, unsigned long long addr, unsigned long long length) except -1 nogil
    cdef int _grow(self) except -1 with gil
