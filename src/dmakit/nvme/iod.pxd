from dmakit.block.request cimport Request
from dmakit.consts cimport *

cdef int _WINDOW_BYTES
cdef int _VECTOR_BYTES

cdef class Iod:
    cdef readonly Request request
    cdef readonly int cpu
    cdef readonly int direction
    cdef public int status
    cdef public int flags
    cdef public int psdt
    cdef public unsigned long long low
    cdef public unsigned long long high
    cdef public unsigned long long mptr
    cdef public unsigned long long total
    cdef public object state
    cdef unsigned long long window_addr
    cdef unsigned long long window_size
    cdef readonly int map_type
    cdef public unsigned long long chain
    cdef unsigned long long[::1] kept
    cdef readonly Py_ssize_t kept_count
    cdef public int entries
    cdef public object meta_state
    cdef public int meta_map_type
    cdef public unsigned long long meta_total
    cdef public object meta_block
    cdef public int meta_entries
    cdef public int path
    cdef public int reason
    cdef public object error
    cdef int _reset(self, Request request, int cpu) except -1
    cdef void _clear(self, int direction, int cpu) noexcept nogil
    cdef Py_ssize_t room
    cdef int _keep(self, unsigned long long addr, unsigned long long length) except -1 nogil
    cdef int _widen(self) except -1 with gil
    cdef long long _bookkeeping(self) noexcept nogil
