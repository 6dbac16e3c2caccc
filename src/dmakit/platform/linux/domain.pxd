from dmakit.consts cimport *
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.space cimport Domain
from dmakit.ledger cimport Ledger
from dmakit.platform.linux.shadow cimport ShadowMap

cdef class HostDomain(Domain):
    cdef readonly object backend
    cdef readonly object source
    cdef readonly ShadowMap shadow
    cdef readonly list ranges
    cdef bint interrupted
    cdef unsigned long long low
    cdef unsigned long long high
    cdef int _map(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                  int cpu=*) noexcept nogil
    cdef int _sync_map(self, unsigned long long iova, unsigned long long size, int cpu=*) noexcept nogil
    cdef unsigned long long _unmap(self, unsigned long long iova, unsigned long long size,
                                   Gather gather) noexcept nogil
    cdef unsigned long long _iova_to_phys(self, unsigned long long iova) noexcept nogil
    cdef bint _leaf_across(self, unsigned long long iova) noexcept nogil
    cdef int _refuse(self, int error) noexcept with gil
    cdef int _map_pieces(self, unsigned long long iova, unsigned long long phys, unsigned long long size,
                         int prot) noexcept with gil
    cdef int _put_off(self, object stop) noexcept
    cdef bint _find_range(self, unsigned long long iova, unsigned long long size) except? -1
    cdef unsigned long long _take_back(self, unsigned long long iova, unsigned long long size) noexcept with gil
    cdef void _note(self, str name, unsigned long long first, unsigned long long second) noexcept with gil
    cdef void _note_unmap(self, unsigned long long iova, unsigned long long size,
                          unsigned long long removed) noexcept with gil

cdef unsigned long long _TOP
