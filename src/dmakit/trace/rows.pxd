from dmakit.consts cimport *

cdef class Rows:
    cdef readonly object pattern
    cdef readonly list names
    cdef bytes text
    cdef dict ids
    cdef const unsigned char[::1] data
    cdef unsigned char* p
    cdef const long long[::1] width
    cdef unsigned long long[::1] word_hash
    cdef unsigned long long[::1] word_id
    cdef unsigned long long[::1] kinds
    cdef unsigned long long[::1] rows
    cdef unsigned long long[::1] columns
    cdef unsigned long long[::1] count
    cdef unsigned long long[::1] start
    cdef unsigned long long[::1] filled
    cdef unsigned long long[::1] pool
    cdef unsigned long long[::1] bad_lines
    cdef readonly Py_ssize_t records
    cdef readonly Py_ssize_t pooled
    cdef readonly Py_ssize_t others
    cdef readonly Py_ssize_t notes
    cdef readonly Py_ssize_t malformed
    cdef Py_ssize_t room
    cdef Py_ssize_t pool_room
    cdef Py_ssize_t top
    cdef Py_ssize_t known
    cdef unsigned long long _hash(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _name(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _new_name(self, Py_ssize_t begin, Py_ssize_t end) noexcept with gil
    cdef void _to_columns(self) noexcept nogil
    cdef void _grow(self) noexcept with gil
    cdef void _grow_pool(self) noexcept with gil
