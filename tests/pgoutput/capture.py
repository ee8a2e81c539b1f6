"""Reads a real server's pgoutput through the SQL interface and decodes it, with a catalogue query of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from pgoutput.frames import META
from spillway.change import Change
from spillway.pgoutput import Decoder, Event, Relation, TableInfo, Truncation, TypeInfo

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
    """One slot and one decoder over all that a publication carries."""

    def __init__(
        self,
        session: psycopg.Connection[tuple[object, ...]],
        groups: tuple[tuple[str, ...], ...] = (),
        max_message_bytes: int = 1 << 24,
        publication: str = "p",
        options: tuple[str, ...] = (),
    ) -> None:
        self._session = session
        self._options = ("proto_version", "1", "publication_names", publication, *options)
        self.relations: list[Relation] = []
        self.warnings: list[str] = []
        self.frames: list[bytes] = []
        self._decoder = Decoder(META, lambda *_: groups, max_message_bytes, lambda w: self.warnings.append(w.code))

    def events(self, *, peek: bool = False) -> Iterator[Event]:
        """Everything since the last call that did not only peek."""
        verb = "peek" if peek else "get"
        query = f"SELECT data FROM pg_logical_slot_{verb}_binary_changes('s', NULL, NULL, VARIADIC %s::text[])"
        with self._session.cursor(binary=True) as cursor:
            self.frames = [bytes(row[0]) for row in cursor.execute(query, [list(self._options)]).fetchall()]
        for frame in self.frames:
            event = self._decoder.feed(frame)
            if isinstance(event, Relation):
                self.relations.append(event)
                self._decoder.learn(event, self._table_info(event))
            if event is not None:
                yield event

    def changes(self, *, peek: bool = False) -> list[Change]:
        found: list[Change] = []
        for event in self.events(peek=peek):
            if isinstance(event, Change):
                found.append(event)
            elif isinstance(event, Truncation):
                found.extend(event.changes)
        return found

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
