"""A page's rows are the stream's, byte for byte, whatever the table looks like and becomes."""

from __future__ import annotations

import asyncio

import pytest

from pgoutput.twins import TWINS
from source.conftest import MANY, SourceDatabase
from source.paging import ALL, SECONDS, T, changes, new_decoder, pages, reading, records, streamed
from spillway.errors import SpillwayError
from spillway.pgoutput.decoder import Decoder
from spillway.source import view
from spillway.source.connect import connect_query
from spillway.source.page import LockTimeout, Selection

UNUSUAL = {
    "bool": "true",
    '"char"': "'x'",
    "name": "'n'",
    "int2": "-1",
    "oid": "4294967295",
    "regclass": "'pg_catalog.pg_class'::regclass",
    "regtype": "'public.mood'::regtype",
    "float4": "0.1",
    "float8": "'-Infinity'",
    "numeric": "'NaN'",
    "money": "'$1,234.50'",
    "char(5)": "'ab'",
    "varchar(9)": "''",
    "text": r"E'tab\there\nline\\ \\N \\. é\r\b\f\v\u0001'",
    "bytea": r"'\x00ff5c'",
    "timestamptz": "'0044-03-15 12:00:00+05:45 BC'",
    "timestamp": "'infinity'",
    "date": "'-infinity'",
    "time": "'24:00:00'",
    "timetz": "'12:00:00+05:45'",
    "interval": "'-1 mons +2 days -03:04:05.6'",
    "json": r"""E'{"a":\n 1.10, "b": "\\u00e9 \\n"}'""",
    "jsonb": """'{"b": 1.10, "a": [null, "x"]}'""",
    "uuid": "'123e4567-e89b-12d3-a456-426614174000'",
    "inet": "'10.1.2.3/8'",
    "cidr": "'10.0.0.0/8'",
    "macaddr": "'08:00:2b:01:02:03'",
    "bit(3)": "'101'",
    "varbit": "'1'",
    "tsvector": "'a:1 b:2A'",
    "xml": "'<a>&amp;</a>'",
    "point": "'(1.5,-0)'",
    "box": "'((0,0),(1,1))'",
    "int4range": "'[1,5)'",
    "tstzrange": "'[2024-01-01 00:00:00+01,)'",
    "int[]": "'[0:1]={1,NULL}'",
    "text[]": """'{"a,b","NULL",NULL,"q\\"x"}'""",
    "public.mood": "'ok'",
    "public.positive": "3",
    "public.pair": """ROW(1, 'a "b"')""",
    "public.pair[]": """ARRAY['(1,x)', NULL]::public.pair[]""",
    "bigint": "NULL",
}


@pytest.mark.parametrize("twin", TWINS)
async def test_a_row_of_unusual_types_is_the_stream_s(source: SourceDatabase, twin: type[Decoder]) -> None:
    columns = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(UNUSUAL))
    await source.execute(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok')",
        "CREATE TYPE public.pair AS (n int, t text)",
        "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
        f"CREATE TABLE public.t ({columns}, dropped int, g int GENERATED ALWAYS AS (1) STORED, id int PRIMARY KEY)",
        "ALTER TABLE public.t DROP COLUMN dropped",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        f"ALTER DATABASE {source.database} SET DateStyle = 'German, DMY'",
        f"ALTER DATABASE {source.database} SET search_path = 'public, pg_catalog'",
    )
    names = ", ".join(f"c{number}" for number in range(len(UNUSUAL)))
    await source.execute(f"INSERT INTO public.t (id, {names}) VALUES (1, {', '.join(UNUSUAL.values())})")
    (inserted,) = await streamed(source, await source.stream(), 1, new_decoder(twin))
    async with reading(source, twin=twin) as reader:
        (everything,) = await pages(reader)
    (read,) = changes(everything)
    assert read.record == inserted.record
    assert (read.key, read.pks, read.whole) == (inserted.key, inserted.pks, inserted.whole)


