cdef long long exact(object value) noexcept
