from dmakit.consts cimport *
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.pagetable cimport PageTable
from dmakit.iova.flush_queue cimport FlushTarget
from dmakit.ledger cimport Ledger

cdef class Domain(FlushTarget):
    cdef readonly PageTable table
    cdef readonly Ledger ledger
    cdef readonly unsigned long long granule
    cdef readonly unsigned long long page_sizes
    cdef readonly unsigned long long aperture_end
    cdef readonly object reserved
    cdef readonly object capabilities
    cdef readonly bint dirty_tracking
    cdef public object events
    cdef readonly object failure
    cdef Gather scratch
    cdef Gather pending
    cdef int _map(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                  int cpu=*) noexcept nogil
    cdef int _sync_map(self, unsigned long long iova, unsigned long long size, int cpu=*) noexcept nogil
    cdef unsigned long long _unmap(self, unsigned long long iova, unsigned long long size,
                                   Gather gather) noexcept nogil
    cdef void _flush(self, Gather gather, int cpu=*) noexcept nogil
    cdef void _flush_all(self, int cause, int cpu=*) noexcept nogil
    cdef unsigned long long _iova_to_phys(self, unsigned long long iova) noexcept nogil
    cdef bint _leaf_across(self, unsigned long long iova) noexcept nogil
    cdef int _on_cpu(self, object cpu) except? -1
    cdef int _map_undisturbed(self, unsigned long long iova, unsigned long long phys, unsigned long long size,
                              int prot, int cpu) noexcept
    cdef unsigned long long _unmap_undisturbed(self, unsigned long long iova, unsigned long long size,
                                               Gather gather, bint flush, int cpu) noexcept

cdef unsigned long long _word(str name, object value, unsigned long long low, unsigned long long high) except? 1
cdef unsigned long long _TOP
cdef int _PROT_TOP
cdef unsigned long long _LONG
