from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.ledger cimport Ledger

cdef int _END
cdef int _IDLE

cdef class DescriptorPool:
    cdef readonly int size
    cdef readonly Ledger ledger
    cdef readonly FailPoint fail
    cdef readonly object source
    cdef readonly list pages
    cdef list views
    cdef readonly Py_ssize_t count
    cdef readonly Py_ssize_t used
    cdef readonly Py_ssize_t idle_count
    cdef unsigned long long[::1] addrs
    cdef unsigned long long[::1] places
    cdef long long[::1] following
    cdef long long[::1] idle
    cdef bint refused
    cdef object error
    cdef Py_ssize_t _alloc(self) except? -2 nogil
    cdef int _grow(self) except? -2 with gil
    cdef object _lacking(self)
    cdef bint _held(self, Py_ssize_t block) noexcept nogil
    cdef int _free(self, Py_ssize_t block) noexcept nogil
    cdef int _free_chain(self, Py_ssize_t block) noexcept nogil
    cdef object _view(self, Py_ssize_t block)
