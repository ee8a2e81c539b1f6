"""The SQLite sink: a table equal to its source, exact to the digit, and whole batches or nothing."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinks.messages import batch_of, change, context, shaped
from spillway.change import Change
from spillway.chunk import Keying
from spillway.errors import SpillwayError
from spillway.sinks import sqlite as sqlite_sink
from spillway.sinks.base import OK, Readable, Result
from spillway.sinks.sqlite import SqliteSink, record_values

Make = Callable[..., SqliteSink]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[SqliteSink] = []

    def make(**options: Any) -> SqliteSink:
        made.append(SqliteSink(context(tmp_path), path="copy.db", **options))
        return made[-1]

    yield make
    for sink in made:
        await sink.close()


@pytest.fixture
def query(tmp_path: Path) -> Callable[[str], list[Any]]:
    def query(sql: str) -> list[Any]:
        connection = sqlite3.connect(tmp_path / "copy.db", isolation_level=None)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    return query


Query = Callable[[str], list[Any]]


def rejected(result: Result, reason: str) -> bool:
    return (result.outcome, result.reason) == ("reject", reason)


async def test_the_table_is_made_and_follows_its_source(make: Make, query: Query) -> None:
    sink = make()
    assert (
        await sink.send(
            batch_of(
                [
                    change({"id": 1, "title": "a"}, pks=("1",)),
                    change({"id": 2, "title": "b"}, pks=("2",), action="read"),
                    change({"id": 1, "title": "c"}, pks=("1",), action="update"),
                    change({"id": 2, "title": None}, pks=("2",), action="delete"),
                    change({"id": 3, "title": None}, pks=("3",)),
                ]
            )
        )
        == OK
    )
    assert query("SELECT _spillway_key, id, title FROM jobs ORDER BY id") == [
        ("public.jobs:1", 1, "c"),
        ("public.jobs:3", 3, None),
    ]


async def test_applied_twice_it_is_the_same(make: Make, query: Query) -> None:
    sink = make()
    batch = [
        change({"id": 1, "t": "long"}, pks=("1",)),
        change({"id": 2}, action="update", pks=("2",), was=("1",), whole=False),
        change({"id": 1, "t": "other"}, pks=("1",)),
    ]
    for start in (0, 0, 1):
        assert await sink.send(batch_of(batch[start:])) == OK
        assert query("SELECT id, t FROM jobs ORDER BY id") == [(1, "other"), (2, "long")]


async def test_new_columns_are_added_and_dropped_ones_stay(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1, "gone": "x"}, pks=("1",))])) == OK
    assert await sink.send(batch_of([change({"id": 1, 'ne"w col': 2}, pks=("1",), action="update")])) == OK
    assert query("SELECT * FROM jobs") == [("public.jobs:1", 1, "x", 2)]


async def test_what_was_made_by_a_batch_that_failed_is_forgotten(make: Make, query: Query) -> None:
    sink = make()
    poison = change({"id": 2}, pks=())
    assert rejected(await sink.send(batch_of([change({"id": 1}), poison])), "no_primary_key")
    assert query("SELECT name FROM sqlite_master") == []
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    assert rejected(await sink.send(batch_of([change({"id": 1, "more": 1}), poison])), "no_primary_key")
    assert await sink.send(batch_of([change({"id": 1, "more": 1})])) == OK
    assert query("SELECT id, more FROM jobs") == [(1, 1)]


async def test_a_table_that_was_changed_under_us(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    query("DROP TABLE jobs")
    assert await sink.send(batch_of([change({"id": 2}, pks=("2",))])) == OK
    query("ALTER TABLE jobs RENAME COLUMN id TO was")
    assert await sink.send(batch_of([change({"id": 3}, pks=("3",))])) == OK
    assert query("SELECT was, id FROM jobs") == [(2, None), (None, 3)]


async def test_unchanged_toast_columns_stay_as_they_are(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1, "t": "long", "n": 1})])) == OK
    assert await sink.send(batch_of([change({"id": 1, "n": 2}, action="update", whole=False)])) == OK
    assert query("SELECT t, n FROM jobs") == [("long", 2)]
    result = await sink.send(batch_of([change({"id": 7, "n": 2}, pks=("7",), action="update", whole=False)]))
    assert rejected(result, "unchanged_toast")
    assert query("SELECT count(*) FROM jobs") == [(1,)]


async def test_a_change_of_the_key(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1, "t": "a"}, pks=("1",))])) == OK
    moved = change({"id": 2, "t": "a"}, action="update", pks=("2",), was=("1",))
    assert await sink.send(batch_of([moved], Keying.EVENTS)) == OK
    assert query("SELECT _spillway_key, id, t FROM jobs") == [("public.jobs:2", 2, "a")]


async def test_truncate_empties_its_table_alone(make: Make, query: Query) -> None:
    sink = make()
    batch = [change({"id": 1}), change({"id": 1}, table="other"), change({}, action="truncate", pks=())]
    assert await sink.send(batch_of([*batch, change({}, action="truncate", pks=(), table="none")])) == OK
    assert query("SELECT count(*) FROM jobs") == [(0,)]
    assert query("SELECT count(*) FROM other") == [(1,)]


async def test_names_of_tables(make: Make, query: Query) -> None:
    tables = [("public", "jobs"), ("shop", "jobs"), ("public", "shop.jobs"), ("public", 'we"ird')]
    assert await make().send(batch_of([change({"id": 1}, schema=s, table=t) for s, t in tables])) == OK
    names = {name for (name,) in query("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {"jobs", "shop.jobs", "shop\\.jobs", 'we"ird'}


async def test_a_configured_table_is_for_one_source_table(make: Make, query: Query) -> None:
    sink = make(table="copy")
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    assert query("SELECT id FROM copy") == [(1,)]
    assert rejected(await sink.send(batch_of([change({"id": 1}, table="other")])), "table_taken")


async def test_tables_that_are_not_ours_are_left_alone(make: Make, query: Query) -> None:
    query("CREATE TABLE jobs (id)")
    sink = make()
    assert rejected(await sink.send(batch_of([change({"id": 1})])), "table_taken")
    assert rejected(await sink.send(batch_of([change({"id": 1}, table="JOBS")])), "table_taken")
    assert query("SELECT * FROM jobs") == []


async def test_names_that_sqlite_cannot_tell_apart(make: Make) -> None:
    assert (await make().send(batch_of([change({"id": 1, "ID": 2})]))).outcome == "reject"
    assert rejected(await make().send(batch_of([change({"_spillway_key": 1})])), "reserved_column")


async def test_a_constraint_or_trigger_rejects_the_batch_whole(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1, "v": "a"}, pks=("1",))])) == OK
    query("CREATE UNIQUE INDEX one ON jobs (v)")
    result = await sink.send(
        batch_of([change({"id": 2, "v": "b"}, pks=("2",)), change({"id": 3, "v": "a"}, pks=("3",))])
    )
    assert rejected(result, "sqlite_constraint_unique")
    query("CREATE TRIGGER no BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'not on my watch'); END")
    result = await sink.send(batch_of([change({"id": 4, "v": "d"}, pks=("4",))]))
    assert rejected(result, "sqlite_constraint_trigger")
    assert result.detail == "not on my watch"
    assert query("SELECT id FROM jobs") == [(1,)]
    query("DROP TRIGGER no")
    assert await sink.send(batch_of([change({"id": 4, "v": "d"}, pks=("4",))])) == OK


async def test_a_locked_file_is_the_sinks_failure(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_sink, "_BUSY_SECONDS", 0.05)
    sink = make()
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    other = sqlite3.connect(tmp_path / "copy.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    result = await sink.send(batch_of([change({"id": 2}, pks=("2",))]))
    assert (result.outcome, result.reason) == ("sink_down", "sqlite_busy")
    other.rollback()
    assert await sink.send(batch_of([change({"id": 2}, pks=("2",))])) == OK
    other.close()


async def test_a_full_file_is_the_sinks_failure(make: Make, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    assert sink._connection is not None
    await sink._thread.run(
        lambda: sink._connection and sink._connection.execute("PRAGMA max_page_count = 4").fetchall()
    )
    result = await sink.send(batch_of([change({"id": 2, "v": "x" * 100_000}, pks=("2",))]))
    assert (result.outcome, result.reason) == ("sink_down", "sqlite_full")
    assert await sink.send(batch_of([change({"id": 2, "v": "x" * 100_000}, pks=("2",))])) == OK
    assert query("SELECT count(*) FROM jobs") == [(2,)]


async def test_a_file_that_is_no_database_is_the_sinks_failure(make: Make, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"something else" * 100)
    sink = make()
    await sink.open()
    result = await sink.send(batch_of([change({"id": 1})]))
    assert (result.outcome, result.reason) == ("sink_down", "sqlite_notadb")


async def test_a_deleted_file_is_begun_anew(make: Make, tmp_path: Path, query: Query) -> None:
    sink = make()
    assert await sink.send(batch_of([change({"id": 1})])) == OK
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    assert await sink.send(batch_of([change({"id": 2}, pks=("2",))])) == OK
    assert query("SELECT id FROM jobs") == [(2,)]


async def test_half_a_surrogate_pair_is_rejected(make: Make) -> None:
    assert rejected(await make().send(batch_of([change('{"v":"\\ud800"}')])), "invalid_text")


async def test_five_hundred_columns(make: Make, query: Query) -> None:
    record = {f"column_{i}": i for i in range(500)}
    assert await make().send(batch_of([change(record)])) == OK
    assert query("SELECT * FROM jobs")[0][1:] == tuple(range(500))


@pytest.mark.parametrize(
    ("json_text", "stored"),
    [
        ("null", None),
        ("true", 1),
        ("false", 0),
        ("0", 0),
        ("-7", -7),
        ("-0", "-0"),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", "9223372036854775808"),
        ("1.50", "1.50"),
        ("1e400", "1e400"),
        ("1" * 5000, "1" * 5000),
        ('"NaN"', "NaN"),
        ('"é\\n\\"\\u00e9"', 'é\n"é'),
        ('{"a": [1.50, "]}\\""] }', '{"a": [1.50, "]}\\""] }'),
        ("[]", "[]"),
        ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000),
    ],
)
async def test_values(make: Make, query: Query, json_text: str, stored: object) -> None:
    assert await make().send(batch_of([change(f'{{"v":{json_text},"after":1}}')])) == OK
    ((value, after),) = query("SELECT v, after FROM jobs")
    assert (value, type(value), after) == (stored, type(stored), 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=6), st.booleans())
def test_records_are_taken_apart_as_a_parser_would(record: dict[str, Any], spaced: bool) -> None:
    text = json.dumps(record, ensure_ascii=spaced, indent=1 if spaced else None)
    found = dict(record_values(text))
    assert list(found) == list(record)
    for name, value in record.items():
        stored = found[name]
        if isinstance(value, bool):
            assert stored == int(value)
        elif isinstance(value, dict | list):
            assert json.loads(str(stored)) == value
        elif isinstance(value, float):
            assert math.isclose(float(str(stored)), value, rel_tol=0)
        elif isinstance(value, int):
            assert int(stored or 0) == value
        else:
            assert stored == value


def test_a_message_is_what_the_decoder_makes() -> None:
    """The factory of these tests against the contract of a change."""
    one: Change = change({"a": 1})
    assert orjson.loads(one.record) == {"a": 1}


async def pages_of(sink: SqliteSink, table: tuple[str, str] = ("public", "jobs"), limit: int = 2) -> list[Any]:
    found: list[tuple[str, ...]] = []
    after: str | None = None
    while True:
        page, after = await sink.keys(table, ("a", "b"), after, limit, None)
        assert len(page) <= limit
        found += page
        if after is None:
            return found


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
async def test_keys_of_the_rows_that_it_holds(make: Make, count: int) -> None:
    sink = make()
    assert isinstance(sink, Readable)
    await sink.send(batch_of([change({"a": i}, pks=(str(i), "x:.\\y")) for i in range(count)]))
    await sink.send(batch_of([change({"a": 1}, pks=("1",), table="jobs:")]))
    assert await pages_of(sink) == [(str(i), "x:.\\y") for i in range(count)]
    assert await pages_of(sink, ("public", "no such table")) == []


async def test_keys_of_another_table_in_the_same_are_left_out(make: Make) -> None:
    await make(table="jobs").send(batch_of([change({"a": 1}, pks=("1",))]))
    other = make(table="jobs")
    await other.send(batch_of([change({"a": 2}, pks=("2",), table="other")]))
    assert await pages_of(other, ("public", "other")) == [("2",)]
    assert await pages_of(other) == [("1",)]


async def test_keys_of_a_file_that_is_broken(make: Make, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"no database" * 100)
    with pytest.raises(SpillwayError, match=r"copy\.db cannot be read") as raised:
        await make().keys(("public", "jobs"), ("a",), None, 2, None)
    assert raised.value.code == "sink_unreachable"


async def test_a_whole_row_that_was_shaped_replaces_the_row(make: Make, query: Query) -> None:
    sink = make()
    whole, part = change({"id": 1}, pks=("1",)), change({"id": 1}, action="update", pks=("1",), whole=False)
    for one, row, expected in (
        (whole, {"id": 1, "address_city": "x", "name": "a"}, ("x", "a")),
        (part, {"id": 1, "name": "b"}, ("x", "b")),
        (whole, {"id": 1, "name": None}, (None, None)),
        (whole, {"id": 1, "address_city": "y"}, ("y", None)),
    ):
        assert await sink.send(shaped([(one, row, None)])) == OK
        assert query("SELECT address_city, name FROM jobs") == [expected]
