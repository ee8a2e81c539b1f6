"""Filters on a column that an update may leave out of the stream."""

from __future__ import annotations

from pathlib import Path

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
