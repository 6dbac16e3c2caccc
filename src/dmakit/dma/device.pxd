from dmakit.dma.iova_state cimport IovaState
from dmakit.dma.scatter cimport Scatter, SgMapping

cdef class Device(Scatter):
    cdef readonly object port
    cdef readonly object pages
    cdef readonly object low_pages
    cdef readonly object clock
    cdef readonly bint debug
    cdef readonly list states
    cdef readonly object allocations
