from dmakit.consts cimport *
from dmakit.nvme.lists cimport ListWriter
from dmakit.nvme.pool cimport DescriptorPool

cdef int _PER_SMALL
cdef unsigned long long _MAX_TOTAL
cdef int _BAD_OFFSET

cdef void _run(unsigned long long* words, Py_ssize_t count, unsigned long long addr) noexcept nogil

cdef class PrpWriter(ListWriter):
    cdef readonly unsigned long long prp1
    cdef readonly unsigned long long prp2
    cdef readonly unsigned long long left
    cdef readonly int entries
    cdef int slot
    cdef int stage
    cdef Py_ssize_t at
    cdef void _begin(self, unsigned long long total) noexcept nogil
    cdef int _feed(self, unsigned long long addr, unsigned long long length) except? -1 nogil
    cdef unsigned long long _pages(self, unsigned long long addr, unsigned long long length) noexcept nogil
    cdef int _open(self) except? -1 nogil
    cdef int _chain(self) except? -1 nogil
    cdef void _link(self, Py_ssize_t block, unsigned long long addr) noexcept nogil
    cdef int _build(self, const unsigned long long[::1] addrs, const unsigned long long[::1] lengths, Py_ssize_t first,
                    Py_ssize_t end) except? -1 nogil
    cdef unsigned long long _word(self, bint high) noexcept nogil

cdef class PrpWalker:
    cdef readonly unsigned long long[::1] addr
    cdef readonly unsigned long long[::1] length
    cdef readonly Py_ssize_t count
    cdef readonly unsigned long long left
    cdef readonly unsigned long long list_addr
    cdef readonly int list_entries
    cdef readonly int status
    cdef Py_ssize_t room
    cdef int _begin(self, unsigned long long prp1, unsigned long long prp2, unsigned long long size) except -1 nogil
    cdef int _entry(self, unsigned long long addr) except -1 nogil
    cdef void _want(self, unsigned long long addr) noexcept nogil
    cdef int _list(self, const unsigned long long[::1] words) except -1 nogil
    cdef int _grow(self) except -1 with gil
