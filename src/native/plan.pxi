# What is compiled once per relation, after spillway.pgoutput.plan.

cdef enum:
    INSERTED = 0  # codes of actions, as a chunk has them
    UPDATED = 1
    DELETED = 2
    READ = 3
    TRUNCATED = 4
    GROUP_VALUE_BYTES = 1024  # above this a value of a group's key is a digest

cdef struct Column:
    Kind kind
    bint in_key  # of the primary key or a group
    bint in_primary_key
    bint in_check  # some filter looks at it
    PyObject* renderer  # of kind PYTHON and NUMBERS
    Slice lead  # what stands before its value in a whole record
    Slice name  # the name alone, with its colon

cdef struct Group:
    int count  # of columns; -1: it is the primary key
    int* columns  # -1: the relation has no such column


@cython.final
cdef class Plan:
    cdef readonly tuple name
    cdef readonly tuple own_name
    cdef bint partitioned
    cdef bint partial  # an old row that is said to be whole may be a key
    cdef size_t overhead_bytes
    cdef int column_count
    cdef Column* columns
    cdef int primary_count
    cdef int* primary
    cdef bint plain_primary
    cdef int group_count
    cdef Group* groups
    cdef uint32_t always  # bits, by action: all rows are wanted
    cdef uint32_t wanted  # the same, or some are
    cdef int filter_count
    cdef Filter* filters
    cdef Slice prefix  # of the table's keys
    cdef uint32_t prefix_crc
    cdef Slice tails[5]  # by action: from the action up to the idempotency key
    cdef uint64_t chunk  # the chunk in which the table has this number
    cdef uint16_t number
    cdef list _kept  # objects that the slices and pointers above belong to

    def __cinit__(self, relation, info, tuple groups, frozenset wanted, tuple filters):
        cdef int index
        cdef bytes name
        self._kept = []
        self.own_name = (relation.schema, relation.table)
        self.name = info.root or self.own_name
        self.partitioned = info.partitioned
        self.partial = info.partitioned and info.partial
        self.column_count = len(relation.columns)
        self.columns = <Column*> self._zeroed(self.column_count, sizeof(Column))
        for index, column in enumerate(relation.columns):
            self.overhead_bytes += 2 * len(column.name) + 8
            self._set_renderer(&self.columns[index], column.type_oid, info.types)
            name = orjson.dumps(column.name) + b":"
            self.columns[index].name = self._keep(name)
            self.columns[index].lead = self._keep((b"," if index else b'{"record":{') + name)
        self._set_keys(relation, info, groups)
        self.always = self._bits(wanted)
        self._set_filters(filters)
        for index, action in enumerate(ACTIONS):
            schema, table = self.own_name if action == "truncate" else self.name
            self.tails[index] = self._keep(
                b',"action":"%b","metadata":{"table_schema":%b,"table_name":%b,"idempotency_key":"'
                % (action.encode(), orjson.dumps(schema), orjson.dumps(table))
            )

    def __dealloc__(self):
        cdef int index
        PyMem_Free(self.columns)
        PyMem_Free(self.primary)
        if self.groups != NULL:
            for index in range(self.group_count):
                PyMem_Free(self.groups[index].columns)
        PyMem_Free(self.groups)
        if self.filters != NULL:
            for index in range(self.filter_count):
                self._free_checks(&self.filters[index])
        PyMem_Free(self.filters)

    cdef void _free_checks(self, Filter* filter) noexcept:
        cdef int index
        if filter.checks != NULL:
            for index in range(filter.count):
                PyMem_Free(filter.checks[index].integers)
                PyMem_Free(filter.checks[index].texts)
                PyMem_Free(filter.checks[index].steps)
        PyMem_Free(filter.checks)

    cdef uint32_t _bits(self, frozenset actions) except? 0xFFFFFFFF:
        cdef uint32_t bits = 0
        for action in actions:
            bits |= 1 << <int> ACTIONS.index(action)
        return bits

    cdef void* _zeroed(self, size_t count, size_t size) except NULL:
        cdef void* memory = PyMem_Malloc(count * size + 1)
        if memory == NULL:
            raise MemoryError
        memset(memory, 0, count * size + 1)
        return memory

    cdef Slice _keep(self, bytes data):
        cdef Slice kept
        self._kept.append(data)
        kept.data = <const uint8_t*> PyBytes_AS_STRING(data)
        kept.size = <size_t> PyBytes_GET_SIZE(data)
        return kept

    cdef int _set_renderer(self, Column* column, oid, types) except -1:
        renderer = renderer_for(oid, types)
        column.kind = KINDS.get(renderer, NUMBERS if oid in NUMBER_ARRAYS else PYTHON)
        column.renderer = <PyObject*> renderer
        self._kept.append(renderer)
        return 0

    cdef int _set_keys(self, relation, info, tuple groups) except -1:
        cdef int index, at
        index_of = {column.name: index for index, column in enumerate(relation.columns)}
        names = primary_key(relation, info)
        self.primary_count = len(names)
        self.primary = <int*> self._zeroed(self.primary_count, sizeof(int))
        for at, name in enumerate(names):
            index = index_of[name]
            self.primary[at] = index
            self.columns[index].in_key = self.columns[index].in_primary_key = True
        self.plain_primary = (
            self.primary_count == 1 and relation.columns[self.primary[0]].type_oid in plain_oids
        )
        self.group_count = len(groups)
        self.groups = <Group*> self._zeroed(self.group_count, sizeof(Group))
        for at, columns in enumerate(groups):
            self._set_group(&self.groups[at], columns, index_of)
        self.prefix = self._keep(table_prefix(*self.name).encode())
        self.prefix_crc = crc32_more(0, self.prefix.data, self.prefix.size)
        return 0

    cdef int _set_group(self, Group* group, columns, dict index_of) except -1:
        cdef int index, at
        if columns is None:
            group.count = -1
            return 0
        group.columns = <int*> self._zeroed(len(columns), sizeof(int))
        for at, name in enumerate(columns):
            index = index_of.get(name, -1)
            group.columns[at] = index
            if index >= 0:
                self.columns[index].in_key = True
        group.count = len(columns)
        return 0

    cdef int _set_filters(self, tuple filters) except -1:
        cdef int at, i
        cdef Filter* filter
        self.wanted = self.always
        self.filters = <Filter*> self._zeroed(len(filters), sizeof(Filter))
        self.filter_count = len(filters)
        for at, one in enumerate(filters):
            filter = &self.filters[at]
            filter.number = one.number
            filter.actions = self._bits(one.actions)
            filter.leaves = one.leaves
            self.wanted |= filter.actions
            filter.checks = <Check*> self._zeroed(len(one.checks), sizeof(Check))
            filter.count = len(one.checks)
            for i, check in enumerate(one.checks):
                self._set_check(&filter.checks[i], check)
        return 0

    cdef int _set_check(self, Check* into, check) except -1:
        cdef int i
        if not 0 <= check.column < self.column_count:
            raise ProtocolError(f"a check of column {check.column} where {self.own_name} has {self.column_count}")
        into.column = check.column
        into.of_null = check.of_null
        into.trimmed = check.trimmed
        into.kind = <CheckKind> <int> CHECK_KINDS[check.kind]
        into.operator = <CheckOperator> <int> CHECK_OPERATORS[check.operator]
        self.columns[into.column].in_check = True
        holds = check.holds
        self._kept.append(holds)
        into.holds = <PyObject*> holds
        if into.kind == CHECK_INTEGER or into.kind == CHECK_MOMENT:
            into.integers = <int64_t*> self._zeroed(len(check.values), sizeof(int64_t))
        elif into.kind == CHECK_TEXT:
            into.texts = <Slice*> self._zeroed(len(check.values), sizeof(Slice))
        elif into.kind == CHECK_PATH:
            self._set_path(into, holds)
            return 0
        else:
            return 0
        into.count = len(check.values)
        if not into.count and into.operator != OP_IN and into.operator != OP_NOT_IN:
            raise ProtocolError("a check without a value")
        for i, value in enumerate(check.values):
            if into.kind == CHECK_TEXT:
                into.texts[i] = self._keep(value)
            else:
                into.integers[i] = value
        return 0

    cdef int _set_path(self, Check* into, told) except -1:
        cdef int i
        known = {}
        self._kept.append(known)
        into.known = <PyObject*> known
        into.absent = told.absent
        into.count = len(told.steps)
        into.steps = <Step*> self._zeroed(into.count, sizeof(Step))
        for i, (key, index) in enumerate(told.steps):
            into.steps[i].key = self._keep(key)
            into.steps[i].index = index
        return 0

    # Taking a row apart.

    cdef Py_ssize_t split(self, const uint8_t* payload, size_t size, size_t at, Value* row, bint* unchanged) except -1:
        """TupleData at ``at`` into slices; where it ends. ``unchanged`` is set if a column of it is UNCHANGED."""
        cdef int index
        cdef uint8_t kind
        cdef size_t length
        at = self._start(payload, size, at)
        for index in range(self.column_count):
            if at >= size:
                raise IndexError
            kind = payload[at]
            at += 1
            if kind == c"t":
                if size - at < 4:
                    raise IndexError
                length = big32(payload + at)
                at += 4
                if size - at < length:
                    raise ProtocolError(f"a row ends at byte {at + length} of a frame of {size}")
                row[index].data = payload + at
                row[index].size = length
                at += length
            elif kind == c"n":
                row[index].data = NULL
                row[index].size = 0
            elif kind == c"u":
                row[index].data = UNCHANGED
                row[index].size = UNCHANGED_BYTES
                unchanged[0] = True
            else:
                raise ProtocolError(f"a column of kind {kind:#04x} in a row of {self.own_name}")
        return <Py_ssize_t> at

    cdef Py_ssize_t split_key(
        self, const uint8_t* payload, size_t size, size_t at, Value* row, bint checked
    ) except -1:
        """As `split` for a row that is too large: other columns than the key's are null. ``checked``: than those that
        filters look at, and of these long values are not known."""
        cdef int index
        cdef uint8_t kind
        cdef size_t length
        at = self._start(payload, size, at)
        for index in range(self.column_count):
            row[index].data = NULL
            row[index].size = 0
            if at >= size:
                raise IndexError
            kind = payload[at]
            at += 1
            if kind == c"t":
                if size - at < 4:
                    raise IndexError
                length = big32(payload + at)
                at += 4
                if size - at < length:
                    raise ProtocolError(f"a row ends at byte {at + length} of a frame of {size}")
                if checked and length > CHECKED_BYTES:
                    row[index].data = UNCHANGED
                    row[index].size = UNCHANGED_BYTES
                elif checked or self.columns[index].in_key:
                    row[index].data = payload + at
                    row[index].size = length
                at += length
            elif kind == c"u":
                row[index].data = UNCHANGED
                row[index].size = UNCHANGED_BYTES
        return <Py_ssize_t> at

    cdef Py_ssize_t _start(self, const uint8_t* payload, size_t size, size_t at) except -1:
        cdef int count
        if at > size or size - at < 2:
            raise IndexError
        count = (payload[at] << 8) | payload[at + 1]
        if count != self.column_count:
            raise ProtocolError(f"a row of {count} columns where {self.own_name} has {self.column_count}")
        return <Py_ssize_t> at + 2

    cdef inline uint8_t mark(self, const uint8_t* payload) noexcept:
        """What kind of row comes first. By the root's identity it may be called whole where the partition's is a key."""
        return c"K" if self.partial and payload[ROW_START - 1] == c"O" else payload[ROW_START - 1]

    # Rendering.

    cdef int append_record(self, Buffer* out, Value* row) except -1:
        """The beginning of a body: the whole row."""
        cdef int index
        cdef Column* column
        if self.column_count == 0:
            return append(out, b'{"record":{}', 12)
        for index in range(self.column_count):
            column = &self.columns[index]
            append(out, column.lead.data, column.lead.size)
            append_value(out, column, row[index])
        return append_byte(out, c"}")

    cdef int append_columns(self, Buffer* out, Value* row, Value* differs_from, bint key_alone) except -1:
        """A JSON object of some columns, without those that are UNCHANGED: those that differ from another row, the
        key's, or all."""
        cdef int index
        cdef Column* column
        cdef bint first = True
        append_byte(out, c"{")
        for index in range(self.column_count):
            column = &self.columns[index]
            if row[index].data == UNCHANGED or (differs_from != NULL and same(row[index], differs_from[index])):
                continue
            if key_alone and not (
                column.in_primary_key or (column.in_key and row[index].size <= GROUP_VALUE_BYTES)
            ):
                continue
            if not first:
                append_byte(out, c",")
            first = False
            append(out, column.name.data, column.name.size)
            append_value(out, column, row[index])
        return append_byte(out, c"}")


cdef inline bint same(Value one, Value other) noexcept nogil:
    if one.data == NULL or other.data == NULL:
        return one.data == other.data
    return one.size == other.size and memcmp(one.data, other.data, one.size) == 0


cdef size_t growth_bytes(Value* row, int count) noexcept nogil:
    """How much larger than itself the row's JSON is at least, by characters that take six bytes."""
    cdef size_t found = 0, at
    cdef int index
    cdef uint8_t c
    for index in range(count):
        if row[index].data == NULL:
            continue
        for at in range(row[index].size):
            c = row[index].data[at]
            found += c < 0x20 and c != 0x08 and c != 0x09 and c != 0x0A and c != 0x0C and c != 0x0D
    return 5 * found
