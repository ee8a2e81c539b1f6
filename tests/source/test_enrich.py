"""Enrichment on real servers: any key, any type, as many rows as there are, and what goes wrong."""

from __future__ import annotations

import asyncio
import gc
import re
from pathlib import Path

import orjson
import pytest

from source.conftest import MANY, SourceDatabase
from source.enriching import NOTHING, T, enriched, enriching
from source.paging import SECONDS, new_decoder, streamed
from source.test_page import KEYS
from source.test_page_shape import UNUSUAL
from spillway.cli.run import _bound_the_allocator
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.source import bykeys, wrapped
from spillway.source.bykeys import BatchFailed, making_bytes
from spillway.source.connect import connect_query
from spillway.source.enrich import Enricher
from spillway.source.origin import Expected
from spillway.source.snapshot import Seen
from spillway.source.wrapped import COLLECTED

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
                    await enricher.fetch(("public", table), asked, seen=NOTHING, credit_bytes=MANY, row_bytes=MANY)
                continue
            fetched = await enricher.fetch(("public", table), [*asked, asked[0]], NOTHING, MANY, MANY)
            expected = [str(n).encode() for _, n in [*rows, rows[0]]]
            assert [fetched.rows[place]["n"] for place in range(len(expected))] == expected, type_


async def test_a_composite_key_has_its_columns_in_alphabetical_order(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (z uuid, n int, a text, name text, PRIMARY KEY (n, z, a))",
        "INSERT INTO public.t SELECT ('00000000-0000-0000-0000-00000000000' || i)::uuid, i, 'a,' || i, 'row ' || i"
        " FROM generate_series(1, 3) i",
    )
    sql = """
        SELECT t.name, t.n, t.z, t.a FROM unnest($1, $2, $3) AS r (a, n, z)
          JOIN t ON (t.a, t.n, t.z) = (r.a, r.n, r.z)
    """
    async with enriching(source, sql) as enricher:
        keys = [(f"00000000-0000-0000-0000-00000000000{i}", str(i), f"a,{i}") for i in (2, 4, 1, 2)]
        fetched = await enriched(enricher, *keys)
        assert {place: row["name"] for place, row in fetched.rows.items()} == {
            0: b'"row 2"',
            2: b'"row 1"',
            3: b'"row 2"',
        }
        with pytest.raises(BatchFailed, match="has 3 columns now"):
            await enriched(enricher, ("1",))


@pytest.mark.parametrize("in_pieces", [False, True])
async def test_values_are_the_stream_s(
    source: SourceDatabase, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_pieces:
        monkeypatch.setattr(wrapped, "WHOLE_BYTES", 0)
        monkeypatch.setattr(wrapped, "PIECE_BYTES", 3)
    columns = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(UNUSUAL))
    await source.execute(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok')",
        "CREATE TYPE public.pair AS (n int, t text)",
        "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
        f"CREATE TABLE public.t ({columns}, empty public.pair, id int PRIMARY KEY)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        f"ALTER DATABASE {source.database} SET DateStyle = 'German, DMY'",
        f"ALTER DATABASE {source.database} SET search_path = 'elsewhere'",
    )
    names = ", ".join(f"c{number}" for number in range(len(UNUSUAL)))
    values = ", ".join(UNUSUAL.values())
    await source.execute(f"INSERT INTO public.t (id, empty, {names}) VALUES (1, ROW(NULL, NULL), {values})")
    (inserted,) = await streamed(source, await source.stream(), 1, new_decoder())
    async with enriching(source, "SELECT * FROM public.t WHERE id = ANY($1)") as enricher:
        fetched = await enriched(enricher, ("1",))
    row = [orjson.dumps(name) + b":" + value for name, value in fetched.rows[0].items()]
    assert b"{" + b",".join(row) + b"}" == inserted.record


