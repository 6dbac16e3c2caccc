from dmakit.consts cimport *
from dmakit.ledger cimport Ledger

cdef unsigned long long _iotlb_low(int did, int granularity) noexcept nogil
cdef unsigned long long _piotlb_low(int did, int granularity) noexcept nogil
cdef unsigned long long _range_high(unsigned long long iova, int mask, bint ih) noexcept nogil
cdef unsigned long long _devtlb_low(int source, int queue_depth) noexcept nogil
cdef unsigned long long _devtlb_high(unsigned long long iova, int mask) noexcept nogil
cdef int _devtlb_mask(unsigned long long high) noexcept nogil

cdef class InvalidationQueue:
    cdef Ledger ledger
    cdef unsigned long long[::1] ring
    cdef readonly Py_ssize_t head
    cdef readonly Py_ssize_t tail
    cdef readonly int pending
    cdef int _push(self, unsigned long long low, unsigned long long high) noexcept nogil
    cdef void _submit(self, int cpu) noexcept nogil
    cdef Py_ssize_t _next(self) noexcept nogil
