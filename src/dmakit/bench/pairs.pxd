from dmakit.iova.allocator cimport IovaAllocator
from dmakit.iova.shared cimport SharedDomain

cdef void _alone(
    IovaAllocator domain, unsigned long long[::1] sizes, unsigned long long[::1] pfns, unsigned long long top,
    Py_ssize_t rounds)
cdef void _shared(
    SharedDomain domain, int cpu, unsigned long long[::1] sizes, unsigned long long[::1] pfns, unsigned long long top,
    Py_ssize_t rounds)
