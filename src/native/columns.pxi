# The columns of a chunk as a whole, after spillway.columns. What a chunk says of its own lengths is checked: it may have
# been read from a file.

cdef enum:
    OLD_DELETE = 16
    GONE_DELETE = 32
    LONGEST_PLAIN_ID = 128  # see `bulk`

@cython.final
cdef class Columns:
    """A chunk's memory, and some of its indices."""

    cdef object chunk
    cdef bytes data
    cdef bytes meta
    cdef bytes keys
    cdef const uint8_t* bodies
    cdef const uint8_t* records
    cdef const uint8_t* texts
    cdef size_t stride
    cdef size_t total
    cdef size_t* indices
    cdef size_t count

    def __cinit__(self, chunk, indices):
        self.chunk = chunk
        self.data, self.meta, self.keys = chunk.data, chunk.meta, chunk.keys
        self.bodies = <const uint8_t*> PyBytes_AS_STRING(self.data)
        self.records = <const uint8_t*> PyBytes_AS_STRING(self.meta)
        self.texts = <const uint8_t*> PyBytes_AS_STRING(self.keys)
        self.stride = <size_t> (chunk.stride * 8)
        self.total = <size_t> chunk.count
        if self.stride < WORDS * 8 or <size_t> PyBytes_GET_SIZE(self.meta) < self.total * self.stride:
            raise ValueError("a chunk whose records are not all there")
        self.count = <size_t> len(indices)
        self.indices = <size_t*> PyMem_Malloc((self.count + 1) * sizeof(size_t))
        if self.indices == NULL:
            raise MemoryError
        cdef size_t at, start, step
        cdef Py_ssize_t index
        if isinstance(indices, range):
            start, step = (indices.start, indices.step) if self.count else (0, 1)
            for at in range(self.count):
                self.indices[at] = start + at * step
        else:
            for at, index in enumerate(indices):
                self.indices[at] = <size_t> index
        for at in range(self.count):
            if self.indices[at] >= self.total:
                raise IndexError("no such change in the chunk")

    def __dealloc__(self):
        PyMem_Free(self.indices)

    cdef inline uint64_t word(self, size_t index, size_t word) noexcept:
        cdef uint64_t value
        memcpy(&value, self.records + index * self.stride + word * 8, 8)
        return value

    cdef Slice body(self, size_t index) except *:
        cdef Slice body
        cdef size_t start = self.word(index - 1, 3) & 0xFFFFFFFF if index else 0
        cdef size_t end = self.word(index, 3) & 0xFFFFFFFF
        if start > end or end > <size_t> PyBytes_GET_SIZE(self.data):
            raise ValueError("a chunk whose bodies are not all there")
        body.data = self.bodies + start
        body.size = end - start
        return body

    cdef Slice key_texts(self, size_t index) except *:
        """All of a change, each with its zero byte."""
        cdef Slice texts
        cdef size_t start = self.word(index - 1, 3) >> 32 if index else 0
        cdef size_t end = self.word(index, 3) >> 32
        if start >= end or end > <size_t> PyBytes_GET_SIZE(self.keys):
            raise ValueError("a chunk whose keys are not all there")
        texts.data = self.texts + start
        texts.size = end - start
        return texts


cdef Slice two_texts(Slice texts, size_t skipped) except *:
    """Two of the texts behind so many others, with their zero bytes."""
    cdef Slice two
    cdef const uint8_t* at = texts.data
    cdef const uint8_t* end = at + texts.size
    cdef const uint8_t* start = at
    cdef size_t number
    for number in range(skipped + 2):
        if number == skipped:
            start = at
        at = <const uint8_t*> memchr(at, 0, end - at) if at < end else NULL
        if at == NULL:
            raise ValueError("a chunk whose keys are not all there")
        at += 1
    two.data = start
    two.size = at - start
    return two


def gather(chunk, indices, Py_ssize_t hash_word):
    cdef bint own = hash_word == 6
    if own and len(indices) == chunk.count and chunk.groups == 0:
        return chunk
    cdef Columns columns = Columns(chunk, indices)
    cdef size_t record_bytes = WORDS * 8 + (0 if own else 16)
    cdef size_t at, index, place, size = 0
    cdef Buffer bodies, records, keys
    cdef Slice slice
    cdef uint64_t ends
    if not own and (hash_word < WORDS or <size_t> (hash_word + 2) * 8 > columns.stride):
        raise ValueError("no such group in the chunk")
    for at in range(columns.count):
        size += columns.body(columns.indices[at]).size
    bodies.owner = records.owner = keys.owner = NULL
    try:
        buffer_open(&bodies, size + 2)
        buffer_open(&records, columns.count * record_bytes + 2)
        buffer_open(&keys, columns.count * 64 + 2)
        for at in range(columns.count):
            index = columns.indices[at]
            slice = columns.body(index)
            append(&bodies, slice.data, slice.size)
            slice = columns.key_texts(index)
            if columns.stride > WORDS * 8:
                if not own:
                    place = <size_t> hash_word - 6
                    append(&keys, two_texts(slice, 0).data, two_texts(slice, 0).size)
                    slice = two_texts(slice, place)
                else:
                    slice = two_texts(slice, 0)
            append(&keys, slice.data, slice.size)
            append(&records, columns.records + index * columns.stride, WORDS * 8)
            ends = <uint64_t> bodies.size | <uint64_t> keys.size << 32
            memcpy(records.data + records.size - (WORDS - 3) * 8, &ends, 8)
            if not own:
                append(&records, columns.records + index * columns.stride + hash_word * 8, 16)
        return Chunk(
            columns.count,
            buffer_take(&bodies),
            buffer_take(&records),
            buffer_take(&keys),
            chunk.tables,
            0 if own else 1,
        )
    finally:
        buffer_close(&bodies)
        buffer_close(&records)
        buffer_close(&keys)


