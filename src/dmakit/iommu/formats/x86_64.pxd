from dmakit.iommu.formats.base cimport PtFormat

cdef class X86_64(PtFormat):
    pass
