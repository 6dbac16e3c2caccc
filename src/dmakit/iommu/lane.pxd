from dmakit.iommu.caches cimport SetCache
from dmakit.iommu.iotlb cimport Iotlb
from dmakit.ledger cimport Ledger
from dmakit.memory.physical cimport PhysicalMemory

cdef class BatchLane:
    cdef Iotlb iotlb
    cdef SetCache psc
    cdef Ledger ledger
    cdef unsigned long long[::1] words
    cdef unsigned long long[::1] contexts
    cdef unsigned long long[::1] tags
    cdef unsigned long long[::1] values
    cdef unsigned long long[::1] stamps
    cdef unsigned long long[::1] psc_tags
    cdef unsigned long long[::1] psc_values
    cdef unsigned long long[::1] psc_stamps
    cdef long long[::1] live
    cdef long long[::1] psc_live
    cdef unsigned long long highest
    cdef unsigned long long domain
    cdef unsigned long long present
    cdef unsigned long long read_bit
    cdef unsigned long long write_bit
    cdef unsigned long long large
    cdef unsigned long long address
    cdef unsigned long long accessed
    cdef unsigned long long dirty
    cdef unsigned long long need
    cdef unsigned long long mark
    cdef unsigned long long now
    cdef unsigned long long psc_now
    cdef unsigned long long tick
    cdef unsigned long long psc_tick
    cdef unsigned long long set_mask
    cdef unsigned long long psc_set_mask
    cdef Py_ssize_t ways
    cdef Py_ssize_t psc_ways
    cdef int way_bits
    cdef int psc_way_bits
    cdef bint touch
    cdef bint psc_touch
    cdef int width
    cdef long long hits
    cdef long long longer
    cdef unsigned long long evicted
    cdef unsigned long long psc_evicted
    cdef Py_ssize_t _run(
        self, const unsigned long long[::1] iovas, unsigned long long[::1] out, Py_ssize_t start, int did, bint write
    ) noexcept nogil
    cdef void _begin(self, int did, bint write) noexcept nogil
    cdef void _end(self, long long done) noexcept nogil
    cdef unsigned long long _cached(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _walked(self, unsigned long long iova) noexcept nogil
    cdef Py_ssize_t _known(self, unsigned long long page, int level) noexcept nogil
    cdef unsigned long long _below(self, unsigned long long entry, unsigned long long permissions) noexcept nogil
    cdef unsigned long long _permitted(self, unsigned long long entry, unsigned long long permissions) noexcept nogil
    cdef void _keep(self, unsigned long long page, unsigned long long word) noexcept nogil
    cdef void _keep_table(self, unsigned long long page, unsigned long long word) noexcept nogil

cdef Py_ssize_t _probe(unsigned long long[::1] tags, Py_ssize_t first, Py_ssize_t ways,
                       unsigned long long tag) noexcept nogil
cdef Py_ssize_t _oldest(unsigned long long[::1] stamps, Py_ssize_t first, Py_ssize_t ways) noexcept nogil
cdef void _account(SetCache cache, long long[::1] live, unsigned long long old, int level) noexcept nogil
cdef unsigned long long _STOP
