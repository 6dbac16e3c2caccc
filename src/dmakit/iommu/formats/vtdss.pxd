from dmakit.iommu.formats.base cimport PtFormat

cdef class VtdSecondStage(PtFormat):
    pass
