# The text of a value to JSON, after spillway.pgoutput.scalars. What is rare is left to the functions there.

cdef struct Value:  # a slice of a frame
    const uint8_t* data  # NULL: null
    size_t size

# Stands for the value of an unchanged TOAST column; compared by its address, as the reference does.
cdef const uint8_t* UNCHANGED = b"<unchanged toast>"
cdef size_t UNCHANGED_BYTES = 17

cdef enum Kind:
    AS_IT_IS
    TEXT
    QUOTED
    BOOLEAN
    NUMBER
    JSON
    BYTEA
    DATE
    TIMESTAMP
    TIMESTAMPTZ
    NUMBERS  # an array
    PYTHON

# Arrays of int8, int2, int4, oid, float4, float8, numeric: their text is JSON but for the braces, unless it has bounds.
cdef frozenset NUMBER_ARRAYS = frozenset((1016, 1005, 1007, 1028, 1021, 1022, 1231))

cdef uint8_t IN_NUMBERS[256]


cdef void mark_numbers() noexcept:
    cdef const uint8_t* alphabet = b"0123456789+-.eE,{}"
    cdef int i
    for i in range(18):
        IN_NUMBERS[alphabet[i]] = 1


mark_numbers()


cdef inline bytes value_bytes(Value value):
    return PyBytes_FromStringAndSize(<const char*> value.data, <Py_ssize_t> value.size)


cdef int append_rendered(Buffer* out, object renderer, Value value) except -1:
    cdef bytes rendered = renderer(value_bytes(value))
    return append_bytes(out, rendered)


cdef inline int append_quoted(Buffer* out, Value value) except -1:
    reserve(out, value.size + 2)
    out.data[out.size] = 0x22
    memcpy(out.data + out.size + 1, value.data, value.size)
    out.data[out.size + 1 + value.size] = 0x22
    out.size += value.size + 2
    return 0


cdef inline bint is_digit(uint8_t c) noexcept nogil:
    return c"0" <= c <= c"9"


cdef bint is_json_number(Value value) noexcept nogil:
    cdef const uint8_t* at = value.data
    cdef const uint8_t* end = at + value.size
    if at < end and at[0] == c"-":
        at += 1
    if at == end or not is_digit(at[0]):
        return False
    if at[0] == c"0":
        at += 1
    else:
        while at < end and is_digit(at[0]):
            at += 1
    if at < end and at[0] == c".":
        at += 1
        if at == end or not is_digit(at[0]):
            return False
        while at < end and is_digit(at[0]):
            at += 1
    if at < end and (at[0] == c"e" or at[0] == c"E"):
        at += 1
        if at < end and (at[0] == c"+" or at[0] == c"-"):
            at += 1
        if at == end or not is_digit(at[0]):
            return False
        while at < end and is_digit(at[0]):
            at += 1
    return at == end


cdef int append_json(Buffer* out, Value value) except -1:
    cdef size_t i = 0
    cdef bint breaks = False, beyond_ascii = False
    cdef uint8_t c
    while i < value.size:
        if value.size - i >= BLOCK and not block_rare(value.data + i):
            i += BLOCK
            continue
        c = value.data[i]
        breaks |= c == 0x0A or c == 0x0D
        beyond_ascii |= c >= 0x80
        i += 1
    if beyond_ascii and not is_utf8(value.data, value.size):
        return append_rendered(out, scalars.json, value)
    append(out, value.data, value.size)
    if breaks:
        for i in range(out.size - value.size, out.size):
            if out.data[i] == 0x0A or out.data[i] == 0x0D:
                out.data[i] = 0x20
    return 0


cdef int append_moment(Buffer* out, Value value, bint zoned) except -1:
    """A timestamp of the common form, which is told by its length and a few bytes."""
    cdef const uint8_t* data = value.data
    cdef size_t size = value.size, digits
    cdef uint8_t* to
    if zoned:
        if (
            size < 22
            or size > 29
            or data[4] != c"-"
            or data[size - 3] != c"+"
            or data[size - 2] != c"0"
            or data[size - 1] != c"0"
        ):
            return append_rendered(out, scalars.timestamptz, value)
        size -= 3
    elif size < 19 or size > 26 or data[4] != c"-" or data[size - 1] > c"9":
        return append_rendered(out, scalars.timestamp, value)
    reserve(out, 32)
    to = out.data + out.size
    to[0] = 0x22
    memcpy(to + 1, data, 10)
    to[11] = c"T"
    if size == 26:
        memcpy(to + 12, data + 11, 15)
    else:
        memcpy(to + 12, data + 11, 8)
        memcpy(to + 20, b".000000", 7)
        digits = size - 20 if size > 20 else 0
        memcpy(to + 21, data + 20, digits)
    size = 27
    if zoned:
        to[size] = c"Z"
        size += 1
    to[size] = 0x22
    out.size += size + 1
    return 0


cdef int append_numbers(Buffer* out, object renderer, Value value) except -1:
    cdef size_t i
    cdef uint8_t c
    cdef uint8_t* to
    if value.size == 0 or value.data[0] != c"{":
        return append_rendered(out, renderer, value)
    for i in range(value.size):
        if not IN_NUMBERS[value.data[i]]:
            return append_rendered(out, renderer, value)
    reserve(out, value.size)
    to = out.data + out.size
    for i in range(value.size):
        c = value.data[i]
        to[i] = c"[" if c == c"{" else c"]" if c == c"}" else c
    out.size += value.size
    return 0


cdef inline int append_value(Buffer* out, Column* column, Value value) except -1:
    cdef Kind kind = column.kind
    if value.data == NULL:
        return append(out, b"null", 4)
    if kind == AS_IT_IS:
        return append(out, value.data, value.size)
    if kind == TEXT or (kind == BYTEA and (value.size < 2 or value.data[0] != 0x5C or value.data[1] != c"x")):
        if append_string(out, value.data, value.size):
            return 0
        return append_rendered(out, scalars.text, value)
    if kind == QUOTED or (kind == DATE and value.size == 10):
        return append_quoted(out, value)
    if kind == BOOLEAN:
        if value.size == 1 and value.data[0] == c"t":
            return append(out, b"true", 4)
        return append(out, b"false", 5)
    if kind == NUMBER:
        if is_json_number(value):
            return append(out, value.data, value.size)
        return append_quoted(out, value)
    if kind == JSON:
        return append_json(out, value)
    if kind == TIMESTAMP or kind == TIMESTAMPTZ:
        return append_moment(out, value, kind == TIMESTAMPTZ)
    if kind == NUMBERS:
        return append_numbers(out, <object> column.renderer, value)
    if kind == BYTEA:
        append(out, b'"\\', 2)
        append(out, value.data, value.size)
        return append_byte(out, 0x22)
    return append_rendered(out, <object> column.renderer, value)
