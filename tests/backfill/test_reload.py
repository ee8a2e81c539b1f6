"""SIGHUP: a sink and a table that join a running process get the rows that exist and all that is committed after."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from backfill.site import Site, file_sink, sink, sqlite_sink
from oracle.rules import judge_rows
from oracle.workload import SCHEMA, Load
from shape.place import Shaped, python

JOBS, PAIRS = "public.jobs", "public.pairs"


def reload(site: Site, *sinks: dict[str, object]) -> str:
    """What the process says of it."""
    before = site.product.log.read_text().count("configuration ")
    site.configure(*sinks)
    os.kill(site.product.pid, signal.SIGHUP)
    site.wait(lambda: site.product.log.read_text().count("configuration ") > before, "the file to be read again")
    return site.product.log.read_text()


def test_a_sink_joins_under_load_and_misses_nothing(database: str, tmp_path: Path) -> None:
    old = file_sink("old", [JOBS])
    with Site(database, tmp_path, [old]) as site, ExitStack() as loads:
        site.sql(*SCHEMA.strip().split(";\n"))
        site.begin()
        load = loads.enter_context(Load(database, seed=5, writers=4))
        load.allow(200)
        site.wait(lambda: len(site.lines("old")) > 20, "the load to begin")
        load.allow(3000)
        new = sqlite_sink("new", [JOBS, PAIRS], initial_backfill=True)
        assert '"joined": ["new"]' in reload(site, old, new)
        site.wait(lambda: len(site.product.backfills("new")) == 2, "the initial backfills")
        site.ended("new", [item["id"] for item in site.product.backfills("new")])
        load.finish()
        site.drained("new", "old")
        for table in (JOBS, PAIRS):
            assert not judge_rows(site.source_rows(table), site.sqlite_rows("new", table))
        pid = site.product.pid
        site.again()  # it is a sink like the others
        assert site.product.pid != pid
        assert site.status("new")["backlog_messages"] == 0
        assert len(site.product.backfills("new")) == 2


def test_a_known_sink_takes_another_table_and_what_needs_a_restart_is_named(database: str, tmp_path: Path) -> None:
    with Site(database, tmp_path, [sqlite_sink("mirror", [JOBS], initial_backfill=True)]) as site:
        site.sql(
            *SCHEMA.strip().split(";\n"), "insert into pairs select n, 'x', n, 'there' from generate_series(1, 50) n"
        )
        site.begin()
        more = sqlite_sink("mirror", [JOBS, PAIRS], initial_backfill=True)
        assert '"changed": ["mirror"]' in reload(site, more)
        site.wait(lambda: len(site.product.backfills("mirror")) == 2, "the backfill of the table that has joined")
        site.ended("mirror", [item["id"] for item in site.product.backfills("mirror")])
        site.sql("insert into pairs values (0, 'live', 0, 'after')")
        site.drained("mirror")
        assert not judge_rows(site.source_rows(PAIRS), site.sqlite_rows("mirror", PAIRS))
        said = reload(site, more | {"batch_size": 7}, file_sink("second", [JOBS]))
        assert "sink mirror: batch_size" in said
        (site.folder / "broken").touch()
        pid = site.product.pid
        assert "configuration was not taken" in reload(site, more | {"destination": {"type": "nonsense"}})
        assert site.product.pid == pid
        assert site.status("mirror")["state"] in ("idle", "caught_up")


def test_a_table_waits_with_the_filters_and_functions_that_were_written_for_it(database: str, tmp_path: Path) -> None:
    def ones(table: str) -> dict[str, object]:
        return {"table": table, "column": "a", "operator": "eq", "value": 1}

    T, U = "public.t", "public.u"
    joined = {"name": "joined", "type": "enrichment", "code": "select id, secret from t where id = any($1)"}
    shape = python("shape", "transform", "return {'id': record['id'], 'by': 'the first'}")
    kept, enriched = file_sink("kept", [T], filters=[ones(T)]), file_sink("enriched", [T], enrichment="joined")
    shaped = file_sink("shaped", [T], transform="shape")
    schema = "create table t (id int primary key, a int, secret text); create table u (id int primary key, a int)"
    with Shaped(database, tmp_path, [kept, enriched, shaped], [joined, shape], schema=schema) as place:
        place.begin()
        other = python("shape", "transform", "return {'id': record['id'], 'by': 'the second'}")
        new = python("new", "filter", "return False")
        place._sections["functions"] = [joined, other, new]
        reload(
            place,
            file_sink("kept", [T, U], filters=[ones(T), ones(U)], initial_backfill=True),
            file_sink("enriched", [T, U]),
            file_sink("shaped", [T, U], transform="shape"),
            file_sink("fresh", [U], filter="new"),
        )
        place.wait(lambda: "waits for a restart" in place.product.log.read_text(), "what waits")
        said = place.product.log.read_text()
        assert '"joined": [], "changed": []' in said
        for waits in (
            "sink kept: source, filters, initial_backfill",
            "sink enriched: source, enrichment",
            "sink shaped: source, function shape",
            "sink fresh, which is new, for function new",
        ):
            assert waits in said
        place.sql("insert into u values (1, 2)", "insert into t values (1, 1, 'of t')")
        place.drained("kept", "enriched", "shaped")
        assert [line["metadata"]["table_name"] for line in place.lines("kept")] == ["t"]
        assert [line["metadata"]["enrichment"] for line in place.lines("enriched")] == [{"id": 1, "secret": "of t"}]
        assert place.lines("shaped") == [{"id": 1, "by": "the first"}]
        place.stop()
        place.begin()
        place.sql("insert into u values (2, 2), (3, 1)")
        place.drained("kept", "enriched", "shaped", "fresh")
        assert [line["record"]["id"] for line in place.lines("kept") if line["action"] == "insert"] == [1, 3]
        assert place.lines("shaped")[1:] == [{"id": 2, "by": "the second"}, {"id": 3, "by": "the second"}]
        assert place.lines("fresh") == []


def test_new_sinks_wait_while_the_memory_is_another(database: str, tmp_path: Path) -> None:
    """How large their messages may be follows from it."""
    old, new = file_sink("old", ["public.t"]), file_sink("new", ["public.t"])
    with Shaped(database, tmp_path, [old], schema="create table t (id int primary key)") as place:
        place.begin()
        place._sections["memory"] = {"limit_mb": 256}
        said = reload(place, old, new)
        place.wait(lambda: "which is new, for memory" in place.product.log.read_text(), "what waits")
        assert '"joined": []' in said
        place.again()
        place.sql("insert into t values (1)")
        place.came("new", 1)


def test_a_sink_that_no_memory_is_set_apart_for_waits_and_the_next_ones_join(database: str, tmp_path: Path) -> None:
    """A search index reads rows anew, which nobody did when the process started."""
    old, new = file_sink("old", ["public.t"]), file_sink("new", ["public.t"])
    index = sink("index", ["public.t"], {"type": "opensearch", "endpoint_url": "http://127.0.0.1:1", "index_name": "i"})
    with Shaped(database, tmp_path, [old], schema="create table t (id int primary key)") as place:
        place.begin()
        assert '"joined": ["new"]' in reload(place, old, index, new)
        waits = "sink index, which is new: no sink of the file had functions"
        place.wait(lambda: waits in place.product.log.read_text(), "what waits")
        place.sql("insert into t values (1)")
        place.came("new", 1)
        place.again()
        place.wait(lambda: place.status("index")["backlog_messages"] == 0, "the index to be there")
        place.sql("insert into t values (2)")
        place.wait(lambda: place.status("index")["backlog_messages"] == 1, "what it has no server for")
