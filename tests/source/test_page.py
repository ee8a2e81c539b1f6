"""Pages of existing rows on real servers: every row exactly once, in whatever order its key has."""

from __future__ import annotations

import pytest

from source.conftest import MANY, SourceDatabase
from source.paging import ALL, SECONDS, T, changes, pages, reading, records
from spillway.errors import SpillwayError
from spillway.source.connect import connect_query
from spillway.source.page import Range, Selection
from spillway.source.view import before_header

KEYS: dict[str, tuple[str, ...]] = {
    "int": ("-5", "-1", "0", "7", "2147483647"),
    "uuid": (
        "00000000-0000-0000-0000-000000000000",
        "123e4567-e89b-12d3-a456-426614174000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ),
    "text": ("", "a b", "it's", "back\\slash", "tab\there", "new\nline", "ünï", "a:b.c", "%s", "Z", "{}"),
    'text COLLATE "en-x-icu"': ("a", "A", "b", "B", "ä", "z", "-a", ""),
    "public.mood": ("sad", "ok", "happy"),
    "bytea": (r"\x", r"\x00", r"\x00ff", r"\x5c", r"\xff"),
    "numeric": ("-1e30", "-0.10", "0", "1.00", "1.01", "NaN", "12345678901234567890.123456789"),
    "float8": ("-Infinity", "-1.5", "0.1", "3.0000000000000004", "1e300", "Infinity", "NaN"),
    "float4": ("-Infinity", "0.1", "16777217", "NaN"),
    "timestamptz": ("-infinity", "0044-03-15 00:00:00+00 BC", "2024-02-29 12:00:00.123456+00", "infinity"),
    "timestamp": ("-infinity", "4713-01-01 00:00:00 BC", "2024-02-29 12:00:00.000001", "infinity"),
    "date": ("-infinity", "0001-01-01 BC", "2024-02-29", "infinity"),
    "time": ("00:00:00", "24:00:00", "12:30:00.5"),
    "interval": ("-1 mons +2 days", "1 year", "12:00:00", "00:00:00"),
    "char(4)": ("a", "ab", "", "zz"),
    "varchar(8)": ("", "a", "'quoted'"),
    '"char"': ("a", "b", ""),
    "name": ("a", "b"),
    "bool": ("f", "t"),
    "bit varying(5)": ("", "1", "10101"),
    "inet": ("10.0.0.1", "10.0.0.0/8", "::1"),
    "int[]": ("{}", "{1}", "{1,2}", "{NULL,1}"),
    "int4range": ("empty", "[1,3)", "(,)", "[1,)"),
    "public.positive": ("1", "2", "30"),
    "public.folded": ("a", "B", "c"),
    "public.pair": ('(1,"a b")', "(1,)", "(2,x)"),
    "jsonb": ('{"a": 1}', "[]", "null", '"x"'),
    "oid": ("0", "4294967295"),
}

OTHERWISE_AS_TEXT = {"bool", "char(4)", "inet"}  # the cast gives another text than the output function


async def _types(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'happy')",
        "CREATE TYPE public.pair AS (n int, t text)",
        "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
        'CREATE DOMAIN public.folded AS text COLLATE "en-x-icu"',
    )


async def test_every_type_of_key_pages_through_all_rows_once(source: SourceDatabase) -> None:
    await _types(source)
    await source.execute("CREATE PUBLICATION p FOR ALL TABLES")
    async with reading(source) as reader:
        for number, (type_, values) in enumerate(KEYS.items()):
            table = f"t{number}"
            await source.execute(f"CREATE TABLE public.{table} (body text, k {type_} PRIMARY KEY)")
            for value in values:
                await source.query.execute(f"INSERT INTO public.{table} VALUES ('x', %s)".encode(), [value])
            ordered = await source.query.execute(f"SELECT k::text FROM public.{table} o ORDER BY o.k".encode())
            selection = Selection("public", table)
            everything = await records(reader, selection)
            assert len(everything) == len(values), type_
            for size in (1, 3):
                assert await records(reader, selection, size) == everything, (type_, size)
            keys = [c.pks for page in await pages(reader, selection) for c in changes(page)]
            if type_ not in OTHERWISE_AS_TEXT:
                assert keys == await ordered.fetchall(), type_
            page = await reader.read_keys(selection, [*keys, keys[0]], MANY, SECONDS)
            assert sorted(c.pks for c in changes(page)) == sorted(keys), type_
            assert page.missing == [], type_


