"""Enrichment: rows of the database as they are when the message is sent, by keys of any type."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from shape.place import Shaped, file_sink, python, sqlite_sink

T = "public.t"
NAMED = """
create table names (id int, name text);
alter table names replica identity full;
insert into names values (1, 'one'), (2, 'two'), (2, 'zwei');
"""


def enrichment(sql: str) -> dict[str, object]:
    return {"name": "more", "type": "enrichment", "code": sql}


def test_no_row_leaves_the_message_and_two_are_its_error(database: str, tmp_path: Path) -> None:
    more = enrichment("select t.id, n.name from t join names n on n.id = t.id where t.id = any($1)")
    schema = f"create table t (id int primary key, v text); {NAMED}"
    with Shaped(database, tmp_path, [file_sink("out", [T], enrichment="more")], [more], schema=schema) as place:
        place.begin()
        place.sql("insert into t select n, 'v' from generate_series(1, 3) n")
        (parked,) = place.parked("out", 1)
        assert parked["key"].endswith("2")
        assert "more than one row" in parked["detail"]
        lines = place.lines("out")
        found = {line["record"]["id"]: line["metadata"]["enrichment"] for line in lines}
        assert found == {1: {"id": 1, "name": "one"}, 3: None}
        place.sql("delete from names where name = 'zwei'")
        assert place.post("out/backlog/retry", all=True)["count"] == 1
        assert place.came("out", 3)[-1]["metadata"]["enrichment"] == {"id": 2, "name": "two"}


@pytest.mark.parametrize(
    ("columns", "condition", "values"),
    [
        ("id uuid primary key", "t.id = any($1)", ["md5('a')::uuid", "md5('b')::uuid"]),
        ("id text primary key", "t.id = any($1)", ["'it''s'", "'{\"a\",b}'", "'NULL'", "''", "E'line\\nbreak \\\\'"]),
        ("id timestamptz primary key", "t.id = any($1)", ["'2026-01-01 00:00:00.123456+05'", "'infinity'"]),
        ("id numeric primary key", "t.id = any($1)", ["1.50", "12345678901234567890.123"]),
        ("id bytea primary key", "t.id = any($1)", ["'\\x00ff'", "'\\x'"]),
    ],
    ids=["uuid", "text", "timestamptz", "numeric", "bytea"],
)
def test_keys_of_any_type(database: str, tmp_path: Path, columns: str, condition: str, values: list[str]) -> None:
    more = enrichment(f"select t.id, t.v || '!' as loud from public.t where {condition}")
    schema = f"create table t ({columns}, v text)"
    with Shaped(database, tmp_path, [file_sink("out", [T], enrichment="more")], [more], schema=schema) as place:
        place.begin()
        for number, value in enumerate(values):
            place.sql(f"insert into t values ({value}, 'v{number}')")
        lines = place.came("out", len(values))
    for number, line in enumerate(lines):
        assert line["metadata"]["enrichment"] == {"id": line["record"]["id"], "loud": f"v{number}!"}


def test_a_composite_key_is_given_in_alphabetical_order(database: str, tmp_path: Path) -> None:
    sql = """
select t.z, t.b, t.a, t.b || ' of ' || t.a as both
  from unnest($1, $2, $3) as wanted (a, b, z) join public.t using (a, b, z)
