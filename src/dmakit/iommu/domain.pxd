from dmakit.iommu.gather cimport Gather
from dmakit.iommu.pagetable cimport PageTable
from dmakit.iommu.tables cimport TablePages
from dmakit.iommu.unit cimport IommuUnit
from dmakit.iova.flush_queue cimport FlushTarget
from dmakit.ledger cimport Ledger

cdef class PageTableDomain(FlushTarget):
    cdef readonly IommuUnit unit
    cdef readonly PageTable table
    cdef readonly TablePages tables
    cdef readonly Ledger ledger
    cdef readonly int did
    cdef readonly unsigned long long granule
    cdef readonly unsigned long long page_sizes
    cdef readonly unsigned long long aperture_end
    cdef readonly object reserved
    cdef readonly object capabilities
    cdef readonly bint dirty_tracking
    cdef public object events
    cdef Gather scratch
    cdef Gather pending
    cdef int last_error
    cdef int _map(self, unsigned long long iova, unsigned long long phys, unsigned long long size, int prot,
                  int cpu=*) noexcept nogil
    cdef int _sync_map(self, unsigned long long iova, unsigned long long size, int cpu=*) noexcept nogil
    cdef unsigned long long _unmap(self, unsigned long long iova, unsigned long long size,
                                   Gather gather) noexcept nogil
    cdef void _flush(self, Gather gather, int cpu=*) noexcept nogil
    cdef void _flush_all(self, int cause, int cpu=*) noexcept nogil
    cdef unsigned long long _iova_to_phys(self, unsigned long long iova) noexcept nogil
    cdef bint _leaf_across(self, unsigned long long iova) noexcept nogil
    cdef Py_ssize_t _map_many(self, const unsigned long long[::1] iovas, const unsigned long long[::1] phys,
                              const unsigned long long[::1] sizes, Py_ssize_t count, int prot, int cpu) noexcept
    cdef unsigned long long _unmap_many(self, const unsigned long long[::1] iovas,
                                        const unsigned long long[::1] sizes, Py_ssize_t count,
                                        Gather gather) noexcept
    cdef Py_ssize_t _iova_to_phys_many(self, const unsigned long long[::1] iovas,
                                       unsigned long long[::1] out, Py_ssize_t count) noexcept
    cdef int _on_cpu(self, object cpu) except? -1
    cdef void _invalidate(self, Gather gather, int cause, int cpu) noexcept nogil
    cdef void _note_map(self, unsigned long long iova, unsigned long long phys, unsigned long long mapped,
                        int prot, int error) noexcept with gil
    cdef void _note_unmap(self, unsigned long long iova, unsigned long long size,
                          unsigned long long unmapped) noexcept with gil
    cdef void _note_sync(self, unsigned long long iova, unsigned long long size) noexcept with gil
    cdef void _note_flush(self, unsigned long long start, unsigned long long end) noexcept with gil

cdef unsigned long long _word(str name, object value, unsigned long long low, unsigned long long high) except? 1
cdef unsigned long long _TOP
cdef int _PROT_TOP
