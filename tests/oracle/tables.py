"""The rows of a table at the source, and of its copy in the file of a sqlite sink: by key, values as text."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from oracle.rules import Key, Row, as_text


@dataclass(frozen=True, slots=True)
class Shape:
    """Columns in their order, and those of the primary key."""

    table: str
    columns: Sequence[str]
    keys: Sequence[str]

    def rows(self, found: Iterable[Sequence[object]]) -> dict[Key, Row]:
        rows = [dict(zip(self.columns, map(as_text, row), strict=True)) for row in found]
        return {(self.table, *(str(row[key]) for key in self.keys)): row for row in rows}


def shape_of(connection: psycopg.Connection, table: str) -> Shape:
    found = connection.execute(
        "select attname, exists (select from pg_index where indrelid = attrelid and indisprimary and attnum = any"
        " (indkey)) from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped"
        " order by attnum",
        [table],
    ).fetchall()
    return Shape(table, [name for name, _ in found], [name for name, in_key in found if in_key])


def source_rows(conninfo: str, table: str) -> dict[Key, Row]:
    """As they are now, values as PostgreSQL prints them."""
    with psycopg.connect(conninfo) as connection:
        shape = shape_of(connection, table)
        listed = ", ".join(f'"{column}"::text' for column in shape.columns)
        return shape.rows(connection.execute(f"select {listed} from {table}".encode()))


def sqlite_rows(path: Path, conninfo: str, table: str) -> dict[Key, Row]:
    """Of the copy; none, if the sink has not made the table yet."""
    with psycopg.connect(conninfo) as source:
        shape = shape_of(source, table)
    name = table.removeprefix("public.")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        if (name,) not in connection.execute("select name from sqlite_master where type = 'table'").fetchall():
            return {}
        listed = ", ".join(f'"{column}"' for column in shape.columns)
        return shape.rows(connection.execute(f'select {listed} from "{name}"'))
    finally:
        connection.close()
