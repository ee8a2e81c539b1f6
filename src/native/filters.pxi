# Column filters, after spillway.pgoutput.filters. Null tests, integers, texts and moments are compared here, paths are
# followed; of all other kinds the check's own function is asked.

cdef enum:
    CHECKED_BYTES = 65536
    KNOWN_BYTES = 64  # a value at a path, to be remembered
    KNOWN_VALUES = 256

    NO = 0  # what a filter says
    YES = 1
    LEFT = 2

cdef enum CheckKind:
    CHECK_NULL
    CHECK_INTEGER
    CHECK_TEXT
    CHECK_MOMENT
    CHECK_PATH
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
    "null": CHECK_NULL, "integer": CHECK_INTEGER, "text": CHECK_TEXT, "moment": CHECK_MOMENT, "path": CHECK_PATH,
    "python": CHECK_PYTHON,
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
    Step* steps  # of a path; as many as ``count``
    bint absent  # what is told if nothing is there
    PyObject* known  # what was told of values at the path
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


cdef inline int64_t digits(const uint8_t* at, size_t size) noexcept nogil:
    """Of so many digits; a large negative number if one is none."""
    cdef int64_t found = 0
    cdef size_t i
    for i in range(size):
        if not is_digit(at[i]):
            return -100000000
        found = found * 10 + (at[i] - c"0")
    return found


cdef const uint8_t* MONTH_DAYS = b"\x1f\x1c\x1f\x1e\x1f\x1e\x1f\x1f\x1e\x1f\x1e\x1f"


cdef bint parse_moment(Value value, int64_t* microseconds) noexcept nogil:
    """``2024-12-31``, ``2024-12-31 23:59:59.123456`` or the same with ``+00``, of the years 1 to 9999. Everything else is
    left to the reference. The days are Howard Hinnant's ``days_from_civil``."""
    cdef const uint8_t* at = value.data
    cdef size_t size = value.size, fraction
    cdef int64_t year, month, day, hour = 0, minute = 0, second = 0, micros = 0, era, of_year, of_era
    if size < 10 or at[4] != c"-" or at[7] != c"-":
        return False
    year, month, day = digits(at, 4), digits(at + 5, 2), digits(at + 8, 2)
    if year < 1 or month < 1 or month > 12 or day < 1:
        return False
    if day > MONTH_DAYS[month - 1] + (month == 2 and year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)):
        return False
    if size > 10:
        if size > 19 and at[size - 3] == c"+" and at[size - 2] == c"0" and at[size - 1] == c"0":
            size -= 3
        if size < 19 or at[10] != c" " or at[13] != c":" or at[16] != c":":
            return False
        hour, minute, second = digits(at + 11, 2), digits(at + 14, 2), digits(at + 17, 2)
        if hour < 0 or hour > 23 or minute < 0 or minute > 59 or second < 0 or second > 59:
            return False
        if size > 19:
            if at[19] != c"." or size < 21 or size > 26:
                return False
            micros = digits(at + 20, size - 20)
            if micros < 0:
                return False
            for fraction in range(26 - size):
                micros *= 10
    year -= month <= 2
    era = year // 400
    of_era = year - era * 400
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    of_era = of_era * 365 + of_era // 4 - of_era // 100 + of_year
    microseconds[0] = (
        (((era * 146097 + of_era - 719468) * 24 + hour) * 60 + minute) * 60 + second
    ) * 1000000 + micros
    return True


# The values of a list are in order (spillway.pgoutput.conditions): it may be one of 100,000 tenants.

cdef bint number_holds(Check* check, int64_t number) noexcept nogil:
    cdef int low = 0, high = check.count, middle
    if check.operator != OP_IN and check.operator != OP_NOT_IN:
        return ordered(check.operator, (number > check.integers[0]) - (number < check.integers[0]))
    while low < high:
        middle = low + (high - low) // 2
        if check.integers[middle] < number:
            low = middle + 1
        else:
            high = middle
    return (low < check.count and check.integers[low] == number) == (check.operator == OP_IN)


cdef bint text_holds(Check* check, Value value) noexcept nogil:
    cdef Slice text
    cdef int low = 0, high = check.count, middle
    text.data, text.size = value.data, value.size
    if check.trimmed:
        while text.size and text.data[text.size - 1] == c" ":
            text.size -= 1
    if check.operator == OP_PREFIX:
        return text.size >= check.texts[0].size and memcmp(text.data, check.texts[0].data, check.texts[0].size) == 0
    if check.operator != OP_IN and check.operator != OP_NOT_IN:
        return ordered(check.operator, text_sign(text, check.texts[0]))
    while low < high:
        middle = low + (high - low) // 2
        if text_sign(check.texts[middle], text) < 0:
            low = middle + 1
        else:
            high = middle
    return (low < check.count and text_sign(check.texts[low], text) == 0) == (check.operator == OP_IN)


cdef bint path_holds(Check* check, Value value) except -1:
    cdef Value found
    cdef dict known
    cdef bytes text
    if not follow(value, check.steps, check.count, &found):
        return (<object> check.holds)(value_bytes(value)) is not False
    if found.data == NULL:
        return check.absent
    text = value_bytes(found)
    if found.size > KNOWN_BYTES:
        return (<object> check.holds).of_value(text) is not False
    known = <dict> check.known
    told = known.get(text)
    if told is None:
        told = (<object> check.holds).of_value(text) is not False
        if len(known) >= KNOWN_VALUES:
            known.clear()
        known[text] = told
    return <bint> told


cdef bint check_holds(Check* check, Value value, bint null_is_unknown) except -1:
    cdef int64_t number
    if value.data == UNCHANGED:
        return not (check.kind == CHECK_NULL and check.of_null)  # what is stored apart is no null
    if value.data == NULL:
        return null_is_unknown or check.of_null
    if check.kind == CHECK_NULL:
        return not check.of_null
    if check.kind == CHECK_INTEGER:
        return not parse_integer(value, &number) or number_holds(check, number)
    if check.kind == CHECK_MOMENT and parse_moment(value, &number):
        return number_holds(check, number)
    if check.kind == CHECK_TEXT:
        return text_holds(check, value)
    if check.kind == CHECK_PATH:
        return path_holds(check, value)
    return (<object> check.holds)(value_bytes(value)) is not False


cdef bint admits(Filter* one, Value* row, bint partial) except -1:
    cdef int i
    for i in range(one.count):
        if not check_holds(&one.checks[i], row[one.checks[i].column], partial):
            return False
    return True
