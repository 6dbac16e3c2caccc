from dmakit.consts cimport *
from dmakit.iommu.formats.base cimport PtFormat
from dmakit.iommu.gather cimport Gather
from dmakit.iommu.pagetable cimport PageTable
from dmakit.iommu.space cimport Domain
from dmakit.iommu.tables cimport TablePages
from dmakit.iommu.unit cimport IommuUnit

cdef class PageTableDomain(Domain):
    cdef readonly IommuUnit unit
    cdef readonly TablePages tables
    cdef readonly int did
    cdef int last_error
    cdef Py_ssize_t _map_many(self, const unsigned long long[::1] iovas, const unsigned long long[::1] phys,
                              const unsigned long long[::1] sizes, Py_ssize_t count, int prot, int cpu) noexcept
    cdef unsigned long long _unmap_many(self, const unsigned long long[::1] iovas,
                                        const unsigned long long[::1] sizes, Py_ssize_t count,
                                        Gather gather, int cpu) noexcept
    cdef Py_ssize_t _iova_to_phys_many(self, const unsigned long long[::1] iovas,
                                       unsigned long long[::1] out, Py_ssize_t count) noexcept
    cdef void _undo_map(self, unsigned long long iova, int cpu) noexcept nogil
    cdef void _invalidate(self, Gather gather, int cause, int cpu) noexcept nogil
    cdef void _note_map(self, unsigned long long iova, unsigned long long phys, unsigned long long mapped,
                        int prot, int error) noexcept with gil
    cdef void _note_unmap(self, unsigned long long iova, unsigned long long size,
                          unsigned long long unmapped) noexcept with gil
    cdef void _note_sync(self, unsigned long long iova, unsigned long long size) noexcept with gil
    cdef void _note_flush(self, unsigned long long start, unsigned long long end) noexcept with gil