async def test_two_rows_of_one_key_are_told_and_cost_the_others_nothing(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT id, n FROM unnest($1) AS r (id), generate_series(1, id) AS n"
    async with enriching(source, sql) as enricher:
        fetched = await enriched(enricher, ("1",), ("2",), ("0",), ("3",), ("2",))
        assert fetched.rows == {0: {"id": b"1", "n": b"1"}}
        assert (fetched.several, fetched.sizes) == ({1, 3, 4}, {})
        fetched = await enriched(enricher, ("1",), ("2",), credit_bytes=0)
        assert (fetched.rows, fetched.several, list(fetched.sizes)) == ({}, {1}, [0])


async def test_rows_of_other_keys_are_nobody_s(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT CASE n WHEN 3 THEN NULL ELSE n END AS id FROM generate_series(1, 9) AS n WHERE $1 IS NOT NULL"
    async with enriching(source, sql) as enricher:
        assert (await enriched(enricher, ("4",), ("10",))).rows == {0: {"id": b"4"}}


async def test_the_credit_bounds_what_is_sent(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT id, repeat('x', id) AS body FROM unnest($1) AS r (id)"
    keys = [(str(size),) for size in (10_000, 90_000, 20_000, 30_000, 40_000)]
    async with enriching(source, sql) as enricher:
        nothing = await enriched(enricher, *keys, credit_bytes=0)
        assert nothing.rows == {}
        sizes = nothing.sizes
        assert all(int(keys[place][0]) < size < 1.2 * int(keys[place][0]) + 1000 for place, size in sizes.items())
        fetched = await enricher.fetch(T, keys, NOTHING, sizes[0] + sizes[2], sizes[2])
        assert (set(fetched.rows), fetched.sizes) == ({0, 2}, {place: sizes[place] for place in (1, 3, 4)})
        rest = [keys[place] for place in fetched.sizes]
        assert len((await enriched(enricher, *rest, credit_bytes=sum(fetched.sizes.values()))).rows) == 3


@pytest.mark.parametrize(("character", "bytes_"), [("\x01", 6), ("\n", 2), ('"', 2), ("é", 2)])
async def test_what_grows_as_json_is_within_the_credit_too(source: SourceDatabase, character: str, bytes_: int) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    for many in (50, 1000, 200_000):
        value = "'" + character + "'"
        body = f"repeat({value}, {many})"
        sql = f"SELECT id, {body} AS body, ARRAY[{body}] AS list FROM unnest($1) AS r (id)"
        async with enriching(source, sql) as enricher:
            credit_bytes = 0
            for _ in range(4):
                fetched = await enriched(enricher, ("1",), credit_bytes=credit_bytes)
                if fetched.rows:
                    break
                assert fetched.sizes[0] > credit_bytes
                credit_bytes = fetched.sizes[0]
            (row,) = fetched.rows.values()
            assert sum(map(len, row.values())) <= credit_bytes < (2 + COLLECTED) * bytes_ * many * 1.3 + 1000
            assert orjson.loads(row["body"]) == character * many


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


async def test_memory_of_large_rows(source18: SourceDatabase) -> None:
    """Rows of 18 MB, five asked for, credit for two: these are kept, and of one there is a piece in the making."""
    _bound_the_allocator()
    await source18.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    columns = "repeat('x', 9000000) AS body, jsonb_build_object('a', repeat('y', 9000000)) AS doc"
    sql = f"SELECT id, {columns} FROM unnest($1) AS r (id)"
    keys = [(str(i),) for i in range(5)]
    async with enriching(source18, sql) as enricher:
        sizes = (await enriched(enricher, *keys, credit_bytes=0)).sizes
        gc.collect()
        _forget_the_peak()
        before = _status_bytes("VmRSS")
        row_bytes = sizes[0]
        fetched = await enricher.fetch(T, keys, NOTHING, 2 * row_bytes, row_bytes)
        taken = _status_bytes("VmHWM") - before
        assert (len(fetched.rows), len(fetched.sizes)) == (2, 3)
        assert taken < 2.1 * row_bytes + making_bytes(row_bytes)
        fetched.rows.clear()
        assert _status_bytes("VmRSS") - before < row_bytes, "libpq's buffer goes with the connection"


async def test_what_is_wrong_with_the_sql(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int)",
        "CREATE TABLE public.keyless (id int)",
    )
    wrong = {
        "SELECT id FROM t WHERE id = ANY($1": "enrichment_failed",
        "SELECT id FROM nowhere WHERE id = ANY($1)": "enrichment_failed",
        "SELECT id FROM t WHERE id = ANY($1); SELECT 1": "enrichment_failed",
        "DELETE FROM t WHERE id = ANY($1) RETURNING id": "enrichment_failed",
        "SELECT id, n, 1 AS n FROM t WHERE id = ANY($1)": "enrichment_columns",
        "SELECT n FROM t WHERE id = ANY($1)": "enrichment_key",
        "SELECT id FROM t WHERE id = ANY($1) AND n = ANY($2)": "enrichment_parameters",
        "SELECT nextval('public.s') AS id WHERE $1 IS NOT NULL": "enrichment_failed",
    }
    await source.execute("CREATE SEQUENCE public.s")
    for sql, code in wrong.items():
        async with enriching(source, sql) as enricher:
            with pytest.raises(SpillwayError) as caught:
                await enriched(enricher, ("1",))
            assert (caught.value.code, type(caught.value)) == (code, SpillwayError), sql
            assert caught.value.remedy
    told = {
        "SELECT id,\n  m\nFROM t WHERE id = ANY($1)": r'column "m" does not exist \(line 2, column 3 of the SQL\)$',
        "SELECT id\nFORM t WHERE id = ANY($1)": r"\(line 2, column 6 of the SQL; it must be one SELECT\)$",
        "DELETE FROM t WHERE id = ANY($1) RETURNING id": r"\(it must be one SELECT\)$",
    }
    for sql, text in told.items():
        async with enriching(source, sql) as enricher:
            with pytest.raises(SpillwayError) as caught:
                await enriched(enricher, ("1",))
            assert re.search(text, caught.value.what)
    async with enriching(source, "SELECT 1 AS id WHERE $1 IS NOT NULL") as enricher:
        with pytest.raises(SpillwayError, match=r"public\.keyless has no primary key"):
            await enricher.fetch(("public", "keyless"), [("1",)], NOTHING, MANY, MANY)


async def test_a_row_s_data_fails_those_that_are_asked_with_it(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int)", "INSERT INTO public.t VALUES (1, 1), (2, 0), (3, 2)"
    )
    async with enriching(source, "SELECT id, 6 / n AS part FROM t WHERE id = ANY($1)") as enricher:
        for keys in ([("1",), ("2",)], [("2",)], [("1",), ("no number",)], [("99999999999",)]):
            with pytest.raises(BatchFailed):
                await enriched(enricher, *keys)
        fetched = await enriched(enricher, ("1",), ("3",))
        assert [row["part"] for row in fetched.rows.values()] == [b"6", b"3"]
    async with enriching(source, "SELECT id, (SELECT id FROM t) AS one FROM t WHERE id = ANY($1)") as enricher:
        with pytest.raises(BatchFailed, match="more than one row"):
            await enriched(enricher, ("1",))


async def test_a_slow_query_is_stopped(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT id, pg_sleep(CASE id WHEN 1 THEN 60 ELSE 0 END)::text AS s FROM unnest($1) AS r (id)"
    async with enriching(source, sql, timeout_seconds=0.3) as enricher:
        with pytest.raises(SourceUnavailable) as caught:
            await enriched(enricher, ("1",))
        assert caught.value.code == "enrichment_timeout"
        assert len((await enriched(enricher, ("2",))).rows) == 1


@pytest.mark.parametrize("look_seconds", [0.0, 1e9])
async def test_a_lost_connection_is_made_anew(
    source: SourceDatabase, look_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bykeys, "LOOK_SECONDS", look_seconds)
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT id, pg_advisory_xact_lock_shared(7) IS NULL AS l FROM unnest($1) AS r (id)"
    async with asyncio.timeout(SECONDS), enriching(source, sql) as enricher:
        await enriched(enricher, ("1",))
        await source.execute(f"SELECT pg_terminate_backend(pid) {OURS}")
        assert len((await enriched(enricher, ("1",))).rows) == 1, "one that was idle"

        await source.execute("SELECT pg_advisory_lock(7)")
        asking = asyncio.create_task(enriched(enricher, ("2",)))
        await _terminate(source, 0)
        await source.execute("SELECT pg_advisory_unlock(7)")
        assert (await asking).rows[0]["id"] == b"2", "in the middle of a query"

        await source.execute("SELECT pg_advisory_lock(7)")
        asking = asyncio.create_task(enriched(enricher, ("2",)))
        await _terminate(source, await _terminate(source, 0))
        with pytest.raises(SourceUnavailable):
            await asking
        await source.execute("SELECT pg_advisory_unlock(7)")


OURS = "FROM pg_stat_activity WHERE application_name = 'spillway:s:enrichment' AND datname = current_database()"


async def _terminate(source: SourceDatabase, but: int) -> int:
    """The one that waits for a lock and has not this pid; returns its own."""
    pids: list[int] = []

    async def found() -> bool:
        pid = await source.value(f"SELECT max(pid) {OURS} AND wait_event_type = 'Lock' AND pid <> {but}")
        if isinstance(pid, int):
            pids.append(pid)
        return bool(pids)

    await source.until(found)
    await source.execute(f"SELECT pg_terminate_backend({pids[0]})")
    return pids[0]


async def test_batches_overlap_on_as_many_connections(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    sql = "SELECT id, pg_advisory_xact_lock_shared(7) IS NULL AS l FROM unnest($1) AS r (id)"
    async with asyncio.timeout(SECONDS), enriching(source, sql, connections=2) as enricher:
        await source.execute("SELECT pg_advisory_lock(7)")
        asking = [asyncio.create_task(enriched(enricher, (str(i),))) for i in range(5)]

        async def two() -> bool:
            return await source.value(f"SELECT count(*) {OURS} AND wait_event_type = 'Lock'") == 2

        await source.until(two)
        asking.pop().cancel()  # one that waits for its turn
        asking.pop(0).cancel()  # one that is at work
        await source.execute("SELECT pg_advisory_unlock(7)")
        for i, task in enumerate(asking, 1):
            assert (await task).rows[0]["id"] == str(i).encode()
        assert await source.value(f"SELECT count(*) {OURS}") == 2
    with pytest.raises(SourceUnavailable, match="were closed"):
        await enriched(enricher, ("1",))


async def test_tables_that_are_altered_meanwhile(source: SourceDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the look at whether they were, which comes every now and then."""
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, n int)", "INSERT INTO public.t VALUES (1, 5)")
    async with enriching(source, "SELECT t.*, 'x' AS x FROM t WHERE id = ANY($1)") as enricher:
        for look_seconds in (1e9, 0.0):
            monkeypatch.setattr(bykeys, "LOOK_SECONDS", look_seconds)
            assert (await enriched(enricher, ("1",))).rows[0]["n"] == b"5"
            await source.execute("ALTER TABLE public.t ALTER n TYPE text")
            assert (await enriched(enricher, ("1",))).rows[0]["n"] == b'"5"'
            await source.execute("ALTER TABLE public.t ADD more int DEFAULT 7")
            row = (await enriched(enricher, ("1",))).rows[0]
            assert row["x"] == b'"x"'
            assert ("more" in row) == (not look_seconds)
            await source.execute("ALTER TABLE public.t ALTER n TYPE int USING n::int, DROP more")
        await source.execute("ALTER TABLE public.t ALTER id TYPE bigint", "UPDATE public.t SET id = 99999999999")
        assert (await enriched(enricher, ("99999999999",))).rows[0]["id"] == b"99999999999"
        await source.execute("ALTER TABLE public.t RENAME id TO key")
        with pytest.raises(SpillwayError, match='"id" does not exist'):
            await enriched(enricher, ("1",))


async def test_another_server_is_not_asked(source18: SourceDatabase) -> None:
    await source18.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    enricher = Enricher(source18.dsn, "s", lambda: Expected("1"), "f", "SELECT id FROM t WHERE id = ANY($1)")
    with pytest.raises(SourceUnavailable) as caught:
        await enriched(enricher, ("1",))
    assert caught.value.code == "other_system"
    await enricher.close()


async def test_what_was_seen_must_be_visible(source: SourceDatabase) -> None:
    """A transaction that has not ended is one whose commit is not visible yet."""
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)", "INSERT INTO public.t VALUES (1)")
    writer = await connect_query(source.dsn)
    await writer.execute("BEGIN")
    row = await (await writer.execute("SELECT txid_current()")).fetchone()
    assert row is not None
    seen = Seen((int(row[0]) % (1 << 32),), 0)
    async with enriching(source, "SELECT id FROM t WHERE id = ANY($1)", visible_seconds=0.05) as enricher:
        with pytest.raises(SourceUnavailable) as caught:
            await enricher.fetch(T, [("1",)], seen, MANY, MANY)
        assert caught.value.code == "not_visible"
        await writer.execute("COMMIT")
        fetched = await enricher.fetch(T, [("1",)], seen, MANY, MANY)
        assert (len(fetched.rows), fetched.queries) == (1, 1)
    await writer.close()