async def test_what_the_publication_leaves_out(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (secret text, id int PRIMARY KEY, n int, g int GENERATED ALWAYS AS (n + 1) STORED)",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
    )
    publication = {
        12: "CREATE PUBLICATION p FOR TABLE public.t",
        15: "CREATE PUBLICATION p FOR TABLE public.t (n, id) WHERE (id > 1)",
        18: "CREATE PUBLICATION p FOR TABLE public.t WHERE (id > 1) WITH (publish_generated_columns = stored)",
    }[source.version // 10000]
    await source.execute(publication, "INSERT INTO public.t VALUES ('s', 1, 5), ('s', 2, 5), ('s', 3, 6)")
    shown = 3 if source.version < 150000 else 2
    inserted = await streamed(source, await source.stream(), shown, new_decoder())
    async with reading(source) as reader:
        for size in (1, 2, MANY):
            assert await records(reader, size=size) == [change.record for change in inserted]
        by_key = await reader.read_keys(T, [("1",), ("2",)], MANY, SECONDS)
        assert by_key.missing == ([] if shown == 3 else [("1",)])
        if source.version >= 150000:
            await source.execute("ALTER PUBLICATION p SET TABLE public.t WHERE (id > 2)")
            assert len(await records(reader)) == 1
        await source.execute("ALTER PUBLICATION p SET TABLE public.t")
        assert len(await records(reader)) == 3
        await source.execute("ALTER PUBLICATION p DROP TABLE public.t")
        with pytest.raises(SpillwayError, match=r"public\.t is not in publication p"):
            await records(reader)


@pytest.mark.parametrize("via_root", [False, True])
async def test_partitions(source: SourceDatabase, via_root: bool) -> None:
    if source.version < 130000:  # what it does not have
        via_root = False
    # 12 publishes no partitioned table, only its partitions.
    tables = "public.t" if source.version >= 130000 else "public.t1, public.t2"
    await source.execute(
        "CREATE TABLE public.t (id int, part int, body text, PRIMARY KEY (part, id)) PARTITION BY LIST (part)",
        "CREATE TABLE public.t1 PARTITION OF public.t FOR VALUES IN (1)",
        "CREATE TABLE public.t2 (body text, gone int, part int NOT NULL, id int NOT NULL)",
        "ALTER TABLE public.t2 DROP COLUMN gone",
        "ALTER TABLE public.t ATTACH PARTITION public.t2 FOR VALUES IN (2)",
        f"CREATE PUBLICATION p FOR TABLE {tables}" + (" WITH (publish_via_partition_root)" if via_root else ""),
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        "INSERT INTO public.t SELECT i, i % 2 + 1, 'x' FROM generate_series(1, 10) i",
    )
    inserted = await streamed(source, await source.stream(), 10, new_decoder())
    async with reading(source) as reader:
        relations = await reader.relations("public", "t")
        assert sorted(relations) == ([("public", "t")] if via_root else [("public", "t1"), ("public", "t2")])
        for size in (1, 3, MANY):
            read = [
                change
                for schema, table in relations
                for one in await pages(reader, Selection(schema, table), size)
                for change in changes(one)
            ]
            assert sorted((c.schema, c.table, c.pks, c.key, c.record) for c in read) == sorted(
                (c.schema, c.table, c.pks, c.key, c.record) for c in inserted
            )


async def test_a_child_by_inheritance_is_another_table(source18: SourceDatabase) -> None:
    await source18.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        "CREATE TABLE public.child (more int) INHERITS (public.t)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t VALUES (1)",
        "INSERT INTO public.child VALUES (2, 2)",
    )
    async with reading(source18) as reader:
        assert await records(reader) == [b'{"id":1}']


async def test_a_partition_that_is_attached_between_two_pages(source18: SourceDatabase) -> None:
    await source18.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        "CREATE TABLE public.root (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t VALUES (1), (2)",
    )
    async with reading(source18) as reader:
        first = await reader.read(T, ALL, None, 1, MANY, SECONDS)
        await source18.execute("ALTER TABLE public.root ATTACH PARTITION public.t FOR VALUES FROM (0) TO (9)")
        second = await reader.read(T, ALL, first.cursor, 1, MANY, SECONDS)
        assert [c.key for one in (first, second) for c in changes(one)] == ["public.t:1", "public.root:2"]


