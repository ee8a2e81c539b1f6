# libpq's own functions, of the very library that psycopg has loaded: a symbol is looked up from psycopg's module on, so
# that the libpq it was linked with is found, whatever others the process may hold.

ctypedef int (*GetCopyData)(void* connection, char** buffer, int async_) noexcept
ctypedef void (*FreeMemory)(void* memory) noexcept

cdef GetCopyData get_copy_data = NULL
cdef FreeMemory free_memory = NULL


cdef object libpq():
    import ctypes

    from psycopg import pq

    if pq.__impl__ == "python":
        from psycopg.pq import _pq_ctypes

        return _pq_ctypes.pq
    import sys

    return ctypes.CDLL(sys.modules[pq.PGconn.__module__].__file__)


cdef int find_libpq() except -1:
    global get_copy_data, free_memory
    import ctypes

    try:
        library = libpq()
        get = ctypes.cast(library.PQgetCopyData, ctypes.c_void_p).value
        free = ctypes.cast(library.PQfreemem, ctypes.c_void_p).value
    except (ImportError, AttributeError, KeyError, OSError):
        return 0  # frames come through psycopg, which is slower and else the same
    get_copy_data = <GetCopyData> <uintptr_t> get
    free_memory = <FreeMemory> <uintptr_t> free
    return 0


find_libpq()


def calls_libpq():
    """Whether frames are taken from libpq without psycopg."""
    return get_copy_data != NULL
