from dmakit.clock cimport VirtualClock
from dmakit.consts cimport *
from dmakit.lab.flight cimport Columns, Flight, InFlight
from dmakit.lab.payload cimport DataPath
from dmakit.lab.strategies cimport Strategy

cdef long long _STEP_NS
cdef unsigned long long _MOST_BYTES
cdef int _SUBMIT

cdef long long _now() noexcept

cdef class Engine:
    cdef Strategy strategy
    cdef Columns columns
    cdef DataPath data
    cdef VirtualClock clock
    cdef InFlight flights
    cdef long long[::1] counts
    cdef readonly long long[::1] submission
    cdef readonly long long[::1] completion
    cdef unsigned long long[::1] numbers
    cdef unsigned short[::1] taken
    cdef Py_ssize_t logged
    cdef readonly long long requests
    cdef readonly unsigned long long size
    cdef readonly long long wrong
    cdef readonly long long failed
    cdef readonly long long faults
    cdef readonly long long simulator_ns
    cdef Py_ssize_t _run(
        self, const unsigned char[::1] kinds, const unsigned long long[::1] positions, Py_ssize_t start) except -1
    cdef int _submit(self, Py_ssize_t position) except -1
    cdef int _complete(self, Py_ssize_t position) except -1
    cdef void _subtract(self, long long[::1] phase) noexcept
    cdef void _add(self, long long[::1] phase) noexcept
