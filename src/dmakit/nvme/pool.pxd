from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.ledger cimport Ledger

cdef class Block:
    cdef readonly unsigned long long addr
    cdef readonly unsigned long long[::1] words
    cdef readonly int size
    cdef readonly bint free

cdef class DescriptorPool:
    cdef readonly int size
    cdef readonly Ledger ledger
    cdef readonly FailPoint fail
    cdef readonly object source
    cdef readonly list pages
    cdef readonly list blocks
    cdef readonly list idle
    cdef readonly int used
    cdef Block _alloc(self)
    cdef int _free(self, Block block) except -1
