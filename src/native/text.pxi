# Bytes as they are: scanning, JSON escapes, UTF-8, numbers, base64, CRC-32. Nothing here knows of frames or tables.

cdef enum:
    BLOCK = 64

cdef uint8_t* HEX = b"0123456789abcdef"
cdef uint8_t* BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
cdef uint8_t SPECIAL[256]  # bytes that a JSON string cannot hold as they are, and those of which UTF-8 must be checked
cdef uint32_t CRC[8][256]


cdef void fill_tables() noexcept:
    cdef int i, j
    cdef uint32_t c
    for i in range(256):
        SPECIAL[i] = i < 0x20 or i == 0x22 or i == 0x5C or i >= 0x80
        c = i
        for j in range(8):
            c = (c >> 1) ^ (0xEDB88320u if c & 1 else 0)
        CRC[0][i] = c
    for i in range(256):
        for j in range(1, 8):
            CRC[j][i] = (CRC[j - 1][i] >> 8) ^ CRC[0][CRC[j - 1][i] & 0xFF]


fill_tables()


cdef inline uint64_t load64(const uint8_t* data) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, data, 8)
    return word


cdef inline uint32_t big32(const uint8_t* data) noexcept nogil:
    return (<uint32_t> data[0] << 24) | (<uint32_t> data[1] << 16) | (<uint32_t> data[2] << 8) | data[3]


cdef inline uint64_t big64(const uint8_t* data) noexcept nogil:
    return (<uint64_t> big32(data) << 32) | big32(data + 4)


cdef inline bint any_special(uint64_t word) noexcept nogil:
    """Whether one of eight bytes is SPECIAL (Warren, Hacker's Delight, "Find First 0-Byte")."""
    cdef uint64_t quote = word ^ 0x2222222222222222u
    cdef uint64_t backslash = word ^ 0x5C5C5C5C5C5C5C5Cu
    return (
        (
            word
            | ((word - 0x2020202020202020u) & ~word)
            | ((quote - 0x0101010101010101u) & ~quote)
            | ((backslash - 0x0101010101010101u) & ~backslash)
        )
        & 0x8080808080808080u
    ) != 0


cdef inline bint block_special(const uint8_t* data) noexcept nogil:
    """The same of BLOCK bytes, in a form that compilers turn into vector instructions."""
    cdef uint8_t found = 0
    cdef int i
    for i in range(BLOCK):
        found |= (<int8_t> data[i] < 0x20) | (data[i] == 0x22) | (data[i] == 0x5C)
    return found != 0


cdef inline bint block_rare(const uint8_t* data) noexcept nogil:
    """Whether one of BLOCK bytes is a control character or not ASCII."""
    cdef uint8_t found = 0
    cdef int i
    for i in range(BLOCK):
        found |= <int8_t> data[i] < 0x20
    return found != 0


cdef inline size_t copy_plain(uint8_t* out, const uint8_t* data, size_t size) noexcept nogil:
    """Copies up to the first SPECIAL byte; how many that was. ``out`` has room for all, beyond it nothing is written."""
    cdef size_t i = 0
    cdef uint64_t word
    while size - i >= BLOCK:
        if block_special(data + i):
            break
        memcpy(out + i, data + i, BLOCK)
        i += BLOCK
    while size - i >= 8:
        word = load64(data + i)
        if any_special(word):
            break
        memcpy(out + i, &word, 8)
        i += 8
    while i < size and not SPECIAL[data[i]]:
        out[i] = data[i]
        i += 1
    return i


cdef inline bint continues(uint8_t byte) noexcept nogil:
    return (byte & 0xC0) == 0x80


cdef size_t utf8_run(const uint8_t* data, size_t size) noexcept nogil:
    """How many bytes from here on are well-formed sequences of two to four bytes (Unicode, table 3-7)."""
    cdef size_t i = 0
    cdef uint8_t c, low, high
    while i < size:
        c = data[i]
        if c < 0xC2 or c > 0xF4:
            break
        if c < 0xE0:
            if size - i < 2 or not continues(data[i + 1]):
                break
            i += 2
        elif c < 0xF0:
            low = 0xA0 if c == 0xE0 else 0x80
            high = 0x9F if c == 0xED else 0xBF
            if size - i < 3 or not (low <= data[i + 1] <= high) or not continues(data[i + 2]):
                break
            i += 3
        else:
            low = 0x90 if c == 0xF0 else 0x80
            high = 0x8F if c == 0xF4 else 0xBF
            if (
                size - i < 4
                or not (low <= data[i + 1] <= high)
                or not continues(data[i + 2])
                or not continues(data[i + 3])
            ):
                break
            i += 4
    return i


