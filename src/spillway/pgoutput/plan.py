"""What is compiled once per relation so that a row costs little: renderers, templates, where the key's columns are.

A row is taken apart into a list with one entry per column: its text, None for null, `UNCHANGED` for a TOAST column
that the server did not send. One ``%`` of a prepared template then makes the whole body, so a large value is copied
once.

Primary key: under replica identity default the columns that pgoutput flags are the primary key as it was when the row
was written; that is right even when the catalogue, asked later, has another. Else the catalogue's is taken, and a
table whose rows do not carry all of it has no key.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import orjson

from spillway.change import ACTIONS, BODY_START, Action, make_key, table_prefix
from spillway.pgoutput import lines
from spillway.pgoutput.filters import CHECKED_BYTES, UNCHANGED, Filter
from spillway.pgoutput.messages import ProtocolError
from spillway.pgoutput.relation import Relation, TableInfo
from spillway.pgoutput.scalars import to_text
from spillway.pgoutput.types import PLAIN_OIDS, renderer_for

Row = list[bytes | None]

# A value of a configured group column above this enters the key as a digest: keys are held in memory, shown and typed.
GROUP_VALUE_BYTES = 1024

_NULL, _UNCHANGED, _TEXT = b"nut"
_INSERT_BYTES = 8  # of the frame of an insert, before its columns: each has a byte for its kind, and a value its length
_count_at = struct.Struct(">H").unpack_from
_length_at = struct.Struct(">I").unpack_from

# Everything but the control characters that JSON writes with six bytes (\u0001).
_SHORT_IN_JSON = bytes(set(range(256)) - set(range(32)) | set(b"\b\t\n\f\r"))


@dataclass(frozen=True, slots=True)
class DatabaseMeta:
    """The database entity as messages name it (``metadata.database``)."""

    id: str
    name: str
    annotations: Mapping[str, object]
    database: str
    hostname: str

    def as_json(self) -> bytes:
        return orjson.dumps(
            {
                "id": self.id,
                "name": self.name,
                "annotations": dict(self.annotations),
                "database": self.database,
                "hostname": self.hostname,
            }
        )


def primary_key(relation: Relation, info: TableInfo) -> tuple[str, ...]:
    """The primary key's columns, in column order of the table; none if the rows do not carry them all."""
    if relation.replica_identity == "d":
        flagged = tuple(column.name for column in relation.columns if column.in_identity)
        if flagged:
            return flagged
    names = {column.name for column in relation.columns}
    return info.primary_key if names.issuperset(info.primary_key) else ()


