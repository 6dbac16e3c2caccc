cimport cython


@cython.final
cdef class Operation:
    cdef public str kind
    cdef public unsigned long long iovad
    cdef public long long begin
    cdef public long long end
    cdef public tuple cpus
    cdef public long long line
    cdef public long long pid
    cdef public unsigned long long size
    cdef public unsigned long long limit
    cdef public unsigned long long hi
    cdef public long long serial
    cdef public bint flush
    cdef public bint retry
    cdef public object pfn
    cdef public list searches
    cdef public object to_tree
    cdef public list moments
    cdef public list drained
    cdef public Operation next
    cpdef bint possible(self)
