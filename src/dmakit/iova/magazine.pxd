from dmakit.consts cimport *
from dmakit.failpoint cimport FailPoint
from dmakit.iova.bits cimport mix

cimport cython

@cython.final
cdef class MagazinePool:
    cdef readonly FailPoint fail
    cdef readonly unsigned long long[::1] words
    cdef readonly int[::1] link
    cdef readonly int unused
    cdef readonly int capacity
    cdef readonly int allocated
    cdef bint _grow(self) noexcept with gil
    cdef int _size(self, int magazine) noexcept nogil
    cdef void _clear(self, int magazine) noexcept nogil
    cdef unsigned long long _fingerprint(self, int magazine) noexcept nogil
    cdef int _new(self) noexcept nogil
    cdef void _release(self, int magazine) noexcept nogil
    cdef void _push(self, int magazine, unsigned long long pfn) noexcept nogil
    cdef unsigned long long _pop(self, int magazine, unsigned long long highest) noexcept nogil
    cdef Py_ssize_t _look(self, int magazine, unsigned long long highest) noexcept nogil
    cdef Py_ssize_t _pop_run(
        self, int magazine, unsigned long long highest, unsigned long long* pfns, Py_ssize_t first, Py_ssize_t end
    ) noexcept nogil
    cdef Py_ssize_t _push_run(
        self, int magazine, unsigned long long* pfns, Py_ssize_t first, Py_ssize_t end
    ) noexcept nogil
