"""A question by keys, and the statement that is sent for it: the question's SQL inside of ours.

A `Question` is SQL whose ``$1`` ... ``$n`` are arrays of key values, one array for each column of the key. Its rows may
be of any number and size, so it never runs as it stands. The statement around it

- writes every value by its type's output function (``concat`` does; a cast to text would turn ``t`` into ``true`` and
  take the blanks off a char(n)), in an inner query that is evaluated once: ``OFFSET 0`` keeps the planner from
  repeating its expressions;
- sums what the rows cost so far, in a window, and leaves away all values but the key's of a row with which the sum is
  above the credit, or which is larger than one row may be (and so does not count). WindowAgg hands its rows on as they
  come, so the server holds none of them back;
- gives the long values of a large row in pieces, in rows of their own that follow it, as bytes: libpq never has more
  than a piece, and what is made of it is begun before the rest is there (`spillway.source.pieces`);
- says in its first row, which comes even if the question has none, what the statement's own snapshot sees, whether the
  server is in recovery, and of which types the values are. After an ALTER TABLE the server plans the question anew
  without a word, since all that comes out of the statement is text: by the types it is noticed.

Columns are referred to by name, so that a column more in a ``SELECT *`` does not shift the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from spillway.pgoutput.filters import Check
from spillway.pgoutput.scalars import Renderer

# What a value costs beside its bytes: an object and its place in a dict; and a row. The server does not know how long a
# text is as JSON. It allows for some of that, or a row would have to be asked for twice because of its quotes.
VALUE_BYTES: Final = 80
ROW_BYTES: Final = 512
_ALLOWED_BYTES_BY_VALUE: Final = 16
_ALLOWED_PART: Final = 8
_ALLOWED_BYTES: Final = 64 << 10  # at most
COLLECTED: Final = 3  # times a long value that is made as a whole, besides: it, and what stands between it and JSON

WHOLE_BYTES: Final = 512 << 10  # of a row that comes as one
PIECE_BYTES: Final = 256 << 10

# Of the statement's columns, all of them text but PIECE: what the snapshot sees (in the first row), what the row costs
# (null: there is no row), whether it came within the credit (`WHOLE`, `IN_PIECES` or none of these), of which column a
# piece is (0: this is no piece) and the piece; then the question's.
HEAD, COST, COVERED, COLUMN, PIECE, FIRST = range(6)
WHOLE, IN_PIECES = b"w", b"p"
NO_COLUMN = b"0"

INT8_OID: Final = 20


Row = Mapping[str, bytes]  # values as JSON, by column


def object_parts(row: Row) -> list[bytes]:
    """A row as a JSON object, to be joined with what stands around it: a large value is copied once then."""
    return parts((orjson.dumps(name), value) for name, value in row.items())


def parts(members: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The object of these, as `object_parts`; their names have their quotes."""
    found: list[bytes] = []
    before = b"{"
    for name, value in members:
        found += (before + name + b":", value)
        before = b","
    return [*found, b"}"] if found else [b"{}"]


def row_bytes(values: Collection[bytes]) -> int:
    """What a row takes of the credit."""
    return ROW_BYTES + sum(VALUE_BYTES + len(value) for value in values)


# What may stand behind a statement and not behind a subquery. A comment with a quote in it may be the end of a literal.
_SEMICOLON_AT_END = re.compile(r"""\s*;(?:\s|--[^\n'"$]*(?:\n|\Z))*\Z""")


@dataclass(frozen=True, slots=True)
class Parameter:
    place: int  # among the values of a key, which are in column order
    array_oid: int
    delimiter: str


@dataclass(frozen=True, slots=True)
class Question:
    sql: str
    key: tuple[str, ...]  # the columns of the result that say whose row it is, in the order of a key's values
    parameters: tuple[Parameter, ...]  # $1, $2, ...
    checks: tuple[Check, ...] = field(default=(), compare=False)  # of the result's columns: what rows must pass

    def literals(self, keys: Sequence[tuple[str, ...]]) -> list[bytes | None]:
        return [array([key[p.place] for key in keys], p.delimiter) for p in self.parameters]

    @property
    def types(self) -> list[int]:
        return [parameter.array_oid for parameter in self.parameters]


@dataclass(slots=True)
class Prepared:
    """A question as a connection knows it."""

    question: Question
    name: bytes  # of the question's own statement, which is never run
    statement: bytes  # of the one around it
    columns: tuple[str, ...]
    types: str
    renderers: tuple[Renderer | None, ...]
    collected: frozenset[int]  # columns of which a long value is made as a whole
    looked_at: float  # when the question was last found to be the same, by the monotonic clock
    carried: set[str] = field(default_factory=set)  # columns that the stream had by then
    key_places: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.key_places = tuple(self.columns.index(name) for name in self.question.key)


def array(values: Sequence[str | None], delimiter: str) -> bytes:
    """The literal of an array. Every value is quoted, so that none reads as null, a brace or the delimiter."""
    quoted = [
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values
    ]
    return ("{" + delimiter.join(quoted) + "}").encode()


def as_subquery(text: str) -> str:
    """A statement as it can stand between parentheses; the line breaks end a comment that it may end with."""
    return "(\n" + _SEMICOLON_AT_END.sub("", text) + "\n)"


