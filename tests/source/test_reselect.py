"""Rows read anew by key are the stream's, byte for byte, and only those that it has."""

from __future__ import annotations

import pytest

from pgoutput.given import If
from source.conftest import MANY, SourceDatabase
from source.enriching import NOTHING, T, enriching, records, reselected, reselecting
from source.paging import new_decoder, streamed
from source.test_page import KEYS
from source.test_page_shape import UNUSUAL
from spillway.errors import SpillwayError
from spillway.source.snapshot import Seen

TYPES = (
    "CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'happy')",
    "CREATE TYPE public.pair AS (n int, t text)",
    "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
    'CREATE DOMAIN public.folded AS text COLLATE "en-x-icu"',
)


async def test_rows_by_every_type_of_key(source: SourceDatabase) -> None:
    await source.execute(
        *TYPES,
        "CREATE EXTENSION citext SCHEMA public",
        "CREATE PUBLICATION p FOR ALL TABLES",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
    )
    keys = {**KEYS, "public.citext": ("A", "b", "C,d")}
    for number, (type_, values) in enumerate(keys.items()):
        await source.execute(f"CREATE TABLE public.t{number} (n serial, k {type_} PRIMARY KEY)")
        for value in values:
            await source.query.execute(f"INSERT INTO public.t{number} (k) VALUES (%s)".encode(), [value])
    stream, decoder = await source.stream(), new_decoder()
    async with reselecting(source) as reselect:
        for number, (type_, values) in enumerate(keys.items()):
            inserted = await streamed(source, stream, len(values), decoder)
            asked = [change.pks for change in inserted]
            rows = await reselect.fetch(("public", f"t{number}"), [*asked, asked[0]], NOTHING, MANY, MANY)
            assert [records(rows)[place] for place in range(len(asked))] == [c.record for c in inserted], type_
            assert records(rows)[len(asked)] == inserted[0].record
            assert (rows.sizes, rows.queries) == ({}, 1)


async def test_keys_that_are_equal_and_read_otherwise_are_others(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE EXTENSION citext SCHEMA public",
        "CREATE TABLE public.t (k public.citext PRIMARY KEY)",
        "INSERT INTO public.t VALUES ('Abc')",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reselecting(source) as reselect:
        rows = await reselected(reselect, ("abc",), ("Abc",), ("ABC",), ("Abc",))
    assert records(rows) == {1: b'{"k":"Abc"}', 3: b'{"k":"Abc"}'}


async def test_a_row_of_unusual_types(source: SourceDatabase) -> None:
    columns = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(UNUSUAL))
    await source.execute(
        *TYPES,
        f'CREATE TABLE public.t ({columns}, gone int, "a ""b"" %s" int, g int GENERATED ALWAYS AS (1) STORED,'
        " id int PRIMARY KEY)",
        "ALTER TABLE public.t DROP COLUMN gone",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        f"ALTER DATABASE {source.database} SET DateStyle = 'German, DMY'",
        f"ALTER DATABASE {source.database} SET search_path = 'public, pg_catalog'",
    )
    names = ", ".join(f"c{number}" for number in range(len(UNUSUAL)))
    await source.execute(f"INSERT INTO public.t (id, {names}) VALUES (1, {', '.join(UNUSUAL.values())})")
    (inserted,) = await streamed(source, await source.stream(), 1, new_decoder())
    async with reselecting(source) as reselect:
        rows = await reselected(reselect, ("2",), ("1",))
    assert records(rows) == {1: inserted.record}