cdef bint is_utf8(const uint8_t* data, size_t size) noexcept nogil:
    cdef size_t i = 0, run
    while i < size:
        if size - i >= 8 and not load64(data + i) & 0x8080808080808080u:
            i += 8
        elif data[i] < 0x80:
            i += 1
        else:
            run = utf8_run(data + i, size - i)
            if run == 0:
                return False
            i += run
    return True


cdef inline size_t write_escape(uint8_t* out, uint8_t c) noexcept nogil:
    """A quote, a backslash or a control character as orjson writes it; at most six bytes."""
    cdef uint8_t short_form = 0
    if c == 0x22 or c == 0x5C:
        short_form = c
    elif c == 0x08:
        short_form = c"b"
    elif c == 0x09:
        short_form = c"t"
    elif c == 0x0A:
        short_form = c"n"
    elif c == 0x0C:
        short_form = c"f"
    elif c == 0x0D:
        short_form = c"r"
    out[0] = 0x5C
    if short_form:
        out[1] = short_form
        return 2
    out[1] = c"u"
    out[2] = out[3] = c"0"
    out[4] = HEX[c >> 4]
    out[5] = HEX[c & 15]
    return 6


cdef int append_string(Buffer* out, const uint8_t* data, size_t size) except -1:
    """A JSON string, as orjson writes it. 0, and nothing is written, if it is not UTF-8."""
    cdef size_t began = out.size, i = 0, run
    reserve(out, size + 16)
    out.data[out.size] = 0x22
    out.size += 1
    while True:
        run = copy_plain(out.data + out.size, data + i, size - i)
        out.size += run
        i += run
        if i == size:
            break
        if data[i] < 0x80:
            out.size += write_escape(out.data + out.size, data[i])
            i += 1
        else:
            run = utf8_run(data + i, size - i)
            if run == 0:
                out.size = began
                return 0
            memcpy(out.data + out.size, data + i, run)
            out.size += run
            i += run
        reserve(out, size - i + 16)
    out.data[out.size] = 0x22
    out.size += 1
    return 1


cdef inline size_t write_number(uint8_t* out, uint64_t number) noexcept nogil:
    """In decimal; at most 20 bytes."""
    cdef uint8_t digits[20]
    cdef size_t size = 0, i
    while True:
        digits[size] = c"0" + <uint8_t> (number % 10)
        size += 1
        number //= 10
        if number == 0:
            break
    for i in range(size):
        out[i] = digits[size - 1 - i]
    return size


cdef inline size_t write_base64(uint8_t* out, const uint8_t* data, size_t size) noexcept nogil:
    """With padding; ``4 * ceil(size / 3)`` bytes."""
    cdef size_t i = 0, o = 0
    cdef uint32_t three
    while size - i >= 3:
        three = (<uint32_t> data[i] << 16) | (<uint32_t> data[i + 1] << 8) | data[i + 2]
        out[o] = BASE64[three >> 18]
        out[o + 1] = BASE64[(three >> 12) & 63]
        out[o + 2] = BASE64[(three >> 6) & 63]
        out[o + 3] = BASE64[three & 63]
        i += 3
        o += 4
    if i < size:
        three = <uint32_t> data[i] << 16
        if size - i == 2:
            three |= <uint32_t> data[i + 1] << 8
        out[o] = BASE64[three >> 18]
        out[o + 1] = BASE64[(three >> 12) & 63]
        out[o + 2] = BASE64[(three >> 6) & 63] if size - i == 2 else c"="
        out[o + 3] = c"="
        o += 4
    return o


cdef inline uint32_t crc32_more(uint32_t crc, const uint8_t* data, size_t size) noexcept nogil:
    """zlib's ``crc32(data, crc)``, eight bytes at a time (Kounavis and Berry, "Slicing-by-8")."""
    cdef uint32_t low
    crc = ~crc
    while size >= 8:
        low = crc ^ (data[0] | (<uint32_t> data[1] << 8) | (<uint32_t> data[2] << 16) | (<uint32_t> data[3] << 24))
        crc = (
            CRC[7][low & 0xFF]
            ^ CRC[6][(low >> 8) & 0xFF]
            ^ CRC[5][(low >> 16) & 0xFF]
            ^ CRC[4][low >> 24]
            ^ CRC[3][data[4]]
            ^ CRC[2][data[5]]
            ^ CRC[1][data[6]]
            ^ CRC[0][data[7]]
        )
        data += 8
        size -= 8
    while size:
        crc = (crc >> 8) ^ CRC[0][(crc ^ data[0]) & 0xFF]
        data += 1
        size -= 1
    return ~crc
