"""The named queries of queries.sql, read once. ``-- name: NAME`` begins one; the next ``-- name:`` ends it."""

from __future__ import annotations

import re
from importlib import resources
from typing import LiteralString, cast

import psycopg
from psycopg.rows import DictRow, dict_row

from spillway.source.connect import Connection
from spillway.source.refusal import query_refusal


def _load() -> dict[str, LiteralString]:
    text = resources.files("spillway.source").joinpath("queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
    # Part of the program, not of its input: as literal as a string in the source.
    return {
        name: cast(LiteralString, body.strip().rstrip(";")) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


QUERIES = _load()


async def fetch(connection: Connection, name: str, **parameters: object) -> list[DictRow]:
    """All rows of a named query. Refusals come as errors of ours."""
    try:
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(QUERIES[name], parameters)
            return await cursor.fetchall()
    except psycopg.Error as error:
        raise query_refusal(error) from error


async def fetch_one(connection: Connection, name: str, **parameters: object) -> DictRow | None:
    rows = await fetch(connection, name, **parameters)
    return rows[0] if rows else None