async def test_an_alter_between_two_pages(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TYPE public.pair AS (n int)",
        "CREATE TABLE public.t (id int PRIMARY KEY, a text, p public.pair)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT i, 'x', '(1)' FROM generate_series(1, 20) i",
    )
    steps = {
        "SELECT 1": b'{"id":1,"a":"x","p":{"n":1}}',
        "ALTER TABLE public.t ADD COLUMN b int DEFAULT 7": b'{"id":2,"a":"x","p":{"n":1},"b":7}',
        "ALTER TABLE public.t RENAME COLUMN a TO z": b'{"id":3,"z":"x","p":{"n":1},"b":7}',
        "ALTER TABLE public.t ALTER COLUMN b TYPE text": b'{"id":4,"z":"x","p":{"n":1},"b":"7"}',
        "ALTER TYPE public.pair RENAME ATTRIBUTE n TO m": b'{"id":5,"z":"x","p":{"m":1},"b":"7"}',
        "ALTER TABLE public.t DROP COLUMN z": b'{"id":6,"p":{"m":1},"b":"7"}',
        "ALTER TABLE public.t ALTER COLUMN id TYPE bigint": b'{"id":7,"p":{"m":1},"b":"7"}',
        "ALTER TABLE public.t RENAME COLUMN id TO key": b'{"key":8,"p":{"m":1},"b":"7"}',
        "VACUUM FULL public.t": b'{"key":9,"p":{"m":1},"b":"7"}',
    }
    async with reading(source) as reader:
        cursor = None
        for statement, record in steps.items():
            await source.execute(statement)
            one = await reader.read(T, ALL, cursor, 1, MANY, SECONDS)
            assert [c.record for c in changes(one)] == [record], statement
            cursor = one.cursor
        await source.execute("ALTER TABLE public.t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (b, key)")
        with pytest.raises(SpillwayError) as changed:
            await reader.read(T, ALL, cursor, 1, MANY, SECONDS)
        assert changed.value.code == "order_changed"
        with pytest.raises(SpillwayError, match=r"primary key of public\.t has changed"):
            await reader.read_keys(T, [("1",)], MANY, SECONDS)
        assert len(await records(reader, size=7)) == 20
        await source.execute("DROP TABLE public.t")
        with pytest.raises(SpillwayError, match=r"table public\.t does not exist") as gone:
            await records(reader)
        assert gone.value.code == "no_table"


async def test_a_rewriting_alter_before_and_behind_the_lock(
    source: SourceDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of before the rewrite would see an empty table."""
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT i, 1 FROM generate_series(1, 10) i",
    )
    waits = "SELECT count(*) FROM pg_locks WHERE relation = 'public.t'::regclass AND NOT granted"

    async def waiting() -> bool:
        return await source.value(waits) == 1

    async with reading(source) as reader, await connect_query(source.dsn) as other:
        await other.execute("BEGIN")
        await other.execute("ALTER TABLE public.t ALTER COLUMN n TYPE bigint")
        with pytest.raises(LockTimeout, match=r"public\.t is locked"):
            await records(reader)
        with monkeypatch.context() as patient:
            patient.setattr(view, "LOCK_TIMEOUT_SECONDS", SECONDS)
            read = asyncio.create_task(records(reader))
            await source.until(waiting)
            await other.execute("COMMIT")
            assert len(await read) == 10
        # One that waits for a page's transaction holds up the next, for no longer than the lock's timeout.
        await other.execute("BEGIN")
        await other.execute("LOCK TABLE public.t IN ACCESS SHARE MODE")
        async with await connect_query(source.dsn) as third:
            alter = asyncio.create_task(third.execute("ALTER TABLE public.t ALTER COLUMN n TYPE text"))
            await source.until(waiting)
            with pytest.raises(LockTimeout):
                await records(reader)
            await other.execute("COMMIT")
            await alter
        assert (await records(reader))[0] == b'{"id":1,"n":"1"}'
