# The open transaction, or page of existing rows: what all of its changes share, and what is counted in it; after
# spillway.pgoutput.transaction.

cdef enum:
    BEGIN_BYTES = 21
    LOGICAL_MESSAGE_START = 10
    LONGEST_PREFIX = 256
    BUCKETS = 65536
    MOST = 255
    NOTED_BUCKETS = 1024

cdef int64_t POSTGRES_EPOCH_MICROSECONDS = 946684800000000
cdef int64_t LAST_MICROSECOND = 253402300799999999  # of the year 9999
cdef int64_t DAY_MICROSECONDS = 86400000000

cdef void write_time(uint8_t* out, int64_t microseconds) noexcept nogil:
    """``2024-10-28T21:39:21.127470Z``: 27 bytes. The date is Howard Hinnant's ``civil_from_days``, for years 1970 on."""
    cdef int64_t days = microseconds // DAY_MICROSECONDS, rest = microseconds % DAY_MICROSECONDS
    cdef int64_t shifted = days + 719468
    cdef int64_t era = shifted // 146097
    cdef int64_t of_era = shifted - era * 146097
    cdef int64_t year_of_era = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    cdef int64_t of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    cdef int64_t shifted_month = (5 * of_year + 2) // 153
    cdef int64_t month = shifted_month + 3 if shifted_month < 10 else shifted_month - 9
    cdef int64_t seconds = rest // 1000000
    write_digits(out, year_of_era + era * 400 + (1 if month <= 2 else 0), 4)
    out[4] = c"-"
    write_digits(out + 5, month, 2)
    out[7] = c"-"
    write_digits(out + 8, of_year - (153 * shifted_month + 2) // 5 + 1, 2)
    out[10] = c"T"
    write_digits(out + 11, seconds // 3600, 2)
    out[13] = c":"
    write_digits(out + 14, seconds // 60 % 60, 2)
    out[16] = c":"
    write_digits(out + 17, seconds % 60, 2)
    out[19] = c"."
    write_digits(out + 20, rest % 1000000, 6)
    out[26] = c"Z"


cdef void write_digits(uint8_t* out, int64_t number, int count) noexcept nogil:
    while count:
        count -= 1
        out[count] = c"0" + <uint8_t> (number % 10)
        number //= 10


@cython.final
cdef class Transaction:
    """One after another. Without an open one ``final_lsn`` is 0. A page has the place of one."""

    cdef uint64_t final_lsn
    cdef uint32_t xid
    cdef bint in_page
    cdef int64_t microseconds
    cdef uint64_t idx
    cdef uint8_t* _counts
    cdef uint16_t _noted[NOTED_BUCKETS]  # which counts are not 0, if they are few
    cdef size_t _noted_count
    # The idempotency key: "lsn:idx", or in a page "id:key" or "id:lsn:idx".
    cdef Buffer _head  # base64 of what of it is the same for all and fills groups of three
    cdef Buffer _rest  # what of that does not fill them, and what comes behind it
    cdef size_t _rest_size  # without what comes behind it
    cdef Buffer _moment  # from the idempotency key's end to commit_idx
    cdef size_t annotation_bytes  # what annotations add to each change, while it is built and while it is copied
    cdef bytes _database_part  # from there to the primary key
    cdef object _on_warning
    cdef object _database_name
    cdef bytes _database_json
    cdef size_t _max_annotation_bytes

    def __cinit__(self, database, size_t max_annotation_bytes, on_warning):
        self._database_name = database.name
        self._database_json = database.as_json()
        self._max_annotation_bytes = max_annotation_bytes
        self._on_warning = on_warning
        buffer_open(&self._head, 64)
        buffer_open(&self._rest, 64)
        buffer_open(&self._moment, 128)
        self._counts = <uint8_t*> PyMem_Malloc(BUCKETS)
        if self._counts == NULL:
            raise MemoryError
        memset(self._counts, 0, BUCKETS)
        self.start_key(b"0:")
        append_bytes(&self._moment, b'","commit_timestamp":,"commit_idx":')
        self._database_part = b',"database_name":,"record_pks":'

    def __dealloc__(self):
        buffer_close(&self._head)
        buffer_close(&self._rest)
        buffer_close(&self._moment)
        PyMem_Free(self._counts)

    cdef int begin(self, const uint8_t* payload, size_t size) except -1:
        cdef int64_t time
        if size < BEGIN_BYTES:
            raise IndexError
        time = <int64_t> big64(payload + 9)
        if time < -POSTGRES_EPOCH_MICROSECONDS:
            raise ProtocolError("a transaction from before 1970")
        if time > LAST_MICROSECOND - POSTGRES_EPOCH_MICROSECONDS:
            raise OverflowError
        self.xid = big32(payload + 17)
        self.in_page = False
        self.forget_counts()
        self.start(big64(payload + 1), time + POSTGRES_EPOCH_MICROSECONDS)
        return self.start_key(b"%d:" % self.final_lsn)

    cdef int begin_message(self, uint64_t lsn, int64_t sent) except -1:
        """A message that belongs to none has the place of one; its record ends at ``lsn``, and it was sent at this time
        since 2000."""
        if self.is_open() or lsn <= 1:
            raise ProtocolError("a message that is not transactional inside of a transaction, or nowhere")
        if sent < -POSTGRES_EPOCH_MICROSECONDS:
            raise ProtocolError("a message from before 1970")
        if sent > LAST_MICROSECOND - POSTGRES_EPOCH_MICROSECONDS:
            raise OverflowError
        self.xid = 0
        self.in_page = False
        self.start(lsn - 1, sent + POSTGRES_EPOCH_MICROSECONDS)
        return self.start_key(b"%d:" % self.final_lsn)

    cdef int begin_page(self, bytes page_id, uint64_t lsn, int64_t microseconds) except -1:
        if self.is_open():
            raise ProtocolError("a page inside of a transaction")
        if microseconds < 0:
            raise ProtocolError("a page from before 1970")
        if microseconds > LAST_MICROSECOND:
            raise OverflowError
        self.xid = 0
        self.in_page = True
        self.start(lsn, microseconds)
        return self.start_key(page_id + b":")

    cdef inline bint is_open(self) noexcept:
        """A transaction is, and no page."""
        return self.final_lsn != 0 and not self.in_page

    cdef int start(self, uint64_t final_lsn, int64_t microseconds) except -1:
        cdef uint8_t digits[20]
        self.final_lsn = final_lsn
        self.microseconds = microseconds
        self.idx = 0
        self._moment.size = 0
        append_bytes(&self._moment, b'","commit_timestamp":"')
        reserve(&self._moment, 27)
        write_time(self._moment.data + self._moment.size, self.microseconds)
        self._moment.size += 27
        append_bytes(&self._moment, b'","commit_lsn":')
        append(&self._moment, digits, write_number(digits, self.final_lsn))
        append_bytes(&self._moment, b',"commit_idx":')
        return self.annotate(b"null")

    cdef int end(self) except -1:
        self.final_lsn = 0
        self.in_page = False
        return self.start_key(b"0:")

    cdef int start_key(self, bytes common) except -1:
        """What of the idempotency key is the same for all."""
        cdef const uint8_t* text = <const uint8_t*> PyBytes_AS_STRING(common)
        cdef size_t size = <size_t> PyBytes_GET_SIZE(common)
        cdef size_t whole = size - size % 3
        self._head.size = self._rest.size = 0
        reserve(&self._head, size * 2)
        self._head.size = write_base64(self._head.data, text, whole)
        append(&self._rest, text + whole, size - whole)
        self._rest_size = self._rest.size
        return 0

    cdef void forget_counts(self) noexcept:
        cdef size_t i
        if self._noted_count < NOTED_BUCKETS:
            for i in range(self._noted_count):
                self._counts[self._noted[i]] = 0
        else:
            memset(self._counts, 0, BUCKETS)
        self._noted_count = 0

    cdef uint8_t number(self, uint64_t hashed) noexcept:
        """1 + the number of earlier changes of the key's bucket in this transaction, saturating; 0 in a page."""
        cdef uint16_t bucket = hashed & 0xFFFF
        cdef uint8_t count = self._counts[bucket]
        if self.in_page:
            return 0
        if not hashed:
            return 1
        if count < MOST:
            if count == 0 and self._noted_count < NOTED_BUCKETS:
                self._noted[self._noted_count] = bucket
                self._noted_count += 1
            count += 1
            self._counts[bucket] = count
        return count

    cdef int annotate(self, bytes annotations) except -1:
        self.annotation_bytes = 2 * <size_t> max(0, len(annotations) - len(b"null"))
        self._database_part = b',"database_name":%b,"transaction_annotations":%b,"database":%b,"record_pks":' % (
            orjson.dumps(self._database_name),
            annotations,
            self._database_json,
        )
        return 0

    cdef int logical_message(self, const uint8_t* payload, size_t size) except -1:
        cdef const void* end
        cdef bytes prefix, content
        cdef size_t start = size
        if size < LOGICAL_MESSAGE_START:
            raise IndexError
        if not payload[1] & 1:
            return 0
        self.idx += 1
        payload += LOGICAL_MESSAGE_START
        size -= LOGICAL_MESSAGE_START
        end = memchr(payload, 0, min(size, <size_t> LONGEST_PREFIX))
        if end == NULL:
            return 0
        prefix = PyBytes_FromStringAndSize(<const char*> payload, <const uint8_t*> end - payload)
        if prefix == ANNOTATION_CLEAR:
            return self.annotate(b"null")
        if prefix != ANNOTATION_SET:
            return 0
        start = min(<size_t> len(prefix) + 5, size)  # its end, and the content's length
        size -= start
        if size > self._max_annotation_bytes:
            return self._no_annotations(f"of {size} bytes, above the {self._max_annotation_bytes} allowed")
        content = PyBytes_FromStringAndSize(<const char*> payload + start, <Py_ssize_t> size)
        try:
            orjson.loads(content)
        except orjson.JSONDecodeError:
            return self._no_annotations("that is not JSON")
        return self.annotate(scalars.json(content))

    cdef int _no_annotations(self, why) except -1:
        if self._on_warning is not None:
            self._on_warning(
                Finding(
                    code="invalid_transaction_annotation",
                    what=f"the transaction at {format_lsn(self.final_lsn)} has an annotation {why}; "
                    "its messages go without",
                    remedy="pass a short JSON object to "
                    f"pg_logical_emit_message(true, '{ANNOTATION_SET.decode()}', ...)",
                    severity="warning",
                    database=self._database_name,
                )
            )
        return self.annotate(b"null")

    cdef int append_tail(self, Buffer* out, Plan plan, int action, Keys* keys) except -1:
        """What stands behind the changes. Of the keys the primary one is looked at."""
        cdef size_t database_size = <size_t> PyBytes_GET_SIZE(self._database_part), digits_size
        cdef Slice* tail = &plan.tails[action]
        cdef uint8_t digits[20]
        cdef uint8_t* to
        digits_size = write_number(digits, self.idx)
        self._rest.size = self._rest_size
        if not self.in_page:
            append(&self._rest, digits, digits_size)
        elif keys.ends[0]:
            append(&self._rest, keys.texts.data + plan.prefix.size, keys.ends[0] - plan.prefix.size)
        else:
            append_bytes(&self._rest, b"%d:%d" % (self.final_lsn, self.idx))
        reserve(
            out,
            tail.size + self._head.size + 2 * self._rest.size + 4 + self._moment.size + digits_size + database_size
            + keys.values.size,
        )
        to = out.data + out.size
        memcpy(to, tail.data, tail.size)
        to += tail.size
        memcpy(to, self._head.data, self._head.size)
        to += self._head.size
        to += write_base64(to, self._rest.data, self._rest.size)
        memcpy(to, self._moment.data, self._moment.size)
        to += self._moment.size
        memcpy(to, digits, digits_size)
        to += digits_size
        memcpy(to, PyBytes_AS_STRING(self._database_part), database_size)
        to += database_size
        memcpy(to, keys.values.data, keys.values.size)
        out.size = <size_t> (to - out.data) + keys.values.size
        return 0


cdef bytes ANNOTATION_SET = b"sequin:transaction_annotations.set"
cdef bytes ANNOTATION_CLEAR = b"sequin:transaction_annotations.clear"
