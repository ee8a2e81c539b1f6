"""A table that goes by another name while the process runs."""

from __future__ import annotations

from pathlib import Path

from shape.place import Shaped, file_sink


def test_a_renamed_table_is_a_gap_and_on_record_when_it_is_back(database: str, tmp_path: Path) -> None:
    with Shaped(
        database, tmp_path, [file_sink("out", ["public.t"])], schema="create table t (id int primary key)"
    ) as place:
        place.begin()
        place.sql("insert into t values (1)")
        place.came("out", 1)
        place.sql("alter table t rename to u", "insert into u values (2)")
        place.wait(lambda: place.status("out")["state"] == "gap", "the gap")
        assert "public.u" in place.status("out")["reason"]
        place.sql("alter table u rename to t", "insert into t values (3)")
        place.came("out", 2)
        place.wait(lambda: place.status("out")["gap"] is not None, "the gap on record")
        assert "called public.u" in place.status("out")["reason"]
