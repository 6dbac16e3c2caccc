from dmakit.consts cimport *
from dmakit.trace.operation cimport Operation
from dmakit.trace.timeline cimport Timeline

cimport cython




@cython.final
cdef class OperationReader:
    cdef readonly Timeline timeline
    cdef readonly dict numbers
    cdef readonly long long offset
    cdef readonly bint searches_recorded
    cdef readonly bint frees_recorded
    cdef readonly bint entries_recorded
    cdef readonly bint free_entries_recorded
    cdef readonly long long place
    cdef readonly long long tidied
    cdef object which
    cdef long long[::1] slot
    cdef const long long[::1] rows
    cdef const long long[::1] seqs
    cdef const long long[::1] starts
    cdef const unsigned long long[::1] words
    cdef const unsigned long long[::1] pool
    cdef long long seq
    cdef long long line
    cdef long long cpu
    cdef long long pid
    cdef long long task
    cdef Py_ssize_t at
    cdef Py_ssize_t base
    cdef unsigned long long iovad
    cdef unsigned long long absent
    cdef dict alone
    cdef dict stacks
    cdef dict latest
    cdef dict works
    cdef Operation last
    cdef _event(self, long long which, long long seq, Py_ssize_t at)
    cdef _read(self, long long which)
    cdef unsigned long long _value(self, Py_ssize_t column) noexcept
    cdef Operation _add(self, str kind, unsigned long long iovad, long long begin, long long end)
    cdef Operation _open(self, str kind)
    cdef long long _unseen(self, bint recorded) except *
    cdef _af_in(self)
    cdef _af_out(self)
    cdef _ai_out(self)
    cdef _split(self, Operation op)
    cdef _ff_in(self)
    cdef _ff_out(self)
    cdef _fi_in(self)
    cdef _domain(self, long long which)
    cdef _depot_in(self)
    cdef _magfree_in(self)
    cdef _cpufree_in(self)
    cdef Operation _top(self, str kind)
    cdef Operation _pop(self, str kind, unsigned long long size, object pfn)
    cdef _return(self, Operation found)
    cdef bint _answers(self, Operation op, unsigned long long size, object pfn) except -1
