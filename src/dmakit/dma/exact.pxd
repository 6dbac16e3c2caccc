cdef long long _ALL_ATTRS
cdef int _Q
cdef int _L

cdef long long exact(object value) noexcept
cdef bint known(long long direction, long long attrs) noexcept
cdef Words taken(str name, object given, bint writable)

cdef class Words:
    cdef Py_buffer view
    cdef bint held
    cdef unsigned long long* items
    cdef Py_ssize_t count
    cdef bint _take(self, object given, bint writable) noexcept
    cdef void _drop(self) noexcept
