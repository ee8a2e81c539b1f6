"""Reads a real server's pgoutput through the SQL interface and decodes it, with a catalogue query of its own. All twins
get the same frames and have to give the same chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from pgoutput.frames import META, PLENTY_BYTES, Connection, changes_of, xlog
from pgoutput.twins import TWINS
from spillway.change import ACTIONS, Change
from spillway.chunk import Chunk
from spillway.errors import Finding
from spillway.pgoutput import Relation, TableInfo, TypeInfo
from spillway.pgoutput.decoder import Decoder

_ALL_ACTIONS = frozenset(ACTIONS)
_COLUMNS = ("count", "data", "meta", "keys", "tables", "commit_lsn", "end_lsn", "truncates")

# What the source forces on its sessions.
FORCED = {
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "client_encoding": "UTF8",
}

# What an administrator may have set for a role or a database.
HOSTILE = {
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
    "xmlbinary": "hex",
    "search_path": "pg_catalog",
}

_TYPES = """
SELECT t.oid::bigint, t.typname,
       CASE WHEN t.typtype = 'b' AND t.typelem <> 0 AND t.typlen = -1 AND t.typcategory = 'A' THEN 'a'
            ELSE t.typtype::text END,
       t.typbasetype::bigint, t.typelem::bigint, coalesce(e.typdelim::text, ','),
       coalesce((SELECT array_agg(ARRAY[a.attname::text, a.atttypid::bigint::text] ORDER BY a.attnum)
                   FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
                    AND t.typtype = 'c'), '{}')
  FROM pg_type t LEFT JOIN pg_type e ON e.oid = t.typelem
"""
_KINDS = {"b": "base", "d": "domain", "e": "enum", "c": "composite", "a": "array", "r": "range", "m": "multirange"}
_PRIMARY_KEY = """
SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
 WHERE i.indrelid = %s::oid AND i.indisprimary ORDER BY a.attnum
"""
_ROOT = """
SELECT n.nspname::text, c.relname::text FROM pg_class p
  JOIN pg_class c ON c.oid = pg_partition_root(p.oid) JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE p.oid = %s::oid AND p.relispartition
"""


def connect(dsn: str, **settings: str) -> psycopg.Connection[tuple[object, ...]]:
    """A session with the forced settings."""
    options = " ".join(f"-c {name}={value}" for name, value in {**FORCED, **settings}.items())
    return psycopg.connect(dsn, options=options, autocommit=True)


def set_hostile(dsn: str) -> None:
    """Hostile defaults for every session of this database."""
    with connect(dsn) as session:
        (name,) = session.execute("SELECT current_database()").fetchone() or ("",)
        for setting, value in HOSTILE.items():
            session.execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                    sql.Identifier(str(name)), sql.Identifier(setting), sql.Literal(value)
                )
            )


class Capture:
    """One slot, and one decoder of each kind over all that a publication carries."""

    def __init__(
        self,
        session: psycopg.Connection[tuple[object, ...]],
        groups: tuple[tuple[str, ...] | None, ...] = (),
        max_message_bytes: int = 1 << 24,
        publication: str = "p",
        options: tuple[str, ...] = (),
    ) -> None:
        self._session = session
        self._options = ("proto_version", "1", "publication_names", publication, *options)
        self.relations: list[Relation] = []
        self.warnings: list[str] = []
        self.frames: list[bytes] = []
        self._decoders = [
            twin(META, lambda *_: groups, len(groups), max_message_bytes, 0, PLENTY_BYTES, self._warn) for twin in TWINS
        ]

    def chunk(self, *, peek: bool = False) -> Chunk:
        """Everything since the last call that did not only peek."""
        verb = "peek" if peek else "get"
        query = f"SELECT data FROM pg_logical_slot_{verb}_binary_changes('s', NULL, NULL, VARIADIC %s::text[])"
        with self._session.cursor(binary=True) as cursor:
            self.frames = [bytes(row[0]) for row in cursor.execute(query, [list(self._options)]).fetchall()]
        self.relations, self.warnings = [], []
        first, *others = [self._decode(decoder) for decoder in self._decoders]
        for other in others:
            assert [getattr(other, name) for name in _COLUMNS] == [getattr(first, name) for name in _COLUMNS]
        self.relations = self.relations[: len(self.relations) // len(TWINS)]
        self.warnings = self.warnings[: len(self.warnings) // len(TWINS)]
        return first

    def page(self, query: str, oid: int) -> Chunk:
        """The rows of a query that has the columns of a relation which was captured before."""
        with self._session.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT") as copy:
            lines = [memoryview(bytes(line)) for line in copy]
        first, *others = [self._decode_page(decoder, lines, oid) for decoder in self._decoders]
        for other in others:
            assert [getattr(other, name) for name in _COLUMNS] == [getattr(first, name) for name in _COLUMNS]
        return first

    def changes(self, *, peek: bool = False) -> list[Change]:
        return changes_of(self.chunk(peek=peek))

    def _decode(self, decoder: Decoder) -> Chunk:
        connection = Connection(*map(xlog, self.frames))
        while (stop := decoder.fill(connection, PLENTY_BYTES, len(self.frames) * 2 + 1)) is not None:
            assert isinstance(stop, Relation)
            self.relations.append(stop)
            decoder.learn(stop, self._table_info(stop), _ALL_ACTIONS)
        return decoder.take()

    def _decode_page(self, decoder: Decoder, lines: list[memoryview], oid: int) -> Chunk:
        decoder.begin_page(b"page", 1, 1)
        assert decoder.fill_page(Connection(*lines), oid, PLENTY_BYTES, len(lines) + 1) is None
        return decoder.take()

    def _warn(self, finding: Finding) -> None:
        self.warnings.append(finding.code)

    def _table_info(self, relation: Relation) -> TableInfo:
        key = tuple(str(name) for (name,) in self._session.execute(_PRIMARY_KEY, [relation.oid]))
        root = self._session.execute(_ROOT, [relation.oid]).fetchone()
        return TableInfo(relation.oid, key, self._types(), (str(root[0]), str(root[1])) if root else None)

    def _types(self) -> dict[int, TypeInfo]:
        types = {}
        for oid, name, kind, base, element, delimiter, attributes in self._session.execute(_TYPES).fetchall():
            if kind in _KINDS:
                types[oid] = TypeInfo(
                    oid, name, _KINDS[kind], base, element, delimiter, tuple((a, int(t)) for a, t in attributes)
                )
        return types  # type: ignore[return-value]


@contextmanager
def slot(
    dsn: str,
    *statements: str,
    publication: str = "FOR ALL TABLES",
    settings: dict[str, str] | None = None,
    **arguments: object,
) -> Iterator[tuple[psycopg.Connection[tuple[object, ...]], Capture]]:
    """Runs statements, then a publication and a slot: what is executed after that is captured."""
    with connect(dsn, **(settings or {})) as session:
        for statement in statements:
            session.execute(statement)
        session.execute(f"CREATE PUBLICATION p {publication}")
        session.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        yield session, Capture(session, **arguments)  # type: ignore[arg-type]
