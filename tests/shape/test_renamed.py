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


def test_a_table_that_was_renamed_before_the_start_is_a_gap_again(database: str, tmp_path: Path) -> None:
    schema = "create table t (id int primary key)"
    with Shaped(database, tmp_path, [file_sink("out", ["public.t"])], schema=schema) as place:
        place.begin()
        place.sql("insert into t values (1)")
        place.came("out", 1)
        for last, name in ((2, "u"), (3, "u")):
            place.again()
            place.sql(*([f"alter table t rename to {name}"] if last == 2 else []), f"insert into u values ({last})")
            place.wait(lambda: place.status("out")["state"] == "gap", "the gap")
            assert "is called public.u now" in place.status("out")["reason"]
        place.again()
        place.sql("alter table u rename to t", "insert into t values (4)")
        assert [line["record"]["id"] for line in place.came("out", 2)] == [1, 4]
        assert place.status("out")["gap"]["reason"].startswith("table public.t is called public.u now")


def test_the_root_of_partitions_is_renamed(database: str, tmp_path: Path) -> None:
    schema = """create table t (id int primary key) partition by range (id);
        create table low partition of t for values from (0) to (100);
        create table high partition of t for values from (100) to (200)"""
    with Shaped(database, tmp_path, [file_sink("out", ["public.t"])], schema=schema) as place:
        place.begin()
        place.sql("insert into t values (1), (101)")
        place.came("out", 2)
        place.sql("alter table t detach partition high", "insert into high values (102)")  # rows of another table
        place.sql("insert into t values (2)")
        place.came("out", 3)
        assert place.status("out")["gap"] is None
        place.sql("alter table t rename to jobs")
        place.again()
        place.sql("insert into jobs values (3)")
        place.wait(lambda: place.status("out")["state"] == "gap", "the gap")
        assert "table public.t is called public.jobs now" in place.status("out")["reason"]
        place.sql("alter table jobs rename to t")
        place.again()
        place.sql("insert into t values (4)")
        place.wait(lambda: place.lines("out")[-1]["record"]["id"] == 4, "the table under its name")
        assert place.status("out")["gap"] is not None


def test_a_table_that_is_made_anew_is_no_other(database: str, tmp_path: Path) -> None:
    schema = "create table t (id int primary key)"
    with Shaped(database, tmp_path, [file_sink("out", ["public.t"])], schema=schema) as place:
        place.begin()
        place.sql("insert into t values (1)")
        place.came("out", 1)
        place.sql("drop table t", schema, "insert into t values (2)")
        place.came("out", 2)
        place.again()
        place.sql("insert into t values (3)")
        place.came("out", 3)
        assert place.status("out")["gap"] is None


def test_a_table_whose_name_is_given_to_one_that_is_not_published(database: str, tmp_path: Path) -> None:
    """The stream says nothing of it: the one that is published is not the sink's, the sink's is not published."""
    schema = "create table t (id int primary key); create table next (id int primary key)"
    sinks = [file_sink("out", ["public.t"]), {**file_sink("all", ["public.t"]), "source": {}}]
    with Shaped(database, tmp_path, sinks, schema=schema) as place:
        place.sql("drop publication spillway", "create publication spillway for table t")
        place.begin()
        place.sql("insert into t values (1)")
        place.came("out", 1)
        place.sql("begin; alter table t rename to past; alter table next rename to t; commit")
        place.sql("insert into t values (2)")
        place.again()
        place.wait(lambda: place.status("out")["state"] == "gap", "the gap")
        assert "nothing is published as public.t" in place.status("out")["reason"]
        assert place.status("all")["gap"] is None  # whatever is published: that is not
        place.sql("alter publication spillway add table t", "insert into t values (3)")
        place.came("out", 2)
        place.again()
        place.wait(lambda: place.status("out")["gap"] is not None, "the gap on record")
