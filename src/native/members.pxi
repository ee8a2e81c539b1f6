# The members of a JSON object as slices of its text, after spillway.members; with the walk of a path.

cdef Walk walk_of(bytes text, Py_ssize_t start):
    cdef Walk walk
    walk.at = <const uint8_t*> PyBytes_AS_STRING(text) + start
    walk.end = <const uint8_t*> PyBytes_AS_STRING(text) + len(text)
    walk.steps, walk.count = NULL, 0
    walk.found.data, walk.found.size = NULL, 0
    return walk


def members(bytes text not None):
    cdef Walk walk = walk_of(text, 0)
    cdef const uint8_t* name
    cdef const uint8_t* name_end
    cdef const uint8_t* value
    cdef bint escaped
    cdef list found = []
    if not skip_byte(&walk, c"{"):
        return reference_members.members(text)
    if skip_byte(&walk, c"}"):
        return found
    while True:
        skip_blanks(&walk)
        name = walk.at
        if not walk_string(&walk, &escaped):
            break
        name_end = walk.at
        if not skip_byte(&walk, c":"):
            break
        skip_blanks(&walk)
        value = walk.at
        if not walk_value(&walk, -1, 0):
            break
        found.append((
            PyBytes_FromStringAndSize(<const char*> name, name_end - name),
            PyBytes_FromStringAndSize(<const char*> value, walk.at - value),
        ))
        if skip_byte(&walk, c"}"):
            return found
        if not skip_byte(&walk, c","):
            break
    return reference_members.members(text)  # nested too deeply for the walk


def end_of_value(bytes text not None, Py_ssize_t start):
    cdef Walk walk = walk_of(text, start)
    if start < 0 or start >= len(text) or not walk_value(&walk, -1, 0):
        return reference_members.end_of_value(text, start)
    return walk.at - <const uint8_t*> PyBytes_AS_STRING(text)


def joined(parts):
    cdef list found = list(parts)
    cdef Py_ssize_t size = 1
    cdef bytes name, value, text
    cdef char* at
    for name, value in found:
        size += len(name) + len(value) + 2
    if not found:
        return b"{}"
    text = PyBytes_FromStringAndSize(NULL, size)
    at = PyBytes_AS_STRING(text)
    for name, value in found:
        at[0] = c"{" if at == PyBytes_AS_STRING(text) else c","
        memcpy(at + 1, PyBytes_AS_STRING(name), len(name))
        at += 1 + len(name)
        at[0] = c":"
        memcpy(at + 1, PyBytes_AS_STRING(value), len(value))
        at += 1 + len(value)
    at[0] = c"}"
    return text
