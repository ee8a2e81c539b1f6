# The texts of a row's keys, one behind the other: the primary key's, and each group's.

cdef struct Keys:
    Buffer texts
    Buffer values  # of the primary key, as JSON
    size_t* ends
    uint64_t* hashes


cdef int keys_open(Keys* keys, int count) except -1:
    buffer_open(&keys.texts, SMALLEST_CAPACITY)
    buffer_open(&keys.values, SMALLEST_CAPACITY)
    keys.ends = <size_t*> PyMem_Malloc(count * sizeof(size_t))
    keys.hashes = <uint64_t*> PyMem_Malloc(count * sizeof(uint64_t))
    if keys.ends == NULL or keys.hashes == NULL:
        raise MemoryError
    return 0


cdef void keys_close(Keys* keys) noexcept:
    buffer_close(&keys.texts)
    buffer_close(&keys.values)
    PyMem_Free(keys.ends)
    PyMem_Free(keys.hashes)


cdef inline Slice key_text(Keys* keys, int number) noexcept:
    cdef Slice text
    cdef size_t start = keys.ends[number - 1] if number else 0
    text.data = keys.texts.data + start
    text.size = keys.ends[number] - start
    return text


cdef int read_keys(Keys* keys, Plan plan, Value* row) except -1:
    """All keys of a row, in which nothing is UNCHANGED any more."""
    cdef int number
    cdef Slice primary
    keys.texts.size = keys.values.size = 0
    read_primary(keys, plan, row)
    keys.ends[0] = keys.texts.size
    primary = key_text(keys, 0)
    keys.hashes[0] = hash_of(plan, primary)
    for number in range(plan.group_count):
        if plan.groups[number].count < 0:
            reserve(&keys.texts, keys.ends[0])
            append(&keys.texts, keys.texts.data, keys.ends[0])
            keys.hashes[1 + number] = keys.hashes[0]
            keys.ends[1 + number] = keys.texts.size
        else:
            read_group(&keys.texts, plan, &plan.groups[number], row)
            keys.ends[1 + number] = keys.texts.size
            keys.hashes[1 + number] = hash_of(plan, key_text(keys, 1 + number))
    return 0


cdef inline uint64_t hash_of(Plan plan, Slice key) noexcept:
    """`spillway.chunk.key_hash`: every key begins with the table's prefix."""
    if key.size == 0:
        return 0
    return crc32_more(plan.prefix_crc, key.data + plan.prefix.size, key.size - plan.prefix.size) | <uint64_t> 1 << 32


cdef int read_primary(Keys* keys, Plan plan, Value* row) except -1:
    cdef int at
    cdef Value value
    cdef bint first = True
    for at in range(plan.primary_count):
        if row[plan.primary[at]].data == NULL:
            return append(&keys.values, b"[]", 2)
    if plan.primary_count == 0:
        return append(&keys.values, b"[]", 2)
    append(&keys.texts, plan.prefix.data, plan.prefix.size)
    if plan.plain_primary:
        value = row[plan.primary[0]]
        append(&keys.texts, value.data, value.size)
        append(&keys.values, b'["', 2)
        append(&keys.values, value.data, value.size)
        return append(&keys.values, b'"]', 2)
    append_byte(&keys.values, c"[")
    for at in range(plan.primary_count):
        if not first:
            append_byte(&keys.texts, c":")
            append_byte(&keys.values, c",")
        first = False
        value = row[plan.primary[at]]
        if append_string(&keys.values, value.data, value.size):
            append_part(&keys.texts, value)
        else:
            append_odd_part(&keys.texts, &keys.values, value)
    return append_byte(&keys.values, c"]")


cdef int read_group(Buffer* texts, Plan plan, Group* group, Value* row) except -1:
    cdef int at
    cdef Value value
    append(texts, plan.prefix.data, plan.prefix.size)
    for at in range(group.count):
        if at:
            append_byte(texts, c":")
        if group.columns[at] < 0 or row[group.columns[at]].data == NULL:
            append(texts, b"\\N", 2)
            continue
        value = row[group.columns[at]]
        if value.size > GROUP_VALUE_BYTES:
            append_bytes(texts, f"sha256-{sha256(value_bytes(value)).hexdigest()}".encode())
        elif is_utf8(value.data, value.size):
            append_part(texts, value)
        else:
            append_odd_part(texts, NULL, value)
    return 0


cdef int append_odd_part(Buffer* texts, Buffer* values, Value value) except -1:
    """A part of a key that is not UTF-8."""
    cdef bytes text = scalars.to_text(value_bytes(value)).encode()
    value.data = <const uint8_t*> PyBytes_AS_STRING(text)
    value.size = <size_t> PyBytes_GET_SIZE(text)
    append_part(texts, value)
    if values != NULL:
        append_string(values, value.data, value.size)
    return 0


cdef int append_part(Buffer* texts, Value value) except -1:
    """Escaped as `spillway.change.make_key` does."""
    cdef size_t i
    cdef uint8_t c
    reserve(texts, value.size * 2)
    for i in range(value.size):
        c = value.data[i]
        if c == 0x5C or c == c"." or c == c":":
            texts.data[texts.size] = 0x5C
            texts.size += 1
        texts.data[texts.size] = c
        texts.size += 1
    return 0
