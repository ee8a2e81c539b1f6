# Frames in, a chunk out, after spillway.pgoutput.decoder.

cdef enum:
    WHOLE = 1  # flags of a record
    OLD = 2
    MOVED = 4
    TOO_LARGE = 8
    GONE = 16

    XLOG_HEADER_BYTES = 25
    KEEPALIVE_BYTES = 18
    COMMIT_BYTES = 26
    ROW_START = 6

    LARGEST_GROWTH = 6  # no byte of text becomes more than six bytes of JSON
    LAST_SUB = 255
    MOST_TABLES = 65536
    RECENT = 256

    WORDS = 8  # of a record

    PASSED_OVER = -1  # in place of an action

cdef enum Changes:  # what of an update's old row is told
    NO_OLD_ROW
    NOTHING
    DIFFERING

cdef enum Outcome:
    DONE
    STOP  # with `stop`
    KEEP  # the same, and the frame comes again


@cython.final
cdef class Decoder:
    # For the caller.
    cdef readonly uint64_t largest_frame_bytes
    cdef public uint64_t taken_frames
    cdef public uint64_t taken_bytes
    cdef readonly uint64_t used_bytes
    cdef public uint64_t break_at_lsn
    # What it was made with.
    cdef Transaction _transaction
    cdef object _group_columns
    cdef int _groups
    cdef size_t _max_message_bytes
    cdef uint64_t _frame_overhead_bytes
    cdef uint64_t _renew_frame_bytes
    # Relations, and a few of them by the low bits of their OID.
    cdef dict _plans
    cdef PyObject* _recent[RECENT]
    cdef uint32_t _recent_oid[RECENT]
    # The frame that the chunk had no credit for: libpq's memory, or bytes.
    cdef char* _kept
    cdef size_t _kept_size
    cdef bytes _kept_bytes
    cdef object _stop
    cdef uint8_t _kind  # of the frame that is being decoded
    cdef Plan _page_plan  # of the relation whose lines are taken; None: frames are
    # The chunk that is being filled.
    cdef readonly uint64_t count
    cdef Buffer _data
    cdef Buffer _meta
    cdef Buffer _texts
    cdef dict _tables
    cdef uint64_t _chunk
    cdef uint64_t _commit_lsn
    cdef uint64_t _end_lsn
    cdef uint64_t _truncates
    cdef dict _emitted  # by prefix, plans of the logical messages that are wanted: of text, of JSON
    cdef bint _with_totals
    cdef bint _has_all  # changes of the open transaction are in the chunk, from the first on
    cdef uint64_t _first
    # The row that is being decoded; in `_known` and `_before` nothing is UNCHANGED.
    cdef Value* _rows  # the memory of the four
    cdef Value* _row
    cdef Value* _old
    cdef Value* _known
    cdef Value* _before
    cdef int _columns
    cdef Keys _keys
    cdef Keys _old_keys
    cdef Buffer _old_body
    cdef size_t _old_record_bytes
    cdef Buffer _scratch  # values of a line that had escapes
    # What filters say: of the row, and of the delete of its old row.
    cdef object _filters
    cdef int _filter_count
    cdef uint8_t* _said
    cdef uint8_t* _said_of_old
    cdef size_t _prefix_size  # of the keys of the page's table
    cdef bint _is_gone  # somebody is to get that delete, for the row has left his filter
    cdef Buffer _matched

    def __cinit__(
        self,
        database,
        group_columns,
        Py_ssize_t groups,
        Py_ssize_t max_message_bytes,
        Py_ssize_t frame_overhead_bytes,
        Py_ssize_t renew_frame_bytes,
        on_warning=None,
        filters=None,
        Py_ssize_t filter_count=0,
        bint totals=False,
        prefixes=(),
    ):
        bind_reference()
        self._group_columns = group_columns
        self._groups = <int> groups
        self._max_message_bytes = <size_t> max_message_bytes
        self._transaction = Transaction(database, <size_t> max_message_bytes // 4, on_warning)
        self._frame_overhead_bytes = <uint64_t> frame_overhead_bytes
        self._renew_frame_bytes = <uint64_t> renew_frame_bytes
        self._plans = {}
        self._tables = {}
        self._chunk = 1
        self._with_totals = totals
        self._emitted = {
            prefix: tuple([Plan(one, emitted.NO_INFO, (None,) * groups, frozenset(("insert",)), ()) for one in both])
            for prefix, both in emitted.relations(prefixes).items()
        }
        if self._emitted:
            self._make_room(2)
        self._filters = filters
        self._filter_count = <int> filter_count
        self._said = <uint8_t*> PyMem_Malloc(2 * filter_count + 1)
        if self._said == NULL:
            raise MemoryError
        self._said_of_old = self._said + filter_count
        buffer_open(&self._matched, SMALLEST_CAPACITY)
        buffer_open(&self._data, SMALLEST_CAPACITY)
        buffer_open(&self._meta, SMALLEST_CAPACITY)
        buffer_open(&self._texts, SMALLEST_CAPACITY)
        buffer_open(&self._old_body, SMALLEST_CAPACITY)
        buffer_open(&self._scratch, SMALLEST_CAPACITY)
        keys_open(&self._keys, 1 + self._groups)
        self._keys.ends[0] = 0
        keys_open(&self._old_keys, 1 + self._groups)

    def __dealloc__(self):
        PyMem_Free(self._said)
        buffer_close(&self._matched)
        buffer_close(&self._data)
        buffer_close(&self._meta)
        buffer_close(&self._texts)
        buffer_close(&self._old_body)
        buffer_close(&self._scratch)
        keys_close(&self._keys)
        keys_close(&self._old_keys)
        PyMem_Free(self._rows)
        if self._kept != NULL:
            free_memory(self._kept)

    @property
    def in_transaction(self):
        return self._transaction.is_open()

    @property
    def page_rows(self):
        return self._transaction.idx

    @property
    def last_key(self):
        cdef Slice text = key_text(&self._keys, 0)
        cdef size_t prefix = min(self._prefix_size, text.size)
        return PyBytes_FromStringAndSize(<const char*> text.data + prefix, <Py_ssize_t> (text.size - prefix))

    def fill(self, copy, object credit_bytes, object max_changes):
        cdef uint64_t credit = max(credit_bytes, 0), most = max(max_changes, 0)
        self._page_plan = None
        try:
            return self._fill(copy, credit, most)
        except (StructError, IndexError, OverflowError, ValueError) as error:
            raise ProtocolError(f"a frame of kind {chr(self._kind)!r} ends too early or is garbled") from error

    def begin_page(self, bytes page_id, uint64_t lsn, int64_t microseconds):
        self._transaction.begin_page(page_id, lsn, microseconds)
        self._kept_bytes = None
        if self._kept != NULL:
            free_memory(self._kept)
            self._kept = NULL

    def fill_page(self, copy, uint32_t oid, object credit_bytes, object max_changes):
        cdef uint64_t credit = max(credit_bytes, 0), most = max(max_changes, 0)
        self._page_plan = self._plan(oid)
        self._prefix_size = self._page_plan.prefix.size
        if not self._transaction.in_page:
            raise ProtocolError("a line outside of a page")
        try:
            return self._fill(copy, credit, most)
        except (StructError, IndexError, OverflowError, ValueError) as error:
            raise ProtocolError("a line of a page is garbled") from error

    def take(self):
        if self._transaction.idx > 0xFFFFFFFF:
            raise ProtocolError("a transaction of more than 4294967295 operations")
        cdef object chunk = Chunk(
            self.count,
            buffer_take(&self._data),
            buffer_take(&self._meta),
            buffer_take(&self._texts),
            tuple(self._tables),
            self._groups,
            self._commit_lsn,
            self._end_lsn,
            self._truncates,
            buffer_take(&self._matched),
            self._filter_count,
        )
        self._chunk += 1
        self._tables = {}
        self.count = self.used_bytes = 0
        self._commit_lsn = self._end_lsn = self._truncates = 0
        self._has_all = not (self._transaction.is_open() and self._transaction.idx)
        self._first = 0
        return chunk

    def learn(self, relation, info, frozenset wanted):
        schema, table = info.root or (relation.schema, relation.table)
        groups = self._group_columns(schema, table)
        if len(groups) != self._groups:
            raise ProtocolError(
                f"{len(groups)} sets of group columns for {schema}.{table} where {self._groups} are due"
            )
        filters = () if self._filters is None else tuple(self._filters(relation, info))
        if any([not 0 <= one.number < self._filter_count for one in filters]):
            raise ProtocolError(f"a filter beyond the {self._filter_count} that there are")
        cdef Plan plan = Plan(relation, info, tuple(groups), wanted, filters)
        if plan.column_count > self._columns or self._rows == NULL:
            self._make_room(plan.column_count)
        self._forget(relation.oid)
        self._plans[relation.oid] = plan
        if info.root is not None and not info.partitioned:
            for plan in self._plans.values():
                if plan.partitioned and plan.name == info.root:
                    plan.partial = info.partial

    cdef int _make_room(self, int columns) except -1:
        cdef Value* all_four = <Value*> PyMem_Realloc(self._rows, 4 * (columns + 1) * sizeof(Value))
        if all_four == NULL:
            raise MemoryError
        self._rows = self._row = all_four
        self._old = all_four + (columns + 1)
        self._known = all_four + 2 * (columns + 1)
        self._before = all_four + 3 * (columns + 1)
        self._columns = columns
        return 0

    # Frames.

    cdef object _fill(self, object copy, uint64_t credit, uint64_t most):
        cdef object pointer = getattr(copy, "pgconn_ptr", None) if get_copy_data != NULL else None
        if pointer is not None:
            return self._fill_from_libpq(<void*> <uintptr_t> pointer, credit, most)
        return self._fill_from_python(copy, credit, most)

    cdef object _fill_from_libpq(self, void* connection, uint64_t credit, uint64_t most):
        cdef char* frame
        cdef int size
        cdef Outcome outcome
        while True:
            if self._kept_bytes is not None or self._kept != NULL:
                outcome = self._take_kept(credit, most)
            else:
                size = get_copy_data(connection, &frame, 1)
                if size <= 0:
                    return Ended(size) if size else None
                self.taken_frames += 1
                self.taken_bytes += <uint64_t> size
                outcome = KEEP
                try:
                    outcome = self._frame(<const uint8_t*> frame, <size_t> size, credit, most)
                finally:
                    if outcome == KEEP and self._stop is not None:
                        self._kept, self._kept_size = frame, <size_t> size
                    else:
                        free_memory(frame)
            if outcome != DONE:
                return self._stopped()

    cdef object _fill_from_python(self, copy, uint64_t credit, uint64_t most):
        cdef Py_buffer view
        cdef Outcome outcome
        while True:
            if self._kept_bytes is not None or self._kept != NULL:
                outcome = self._take_kept(credit, most)
            else:
                size, frame = copy.get_copy_data(1)
                if size <= 0:
                    return Ended(size) if size else None
                self.taken_frames += 1
                self.taken_bytes += <uint64_t> size
                PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
                try:
                    outcome = self._frame(<const uint8_t*> view.buf, <size_t> view.len, credit, most)
                    if outcome == KEEP:
                        self._kept_bytes = PyBytes_FromStringAndSize(<char*> view.buf, view.len)
                finally:
                    PyBuffer_Release(&view)
            if outcome != DONE:
                return self._stopped()

    cdef Outcome _take_kept(self, uint64_t credit, uint64_t most) except? DONE:
        cdef bytes kept = self._kept_bytes
        cdef char* frame = self._kept
        cdef Outcome outcome
        if kept is not None:
            outcome = self._frame(
                <const uint8_t*> PyBytes_AS_STRING(kept), <size_t> PyBytes_GET_SIZE(kept), credit, most
            )
            if outcome != KEEP:
                self._kept_bytes = None
            return outcome
        outcome = self._frame(<const uint8_t*> frame, self._kept_size, credit, most)
        if outcome != KEEP:
            self._kept = NULL
            free_memory(frame)
        return outcome

    cdef object _stopped(self):
        cdef object stop = self._stop
        self._stop = None
        return stop

    cdef Outcome _frame(self, const uint8_t* frame, size_t size, uint64_t credit, uint64_t most) except? DONE:
        cdef const uint8_t* payload
        cdef uint64_t needed
        cdef uint8_t kind
        cdef int action
        cdef Plan plan = None
        if self._page_plan is not None:
            return self._line(self._page_plan, frame, size, credit, most)
        if size == 0:
            raise IndexError
        if frame[0] != c"w":
            return self._keepalive(frame, size)
        if size <= XLOG_HEADER_BYTES:
            raise IndexError
        payload = frame + XLOG_HEADER_BYTES
        size -= XLOG_HEADER_BYTES
        kind = self._kind = payload[0]
        needed = 3 * size + self._frame_overhead_bytes
        action = INSERTED if kind == c"I" else UPDATED if kind == c"U" else DELETED if kind == c"D" else -1
        if action >= 0:
            if size < 5:
                raise IndexError
            plan = self._plan(big32(payload + 1))
            needed += plan.overhead_bytes + self._transaction.annotation_bytes
        elif kind == c"M" and self._emitted:
            needed += emitted_overhead_bytes + self._transaction.annotation_bytes
        if not self._covered(size, needed, credit, most):
            return KEEP
        if action >= 0:
            self._any_row(plan, action, payload, size)
            return DONE
        if kind == c"M":
            self._message(payload, size, <int64_t> big64(frame + 17))
            return DONE
        return self._other(kind, payload, size, credit, most)

    cdef inline bint _covered(self, size_t size, uint64_t needed, uint64_t credit, uint64_t most) except -1:
        """Takes the frame's credit; if it is not there, says so in `_stop`."""
        if self.used_bytes + needed > credit or self.count >= most:
            self._stop = Full(needed)
            return False
        self.used_bytes += needed
        if size > self.largest_frame_bytes:
            self.largest_frame_bytes = size
        return True

    cdef Outcome _line(self, Plan plan, const uint8_t* line, size_t size, uint64_t credit, uint64_t most) except? DONE:
        cdef uint64_t needed = 3 * size + self._frame_overhead_bytes + plan.overhead_bytes
        if not self._covered(size, needed, credit, most):
            return KEEP
        self._existing_row(plan, line, size)
        self._transaction.idx += 1
        if self._scratch.capacity > KEPT_BYTES:
            buffer_close(&self._scratch)
        return DONE

    cdef Outcome _keepalive(self, const uint8_t* frame, size_t size) except? DONE:
        if frame[0] != c"k":
            raise ProtocolError(f"a replication message of kind {frame[0]:#04x}")
        if size < KEEPALIVE_BYTES:
            raise IndexError
        if self._transaction.is_open() and not frame[17]:
            return DONE
        self._stop = Keepalive(big64(frame + 1), frame[17] != 0)
        return STOP

    cdef Plan _plan(self, uint32_t oid):
        cdef uint32_t place = oid % RECENT
        if self._recent[place] != NULL and self._recent_oid[place] == oid:
            return <Plan> self._recent[place]
        cdef Plan plan = self._plans.get(oid)
        if plan is None:
            raise ProtocolError(f"a row of relation {oid} before learn() was called for it")
        self._recent[place] = <PyObject*> plan
        self._recent_oid[place] = oid
        return plan

    cdef int _forget(self, uint32_t oid) except -1:
        self._recent[oid % RECENT] = NULL
        self._plans.pop(oid, None)
        return 0

    # Transactions, and what is not a row.

    cdef Outcome _other(
        self, uint8_t kind, const uint8_t* payload, size_t size, uint64_t credit, uint64_t most
    ) except? DONE:
        if kind == c"B":
            self._transaction.begin(payload, size)
            self._first = self.count
            self._has_all = True
        elif kind == c"C":
            if size < COMMIT_BYTES:
                raise IndexError
            self._commit_lsn = big64(payload + 2)
            self._end_lsn = big64(payload + 10)
            self._end()
            if self.largest_frame_bytes > self._renew_frame_bytes:
                self._stop = Renew()
                return STOP
            if 0 < self.break_at_lsn <= self._end_lsn:
                self._stop = Committed()
                return STOP
            if self._with_totals and (self.used_bytes >= credit // 2 or self.count >= most // 2):
                self._stop = Committed()
                return STOP
        elif kind == c"R":
            relation = read_relation(PyBytes_FromStringAndSize(<const char*> payload, <Py_ssize_t> size))
            self._forget(relation.oid)
            self._stop = relation
            return STOP
        elif kind == c"T":
            self._truncate(PyBytes_FromStringAndSize(<const char*> payload, <Py_ssize_t> size))
        elif kind != c"O" and kind != c"Y" and kind != c"A":
            raise ProtocolError(f"a frame of kind {chr(kind)!r}")
        return DONE

    cdef int _end(self) except -1:
        if self._with_totals and self._has_all:
            self._set_total()
        return self._transaction.end()

    cdef int _message(self, const uint8_t* payload, size_t size, int64_t sent) except -1:
        cdef const uint8_t* start = payload + LOGICAL_MESSAGE_START
        cdef const uint8_t* end
        cdef uint64_t lsn
        cdef tuple plans = None
        if size < LOGICAL_MESSAGE_START:
            raise IndexError
        if self._emitted:
            end = <const uint8_t*> memchr(start, 0, min(size - LOGICAL_MESSAGE_START, <size_t> LONGEST_PREFIX))
            if end != NULL:
                plans = self._emitted.get(PyBytes_FromStringAndSize(<const char*> start, end - start))
        if plans is None:
            return self._transaction.logical_message(payload, size)
        if payload[1] & 1:
            if not self._transaction.is_open():
                raise ProtocolError("a message outside of a transaction")
            self._emit(plans, payload, size, end - payload)
            return self._transaction.logical_message(payload, size)
        lsn = big64(payload + 2)
        self._transaction.begin_message(lsn, sent)
        self._first = self.count
        self._has_all = True
        self._emit(plans, payload, size, end - payload)
        self._transaction.idx += 1
        self._end()
        self._commit_lsn = lsn - 1
        self._end_lsn = lsn
        return 0

    cdef int _emit(self, tuple plans, const uint8_t* payload, size_t size, size_t prefix_end) except -1:
        """A logical message as a row."""
        cdef Plan plan = plans[0]
        cdef size_t start = min(prefix_end + 5, size)  # behind its end, and the content's length
        cdef size_t too_large = size if size > self._max_message_bytes else 0
        cdef bytes value
        self._say_yes()
        self._row[0].data = payload + LOGICAL_MESSAGE_START
        self._row[0].size = prefix_end - LOGICAL_MESSAGE_START
        self._row[1].data = NULL
        self._row[1].size = 0
        if not too_large:
            value, is_json = emitted.content_value(
                PyBytes_FromStringAndSize(<const char*> payload + start, <Py_ssize_t> (size - start))
            )
            if is_json:
                plan = plans[1]
            self._row[1].data = <const uint8_t*> PyBytes_AS_STRING(value)
            self._row[1].size = <size_t> PyBytes_GET_SIZE(value)
            if size * LARGEST_GROWTH > self._max_message_bytes:
                too_large = size + growth_bytes(self._row, 2)
                if too_large <= self._max_message_bytes:
                    too_large = 0
            if not too_large:
                too_large = self._whole(plan, INSERTED, self._row, NO_OLD_ROW, False, False)
        if too_large:
            return self._key_alone(plan, INSERTED, too_large, False, False)
        return 0

    cdef void _set_total(self) noexcept:
        """In all changes of the transaction that ends."""
        cdef size_t stride = (WORDS + 2 * self._groups) * 8
        cdef uint64_t i
        cdef uint16_t total = <uint16_t> self._transaction.idx
        if self._transaction.idx > 0xFFFF:
            return
        for i in range(self._first, self.count):
            memcpy(self._meta.data + i * stride + 4 * 8 + 6, &total, 2)

    cdef int _truncate(self, bytes payload) except -1:
        cdef Plan plan
        cdef size_t began
        cdef int sub = 0, i
        for oid in read_truncate(payload):
            plan = self._plan(oid)
            began = self._data.size
            for i in range(1 + self._groups):
                self._keys.ends[i] = 0
                self._keys.hashes[i] = 0
            self._keys.texts.size = self._keys.values.size = 0
            append(&self._keys.values, b"[]", 2)
            append(&self._data, b'{"record":null,"changes":null', 29)
            self._transaction.append_tail(&self._data, plan, TRUNCATED, &self._keys)
            memset(self._said, YES, self._filter_count)
            self._record(
                self._table_number(plan.own_name), TRUNCATED, &self._keys, NULL, self._data.size, 4, WHOLE, sub, 0,
                self._transaction.number(0), self._said,
            )
            sub = min(sub + 1, <int> LAST_SUB)
        self._truncates += 1
        self._transaction.idx += 1
        return 0

    # Rows.

    cdef int _any_row(self, Plan plan, int action, const uint8_t* payload, size_t size) except -1:
        if not self._transaction.is_open():
            raise ProtocolError("a row outside of a transaction")
        if plan.wanted >> action & 1:
            if size > self._max_message_bytes:
                self._large_row(plan, action, payload, size)
            else:
                self._usual_row(plan, action, payload, size)
        self._transaction.idx += 1
        return 0

    cdef int _usual_row(self, Plan plan, int action, const uint8_t* payload, size_t size) except -1:
        cdef bint unchanged = False, ignored = False, has_old = False
        cdef size_t at, too_large = 0
        cdef Value* key_row = self._row
        cdef Changes changes = NO_OLD_ROW
        if size <= ROW_START:
            raise IndexError
        if action == UPDATED and payload[ROW_START - 1] != c"N":
            has_old = True
            at = plan.split(payload, size, ROW_START, self._old, &ignored)
            at = plan.split(payload, size, after_new(payload, size, at), self._row, &unchanged)
        else:
            at = plan.split(payload, size, ROW_START, self._row, &unchanged)
        if at != size:
            raise ProtocolError(f"a row ends at byte {at} of a frame of {size}")
        if size * LARGEST_GROWTH > self._max_message_bytes:
            too_large = size + growth_bytes(self._row, plan.column_count)
            if has_old:
                too_large += growth_bytes(self._old, plan.column_count)
            if too_large <= self._max_message_bytes:
                too_large = 0
        if unchanged:
            unchanged = self._fill_and_know(plan, has_old)
            key_row = self._known
        if plan.filter_count and not self._say(plan, action, plan.mark(payload), has_old):
            return self._pass_over(plan, action, key_row, has_old, plan.mark(payload) == c"O")
        if not plan.filter_count:
            self._say_yes()
        if action == UPDATED:
            changes = DIFFERING if has_old and plan.mark(payload) == c"O" else NOTHING
        if not too_large:
            too_large = self._whole(plan, action, key_row, changes, has_old, unchanged)
        if too_large:
            has_old = self._split_keys(plan, action, payload, size, False)
            self._key_alone(plan, action, too_large, has_old, has_old and plan.mark(payload) == c"O")
        return 0

    cdef size_t _whole(
        self, Plan plan, int action, Value* key_row, Changes changes, bint has_old, bint unchanged
    ) except? 1:
        """Adds a row that has been taken apart. 0, or what its size is if it is too large; then nothing has happened."""
        cdef size_t began = self._data.size, record_end, too_large
        read_keys(&self._keys, plan, key_row)
        if unchanged:
            append(&self._data, b'{"record":', 10)
            plan.append_columns(&self._data, self._row, NULL, False)
        else:
            plan.append_record(&self._data, self._row)
        record_end = self._data.size
        self._append_changes(plan, changes)
        self._transaction.append_tail(&self._data, plan, action, &self._keys)
        too_large = self._data.size - began
        if too_large > self._max_message_bytes:
            self._data.size = began
            return too_large
        self._add(
            plan,
            action,
            began,
            record_end - began - 10,
            0 if unchanged else WHOLE,
            0,
            self._old if has_old else NULL,
            key_row,
            changes == DIFFERING,
        )
        return 0

    cdef bint _fill_and_know(self, Plan plan, bint has_old) noexcept:
        """Fills UNCHANGED columns from the old row, and copies the row, with null for those that are left, to `_known`.
        Whether any is left."""
        cdef bint left = False
        cdef int i
        for i in range(plan.column_count):
            if self._row[i].data == UNCHANGED:
                if has_old and self._old[i].data != NULL:
                    self._row[i] = self._old[i]
            self._known[i] = self._row[i]
            if self._row[i].data == UNCHANGED:
                left = True
                self._known[i].data = NULL
                self._known[i].size = 0
        return left

    # Filters.

    cdef inline void _say_yes(self) noexcept:
        if self._filter_count:
            memset(self._said, YES, 2 * self._filter_count)
        self._is_gone = False

    cdef bint _say(self, Plan plan, int action, uint8_t mark, bint has_old) except -1:
        """What filters say of the row. Whether anybody wants it. UNCHANGED columns are filled."""
        cdef bint wanted = action != READ and plan.always >> action & 1
        cdef bint is_in, was_in
        cdef Filter* one
        cdef int i
        self._say_yes()
        for i in range(plan.filter_count):
            one = &plan.filters[i]
            is_in = admits(one, self._row, action == DELETED and mark != c"O")
            if is_in and (action == READ or one.actions >> action & 1):
                wanted = True
            if action != UPDATED:
                self._said[one.number] = YES if is_in else NO
                continue
            if is_in and not has_old:
                continue
            was_in = self._was_admitted(plan, one, has_old, has_old and mark == c"O")
            if not is_in:
                self._said[one.number] = LEFT if was_in else NO
                if was_in and one.leaves and one.actions >> UPDATED & 1:
                    self._is_gone = True
            self._said_of_old[one.number] = (YES if is_in else LEFT) if was_in else NO
        return wanted

    cdef bint _was_admitted(self, Plan plan, Filter* one, bint has_old, bint full) except -1:
        """The same of the old row, as far as it is known."""
        cdef Value value
        cdef int i, column
        for i in range(one.count):
            column = one.checks[i].column
            value.data, value.size = NULL, 0
            if has_old:
                value = self._old[column]
            if not full and value.data == NULL and plan.columns[column].in_primary_key:
                value = self._row[column]
            if not check_holds(&one.checks[i], value, not full):
                return False
        return True

    cdef int _pass_over(self, Plan plan, int action, Value* key_row, bint has_old, bint full) except -1:
        """A row that nobody wants: it counts. Of an update, the delete of the old row may be wanted."""
        if action == UPDATED and self._is_gone:
            read_keys(&self._keys, plan, key_row)
            return self._add(
                plan, PASSED_OVER, self._data.size, 0, 0, 0, self._old if has_old else NULL, key_row, full
            )
        if has_old:
            self._read_primary(&self._old_keys, plan, self._told(plan, self._old, key_row, full))
        self._read_primary(&self._keys, plan, key_row)
        if has_old and self._old_keys.ends[0] and not same_text(&self._keys, &self._old_keys, 0):
            self._transaction.number(self._old_keys.hashes[0])
        self._transaction.number(self._keys.hashes[0])
        return 0

    cdef int _read_primary(self, Keys* keys, Plan plan, Value* row) except -1:
        keys.texts.size = keys.values.size = 0
        read_primary(keys, plan, row)
        keys.ends[0] = keys.texts.size
        keys.hashes[0] = hash_of(plan, key_text(keys, 0))
        return 0

    # Rows that are too large.

    cdef int _large_row(self, Plan plan, int action, const uint8_t* payload, size_t size) except -1:
        """A frame that is too large."""
        cdef bint has_old, full, wanted = True
        self._say_yes()
        if plan.filter_count:
            has_old = self._split_keys(plan, action, payload, size, True)
            if has_old:
                self._fill_and_know(plan, True)
            wanted = self._say(plan, action, plan.mark(payload), has_old)
        has_old = self._split_keys(plan, action, payload, size, False)
        full = has_old and plan.mark(payload) == c"O"
        if wanted:
            return self._key_alone(plan, action, size, has_old, full)
        self._fill_and_know(plan, has_old)
        return self._pass_over(plan, action, self._known, has_old, full)

    cdef bint _split_keys(self, Plan plan, int action, const uint8_t* payload, size_t size, bint checked) except -1:
        """Takes the rows apart as far as their keys go, or filters look. Whether there is an old one."""
        cdef bint has_old = action == UPDATED and size > ROW_START and payload[ROW_START - 1] != c"N"
        cdef size_t at
        at = plan.split_key(payload, size, ROW_START, self._row, checked)
        if has_old:
            self._row, self._old = self._old, self._row
            plan.split_key(payload, size, after_new(payload, size, at), self._row, checked)
        return has_old

    cdef int _existing_row(self, Plan plan, const uint8_t* line, size_t size) except -1:
        cdef size_t too_large, most = self._max_message_bytes, line_size = size
        cdef bint wanted = True
        self._say_yes()
        if size > most:
            too_large = split_line(plan, line, size, self._row, &self._scratch, True, False)
            if too_large > most:
                if plan.filter_count:
                    split_line(plan, line, size, self._row, &self._scratch, True, True)
                    wanted = self._say(plan, READ, 0, False)
                    split_line(plan, line, size, self._row, &self._scratch, True, False)
                if not wanted:
                    return self._read_primary(&self._keys, plan, self._row)
                return self._key_alone(plan, READ, too_large, False, False)
        size = split_line(plan, line, line_size, self._row, &self._scratch, False, False)
        if plan.filter_count and not self._say(plan, READ, 0, False):
            return self._read_primary(&self._keys, plan, self._row)
        too_large = size if size > most else 0
        if not too_large and size * LARGEST_GROWTH > most:
            size += growth_bytes(self._row, plan.column_count)
            too_large = size if size > most else 0
        if not too_large:
            too_large = self._whole(plan, READ, self._row, NO_OLD_ROW, False, False)
        if too_large:
            return self._key_alone(plan, READ, too_large, False, False)
        return 0

    cdef int _key_alone(self, Plan plan, int action, size_t too_large, bint has_old, bint full) except -1:
        """Adds a row that is too large. ``full``: all of the old row is there, not only its key."""
        cdef size_t began = self._data.size, record_end
        self._fill_and_know(plan, has_old)
        read_keys(&self._keys, plan, self._known)
        append(&self._data, b'{"record":', 10)
        plan.append_columns(&self._data, self._row, NULL, True)
        record_end = self._data.size
        self._append_changes(plan, NOTHING if action == UPDATED else NO_OLD_ROW)
        self._transaction.append_tail(&self._data, plan, action, &self._keys)
        return self._add(
            plan,
            action,
            began,
            record_end - began - 10,
            TOO_LARGE,
            too_large,
            self._old if has_old else NULL,
            self._known,
            full,
        )

    cdef int _append_changes(self, Plan plan, Changes changes) except -1:
        if changes == NO_OLD_ROW:
            return append(&self._data, b',"changes":null', 15)
        if changes == NOTHING:
            return append(&self._data, b',"changes":{}', 13)
        append(&self._data, b',"changes":', 11)
        return plan.append_columns(&self._data, self._old, self._row, False)

    cdef int _add(
        self,
        Plan plan,
        int action,
        size_t began,
        size_t record_bytes,
        int flags,
        size_t too_large,
        Value* old,
        Value* key_row,
        bint full,
    ) except -1:
        """Records of the row whose body stands in the output from ``began`` on; before it, that of its old row. Of
        PASSED_OVER, an update, only the latter."""
        cdef Keys* was = NULL
        cdef uint16_t number
        cdef bint moved = False, tells_old
        cdef uint8_t n
        if old == NULL and self._is_gone:
            old = self._old
            self._take_key(plan, old, key_row)
        if old != NULL and self._read_old_keys(plan, old, key_row, full):
            was = &self._old_keys
            # An unknown old key has nothing to delete.
            moved = was.ends[0] and not same_text(&self._keys, was, 0)
        n = self._transaction.number(self._old_keys.hashes[0] if moved else self._keys.hashes[0])
        tells_old = self._old_keys.ends[0] if self._is_gone else moved
        if action == PASSED_OVER and not tells_old:
            return 0
        if plan.chunk != self._chunk:
            plan.number = self._table_number(plan.name)
            plan.chunk = self._chunk
        number = plan.number
        if tells_old:
            self._insert_old_body(plan, old, began)
            self._record(
                number, DELETED, &self._old_keys, NULL, began + self._old_body.size, self._old_record_bytes,
                WHOLE | OLD if moved else WHOLE | OLD | GONE, 0, 0, n, self._said_of_old,
            )
        if moved:
            flags |= MOVED
            n = self._transaction.number(self._keys.hashes[0])
        if action == PASSED_OVER:
            return 0
        return self._record(
            number, action, &self._keys, was, self._data.size, record_bytes, flags, 0, too_large, n, self._said
        )

    cdef void _take_key(self, Plan plan, Value* into, Value* row) noexcept:
        """The row with null in all columns that are of no key."""
        cdef int i
        for i in range(plan.column_count):
            into[i] = row[i]
            if not plan.columns[i].in_key:
                into[i].data = NULL
                into[i].size = 0

    cdef Value* _told(self, Plan plan, Value* old, Value* key_row, bint full) noexcept:
        """The row as it was, as far as an old key tells; what that does not hold is taken as unchanged."""
        cdef int i
        if full:
            return old
        for i in range(plan.column_count):
            self._before[i] = key_row[i] if old[i].data == NULL else old[i]
        return self._before

    cdef bint _read_old_keys(self, Plan plan, Value* old, Value* key_row, bint full) except -1:
        """Whether any key was another."""
        cdef int i
        read_keys(&self._old_keys, plan, self._told(plan, old, key_row, full))
        for i in range(1 + self._groups):
            if not same_text(&self._keys, &self._old_keys, i):
                return True
        return False

    cdef int _insert_old_body(self, Plan plan, Value* old, size_t began) except -1:
        """The body of the delete of the old key, before the one that stands at ``began``."""
        cdef Buffer* body = &self._old_body
        cdef size_t size = self._data.size - began
        body.size = 0
        plan.append_record(body, old)
        self._old_record_bytes = body.size - 10
        append(body, b',"changes":null', 15)
        self._transaction.append_tail(body, plan, DELETED, &self._old_keys)
        reserve(&self._data, body.size)
        memmove(self._data.data + began + body.size, self._data.data + began, size)
        memcpy(self._data.data + began, body.data, body.size)
        self._data.size += body.size
        return 0

    cdef int _table_number(self, tuple name) except -1:
        cdef int number = self._tables.setdefault(name, len(self._tables))
        if number >= MOST_TABLES:
            raise OverflowError
        return number

    cdef int _record(
        self,
        uint16_t table,
        int action,
        Keys* keys,
        Keys* was,
        size_t end,
        size_t record_bytes,
        int flags,
        int sub,
        size_t too_large,
        uint8_t n,
        const uint8_t* said,
    ) except -1:
        cdef size_t stride = (WORDS + 2 * self._groups) * 8
        cdef size_t i, key_count = 1 + <size_t> self._groups
        cdef uint64_t* words
        cdef uint8_t* kind
        reserve(&self._meta, stride)
        reserve(&self._texts, keys.texts.size + (was.texts.size if was != NULL else 0) + 2 * key_count)
        words = <uint64_t*> (self._meta.data + self._meta.size)
        words[0] = self._transaction.final_lsn
        words[1] = self._transaction.idx | <uint64_t> record_bytes << 32
        words[2] = <uint64_t> self._transaction.microseconds
        words[4] = 0
        kind = <uint8_t*> &words[4]
        kind[0] = <uint8_t> action
        kind[1] = n
        kind[2] = <uint8_t> flags
        kind[3] = <uint8_t> sub
        memcpy(kind + 4, &table, 2)
        words[5] = min(too_large, <size_t> 0xFFFFFFFF) | <uint64_t> self._transaction.xid << 32
        for i in range(key_count):
            words[6 + 2 * i] = keys.hashes[i]
            self._append_text(keys, i)
            words[7 + 2 * i] = 0
            if was != NULL and not same_text(keys, was, i):
                words[7 + 2 * i] = was.hashes[i]
                self._append_text(was, i)
            else:
                self._texts.data[self._texts.size] = 0
                self._texts.size += 1
        words[3] = <uint64_t> end | <uint64_t> self._texts.size << 32
        if end > 0xFFFFFFFF or self._texts.size > 0xFFFFFFFF:
            raise OverflowError
        self._meta.size += stride
        if self._filter_count:
            append(&self._matched, said, self._filter_count)
        self.count += 1
        return 0

    cdef inline void _append_text(self, Keys* keys, size_t number) noexcept:
        """There is room."""
        cdef Slice text = key_text(keys, <int> number)
        cdef uint8_t* to = self._texts.data + self._texts.size
        memcpy(to, text.data, text.size)
        to[text.size] = 0
        self._texts.size += text.size + 1


cdef inline bint same_text(Keys* one, Keys* other, size_t number) noexcept:
    cdef Slice a, b
    if one.hashes[number] != other.hashes[number]:
        return False
    a = key_text(one, <int> number)
    b = key_text(other, <int> number)
    return a.size == b.size and memcmp(a.data, b.data, a.size) == 0


cdef inline Py_ssize_t after_new(const uint8_t* payload, size_t size, size_t at) except -1:
    if at >= size:
        raise IndexError
    if payload[at] != c"N":
        raise ProtocolError("an update without a new row")
    return <Py_ssize_t> at + 1
