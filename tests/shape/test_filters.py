"""Filters on a column that an update may leave out of the stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from shape.place import Shaped, sqlite_sink

T = "public.t"
SCHEMA = """
create table t (id int primary key, n int, data jsonb);
alter table t alter data set storage external;
"""
FILTERS = [{"column": "data", "path": "kind", "operator": "eq", "value": "a"}]
ROWS = """
insert into t select n, 0, jsonb_build_object('kind', case when n <= 5 then 'a' else 'b' end, 'long',
  repeat(md5(n::text), 300)) from generate_series(1, 10) n
"""


def test_a_row_is_asked_again_when_it_is_read_whole(database: str, tmp_path: Path) -> None:
    sinks = [sqlite_sink("kept", [T], filters=FILTERS, toast="reselect")]
    with Shaped(database, tmp_path, sinks, schema=SCHEMA) as place:
        place.begin()
        place.sql(ROWS)
        place.drained("kept")
        place.sql("update t set n = 1")
        place.drained("kept")
        assert {key[1] for key in place.sqlite_rows("kept", T)} == {"1", "2", "3", "4", "5"}
        place.sql("""update t set data = jsonb_set(data, '{kind}', '"b"') where id = 2""")
        place.sql("update t set n = 2, id = id + 100 where id > 1")
        place.drained("kept")
        assert {key[1] for key in place.sqlite_rows("kept", T)} == {"1", "103", "104", "105"}
        assert place.status("kept")["parked_keys"] == 0


@pytest.mark.parametrize("killed", [False, True])
def test_what_passes_by_while_a_filter_does_not_fit_is_on_record(database: str, tmp_path: Path, killed: bool) -> None:
    """The remedy is another file and a restart, which must not forget it."""

    def kept(column: str) -> dict[str, object]:
        return sqlite_sink("kept", [T], filters=[{"column": column, "operator": "eq", "value": 1}])

    with Shaped(database, tmp_path, [kept("n")], schema="create table t (id int primary key, n int)") as place:
        place.begin()
        place.sql("insert into t values (1, 1), (2, 1)")
        place.drained("kept")
        place.sql("alter table t rename n to m", "update t set m = 2 where id = 1", "insert into t values (3, 1)")
        place.wait(lambda: place.status("kept")["state"] == "gap", "the gap")
        place.read_by_the_stream()
        place.product.kill() if killed else place.stop()
        place.configure(kept("m"))
        place.begin()
        place.sql("insert into t values (4, 1)")
        place.drained("kept")
        assert place.status("kept")["state"] == "gap"
        place.run("kept", gap=True)
        assert place.status("kept")["gap"] is None
        assert {key[1] for key in place.sqlite_rows("kept", T)} == {"2", "3", "4"}


def test_a_row_that_enters_by_an_update_without_its_large_column(database: str, tmp_path: Path) -> None:
    schema = "create table t (id int primary key, tenant int, doc text); alter table t alter doc set storage external"
    sinks = [sqlite_sink("kept", [T], filters=[{"column": "tenant", "operator": "eq", "value": 1}])]
    with Shaped(database, tmp_path, sinks, schema=schema) as place:
        place.begin()
        place.sql("insert into t values (1, 2, repeat('x', 5000)), (2, 1, repeat('y', 5000))")
        place.sql("update t set tenant = 1")
        place.drained("kept")
        assert place.sqlite_rows("kept", T) == place.source_rows(T)
