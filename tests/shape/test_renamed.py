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


def test_a_table_that_takes_the_place_of_another_is_no_gap(database: str, tmp_path: Path) -> None:
    """As migrations do it, whichever of the two is told of first."""
    schema = "create table t (id int primary key); create table next (id int primary key)"
    with Shaped(
        database,
        tmp_path,
        [file_sink("out", ["public.t"]), file_sink("all", ["public.t", "public.next", "public.past"])],
        schema=schema,
    ) as place:
        place.begin()
        place.sql("insert into t values (1)", "insert into next values (1)")
        place.came("all", 2)
        place.sql("begin; alter table t rename to past; alter table next rename to t; commit")
        place.sql("insert into t values (2)", "insert into past values (2)")
        place.came("out", 2)
        place.came("all", 4)
        place.read_by_the_stream()
        assert place.status("out")["state"] in ("idle", "caught_up")
        assert place.status("out")["gap"] is None
