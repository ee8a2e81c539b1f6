# A path through JSON text (RFC 8259), after spillway.pgoutput.paths. The whole text is looked at, so that what is told
# holds of valid texts alone, and of a key that comes twice the last counts, as for PostgreSQL's operators.

cdef enum:
    DEEPEST = 500

cdef struct Slice:
    const uint8_t* data
    size_t size

cdef struct Step:
    Slice key
    int index  # of an array; NO_INDEX, FROM_THE_END

cdef enum:
    NO_INDEX = -1
    FROM_THE_END = -2

cdef struct Walk:
    const uint8_t* at
    const uint8_t* end
    Step* steps
    int count
    Value found


cdef bint follow(Value text, Step* steps, int count, Value* found) noexcept nogil:
    """What stands at the path (``data`` is NULL: nothing does). False: nobody can say here."""
    cdef Walk walk
    walk.at, walk.end = text.data, text.data + text.size
    walk.steps, walk.count = steps, count
    walk.found.data, walk.found.size = NULL, 0
    if not walk_value(&walk, 0, 0):
        return False
    skip_blanks(&walk)
    found[0] = walk.found
    return walk.at == walk.end


cdef inline void skip_blanks(Walk* walk) noexcept nogil:
    while walk.at < walk.end and (walk.at[0] == c" " or walk.at[0] == c"\n" or walk.at[0] == c"\t" or walk.at[0] == c"\r"):
        walk.at += 1


cdef inline bint skip_byte(Walk* walk, uint8_t byte) noexcept nogil:
    """Blanks, and this one, if it is there."""
    skip_blanks(walk)
    if walk.at == walk.end or walk.at[0] != byte:
        return False
    walk.at += 1
    return True


cdef bint walk_value(Walk* walk, int step, int depth) noexcept nogil:
    """``step``: the next one; -1 beside the path."""
    cdef const uint8_t* start
    cdef uint8_t first
    cdef bint escaped
    skip_blanks(walk)
    if walk.at == walk.end or depth > DEEPEST:
        return False
    start, first = walk.at, walk.at[0]
    if first == c"{":
        if not walk_object(walk, step if step < walk.count else -1, depth):
            return False
    elif first == c"[":
        if not walk_array(walk, step if step < walk.count else -1, depth):
            return False
    elif first == c'"':
        if not walk_string(walk, &escaped):
            return False
    elif not walk_word(walk, first):
        return False
    if step == walk.count:
        walk.found.data, walk.found.size = start, walk.at - start
    return True


cdef bint walk_object(Walk* walk, int step, int depth) noexcept nogil:
    cdef const uint8_t* key
    cdef size_t size
    cdef bint escaped, meant
    walk.at += 1
    if skip_byte(walk, c"}"):
        return True
    while True:
        skip_blanks(walk)
        key = walk.at + 1
        if not walk_string(walk, &escaped) or (escaped and step >= 0):
            return False
        size = walk.at - 1 - key
        meant = step >= 0 and size == walk.steps[step].key.size and memcmp(key, walk.steps[step].key.data, size) == 0
        if meant:
            walk.found.data = NULL
        if not skip_byte(walk, c":") or not walk_value(walk, step + 1 if meant else -1, depth + 1):
            return False
        if skip_byte(walk, c"}"):
            return True
        if not skip_byte(walk, c","):
            return False


cdef bint walk_array(Walk* walk, int step, int depth) noexcept nogil:
    cdef int index = 0
    if step >= 0 and walk.steps[step].index == FROM_THE_END:
        return False
    walk.at += 1
    if skip_byte(walk, c"]"):
        return True
    while True:
        if not walk_value(walk, step + 1 if step >= 0 and index == walk.steps[step].index else -1, depth + 1):
            return False
        index += 1
        if skip_byte(walk, c"]"):
            return True
        if not skip_byte(walk, c","):
            return False


cdef bint walk_string(Walk* walk, bint* escaped) noexcept nogil:
    cdef uint8_t byte
    cdef int i
    escaped[0] = False
    if walk.at == walk.end or walk.at[0] != c'"':
        return False
    walk.at += 1
    while walk.at < walk.end:
        byte = walk.at[0]
        walk.at += 1
        if byte == c'"':
            return True
        if byte < 0x20:
            return False
        if byte != c"\\":
            continue
        escaped[0] = True
        if walk.at == walk.end:
            return False
        byte = walk.at[0]
        walk.at += 1
        if byte == c"u":
            if walk.end - walk.at < 4:
                return False
            for i in range(4):
                if not is_hex(walk.at[i]):
                    return False
            walk.at += 4
        elif memchr(b'"\\/bfnrt', byte, 8) == NULL:
            return False
    return False


cdef inline bint is_hex(uint8_t byte) noexcept nogil:
    return is_digit(byte) or c"a" <= (byte | 0x20) <= c"f"


cdef bint walk_word(Walk* walk, uint8_t first) noexcept nogil:
    """A number, true, false or null."""
    if first == c"t":
        return walk_literal(walk, b"true", 4)
    if first == c"f":
        return walk_literal(walk, b"false", 5)
    if first == c"n":
        return walk_literal(walk, b"null", 4)
    if first == c"-":
        walk.at += 1
    if walk.at < walk.end and walk.at[0] == c"0":
        walk.at += 1
    elif not walk_digits(walk):
        return False
    if walk.at < walk.end and walk.at[0] == c".":
        walk.at += 1
        if not walk_digits(walk):
            return False
    if walk.at < walk.end and (walk.at[0] | 0x20) == c"e":
        walk.at += 1
        if walk.at < walk.end and (walk.at[0] == c"+" or walk.at[0] == c"-"):
            walk.at += 1
        return walk_digits(walk)
    return True


cdef inline bint walk_literal(Walk* walk, const uint8_t* word, ptrdiff_t size) noexcept nogil:
    if walk.end - walk.at < size or memcmp(walk.at, word, size) != 0:
        return False
    walk.at += size
    return True


cdef inline bint walk_digits(Walk* walk) noexcept nogil:
    cdef const uint8_t* start = walk.at
    while walk.at < walk.end and is_digit(walk.at[0]):
        walk.at += 1
    return walk.at > start