class TablePlan:
    """Immutable after its creation.

    ``groups`` are sets of group columns, None for the primary key; a column that the relation does not have counts as
    null. ``wanted``: actions whose rows are wanted whatever they say.
    """

    def __init__(
        self,
        relation: Relation,
        info: TableInfo,
        groups: Sequence[Sequence[str] | None],
        wanted: frozenset[Action],
        filters: Sequence[Filter] = (),
    ) -> None:
        self.always = frozenset(ACTIONS.index(action) for action in wanted)
        self.filters = filters
        self.filters_of = [[one for one in filters if action in one.actions] for action in ACTIONS]  # by its code
        self.wanted = self.always.union(code for code, some in enumerate(self.filters_of) if some)
        # What a row costs beyond its bytes: the names of its columns are not in its frame.
        self.overhead_bytes = sum(2 * len(column.name) + 8 for column in relation.columns)
        self.own_name = (relation.schema, relation.table)
        self.name = self.schema, self.table = info.root or self.own_name
        self.partitioned = info.partitioned
        self.partial = info.partitioned and info.partial  # an old row that is said to be whole may be a key
        index_of = {column.name: index for index, column in enumerate(relation.columns)}
        self._pk = [index_of[name] for name in primary_key(relation, info)]
        self._checked = sorted({*self._pk, *(check.column for one in filters for check in one.checks)})
        self._groups = [None if columns is None else [index_of.get(name) for name in columns] for columns in groups]
        self._key_indexes = sorted({*self._pk, *(i for group in self._groups for i in group or () if i is not None)})
        self._column_count = len(relation.columns)

        self._prefix = table_prefix(self.schema, self.table).encode()
        # A key of one plain value needs no look for characters to escape.
        self._plain_pk = len(self._pk) == 1 and relation.columns[self._pk[0]].type_oid in PLAIN_OIDS
        self._renderers = [renderer_for(column.type_oid, info.types) for column in relation.columns]
        self._names_json = [orjson.dumps(column.name) + b":" for column in relation.columns]
        slots = [_escape_percent(name) + b"%b" for name in self._names_json]
        self._template = BODY_START + b"{" + b",".join(slots) + b"}%b"
        # By the action's code. A partition is emptied under its own name.
        self.tails = [_tail(action, *(self.own_name if action == "truncate" else self.name)) for action in ACTIONS]

    # Taking a row apart.

    def split(self, payload: bytes, position: int) -> tuple[Row, int, bool]:
        """TupleData at ``position``: the row, where it ends, and whether a column of it is `UNCHANGED`."""
        row: Row = []
        append = row.append
        unchanged = False
        position = self._start(payload, position)
        for _ in range(self._column_count):
            kind = payload[position]
            if kind == _TEXT:
                start = position + 5
                position = start + _length_at(payload, position + 1)[0]
                append(payload[start:position])
            elif kind == _NULL:
                append(None)
                position += 1
            elif kind == _UNCHANGED:
                append(UNCHANGED)
                unchanged = True
                position += 1
            else:
                raise ProtocolError(f"a column of kind {kind:#04x} in a row of {self.own_name}")
        return row, position, unchanged

    def split_key(self, payload: memoryview, position: int) -> tuple[Row, int]:
        """As `split` for a row that is too large: of other columns than the key's nothing is copied (None)."""
        return self._split_some(payload, position, self._key_indexes, len(payload))

    def split_checked(self, payload: memoryview, position: int) -> tuple[Row, int]:
        """As `split_key`, of what checks look at: long values are taken as not known."""
        return self._split_some(payload, position, self._checked, CHECKED_BYTES)

    def _split_some(
        self, payload: memoryview, position: int, indexes: Sequence[int], most_bytes: int
    ) -> tuple[Row, int]:
        """Of these columns alone; `UNCHANGED` where a value is longer."""
        row: Row = [None] * self._column_count
        position = self._start(payload, position)
        for index in range(self._column_count):
            kind = payload[position]
            position += 1
            if kind == _TEXT:
                start = position + 4
                length = _length_at(payload, position)[0]
                position = start + length
                if position > len(payload):
                    raise ProtocolError(f"a row ends at byte {position} of a frame of {len(payload)}")
                if index in indexes:
                    row[index] = bytes(payload[start:position]) if length <= most_bytes else UNCHANGED
            elif kind == _UNCHANGED:
                row[index] = UNCHANGED
        return row, position

    def _start(self, payload: bytes | memoryview, position: int) -> int:
        (count,) = _count_at(payload, position)
        if count != self._column_count:
            raise ProtocolError(f"a row of {count} columns where {self.own_name} has {self._column_count}")
        return position + 2

    # The same of a line of COPY.

    def split_line(self, line: bytes) -> tuple[Row, int]:
        """The row, and the size of the frame that its insert would have."""
        row = lines.split(line, self._column_count)
        return row, _INSERT_BYTES + sum([1 if value is None else 5 + len(value) for value in row])

    def split_line_key(self, line: memoryview) -> tuple[Row, int]:
        """As `split_line` for a row that may be too large: of other columns than the key's nothing is copied (None)."""
        row: Row = [None] * self._column_count
        size_bytes = _INSERT_BYTES
        for index, (start, end, length) in enumerate(lines.fields(line, self._column_count)):
            size_bytes += 1 if length is None else 5 + length
            if length is not None and index in self._key_indexes:
                row[index] = lines.unescaped(bytes(line[start:end]))
        return row, size_bytes

    def split_line_checked(self, line: memoryview) -> Row:
        """As `split_checked`."""
        row: Row = [None] * self._column_count
        for index, (start, end, length) in enumerate(lines.fields(line, self._column_count)):
            if length is not None and index in self._checked:
                row[index] = lines.unescaped(bytes(line[start:end])) if length <= CHECKED_BYTES else UNCHANGED
        return row

    # What the row says of its key.

    def key_alone(self, row: Row) -> Row:
        """The row with null in all columns that are of no key."""
        return [None if index not in self._key_indexes else value for index, value in enumerate(known(row))]

    def told(self, old: Row | None, row: Row) -> Row:
        """What is known of the old row when only a key of it was sent, or nothing: the primary key is taken as
        unchanged where that does not tell."""
        told: Row = [None] * self._column_count if old is None else list(old)
        for index in self._pk:
            if told[index] is None:
                told[index] = row[index]
        return told

    def primary(self, row: Row) -> tuple[bytes, bytes]:
        """The text of the primary key, and its values as JSON; empty and none where the row does not have them all."""
        values = [value for index in self._pk if (value := row[index]) is not None]
        if not values or len(values) < len(self._pk):
            return b"", b"[]"
        if self._plain_pk:
            return self._prefix + values[0], b'["%b"]' % values[0]
        pks = [to_text(value) for value in values]
        return make_key(self.schema, self.table, tuple(pks)).encode(), orjson.dumps(pks)

    def key_of(self, primary: bytes) -> bytes | None:
        """The text of a primary key without the table's prefix; None for none."""
        return primary[len(self._prefix) :] if primary else None

    def texts(self, primary: bytes, row: Row) -> tuple[bytes, ...]:
        """The keys' texts as a record has them (spillway.chunk), each with none before it: the primary key's, then
        the groups'."""
        if not self._groups:
            return (primary, b"")
        groups = [primary if group is None else self._group_key(group, row) for group in self._groups]
        return (primary, b"", *[text for group in groups for text in (group, b"")])

    def _group_key(self, group: Sequence[int | None], row: Row) -> bytes:
        values = tuple(None if index is None else _group_value(row[index]) for index in group)
        return make_key(self.schema, self.table, values).encode()

    # Rendering.

    def body(self, row: Row, tail: bytes) -> bytes:
        """The body of a row without `UNCHANGED` columns."""
        values = [
            b"null" if value is None else value if renderer is None else renderer(value)
            for value, renderer in zip(row, self._renderers, strict=True)
        ]
        return self._template % (*values, tail)

    def partial_body(self, row: Row, tail: bytes) -> bytes:
        """The body without the columns that are `UNCHANGED`."""
        return BODY_START + self.columns(row, range(self._column_count)) + tail

    def key_body(self, row: Row, tail: bytes) -> bytes:
        """The body of a row that is too large: the key's columns alone, long group values left out."""
        short = [i for i in self._key_indexes if i in self._pk or len(row[i] or b"") <= GROUP_VALUE_BYTES]
        return BODY_START + self.columns(row, short) + tail

    def columns(self, row: Row, indexes: Sequence[int]) -> bytes:
        """A JSON object of some columns, without those that are `UNCHANGED`."""
        members = [
            self._names_json[index] + self._value(value, index)
            for index in indexes
            if (value := row[index]) is not UNCHANGED
        ]
        return b"{" + b",".join(members) + b"}"

    def _value(self, value: bytes | None, index: int) -> bytes:
        if value is None:
            return b"null"
        renderer = self._renderers[index]
        return value if renderer is None else renderer(value)


