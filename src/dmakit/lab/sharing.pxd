cdef int _COMPLETE

cdef class Sharing:
    cdef Py_ssize_t count
    cdef unsigned int[::1] which
    cdef unsigned long long[::1] atoms
    cdef unsigned long long[::1] bounds
    cdef unsigned long long[::1] held
    cdef unsigned long long[::1] holder
    cdef unsigned char[::1] flags
    cdef readonly object shared
    cdef Py_ssize_t _follow(
        self, const unsigned char[::1] kinds, const unsigned long long[::1] positions, Py_ssize_t start,
        bint flagging) noexcept nogil
    cdef bint _taken(self, Py_ssize_t layout) noexcept nogil
