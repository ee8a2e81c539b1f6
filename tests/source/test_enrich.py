"""Enrichment on real servers: any key, any type, as many rows as there are, and what goes wrong."""

from __future__ import annotations

import asyncio

import pytest

from pgoutput.twins import TWINS
from source.conftest import MANY, SourceDatabase
from source.enriching import NOTHING, Key, T, enriched, enriching
from source.paging import streamed, new_decoder
from source.test_page import KEYS
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.source.bykeys import BatchFailed

HAS_NO_ARRAYS = {"int[]"}


async def test_rows_by_key(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, name text)",
        "INSERT INTO public.t VALUES (1, 'one'), (2, NULL), (3, 'three'), (4, '')",
    )
    sql = "SELECT name, id, id * 2 AS double FROM t WHERE id = ANY($1); -- the end"
    async with enriching(source, sql) as enricher:
        fetched = await enriched(enricher, ("3",), ("7",), ("2",), ("3",), ("4",))
        three = {"name": b'"three"', "id": b"3", "double": b"6"}
        two = {"name": b"null", "id": b"2", "double": b"4"}
        four = {"name": b'""', "id": b"4", "double": b"8"}
        assert fetched.rows == {0: three, 2: two, 3: three, 4: four}
        assert (fetched.sizes, fetched.several, fetched.queries) == ({}, set(), 1)
        assert fetched.seconds > 0
        assert (await enriched(enricher, ("7",))).rows == {}
        assert (await enriched(enricher)).rows == {}
        assert await enricher.columns(T) == ("name", "id", "double")


async def test_every_type_of_key(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'happy')",
        "CREATE TYPE public.pair AS (n int, t text)",
        "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
        'CREATE DOMAIN public.folded AS text COLLATE "en-x-icu"',
        "CREATE EXTENSION citext SCHEMA public",
    )
    words = ("", "NULL", "null", ",", "{a}", '"', "\\", '\\"', "a,b", " ", "\n", "ünï", "'", "$1", "(1,2)")
    keys = {**KEYS, "text": words, "public.citext": ("A", "b", "C,d"), "varchar": words}
    for number, (type_, values) in enumerate(keys.items()):
        table = f"t{number}"
        await source.execute(f"CREATE TABLE public.{table} (n serial, k {type_} PRIMARY KEY)")
        for value in values:
            await source.query.execute(f"INSERT INTO public.{table} (k) VALUES (%s)".encode(), [value])
        found = await source.query.execute(f"SELECT concat(k), n FROM public.{table} o".encode())
        rows = await found.fetchall()
        assert len(rows) == len(values)
        async with enriching(source, f"SELECT k, n FROM {table} WHERE k = ANY($1)") as enricher:
            asked = [(str(text),) for text, _ in rows]
            if type_ in HAS_NO_ARRAYS:
                with pytest.raises(SpillwayError, match="no arrays of the type of k"):
                    await enricher.fetch(("public", table), asked, seen=NOTHING, credit_bytes=MANY)
                continue
            fetched = await enricher.fetch(("public", table), [*asked, asked[0]], NOTHING, MANY)
            expected = [str(n).encode() for _, n in [*rows, rows[0]]]
            assert [fetched.rows[place]["n"] for place in range(len(expected))] == expected, type_
