from dmakit.dma.exact cimport exact, known
from dmakit.dma.scatter cimport SgMapping
from dmakit.dma.windows cimport Windows

cdef class Device(Windows):
    cdef readonly object port
    cdef readonly object pages
    cdef readonly object low_pages
    cdef readonly object clock
    cdef readonly bint debug
    cdef readonly object allocations
    cdef int way
    cdef int how
    cdef int on
    cdef bint _need_unmap(self) noexcept nogil
    cdef bint _ordinary(self, object direction, object attrs, object cpu) noexcept