def before(key: Row, row: Row) -> Row:
    """The row as it was, as far as an old key tells; what that does not hold is taken as unchanged.

    No column of a key or an identity index can be null, so what is null in an old key is not part of it. The flags of
    the relation would not do: published by its root, a partition's rows come with its own identity and the root's
    flags.
    """
    return [now if was is None else was for was, now in zip(key, row, strict=True)]


def differing(old: Row, new: Row) -> list[int]:
    """Columns whose text is another: 1.0 and 1.00 differ."""
    return [index for index, (was, now) in enumerate(zip(old, new, strict=True)) if was != now]


def filled(row: Row, old: Row) -> Row:
    """The row with the values of `UNCHANGED` columns that the old row has."""
    return [was if now is UNCHANGED and was is not None else now for was, now in zip(old, row, strict=True)]


def known(row: Row) -> Row:
    """The row with null for what is `UNCHANGED`: for keys alone, never for a record."""
    return [None if value is UNCHANGED else value for value in row]


def growth_bytes(row: Row) -> int:
    """How much larger than itself the row's JSON is at least, by characters that take six bytes."""
    return 5 * sum(len(value.translate(None, _SHORT_IN_JSON)) for value in row if value is not None)


def _tail(action: Action, schema: str, table: str) -> bytes:
    """What stands behind the record. To fill in: changes, idempotency key, what the transaction says with commit_idx
    in the middle, primary key."""
    return (
        b',"changes":%b,"action":"'
        + action.encode()
        + b'","metadata":{"table_schema":'
        + _escape_percent(orjson.dumps(schema))
        + b',"table_name":'
        + _escape_percent(orjson.dumps(table))
        + b',"idempotency_key":"%b","commit_timestamp":%b,"commit_idx":%d,"database_name":%b,"record_pks":%b'
    )


def _group_value(value: bytes | None) -> str | None:
    if value is None:
        return None
    return to_text(value) if len(value) <= GROUP_VALUE_BYTES else f"sha256-{sha256(value).hexdigest()}"


def _escape_percent(text: bytes) -> bytes:
    return text.replace(b"%", b"%%")
