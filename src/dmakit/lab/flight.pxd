from dmakit.consts cimport *

cdef int READ
cdef int NO_PATH

cdef class Ranges:
    cdef readonly unsigned long long[::1] addr
    cdef readonly unsigned long long[::1] length
    cdef readonly unsigned long long[::1] bounds
    cdef readonly Py_ssize_t count

cdef class Columns:
    cdef readonly Py_ssize_t count
    cdef readonly Ranges segments
    cdef readonly unsigned long long[::1] size
    cdef readonly unsigned int[::1] which
    cdef readonly unsigned char[::1] op
    cdef readonly unsigned short[::1] cpu
    cdef readonly unsigned short[::1] end_cpu
    cdef readonly unsigned long long[::1] numbers
    cdef readonly unsigned char[::1] shared
    cdef readonly bint numbered
    cdef readonly bint sharing
    cdef unsigned long long _number(self, Py_ssize_t position) noexcept

cdef class Flight:
    cdef readonly Py_ssize_t position
    cdef readonly unsigned long long number
    cdef readonly Py_ssize_t layout
    cdef readonly unsigned long long size
    cdef readonly int cpu
    cdef readonly int end_cpu
    cdef readonly int direction
    cdef readonly bint reads
    cdef readonly bint shared
    cdef int taken
    cdef int psdt
    cdef unsigned long long low
    cdef unsigned long long high
    cdef unsigned long long chain
    cdef object token
    cdef unsigned long long[::1] own
    cdef unsigned long long[::1] addr
    cdef unsigned long long[::1] length
    cdef unsigned long long[::1] phys
    cdef Py_ssize_t count
    cdef int _begin(self, Columns columns, Py_ssize_t position) except -1
    cdef int _own_ranges(self) except -1

cdef class InFlight:
    cdef Py_ssize_t mask
    cdef list table
    cdef list idle
    cdef Flight _take(self, Py_ssize_t position)
    cdef Flight _find(self, Py_ssize_t position)
    cdef int _drop(self, Flight flight) except -1
    cdef int _double(self) except -1