def join(chunk, indices, bytes before, bytes after):
    cdef Columns columns = Columns(chunk, indices)
    cdef size_t before_size = <size_t> PyBytes_GET_SIZE(before), after_size = <size_t> PyBytes_GET_SIZE(after)
    cdef size_t at, size = columns.count * (before_size + after_size)
    cdef Slice body
    for at in range(columns.count):
        size += columns.body(columns.indices[at]).size
    cdef bytes joined = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> size)
    cdef uint8_t* to = <uint8_t*> PyBytes_AS_STRING(joined)
    for at in range(columns.count):
        body = columns.body(columns.indices[at])
        memcpy(to, PyBytes_AS_STRING(before), before_size)
        to += before_size
        memcpy(to, body.data, body.size)
        to += body.size
        memcpy(to, PyBytes_AS_STRING(after), after_size)
        to += after_size
    return joined


def by_kind(chunk):
    cdef Columns columns = Columns(chunk, ())
    cdef dict kinds = {}
    cdef list places = None
    cdef const uint8_t* kind = columns.records + 32
    cdef uint16_t table = 0
    cdef uint32_t code, last = 0
    cdef size_t index
    for index in range(columns.total):
        memcpy(&table, kind + 4, 2)
        code = <uint32_t> table << 16 | kind[0]
        if kind[2] & OLD:
            code += GONE_DELETE if kind[2] & GONE else OLD_DELETE
        if places is None or code != last:
            places = kinds.setdefault((table, code & 0xFFFF), [])
            last = code
        places.append(index)
        kind += columns.stride
    return kinds


def bulk(chunk, indices, epoch, bytes suffix, document_id):
    cdef Columns columns = Columns(chunk, indices)
    cdef Buffer out
    cdef Slice body
    cdef size_t at, index, record_bytes
    cdef uint64_t high = (<uint64_t> (epoch & 0x1F)) << 58, version
    cdef bint is_delete
    cdef list prefixes = [len(table_prefix(*name).encode()) for name in chunk.tables]
    out.owner = NULL
    try:
        buffer_open(&out, SMALLEST_CAPACITY)
        for at in range(columns.count):
            index = columns.indices[at]
            is_delete = columns.records[index * columns.stride + 32] == DELETED
            if is_delete:
                append(&out, b'{"delete":{"_id":', 17)
            else:
                append(&out, b'{"index":{"_id":', 16)
            append_id(&out, columns, index, prefixes, document_id)
            append(&out, b',"version":', 11)
            version = (
                high
                | ((columns.word(index, 0) >> 5) & 0x3FFFFFFFFFFFFu) << 8
                | columns.records[index * columns.stride + 33]
            )
            reserve(&out, 20)
            out.size += write_number(out.data + out.size, version)
            append(&out, b',"version_type":"external_gte"}}\n', 33)
            if is_delete:
                continue
            body = columns.body(index)
            if suffix is None:
                record_bytes = columns.word(index, 1) >> 32
                body.data += min(<size_t> 10, body.size)
                body.size = min(record_bytes, body.size - min(<size_t> 10, body.size))
                append(&out, body.data, body.size)
            else:
                append(&out, body.data, body.size)
                append_bytes(&out, suffix)
            append_byte(&out, c"\n")
        return buffer_take(&out)
    finally:
        buffer_close(&out)


cdef int append_id(Buffer* out, Columns columns, size_t index, list prefixes, document_id) except -1:
    """A short key of one plain value is its own id; for others ``document_id`` is asked."""
    cdef Slice key = columns.key_texts(index)
    cdef const uint8_t* end = <const uint8_t*> memchr(key.data, 0, key.size)
    cdef uint16_t table
    cdef size_t prefix
    memcpy(&table, columns.records + index * columns.stride + 36, 2)
    prefix = prefixes[table]  # raises IndexError
    if end != NULL and <size_t> (end - key.data) > prefix:
        key.data += prefix
        key.size = end - key.data
        if (
            key.size <= LONGEST_PLAIN_ID
            and memchr(key.data, 0x5C, key.size) == NULL
            and memchr(key.data, c":", key.size) == NULL
            and append_string(out, key.data, key.size)
        ):
            return 0
    return append_bytes(out, orjson.dumps(document_id(columns.chunk.change(index).pks)))
