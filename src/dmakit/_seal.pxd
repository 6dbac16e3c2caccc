cdef extern from *:
    """
    static void dmakit_without_new(PyObject *owner) {
        PyTypeObject *type = (PyTypeObject *)owner;
        if (type->tp_dict && PyDict_GetItemString(type->tp_dict, "__new__")) {
            PyDict_DelItemString(type->tp_dict, "__new__");
            PyType_Modified(type);
        }
    }
    """
    void _without_new "dmakit_without_new"(object owner)
