from dmakit.dma.exact cimport exact, known
from dmakit.dma.window cimport IovaWindow, SIZE_BITS, USE_SWIOTLB

cdef class IovaState(IovaWindow):
    cdef readonly int cpu
    cdef readonly bint live
    cdef unsigned long long run
    cdef int run_direction
    cdef int run_attrs
    cdef list more
    cdef readonly object device
    cdef readonly long long serial
    cdef Py_ssize_t slot
    cdef void _open(self, object device, int cpu) noexcept
    cdef void _note_run(self, unsigned long long size, int direction, int attrs) noexcept nogil
    cdef unsigned long long start
    cdef unsigned long long length
    cdef int way
    cdef int how
    cdef int on
    cdef int _close(self) except -1
    cdef bint _quick(self, object offset, object size, object direction, object attrs, object cpu) noexcept
