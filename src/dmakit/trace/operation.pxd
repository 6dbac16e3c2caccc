cimport cython


@cython.final
cdef class Operation:
    cdef readonly str kind
    cdef readonly unsigned long long iovad
    cdef readonly long long begin
    cdef readonly long long end
    cdef readonly tuple cpus
    cdef readonly long long line
    cdef readonly long long pid
    cdef readonly unsigned long long size
    cdef readonly unsigned long long limit
    cdef readonly unsigned long long hi
    cdef readonly long long serial
    cdef readonly bint flush
    cdef readonly bint retry
    cdef readonly object pfn
    cdef readonly list searches
    cdef readonly object to_tree
    cdef readonly list moments
    cdef readonly list drained
    cdef readonly Operation next
    cpdef bint possible(self)