async def test_a_composite_key_in_the_order_of_its_index(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (a int, body text, b text, c numeric, PRIMARY KEY (c, a, b))",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT i % 3, 'body', 'x' || i % 2, i % 5 FROM generate_series(1, 30) i",
    )
    ordered = await source.query.execute(b"SELECT a::text, b, c::text FROM public.t ORDER BY c, t.a, t.b")
    expected = await ordered.fetchall()
    assert len(expected) == 30
    async with reading(source) as reader:
        for size in (1, 3, 7, 30, 31):
            assert [c.pks for page in await pages(reader, size=size) for c in changes(page)] == expected, size
        page = await reader.read_keys(T, [expected[3], ("9", "x0", "1"), expected[7]], MANY, SECONDS)
        assert sorted(c.pks for c in changes(page)) == sorted([expected[3], expected[7]])
        assert page.missing == [("9", "x0", "1")]


async def test_operators_of_several_schemas_in_one_key(source: SourceDatabase) -> None:
    """By the bare name, citext would be compared as text, which has another order."""
    words = ["a", "B", "c", "D", "e"]
    await source.execute(
        "CREATE EXTENSION citext SCHEMA public",
        "CREATE TABLE public.t (k public.citext PRIMARY KEY)",
        "CREATE TABLE public.mixed (tenant int, k public.citext, day date, PRIMARY KEY (tenant, k, day))",
        "CREATE PUBLICATION p FOR TABLE public.t, public.mixed",
    )
    for word in words:
        await source.execute(
            f"INSERT INTO public.t VALUES ('{word}')",
            f"INSERT INTO public.mixed SELECT i, '{word}', d::date FROM generate_series(1, 3) i,"
            " generate_series('2024-01-01'::timestamp, '2024-01-02', '1 day') d",
        )
    mixed = Selection("public", "mixed")
    async with reading(source) as reader:
        assert [c.pks[0] for page in await pages(reader, size=1) for c in changes(page)] == words
        everything = await records(reader, mixed)
        assert len(everything) == 30
        for size in (1, 3, 4):
            assert await records(reader, mixed, size) == everything
        page = await reader.read_keys(T, [("b",), ("c",)], MANY, SECONDS)
        assert [c.pks for c in changes(page)] == [("c",)]
        assert page.missing == [("b",)]  # "B" is another key, though equal


async def test_a_nondeterministic_collation(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE COLLATION public.ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        "CREATE TABLE public.t (k text COLLATE public.ci, n int, PRIMARY KEY (k, n))",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t VALUES ('a', 1), ('A', 2), ('a', 3), ('b', 1), ('B', 2)",
    )
    async with reading(source) as reader:
        for size in (1, 2, 3):
            keys = [c.pks for page in await pages(reader, size=size) for c in changes(page)]
            assert keys == [("a", "1"), ("A", "2"), ("a", "3"), ("b", "1"), ("B", "2")]
        page = await reader.read_keys(T, [("A", "1"), ("A", "2")], MANY, SECONDS)
        assert ([c.pks for c in changes(page)], page.missing) == ([("A", "2")], [("A", "1")])


async def test_ranges_cover_everything_once(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id uuid PRIMARY KEY, n int)",
        "CREATE TABLE public.heap (n int, body text)",
        "CREATE PUBLICATION p FOR TABLE public.t, public.heap",
        "INSERT INTO public.t SELECT md5(i::text)::uuid, i FROM generate_series(1, 6000) i",
        "INSERT INTO public.heap SELECT i, repeat('x', 100) FROM generate_series(1, 6000) i",
        "ANALYZE public.t, public.heap",
    )
    tables = ["t", "heap"] if source.version >= 140000 else ["t"]
    async with reading(source) as reader:
        for table in tables:
            selection = Selection("public", table)
            assert await reader.split(selection, 1) == [ALL]
            ranges = await reader.split(selection, 4)
            assert len(ranges) == 4
            assert ranges[0].low is None is ranges[-1].high
            assert [one.high for one in ranges[:-1]] == [one.low for one in ranges[1:]]
            parts = [await records(reader, selection, 500, one) for one in ranges]
            assert sorted(record for part in parts for record in part) == sorted(await records(reader, selection))
            assert all(1000 < len(part) < 2000 for part in parts)
            assert await reader.estimate(selection) == 6000