def statement(question: Question, columns: Sequence[str], encoding: str, collected: Collection[int]) -> str:
    """``encoding``: the server's. ``collected``: columns (by number) whose long values are not made piece by piece. The
    last two parameters are the credit, and what one row may take of it."""
    numbers = range(len(columns))
    credit, largest = (f"${len(question.parameters) + i}" for i in (1, 2))
    covered = f"(w.cost <= {largest} AND w.total <= {credit})"
    pieces = f"({covered} AND w.bytes > {WHOLE_BYTES})"
    long_bytes = WHOLE_BYTES // len(columns)  # what remains of a row when these are gone is within WHOLE_BYTES
    characters = 1 if encoding == "UTF8" else 3  # how much longer a text may be as UTF-8
    values = [
        f"CASE WHEN u.{_quoted(c)} IS DISTINCT FROM NULL THEN pg_catalog.concat(u.{_quoted(c)}) END AS c{i}"
        for i, c in enumerate(columns)
    ]
    lengths = [f"COALESCE(pg_catalog.octet_length(t.c{i}), 0)::pg_catalog.int8" for i in numbers]
    weights = [
        f"{characters} * {length}"
        + (f" + {COLLECTED} * GREATEST({characters} * {length} - {long_bytes}, 0)" if i in collected else "")
        for i, length in enumerate(lengths)
    ]
    fixed_bytes = ROW_BYTES + (VALUE_BYTES + _ALLOWED_BYTES_BY_VALUE) * len(columns)
    cost = f"t.bytes + LEAST(t.bytes / {_ALLOWED_PART}, {_ALLOWED_BYTES}) + {fixed_bytes}"
    is_long = [f"{characters} * pg_catalog.octet_length(w.c{i}) > {long_bytes}" for i in numbers]
    shown = [
        f"CASE WHEN p.number = 0 THEN w.c{i} END"
        if column in question.key
        else f"CASE WHEN p.number = 0 AND {covered} AND NOT ({pieces} AND {is_long[i]}) THEN w.c{i} END"
        for i, column in enumerate(columns)
    ]
    divided = [(i + 1, i) for i, column in enumerate(columns) if column not in question.key]
    array = ", ".join(f"CASE WHEN {is_long[i]} THEN {number} END" for number, i in divided) or "NULL::pg_catalog.int4"
    value = "CASE n " + " ".join(f"WHEN {number} THEN w.c{i}" for number, i in divided) + " END" if divided else "''"
    target = "SQL_ASCII" if encoding == "SQL_ASCII" else "UTF8"
    return f"""
SELECT CASE WHEN COALESCE(w.number, 1) = 1 AND p.number = 0
            THEN pg_catalog.concat_ws(' ', pg_catalog.txid_current_snapshot(), pg_catalog.pg_is_in_recovery(), w.types)
       END,
       w.cost::pg_catalog.text,
       CASE WHEN {pieces} THEN '{IN_PIECES.decode()}' WHEN {covered} THEN '{WHOLE.decode()}' END,
       p.number::pg_catalog.text, p.piece, {", ".join(shown)}
  FROM (SELECT 1) AS one
  LEFT JOIN (
       SELECT s.*, pg_catalog.row_number() OVER running AS number,
              pg_catalog.sum(CASE WHEN s.cost <= {largest} THEN s.cost ELSE 0 END) OVER running AS total
         FROM (SELECT t.*, {cost} AS cost
                 FROM (SELECT t.*, {" + ".join(weights)} AS bytes
                         FROM (SELECT {_types(columns)} AS types, {", ".join(values)}
                                 FROM {as_subquery(question.sql)} AS u OFFSET 0) AS t OFFSET 0) AS t OFFSET 0) AS s
       WINDOW running AS (ROWS UNBOUNDED PRECEDING)) AS w ON true
 CROSS JOIN LATERAL (
       SELECT 0 AS number, NULL::pg_catalog.bytea AS piece
        UNION ALL
       SELECT v.n, pg_catalog.substr(v.value, {PIECE_BYTES} * g + 1, {PIECE_BYTES})
         FROM (SELECT n, pg_catalog.convert_to({value}, '{target}') AS value
                 FROM pg_catalog.unnest(ARRAY[{array}]) AS n
                WHERE {pieces} AND n IS NOT NULL OFFSET 0) AS v,
              pg_catalog.generate_series(0, (pg_catalog.octet_length(v.value) - 1) / {PIECE_BYTES}) AS g) AS p"""


def types_of(question: Question, columns: Sequence[str]) -> str:
    """A statement that says the types of a question's columns, as the statement's first row does, and runs nothing.
    (What is said of a prepared statement has the base types of domains.)"""
    return f"""
SELECT {_types(columns)} FROM (SELECT 1) AS one
  LEFT JOIN (SELECT * FROM {as_subquery(question.sql)} AS v LIMIT 0) AS u ON true"""


def _types(columns: Sequence[str]) -> str:
    oids = [f"pg_catalog.pg_typeof(u.{_quoted(column)})::pg_catalog.oid" for column in columns]
    return f"pg_catalog.concat_ws(',', {', '.join(oids)})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
