"""Orders of backfills and re-indexes, as they are read from JSON, and what is said about wrong ones."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from spillway.change import make_key
from spillway.config import BackfillOrder, ReindexOrder, TableName, read_order
from spillway.errors import SpillwayError

JOBS = TableName("public", "jobs")


def test_an_empty_order_means_every_row_of_every_table() -> None:
    order = read_order(BackfillOrder, {})
    assert order == BackfillOrder()
    assert (order.tables, order.keys, order.where, order.parallel, order.gap, order.replay) == (
        *((), None, None, None),
        *(False, False),
    )


@pytest.mark.parametrize("given", [{"table": "public.jobs"}, {"tables": ["jobs"]}, {"table": "jobs", "tables": None}])
def test_tables(given: dict[str, object]) -> None:
    assert read_order(BackfillOrder, given) == BackfillOrder(tables=(JOBS,))


def test_conditions() -> None:
    given = {
        "table": "jobs",
        "where": "state = 'done'",
        "sort_column": "id",
        "start_position": 5,
        "from_key": "1:a",
        "to_key": [9, "b:c"],
        "parallel": 4,
        "max_rows_per_second": 100,
    }
    assert read_order(BackfillOrder, given) == BackfillOrder(
        tables=(JOBS,),
        where="state = 'done'",
        sort_column="id",
        start_position="5",
        from_key=("1", "a"),
        to_key=("9", "b:c"),
        parallel=4,
        max_rows_per_second=100,
    )
    since = read_order(BackfillOrder, {"since": "2026-01-02T03:04:05Z", "sort_column": "updated_at", "replay": True})
    assert since.since == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert read_order(BackfillOrder, {"gap": True, "tables": []}).gap


@pytest.mark.parametrize("values", [("1",), ("a", "b"), ("a:b", "c\\d", "e.f"), ("", "x"), ("public.jobs", "1")])
def test_a_key_is_given_as_it_is_shown(values: tuple[str, ...]) -> None:
    shown = make_key(*JOBS, values)
    short = shown.removeprefix("public.jobs:")
    for key in (shown, short, list(values)):
        assert read_order(BackfillOrder, {"table": "jobs", "keys": [key]}).keys == (values,)
    assert read_order(BackfillOrder, {"keys": [short]}).keys == (values,)


def test_keys_that_are_numbers_or_hold_dots() -> None:
    keys = [5, "a@example.com", "1.5", [7, "x"]]
    assert read_order(BackfillOrder, {"table": "jobs", "keys": keys}).keys == (
        *(("5",), ("a@example.com",), ("1.5",)),
        ("7", "x"),
    )


ONE_ROW = {"keys": ["1"]}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tabel": "jobs"}, "tabel: unknown key; did you mean table?"),
        ({"table": "a", "tables": ["b"]}, "table: give either table or tables"),
        ({"table": "a.b.c"}, 'tables.0: must be a table: schema.table, with "..." around a part that holds a dot'),
        ({"table": 5}, "tables.0: must be a table: schema.table"),
        ({"tables": "jobs"}, "tables: must be a list"),
        ({"tables": ["jobs", "public.jobs"]}, "tables: names a table twice"),
        ({"tables": ["a", "b"], **ONE_ROW}, "tables: must be one table, for keys are those of a table"),
        ({"where": " "}, "where: is empty"),
        ({"parallel": 17}, "parallel: must be at most 16"),
        ({"max_rows_per_second": 0}, "max_rows_per_second: must be at least 1"),
        ({"start_position": "5"}, "start_position: needs a sort_column"),
        ({"keys": []}, "keys: may not be empty"),
        ({"keys": "5"}, "keys: must be a list"),
        ({"keys": [True]}, "keys.0: must be a list"),
        ({"keys": [["a", None]]}, "keys.0.1: must be text; put it in quotes"),
        ({"keys": ["1"] * 10_001}, "keys: may have at most 10000 items"),
        ({**ONE_ROW, "where": "x"}, "where: has no meaning beside keys, which say which rows"),
        ({"since": "2026-01-02T03:04:05"}, "since: must be a time with its zone, such as 2026-01-02T03:04:05Z"),
        ({"since": "yesterday"}, "since: must be a time with its zone, such as 2026-01-02T03:04:05Z"),
        (
            {"since": "2026-01-02T03:04:05Z", "sort_column": "a", "start_position": "b"},
            "since: and start_position both bound sort_column; give one of the two",
        ),
        ({"gap": True, "table": "a"}, "gap: reads all tables that missed changes; name none, or leave gap out"),
        ({"gap": True, "where": "x"}, "gap: reads whole tables, and goes with no condition on rows"),
        ({"gap": True, **ONE_ROW}, "gap: reads whole tables, and goes with no condition on rows"),
        (
            {"replay": True, "table": "jobs"},
            "replay: say which rows, by keys, from_key and to_key, where or since; all: start a backfill",
        ),
        ({"gap": "perhaps"}, "gap: must be true or false"),
        ({"where": "", "parallel": 0}, "where: is empty; parallel: must be at least 1"),
    ],
)
def test_a_wrong_backfill(given: dict[str, object], problem: str) -> None:
    with pytest.raises(SpillwayError) as caught:
        read_order(BackfillOrder, given)
    assert (caught.value.code, caught.value.what) == ("bad_request", problem)


@pytest.mark.parametrize("given", [None, [], "x", 5])
def test_what_is_no_object(given: object) -> None:
    with pytest.raises(SpillwayError, match="the body is no JSON object; send some of into, mapping") as caught:
        read_order(ReindexOrder, given)
    assert caught.value.code == "bad_request"


def test_reindex() -> None:
    mapping = {"mappings": {"properties": {"id": {"type": "long"}}}}
    assert read_order(ReindexOrder, {"into": "jobs_v2"}) == ReindexOrder(into="jobs_v2")
    order = read_order(ReindexOrder, {"into": "jobs_v2", "mapping": mapping, "parallel": 2})
    assert (order.mapping, order.derive_mapping, order.parallel) == (mapping, False, 2)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "into: is required"),
        (
            {"into": "Jobs"},
            'into: must be an index name: lower case, at most 255 bytes, no blanks and none of /\\*?"<>|,#:',
        ),
        ({"into": "a", "mapping": [], "derive_mapping": True}, "mapping: must be a mapping"),
        ({"into": "a", "mapping": {"aliases": {}}}, 'mapping: must be {"mappings": {...}, "settings": {...}}'),
        ({"into": "a", "mapping": {"mappings": 1}}, 'mapping: must be {"mappings": {...}, "settings": {...}}'),
        ({"into": "a", "mapping": {}, "derive_mapping": True}, "derive_mapping: give either mapping or derive_mapping"),
    ],
)
def test_a_wrong_reindex(given: dict[str, object], problem: str) -> None:
    with pytest.raises(SpillwayError) as caught:
        read_order(ReindexOrder, given)
    assert caught.value.what == problem
