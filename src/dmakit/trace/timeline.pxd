from dmakit.trace.midlife cimport MidLife
from dmakit.trace.operation cimport Operation
from dmakit.trace.search cimport OrderSearch

cimport cython





@cython.final
cdef class Timeline:
    cdef object domains
    cdef readonly long long window
    cdef MidLife midlife
    cdef readonly dict searches
    cdef long long step
    cdef Py_ssize_t mask
    cdef list begins
    cdef list ends
    cdef readonly long long at
    cdef readonly long long due
    cdef long long added
    cdef readonly long long impossible
    cdef public long long limit
    cdef public bint free_returns_recorded
    cpdef add(self, Operation op)
    cpdef follow(self, long long seq)
    cpdef advance(self, long long until)
    cdef _begin_some(self, Operation first)
    cdef _begin(self, Operation op)
    cdef _end(self, Operation op)

cdef int _append(list ring, Py_ssize_t slot, Operation op) except -1
