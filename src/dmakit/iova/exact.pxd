from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_AsLongLongAndOverflow


cdef struct Words:
    Py_buffer view
    unsigned long long* at
    Py_ssize_t n


cdef inline long long exact(object value) noexcept:
    cdef int overflow = 0
    if type(value) is not int:
        return -1
    return PyLong_AsLongLongAndOverflow(value, &overflow)


cdef inline bint borrow(Words* words, object items, bint writable) noexcept:
    try:
        PyObject_GetBuffer(items, &words.view, PyBUF_FORMAT | PyBUF_ND | (PyBUF_WRITABLE if writable else 0))
    except BaseException:
        return False
    if words.view.ndim == 1 and words.view.itemsize == 8 and words.view.format != NULL:
        if words.view.format[0] in (b"Q", b"L") and words.view.format[1] == 0:
            words.at = <unsigned long long*>words.view.buf
            words.n = words.view.len >> 3
            return True
    PyBuffer_Release(&words.view)
    return False


cdef inline void give_back(Words* words) noexcept:
    PyBuffer_Release(&words.view)


cdef inline bint meet(unsigned long long* one, Py_ssize_t n, unsigned long long* other, Py_ssize_t m) noexcept nogil:
    return n > 0 and m > 0 and one < other + m and other < one + n
