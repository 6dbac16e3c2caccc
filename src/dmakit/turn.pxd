cimport cython

cdef extern from "pythread.h":
    ctypedef void* PyThread_type_lock
    PyThread_type_lock _allocate_lock "PyThread_allocate_lock"() noexcept nogil
    void _free_lock "PyThread_free_lock"(PyThread_type_lock lock) noexcept nogil
    bint _acquire_lock "PyThread_acquire_lock"(PyThread_type_lock lock, bint wait) noexcept nogil
    void _release_lock "PyThread_release_lock"(PyThread_type_lock lock) noexcept nogil
    unsigned long _thread_ident "PyThread_get_thread_ident"() noexcept nogil

@cython.final
cdef class Turn:
    cdef readonly bint taken
    cdef bint waited
    cdef unsigned long owner
    cdef int depth
    cdef PyThread_type_lock lock
    cdef unsigned long _me(self) noexcept
    cdef void _take(self) noexcept
    cdef void _give(self) noexcept
    cdef void _wait(self) noexcept