"""
    schema = "create table t (z int, b text, a uuid, v text, primary key (z, b, a))"
    sinks = [file_sink("out", [T], enrichment="more")]
    with Shaped(database, tmp_path, sinks, [enrichment(sql)], schema=schema) as place:
        place.begin()
        place.sql("insert into t select n, 'b' || n % 2, md5(n::text)::uuid, 'v' from generate_series(1, 5) n")
        lines = place.came("out", 5)
    for line in lines:
        record, found = line["record"], line["metadata"]["enrichment"]
        assert found == {**{c: record[c] for c in "zba"}, "both": f"{record['b']} of {UUID(record['a'])}"}


def test_values_are_rendered_as_the_stream_renders_them(database: str, tmp_path: Path) -> None:
    columns = (
        "id int primary key, n numeric, at timestamptz, day date, span interval, tags text[], doc jsonb, raw json,"
        " bits bytea, f float8, b bool, big bigint, net inet"
    )
    more = enrichment("select * from public.t where id = any($1)")
    schema = f"create table t ({columns})"
    with Shaped(database, tmp_path, [file_sink("out", [T], enrichment="more")], [more], schema=schema) as place:
        place.sql("alter database " + database.rsplit("/", 1)[1] + " set timezone = 'Asia/Tokyo'")
        place.begin()
        place.sql(
            "insert into t values (1, 1.50, '2026-01-01 00:00:00.5+00', '2026-02-03', '1 mon 2 days 03:04:05.6',"
            " array['a', null, 'it''s \"q\"'], '{\"a\": 1.10}', E'{\"b\":\\n [1.50, 2]}', '\\x00ff', 0.1, true,"
            " 9223372036854775807, '10.0.0.1/8')",
            "insert into t (id) values (2)",
        )
        lines = place.came("out", 2)
    for line in lines:
        assert line["metadata"]["enrichment"] == line["record"]


def test_functions_see_the_enrichment(database: str, tmp_path: Path) -> None:
    functions = [
        enrichment("select t.id, n.name from t join names n on n.id = t.id where t.id = any($1) and n.name <> 'zwei'"),
        python("known", "filter", "return metadata['enrichment'] is not None"),
        python("named", "transform", "return {'name': metadata['enrichment']['name']}"),
    ]
    sinks = [file_sink("out", [T], enrichment="more", filter="known", transform="named")]
    schema = f"create table t (id int primary key, v text); {NAMED}"
    with Shaped(database, tmp_path, sinks, functions, schema=schema) as place:
        place.begin()
        place.sql("insert into t select n, 'v' from generate_series(1, 3) n")
        assert place.came("out", 2) == [{"name": "one"}, {"name": "two"}]


def test_an_error_in_sql_of_one_row_is_that_messages(database: str, tmp_path: Path) -> None:
    more = enrichment("select id, 100 / (id - 4) as q from public.t where id = any($1)")
    schema = "create table t (id int primary key, v text)"
    with Shaped(database, tmp_path, [file_sink("out", [T], enrichment="more")], [more], schema=schema) as place:
        place.begin()
        place.sql("insert into t select n, 'v' from generate_series(1, 9) n")
        (parked,) = place.parked("out", 1)
        assert parked["key"].endswith("4")
        assert "division by zero" in parked["detail"]
        place.wait(lambda: len(place.lines("out")) == 8, "the others")
        found = {line["record"]["id"]: line["metadata"]["enrichment"]["q"] for line in place.lines("out")}
    assert found == {n: int(100 / (n - 4)) for n in range(1, 10) if n != 4}


def test_queries_go_by_batches(database: str, tmp_path: Path) -> None:
    """A hundred messages to a query, where the sink takes a hundred at a time."""
    more = enrichment("select id, statement_timestamp() as asked from public.t where id = any($1)")
    schema = "create table t (id int primary key, v text)"
    sinks = [file_sink("out", [T], enrichment="more", batch_size=100)]
    with Shaped(database, tmp_path, sinks, [more], schema=schema) as place:
        place.begin()
        place.post("out/pause")
        place.sql("insert into t select n, 'v' from generate_series(1, 5000) n")
        place.read_by_the_stream()
        place.post("out/resume")
        lines = place.came("out", 5000)
    assert len({line["metadata"]["enrichment"]["asked"] for line in lines}) <= 52


def test_a_table_that_is_locked_for_longer_than_the_limit_is_nobodys_fault(database: str, tmp_path: Path) -> None:
    sql = "select t.id, r.name from t join r on r.id = t.ref where t.id = any($1)"
    schema = "create table t (id int primary key, ref int); create table r (id int primary key, name text)"
    out = file_sink("out", [T], enrichment="more", enrichment_timeout_ms=300, on_reject="dead_letter")
    with Shaped(database, tmp_path, [out], [enrichment(sql)], schema=schema) as place:
        place.sql("insert into r values (1, 'one')")
        place.begin()
        place.sql("insert into t values (1, 1)")
        place.came("out", 1)
        with psycopg.connect(database) as connection:
            connection.execute("lock table r in access exclusive mode")
            place.sql("insert into t values (2, 1)")
            place.wait(lambda: place.status("out")["last_error"], "a time-out")
        lines = place.came("out", 2)
        status = place.status("out")
    assert [line["metadata"]["enrichment"] for line in lines] == [{"id": 1, "name": "one"}, {"id": 2, "name": "one"}]
    assert "enrichment_timeout" in status["last_error"]
    assert status["dead_letters"] == 0


@pytest.mark.parametrize("toast", ["omit", "reselect"])
def test_columns_of_an_enrichment_that_is_gone_are_null(database: str, tmp_path: Path, toast: str) -> None:
    """Of a row that came whole, of one that came without its large column, and of one that is refreshed."""
    more = enrichment("select t.id, n.name from t join names n on n.id = t.ref where t.id = any($1)")
    related = [{"table": "public.names", "sql": "select id from t where ref = any($1)", "refreshes": T}]
    schema = f"""create table t (id int primary key, ref int, doc text); alter table t alter doc set storage external;
        {NAMED} delete from names where id = 2; alter table names add primary key (id)"""
    copy = sqlite_sink("out", [T], enrichment="more", related=related, toast=toast)
    with Shaped(database, tmp_path, [copy], [more], schema=schema) as place:
        place.begin()
        place.sql(
            "insert into t select n, 1, repeat('x', case n when 2 then 5000 else 1 end) from generate_series(1, 3) n"
        )
        place.drained("out")

        def names() -> list[tuple[int, str | None]]:
            with closing(sqlite3.connect(place.folder / "out.db")) as connection:
                return connection.execute("select length(doc), name from t order by id").fetchall()

        assert names() == [(1, "one"), (5000, "one"), (1, "one")]
        place.sql("update t set ref = null where id < 3")
        place.drained("out")
        assert names() == [(1, None), (5000, None), (1, "one")]
        place.sql("delete from names")
        place.wait(lambda: names()[2] == (1, None), "the refresh")
