# Output that grows. It lies in a bytes object of its own, so that a large one can be handed out as it is.

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject** object, Py_ssize_t size) except -1
    PyObject* PyBytes_FromStringAndSize_new "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size) except NULL
    char* PyBytes_AS_STRING_of "PyBytes_AS_STRING"(PyObject* object)

cdef enum:
    SMALLEST_CAPACITY = 4096
    # Below this a copy costs less than giving the memory away and having it anew.
    LARGE_BYTES = 131072
    # What a buffer may keep of its memory, unused, when it was taken.
    KEPT_BYTES = 1048576

cdef struct Buffer:
    PyObject* owner
    uint8_t* data
    size_t size
    size_t capacity


cdef int buffer_open(Buffer* buffer, size_t capacity) except -1:
    buffer.owner = PyBytes_FromStringAndSize_new(NULL, <Py_ssize_t> capacity)
    buffer.data = <uint8_t*> PyBytes_AS_STRING_of(buffer.owner)
    buffer.capacity = capacity
    buffer.size = 0
    return 0


cdef void buffer_close(Buffer* buffer) noexcept:
    Py_XDECREF(buffer.owner)
    buffer.owner = NULL
    buffer.data = NULL
    buffer.size = buffer.capacity = 0


cdef int buffer_grow(Buffer* buffer, size_t more) except -1:
    cdef size_t capacity = max(buffer.capacity * 2, buffer.size + more, <size_t> SMALLEST_CAPACITY)
    if buffer.owner == NULL:
        return buffer_open(buffer, capacity)
    try:
        _PyBytes_Resize(&buffer.owner, <Py_ssize_t> capacity)
    except MemoryError:
        # The object is gone, whatever was in it.
        buffer.owner = NULL
        buffer_close(buffer)
        raise
    buffer.data = <uint8_t*> PyBytes_AS_STRING_of(buffer.owner)
    buffer.capacity = capacity
    return 0


cdef inline int reserve(Buffer* buffer, size_t more) except -1:
    """Makes room for so many bytes behind what is there."""
    if buffer.capacity - buffer.size >= more:
        return 0
    return buffer_grow(buffer, more)


cdef inline int append(Buffer* buffer, const void* data, size_t size) except -1:
    reserve(buffer, size)
    memcpy(buffer.data + buffer.size, data, size)
    buffer.size += size
    return 0


cdef inline int append_byte(Buffer* buffer, uint8_t byte) except -1:
    reserve(buffer, 1)
    buffer.data[buffer.size] = byte
    buffer.size += 1
    return 0


cdef inline int append_bytes(Buffer* buffer, bytes data) except -1:
    return append(buffer, PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data))


cdef bytes buffer_take(Buffer* buffer):
    """What is in it, as bytes; it is empty then."""
    cdef bytes taken
    cdef size_t size = buffer.size
    cdef PyObject* owner
    if size > LARGE_BYTES and size * 2 >= buffer.capacity:
        _PyBytes_Resize(&buffer.owner, <Py_ssize_t> size)
        owner = buffer.owner
        buffer.owner = NULL
        buffer_close(buffer)
        taken = <bytes> owner
        Py_XDECREF(owner)
        # The next one is likely to be as large. Memory that is never written to is never resident.
        buffer_open(buffer, min(size + size // 8, <size_t> KEPT_BYTES))
        return taken
    taken = PyBytes_FromStringAndSize(<char*> buffer.data, <Py_ssize_t> size)
    if buffer.capacity > KEPT_BYTES:
        buffer_close(buffer)
    buffer.size = 0
    return taken
