from dmakit.consts cimport *
from dmakit.dma.device cimport Device
from dmakit.iommu.port cimport Port
from dmakit.lab.flight cimport Columns, Flight
from dmakit.memory.physical cimport PhysicalMemory
from dmakit.nvme.fetch cimport DescriptorReader

cdef unsigned long long count_wrong(
    const unsigned char* expected, const unsigned char* found, unsigned long long size) noexcept nogil

cdef int _put(unsigned char[::1] into, unsigned long long at, bytes payload) except -1

cdef class DataPath:
    cdef Device device
    cdef Port port
    cdef object cache
    cdef PhysicalMemory memory
    cdef Columns columns
    cdef DescriptorReader reader
    cdef const unsigned char[::1] pattern
    cdef unsigned long long stride
    cdef unsigned long long window
    cdef unsigned char[::1] found
    cdef unsigned char[::1] before
    cdef unsigned long long _start(self, Flight f) noexcept
    cdef int _fill(self, Flight f) except -1
    cdef int _holds(self, Flight f, unsigned char[::1] into) except -1
    cdef long long _carry(self, Flight f) except -1
    cdef long long _arrived(self, Flight f) except -1
    cdef long long _differ(
        self, const unsigned char[::1] expected, unsigned long long at, unsigned long long size) noexcept
    cdef int _deliver(self, unsigned long long addr, unsigned long long at, unsigned long long length) except -1
    cdef int _collect(self, unsigned long long addr, unsigned long long at, unsigned long long length) except -1
