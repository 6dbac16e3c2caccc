from dmakit.consts cimport *
from dmakit.trace.rows cimport Rows

cimport cython


@cython.final
cdef class Scanner(Rows):
    cdef list anchor_texts
    cdef const unsigned char[::1] anchors
    cdef unsigned char* a
    cdef unsigned char[256] digit
    cdef const long long[::1] steps
    cdef const long long[::1] first_step
    cdef unsigned long long[::1] table_hash
    cdef long long[::1] table_kind
    cdef readonly bint seconds
    cdef Py_ssize_t at
    cdef Py_ssize_t payload
    cdef bint wrong
    cdef unsigned long long stamp
    cdef long long pid
    cdef long long cpu
    cdef int context
    cdef unsigned long long absent
    cdef Py_ssize_t _byte(self, int byte, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _anchor(self, Py_ssize_t step, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _digits(self, Py_ssize_t begin, Py_ssize_t end, int base) noexcept nogil
    cdef unsigned long long _number(self, Py_ssize_t begin, Py_ssize_t end, int base) noexcept nogil
    cdef Py_ssize_t _skip(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _word(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _task(self, Py_ssize_t begin, Py_ssize_t bracket) noexcept nogil
    cdef Py_ssize_t _where(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _when(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _stamp(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef long long _lookup(self, unsigned long long name) noexcept nogil
    cdef long long _kind(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef long long _by_symbol(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _field(self, Py_ssize_t step, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t slot) noexcept nogil
    cdef bint _list(self, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t slot) noexcept nogil
    cdef bint _fields(self, long long kind, Py_ssize_t end) noexcept nogil
    cdef int _lost(self, Py_ssize_t begin, Py_ssize_t end, unsigned long long number) noexcept nogil
    cdef int _line(self, Py_ssize_t begin, Py_ssize_t end, unsigned long long number) noexcept nogil
    cdef void _put(self, long long kind, unsigned long long number) noexcept nogil
    cdef unsigned long long _scan(self, Py_ssize_t size, unsigned long long first_line) noexcept nogil
