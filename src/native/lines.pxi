# Lines of COPY in text format, after spillway.pgoutput.lines.

cdef enum:
    INSERT_BYTES = 8  # of the frame of an insert, before its columns

cdef uint8_t ESCAPED[256]  # what stands behind a backslash to what is meant; 0: nothing


cdef void fill_escapes() noexcept:
    ESCAPED[c"b"] = 0x08
    ESCAPED[c"f"] = 0x0C
    ESCAPED[c"n"] = 0x0A
    ESCAPED[c"r"] = 0x0D
    ESCAPED[c"t"] = 0x09
    ESCAPED[c"v"] = 0x0B
    ESCAPED[0x5C] = 0x5C


fill_escapes()


cdef Py_ssize_t unescape(const uint8_t* field, size_t size, size_t at, Buffer* out) except -1:
    """Appends the value of a field whose first backslash is at ``at``, if there is an output, which has room. How long
    the value is."""
    cdef uint8_t* to = out.data + out.size if out != NULL else NULL
    cdef size_t length = 0, start = 0
    cdef const uint8_t* found
    cdef uint8_t value
    while True:
        value = ESCAPED[field[at + 1]] if at + 1 < size else 0
        if not value:
            raise ProtocolError("an escape that COPY does not write")
        if to != NULL:
            memcpy(to + length, field + start, at - start)
            to[length + at - start] = value
        length += at - start + 1
        start = at + 2
        found = <const uint8_t*> memchr(field + start, 0x5C, size - start)
        if found == NULL:
            break
        at = found - field
    if to != NULL:
        memcpy(to + length, field + start, size - start)
    length += size - start
    if out != NULL:
        out.size += length
    return <Py_ssize_t> length


cdef size_t split_line(
    Plan plan, const uint8_t* line, size_t size, Value* row, Buffer* scratch, bint key_alone, bint checked
) except 0:
    """The row; values that had escapes lie in ``scratch``, which does not move meanwhile. ``key_alone``: other columns
    than the key's are null. ``checked``: than those that filters look at, and of these long values are not known.
    Returns the size of the frame that the row's insert would have."""
    cdef const uint8_t* at = line
    cdef const uint8_t* end
    cdef const uint8_t* stop
    cdef const uint8_t* escape
    cdef size_t insert_bytes = INSERT_BYTES, length
    cdef bint escapes, wanted
    cdef int index
    if size == 0 or line[size - 1] != c"\n":
        raise ProtocolError("a line without an end")
    end = line + size - 1
    escapes = memchr(line, 0x5C, size) != NULL
    if escapes:
        scratch.size = 0
        reserve(scratch, size)  # what is not written to is never resident
    for index in range(plan.column_count):
        stop = <const uint8_t*> memchr(at, c"\t", end - at)
        if (stop == NULL) != (index == plan.column_count - 1):
            raise ProtocolError(f"a line that has not the {plan.column_count} fields that are due")
        if stop == NULL:
            stop = end
        length = stop - at
        wanted = plan.columns[index].in_check if checked else not key_alone or plan.columns[index].in_key
        row[index].data = at if wanted else NULL
        row[index].size = length if wanted else 0
        if escapes:
            escape = <const uint8_t*> memchr(at, 0x5C, length)
            if escape != NULL:
                if length == 2 and escape == at and at[1] == c"N":
                    row[index].data = NULL
                    row[index].size = 0
                    insert_bytes += 1
                    at = stop + 1
                    continue
                length = unescape(at, length, escape - at, scratch if wanted else NULL)
                if wanted:
                    row[index].data = scratch.data + scratch.size - length
                    row[index].size = length
        if checked and wanted and length > CHECKED_BYTES:
            row[index].data = UNCHANGED
            row[index].size = UNCHANGED_BYTES
        insert_bytes += 5 + length
        at = stop + 1
    if plan.column_count == 0 and at != end:
        raise ProtocolError("a line with fields where none are due")
    return insert_bytes