async def test_what_an_update_did_not_bring(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (b int, body text, a text, PRIMARY KEY (a, b))",
        "ALTER TABLE public.t ALTER body SET STORAGE EXTERNAL",
        "INSERT INTO public.t VALUES (1, repeat('x', 100000), 'k')",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        "UPDATE public.t SET b = b",
    )
    (updated,) = await streamed(source, await source.stream(), 1, new_decoder())
    assert not updated.whole
    async with reselecting(source) as reselect:
        rows = await reselected(reselect, updated.pks)
        assert records(rows)[0] == b'{"b":1,"body":"' + b"x" * 100_000 + b'","a":"k"}'
        few = await reselected(reselect, updated.pks, credit_bytes=50_000)
        assert few.rows == {}
        assert 100_000 < few.sizes[0] < 120_000
        assert records(await reselected(reselect, updated.pks, credit_bytes=few.sizes[0])) == records(rows)
        await source.execute("DELETE FROM public.t")
        assert (await reselected(reselect, updated.pks)).rows == {}


@pytest.mark.parametrize("in_pieces", [False, True])
async def test_what_the_filters_leave_out(
    source: SourceDatabase, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.source.bykeys.LOOK_SECONDS", 0.0)
    if in_pieces:
        monkeypatch.setattr("spillway.source.wrapped.WHOLE_BYTES", 0)
        monkeypatch.setattr("spillway.source.wrapped.PIECE_BYTES", 3)
    await source.execute(
        "CREATE TABLE public.t (data jsonb, id int PRIMARY KEY, n int)",
        """INSERT INTO public.t VALUES ('{"kind": "a"}', 1, 1), ('{"kind": "b"}', 2, 1), (NULL, 3, 1)""",
        """INSERT INTO public.t VALUES ('{"kind": "a"}', 4, NULL)""",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    conditions = (
        If("data", "eq", "a", ("kind",), T),
        If("n", "eq", 1, table=T),
        If("x", "eq", 1, table=("public", "x")),
    )
    async with reselecting(source, *conditions) as reselect:
        keys = [(key,) for key in "123415"]
        for _ in range(2):
            rows = await reselected(reselect, *keys)
            assert (rows.rows.keys(), rows.left) == ({0, 4}, {1, 2, 3})
        await source.execute("ALTER TABLE public.t ALTER n TYPE text", "ALTER TABLE public.t ADD m int")
        with pytest.raises(SpillwayError, match="does not fit"):
            await reselected(reselect, *keys)


async def test_what_the_publication_leaves_out(source: SourceDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spillway.source.bykeys.LOOK_SECONDS", 0.0)
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
    first = 1 if source.version < 150000 else 2
    inserted = await streamed(source, await source.stream(), 4 - first, new_decoder())
    async with reselecting(source) as reselect:
        rows = await reselected(reselect, ("1",), ("2",), ("3",))
        assert records(rows) == {place: change.record for place, change in enumerate(inserted, first - 1)}
        await source.execute("ALTER PUBLICATION p SET TABLE public.t")
        assert (await reselected(reselect, ("1",))).rows
        await source.execute("ALTER PUBLICATION p DROP TABLE public.t")
        with pytest.raises(SpillwayError, match=r"public\.t is not in publication p"):
            await reselected(reselect, ("1",))


@pytest.mark.parametrize("via_root", [False, True])
async def test_partitions(source: SourceDatabase, via_root: bool) -> None:
    if source.version < 130000:  # what it does not have
        via_root = False
    tables = "public.t" if source.version >= 130000 else "public.t1, public.t2"
    await source.execute(
        "CREATE TABLE public.t (id int, part int, body text, PRIMARY KEY (part, id)) PARTITION BY LIST (part)",
        "CREATE TABLE public.t1 PARTITION OF public.t FOR VALUES IN (1)",
        "CREATE TABLE public.t2 (body text, gone int, id int NOT NULL, part int NOT NULL)",
        "ALTER TABLE public.t2 DROP COLUMN gone",
        "ALTER TABLE public.t ATTACH PARTITION public.t2 FOR VALUES IN (2)",
        f"CREATE PUBLICATION p FOR TABLE {tables}" + (" WITH (publish_via_partition_root)" if via_root else ""),
        f"SELECT pg_create_logical_replication_slot('{source.slot}', 'pgoutput')",
        "INSERT INTO public.t SELECT i, i % 2 + 1, 'x' FROM generate_series(1, 10) i",
    )
    inserted = await streamed(source, await source.stream(), 10, new_decoder())
    async with reselecting(source) as reselect:
        rows = await reselected(reselect, *(change.pks for change in inserted), ("1", "1"))
        assert 10 not in rows.rows
        for place, change in enumerate(inserted):
            if via_root or change.pks[1] == "1":  # of the others the columns have the order of the first partition
                assert records(rows)[place] == change.record
        if not via_root:
            await source.execute(
                "CREATE TABLE public.t3 (part int NOT NULL, id int NOT NULL, body text)",
                "ALTER TABLE public.t ATTACH PARTITION public.t3 FOR VALUES IN (3)",
                *(["ALTER PUBLICATION p ADD TABLE public.t3"] if source.version < 130000 else []),
            )
            async with reselecting(source) as another:
                with pytest.raises(SpillwayError, match="key's columns in another order"):
                    await reselected(another, ("1", "1"))


async def test_a_table_that_is_altered_meanwhile(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, n int)",
        "INSERT INTO public.t VALUES (1, 5)",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reselecting(source) as reselect:
        assert records(await reselected(reselect, ("1",))) == {0: b'{"id":1,"n":5}'}
        await source.execute("ALTER TABLE public.t ALTER n TYPE text")
        assert records(await reselected(reselect, ("1",))) == {0: b'{"id":1,"n":"5"}'}
        await source.execute("ALTER TABLE public.t RENAME n TO m")
        assert records(await reselected(reselect, ("1",))) == {0: b'{"id":1,"m":"5"}'}


async def test_a_column_that_the_stream_has_carried_is_there(source: SourceDatabase) -> None:
    """Though the question was prepared just before it was added."""
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        "INSERT INTO public.t VALUES (1)",
        "CREATE PUBLICATION p FOR TABLE public.t",
    )
    async with reselecting(source) as reselect, enriching(source, "SELECT * FROM t WHERE id = ANY($1)") as enricher:
        for by_keys in (reselect, enricher):
            await by_keys.fetch(T, [("1",)], Seen((), 0, {"id"}), MANY, MANY)
        await source.execute("ALTER TABLE public.t ADD n int", "UPDATE public.t SET n = 5")
        for by_keys in (reselect, enricher):
            fetched = await by_keys.fetch(T, [("1",)], Seen((), 0, {"id", "n"}), MANY, MANY)
            assert fetched.rows == {0: {"id": b"1", "n": b"5"}}
            fetched = await by_keys.fetch(T, [("1",)], Seen((), 0, {"id", "n"}), MANY, MANY)
            assert fetched.queries == 1


async def test_row_security_that_would_hide_a_row(source: SourceDatabase) -> None:
    role = f"reader_{source.database}"
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)",
        "INSERT INTO public.t VALUES (1)",
        "CREATE PUBLICATION p FOR TABLE public.t",
        f"CREATE ROLE {role} LOGIN",
        f"GRANT EXECUTE ON FUNCTION pg_control_system() TO {role}",
    )
    try:
        reading = SourceDatabase(source.as_role(role), source.query)
        async with reselecting(reading) as reselect:
            with pytest.raises(SpillwayError, match="permission denied"):
                await reselected(reselect, ("1",))
            await source.execute(
                f"GRANT SELECT ON public.t TO {role}", "ALTER TABLE public.t ENABLE ROW LEVEL SECURITY"
            )
            with pytest.raises(SpillwayError, match="row-level security") as caught:
                await reselected(reselect, ("1",))
            assert caught.value.code == "reselect_failed"
    finally:
        await source.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_table_without_a_key(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int)", "CREATE PUBLICATION p FOR TABLE public.t")
    async with reselecting(source) as reselect:
        with pytest.raises(SpillwayError, match="no primary key"):
            await reselect.fetch(T, [("1",)], NOTHING, MANY, MANY)
