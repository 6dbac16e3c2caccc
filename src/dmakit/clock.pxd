cdef long long _NEVER

cdef class VirtualClock:
    cdef readonly long long now
    cdef long long due
    cdef object _sequence
    cdef list _timers
    cdef int _tick(self, long long delta_ns) except -1
