"""From changed rows to their parents' keys, on every version of PostgreSQL: types, keys, nulls, pages, visibility."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import psycopg
import pytest

from spillway.config.shape import Related
from spillway.errors import SpillwayError
from spillway.source.origin import Expected
from spillway.source.parents import PAGE_KEYS, SETTINGS, Parents, QuestionFailed, Values
from spillway.source.sessions import Sessions
from spillway.source.snapshot import Seen

NOTHING = Seen((), 0)


def related(sql: str, columns: Sequence[str] | None = None) -> Related:
    entry = {"table": "public.child", "refreshes": "public.parent", "sql": sql}
    return Related.model_validate(entry if columns is None else {**entry, "columns": list(columns)})


@contextlib.asynccontextmanager
async def finding(conninfo: str) -> AsyncIterator[Parents]:
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("select system_identifier::text from pg_control_system()").fetchone()
        assert row is not None
    sessions = Sessions(
        conninfo, "", "related", lambda: Expected(row[0]), 60.0, 1, own_search_path=True, settings=SETTINGS
    )
    parents = Parents(sessions)
    try:
        yield parents
    finally:
        await parents.close()


class Pages:
    def __init__(self) -> None:
        self.keys: list[str] = []
        self.sizes: list[int] = []

    async def take(self, table: tuple[str, str], keys: Sequence[str]) -> None:
        assert table == ("public", "parent")
        self.keys += keys
        self.sizes.append(len(keys))


async def ask(parents: Parents, entry: Related, *values: Values, seen: Seen = NOTHING) -> list[str]:
    pages = Pages()
    await parents.find([(entry, values)], seen, pages.take)
    return sorted(pages.keys)


def run(conninfo: str, *statements: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


async def test_values_have_the_types_of_their_columns(any_database: str) -> None:
    run(
        any_database,
        "create type mood as enum ('sad', 'fine')",
        "create domain code as text check (value <> '')",
        "create table child (a int, b uuid, c mood, d code, e timestamptz, primary key (b, a))",
        "create table parent (region text, id int, at timestamptz, primary key (region, id))",
        "insert into parent values ('a:b', 1, '2020-01-01 00:00+00'), ('\\', 2, '2021-01-01 00:00+00')",
    )
    async with finding(any_database) as parents:
        # Typed: there is nothing in it that would say so.
        entry = related(
            "select p.id, p.region from parent p join unnest($1, $2, $3, $4) as c (a, c, d, e) on c.a = p.id"
            " and c.e = p.at and c.c = 'fine' and c.d like '%\"%'", ["a", "c", "d", "e"],
        )  # fmt: skip
        found = await ask(
            parents, entry,
            ("1", "fine", '{",\\"}', "2020-01-01 00:00:00+00"), ("2", "fine", 'NULL"', "2021-01-01 00:00:00+00"),
            ("1", "sad", '"', "2020-01-01 00:00:00+00"), (None, None, None, None),
        )  # fmt: skip
        assert found == ["public.parent:\\\\:2", "public.parent:a\\:b:1"]
        # The primary key by names, whatever the order in the table; here uuid, then int.
        entry = related("select p.id, p.region from parent p where id = any($1) and 2 = cardinality($2)")
        keys = [("1", "5f0c7c0a-0000-4000-8000-000000000001"), ("1", "5f0c7c0a-0000-4000-8000-000000000002")]
        assert await ask(parents, entry, *keys) == ["public.parent:a\\:b:1"]


async def test_a_key_is_cast_to_its_type_and_nulls_mean_nothing(any_database: str) -> None:
    run(any_database, "create table child (id int primary key)", "create table parent (id numeric(6, 2) primary key)")
    async with finding(any_database) as parents:
        entry = related("select case when id > 1 then id end as whatever from unnest($1) as id")
        assert await ask(parents, entry, ("1",), ("2",), ("3",)) == ["public.parent:2\\.00", "public.parent:3\\.00"]


async def test_pages_are_bounded_and_in_one_snapshot(any_database: str) -> None:
    run(
        any_database,
        "create table child (id int primary key)",
        "create table parent (id int primary key, child int)",
        f"insert into parent select n, 1 from generate_series(1, {3 * PAGE_KEYS}) n",
    )
    entry = related("select id from parent where child = any($1) order by id")
    sizes = []
    async with finding(any_database) as parents:

        async def take(_: tuple[str, str], keys: Sequence[str]) -> None:
            run(any_database, "insert into parent select max(id) + 1, 1 from parent")
            sizes.append(len(keys))

        await parents.find([(entry, [("1",)]), (entry, [("1",)])], NOTHING, take)
    assert sizes == [PAGE_KEYS] * 6


async def test_a_change_that_is_not_visible_yet_is_waited_for(any_database: str) -> None:
    run(
        any_database,
        "create table child (id int primary key)",
        "create table parent (id int primary key, child int)",
        "insert into parent values (1, 1)",
    )
    entry = related("select id from parent where child = any($1)")
    async with finding(any_database) as parents:
        with psycopg.connect(any_database) as late:
            row = late.execute("insert into parent values (2, 1) returning xmin::text").fetchone()
            assert row is not None
            asked = asyncio.create_task(ask(parents, entry, ("1",), seen=Seen((int(row[0]),), 1)))
            done, _ = await asyncio.wait([asked], timeout=0.3)
            assert not done
            late.commit()
        assert await asked == ["public.parent:1", "public.parent:2"]


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("select 1 / (id - 1) as id from unnest($1) as id", "related_data"),
        ("select repeat('x', 2000) as id from unnest($1) as id", "related_key_too_long"),
        ("select nothing as id from unnest($1) as id", "related_sql"),
        ("select id as other, id as another from unnest($1) as id", "related_sql"),
        ("select id from unnest($1) as id; delete from parent", "related_sql"),
    ],
)
async def test_what_fails_is_told_apart(database: str, sql: str, code: str) -> None:
    run(database, "create table child (id int primary key)", "create table parent (id text primary key)")
    async with finding(database) as parents:
        with pytest.raises(SpillwayError) as failed:
            await ask(parents, related(sql), ("1",))
        assert failed.value.code == code
        assert isinstance(failed.value, QuestionFailed) == (code in ("related_data", "related_key_too_long"))
        fine = related("select id from unnest($1) as id")
        assert await ask(parents, fine, ("1",)) == ["public.parent:1"]


@pytest.mark.parametrize(
    ("sql", "place"),
    [
        ("select id,\n nothing from unnest($1) as id", "(line 2, column 2 of the SQL)"),
        ("delete from parent where id = any($1) returning id", "(line 1, column 8 of the SQL; it must be one SELECT)"),
    ],
)
async def test_a_mistake_in_the_sql_is_told_with_its_place(database: str, sql: str, place: str) -> None:
    run(database, "create table child (id text primary key)", "create table parent (id text primary key)")
    async with finding(database) as parents:
        with pytest.raises(SpillwayError) as failed:
            await ask(parents, related(sql), ("1",))
        assert failed.value.what.endswith(place)


async def test_a_column_of_another_type_by_now(database: str) -> None:
    run(database, "create table child (id int primary key)", "create table parent (id int primary key)")
    entry = related("select id from unnest($1) as id where pg_typeof(id) = 'text'::regtype or id::text < '5'")
    async with finding(database) as parents:
        assert await ask(parents, entry, ("1",), ("7",)) == ["public.parent:1"]
        run(database, "alter table child alter id type text", "alter table parent alter id type text")
        with pytest.raises(SpillwayError):
            await ask(parents, entry, ("a",))
        assert await ask(parents, entry, ("a",)) == ["public.parent:a"]