async def test_a_table_without_primary_key_by_its_blocks(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (n int, body text)",
        "INSERT INTO public.t SELECT i, repeat('x', 300) FROM generate_series(1, 500) i",
        "DELETE FROM public.t WHERE n BETWEEN 100 AND 200",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reading(source) as reader:
        if source.version < 140000:
            with pytest.raises(SpillwayError, match="has no primary key") as caught:
                await reader.relations("public", "t")
            assert caught.value.code == "no_primary_key"
            with pytest.raises(SpillwayError, match="has no primary key"):
                await records(reader)
            return
        assert await reader.relations("public", "t") == [("public", "t")]
        everything = await records(reader)
        assert len(everything) == 399
        for size, credit in ((3, MANY), (60, MANY), (MANY, 20_000)):
            read = await pages(reader, size=size, credit=credit)
            assert [c.record for page in read for c in changes(page)] == everything
            assert (
                len({c.body for page in read for c in changes(page)}) == 399
            )  # each has an idempotency key of its own
        # A condition with an index of its own does not change the order.
        await source.execute("CREATE INDEX ON public.t (n)", "ANALYZE public.t")
        some = await records(reader, Selection("public", "t", where="n % 7 = 0 AND n < 90"), 20)
        assert some == [record for record in everything if int(record.split(b":")[1].split(b",")[0]) in range(7, 90, 7)]
        # A rewritten table has other places: the cursor is none of them.
        page = await reader.read(T, ALL, None, 60, MANY, SECONDS)
        await source.execute("VACUUM FULL public.t")
        with pytest.raises(SpillwayError) as rewritten:
            await reader.read(T, ALL, page.cursor, 60, MANY, SECONDS)
        assert rewritten.value.code == "order_changed"
        assert len(await records(reader, size=60)) == 399


@pytest.mark.parametrize("lsn", [0x1000028, 0x1000018, 0x1002018])
def test_a_position_behind_a_page_header_is_before_it(lsn: int) -> None:
    assert before_header(lsn) == lsn // 8192 * 8192


@pytest.mark.parametrize("lsn", [0x1000000, 0x1000030, 0x1000020, 0x1001FF8])
def test_any_other_position_stays(lsn: int) -> None:
    assert before_header(lsn) == lsn


async def test_a_page_knows_what_it_sees(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT generate_series(1, 10)",
    )
    async with reading(source) as reader, await connect_query(source.dsn) as other:
        assert (reader.standby, reader.wal_writer_delay_seconds) == (False, 0.2)
        await other.execute("BEGIN")
        xid, pid = await (await other.execute("SELECT txid_current(), pg_backend_pid()")).fetchone() or (0, 0)
        assert await reader.running() == {xid: f"pid {pid} (postgres, idle in transaction)"}
        await other.execute("INSERT INTO public.t VALUES (0)")
        page = await reader.read(T, ALL, None, 4, MANY, SECONDS)
        assert not page.snapshot.sees(xid, 0)
        await other.execute("COMMIT")
        assert await reader.running() == {}
        assert [c.pks for c in changes(page)] == [("1",), ("2",), ("3",), ("4",)]
        assert {c.action for c in changes(page)} == {"read"}
        assert page.cursor == ("1", "4")
        assert page.snapshot.replayed_lsn is None
        after = await reader.read(T, Range(None, ("1", "2")), None, 9, MANY, SECONDS)
        assert [c.pks for c in changes(after)] == [("0",), ("1",), ("2",)]
        assert after.cursor is None
        assert after.snapshot.sees(xid, 0)
        assert page.snapshot.lsn < after.snapshot.lsn
        assert 0 < after.snapshot.lsn - await reader.flushed_lsn() + 8192 < 100_000
        assert await reader.relations("public", "t") == [("public", "t")]
        with pytest.raises(SpillwayError, match="not in publication"):
            await reader.relations("public", "other")
