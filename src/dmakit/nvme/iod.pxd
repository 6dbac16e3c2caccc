from dmakit.consts cimport *

cdef class Iod:
    cdef readonly object request
    cdef public int status
    cdef public int flags
    cdef public int psdt
    cdef public unsigned long long low
    cdef public unsigned long long high
    cdef public unsigned long long mptr
    cdef public unsigned long long total
    cdef public object state
    cdef readonly int map_type
    cdef public list blocks
    cdef readonly list vectors
    cdef public int entries
    cdef public object meta_state
    cdef public int meta_map_type
    cdef public unsigned long long meta_total
    cdef public object meta_block
    cdef public int meta_entries
    cdef public int path
    cdef public int reason
    cdef public object error
