# Column filters, after spillway.pgoutput.filters. Null tests, integers and texts are compared here; of all other kinds the
# check's own function is asked.

cdef enum:
    CHECKED_BYTES = 65536

    NO = 0  # what a filter says
    YES = 1
    LEFT = 2

cdef struct Slice:
    const uint8_t* data
    size_t size

cdef enum CheckKind:
    CHECK_NULL
    CHECK_INTEGER
    CHECK_TEXT
    CHECK_PYTHON

cdef enum CheckOperator:
    OP_NONE
    OP_EQ
    OP_NE
    OP_LT
    OP_LTE
    OP_GT
    OP_GTE
    OP_IN
    OP_NOT_IN
    OP_PREFIX

cdef dict CHECK_KINDS = {
    "null": CHECK_NULL, "integer": CHECK_INTEGER, "text": CHECK_TEXT, "python": CHECK_PYTHON,
}
cdef dict CHECK_OPERATORS = {
    "": OP_NONE, "eq": OP_EQ, "ne": OP_NE, "lt": OP_LT, "lte": OP_LTE, "gt": OP_GT, "gte": OP_GTE, "in": OP_IN,
    "not_in": OP_NOT_IN, "prefix": OP_PREFIX,
}

cdef struct Check:
    int column
    bint of_null
    bint trimmed
    CheckKind kind
    CheckOperator operator
    int count
    int64_t* integers
    Slice* texts
    PyObject* holds

cdef struct Filter:
    int number
    uint32_t actions  # bits
    bint leaves
    int count
    Check* checks


cdef inline bint parse_integer(Value value, int64_t* number) noexcept nogil:
    """Whether it is one that 64 bits hold."""
    cdef size_t at = 0
    cdef uint64_t found = 0
    cdef bint negative = value.size > 0 and value.data[0] == c"-"
    at = 1 if negative else 0
    if value.size == at or value.size - at > 19:
        return False
    while at < value.size:
        if not is_digit(value.data[at]):
            return False
        found = found * 10 + (value.data[at] - c"0")  # 19 digits never overflow
        at += 1
    if found > (<uint64_t> 1 << 63) - (0 if negative else 1):
        return False
    number[0] = <int64_t> (0 - found) if negative else <int64_t> found
    return True


cdef inline bint ordered(CheckOperator operator, int sign) noexcept nogil:
    """``sign``: of the value less the check's."""
    if operator == OP_EQ or operator == OP_IN:
        return sign == 0
    if operator == OP_NE or operator == OP_NOT_IN:
        return sign != 0
    if operator == OP_LT:
        return sign < 0
    if operator == OP_LTE:
        return sign <= 0
    if operator == OP_GT:
        return sign > 0
    return sign >= 0


cdef inline int text_sign(Slice one, Slice other) noexcept nogil:
    cdef int sign = memcmp(one.data, other.data, min(one.size, other.size))
    if sign:
        return sign
    return (one.size > other.size) - (one.size < other.size)


cdef bint integer_holds(Check* check, Value value) noexcept nogil:
    cdef int64_t number
    cdef int i
    cdef bint is_listed = check.operator == OP_IN or check.operator == OP_NOT_IN
    if not parse_integer(value, &number):
        return True
    if not is_listed:
        return ordered(check.operator, (number > check.integers[0]) - (number < check.integers[0]))
    for i in range(check.count):
        if number == check.integers[i]:
            return check.operator == OP_IN
    return check.operator == OP_NOT_IN


cdef bint text_holds(Check* check, Value value) noexcept nogil:
    cdef Slice text
    cdef int i
    text.data, text.size = value.data, value.size
    if check.trimmed:
        while text.size and text.data[text.size - 1] == c" ":
            text.size -= 1
    if check.operator == OP_PREFIX:
        return text.size >= check.texts[0].size and memcmp(text.data, check.texts[0].data, check.texts[0].size) == 0
    if check.operator != OP_IN and check.operator != OP_NOT_IN:
        return ordered(check.operator, text_sign(text, check.texts[0]))
    for i in range(check.count):
        if text.size == check.texts[i].size and memcmp(text.data, check.texts[i].data, text.size) == 0:
            return check.operator == OP_IN
    return check.operator == OP_NOT_IN


cdef bint check_holds(Check* check, Value value, bint null_is_unknown) except -1:
    if value.data == UNCHANGED:
        return True
    if value.data == NULL:
        return null_is_unknown or check.of_null
    if check.kind == CHECK_NULL:
        return not check.of_null
    if check.kind == CHECK_INTEGER:
        return integer_holds(check, value)
    if check.kind == CHECK_TEXT:
        return text_holds(check, value)
    return (<object> check.holds)(value_bytes(value)) is not False


cdef bint admits(Filter* one, Value* row, bint partial) except -1:
    cdef int i
    for i in range(one.count):
        if not check_holds(&one.checks[i], row[one.checks[i].column], partial):
            return False
    return True
