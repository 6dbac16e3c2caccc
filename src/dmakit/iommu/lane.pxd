from dmakit.consts cimport *
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
    cdef int[::1] newer
    cdef int[::1] oldest
    cdef unsigned long long[::1] psc_tags
    cdef unsigned long long[::1] psc_values
    cdef int[::1] psc_newer
    cdef int[::1] psc_oldest
    cdef long long[::1] live
    cdef long long[::1] psc_live
    cdef unsigned long long highest
    cdef unsigned long long domain
    cdef unsigned long long key
    cdef unsigned long long psc_key
    cdef unsigned long long last
    cdef unsigned long long reach
    cdef unsigned long long present
    cdef unsigned long long read_bit
    cdef unsigned long long write_bit
    cdef unsigned long long large
    cdef unsigned long long address
    cdef unsigned long long accessed
    cdef unsigned long long dirty
    cdef unsigned long long need
    cdef unsigned long long mark
    cdef unsigned long long above
    cdef unsigned long long above_mask
    cdef unsigned long long plain
    cdef unsigned long long top
    cdef unsigned long long top_word
    cdef unsigned long long top_table
    cdef Py_ssize_t top_way
    cdef Py_ssize_t top_set
    cdef unsigned long long set_mask
    cdef unsigned long long psc_set_mask
    cdef Py_ssize_t ways
    cdef Py_ssize_t psc_ways
    cdef bint full
    cdef bint top_newest
    cdef long long hits
    cdef long long once
    cdef long long others
    cdef long long psc_others
    cdef Py_ssize_t _run(
        self, const unsigned long long[::1] iovas, unsigned long long[::1] out, Py_ssize_t start, int did, bint write
    ) noexcept nogil
    cdef void _begin(self, int did, bint write) noexcept nogil
    cdef void _look_full(self) noexcept nogil
    cdef void _end(self, long long done) noexcept nogil
    cdef Py_ssize_t _block(
        self, const unsigned long long[::1] iovas, unsigned long long[::1] out, Py_ssize_t i, Py_ssize_t end
    ) noexcept nogil
    cdef void _ask(self, const unsigned long long[::1] iovas, Py_ssize_t i, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _once(
        self, unsigned long long page, Py_ssize_t first, unsigned long long tag
    ) noexcept nogil
    cdef unsigned long long _any(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _cached(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _walked(self, unsigned long long iova) noexcept nogil
    cdef bint _find_top(self, unsigned long long iova) noexcept nogil
    cdef unsigned long long _below(self, unsigned long long entry) noexcept nogil
    cdef unsigned long long _leaf(self, unsigned long long at, unsigned long long known) noexcept nogil
    cdef unsigned long long _permitted(self, unsigned long long entry, unsigned long long permissions) noexcept nogil
    cdef void _renew_table(self, Py_ssize_t way) noexcept nogil
    cdef void _renew_top(self) noexcept nogil
    cdef void _keep(self, Py_ssize_t set_, unsigned long long tag, unsigned long long word) noexcept nogil
    cdef void _replace_table(self, unsigned long long old) noexcept nogil

cdef Py_ssize_t _way(unsigned long long[::1] tags, Py_ssize_t first, Py_ssize_t ways,
                     unsigned long long tag) noexcept nogil
cdef void _account(SetCache cache, long long[::1] live, unsigned long long old, int level) noexcept nogil
cdef unsigned long long _NOWHERE
