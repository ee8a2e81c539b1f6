"""A companion that could not take part: what it missed is everything, and due as soon as it can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from store_support import SLOT, fast_folder

from spillway.clock import SystemClock
from spillway.config import load
from spillway.engine.related import Companion, clear, forget
from spillway.flow.budget import Budget
from spillway.flow.delivery import Delivery
from spillway.flow.inflow import Process, SinkSpec
from spillway.flow.limits import Limits
from spillway.metrics import Metrics
from spillway.position import Position
from spillway.sinks.base import SinkContext
from spillway.sinks.blackhole import BlackholeSink
from spillway.store.base import EVERYTHING, AskedRefreshes, Write
from spillway.store.sqlite import SqliteStore, open_store

JOBS, TAGS = ("public", "jobs"), ("public", "tags")
FILE = f"""
databases:
  - name: app
    url: postgres://localhost/app
    slot: {{name: {SLOT}}}
    publication: {{name: p}}
sinks:
  - name: jobs
    database: app
    source: {{include_tables: [public.jobs, public.tags]}}
    destination: {{type: sqlite, path: jobs.db}}
    backlog: {{on_full: pause}}
    related:
      - {{table: public.companies, sql: 'select id from jobs where c = any($1)', refreshes: public.jobs}}
      - {{table: public.skills, columns: [job], sql: 'select unnest($1) as id', refreshes: public.jobs}}
      - {{table: public.skills, columns: [tag], sql: 'select unnest($1) as id', refreshes: public.tags}}
"""


@asynccontextmanager
async def companion(path: Path, given: str = FILE) -> AsyncIterator[tuple[Companion, SqliteStore]]:
    file = path / "spillway.yml"
    file.write_text(given)
    config = load(file, {})
    store = open_store(path / "state.db", SystemClock())
    process = Process(store, Budget(1 << 26, 2), SystemClock(), Metrics())
    main = Delivery(
        SinkSpec("jobs", 10, 1 << 20, 100, 1 << 20, 10.0),
        BlackholeSink(SinkContext("jobs", b"", path, 1, 0)),
        store.open_sink("jobs", SLOT),
        process,
        lambda: None,
    )
    try:
        yield Companion(config.sinks[0], main, config.databases[0], lambda: "1", 1 << 20, process, lambda: None), store
    finally:
        store.close()


def is_full(*_: object, **__: object) -> str:
    return "the state disk has 0 bytes left"


def due(store: SqliteStore) -> list[tuple[tuple[str, str], str]]:
    return [(table, one.key) for table in (JOBS, TAGS) for one in store.refreshes("jobs", table, 0, 10)]


async def test_what_it_missed_is_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with fast_folder() as folder:
        async with companion(folder) as (one, store):
            with monkeypatch.context() as full:
                full.setattr(Limits, "full", is_full)
                await one.tick(100)
                assert one.delivery.gap is not None and one.delivery.gap.last_lsn is None
                await one.tick(100)
                assert due(store) == []
                assert [found.code for found in one.findings([])] == ["related_gap"]
            while one.delivery.gap is not None:
                await one.tick(200)
            assert due(store) == [(JOBS, EVERYTHING), (TAGS, EVERYTHING)]
            assert one.main.counters.refreshes == 2
            assert one.findings([]) == []


async def test_a_gap_of_before_a_crash_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with fast_folder() as folder:
        async with companion(folder) as (one, store):
            with monkeypatch.context() as full:
                full.setattr(Limits, "full", is_full)
                await one.tick(100)
            await one.delivery.refresh()  # behind the gap
        async with companion(folder) as (one, store):
            await one.tick(0)
            assert due(store) == [], "the source was not reached yet"
            while one.delivery.gap is not None:
                await one.tick(200)
            assert due(store) == [(JOBS, EVERYTHING), (TAGS, EVERYTHING)]


async def test_it_leaves_nothing_behind() -> None:
    with fast_folder() as folder:
        async with companion(folder) as (one, store):
            await one.ask(AskedRefreshes(JOBS, [f"public.jobs:{n}" for n in range(2500)]))
            await one.ask(AskedRefreshes(TAGS, ["public.tags:1"]))
            await clear(store, SLOT, "jobs")
            assert due(store) == []
            assert store.open_sink("jobs", SLOT).counters.refreshes == 0
            assert store.backfills("jobs~related", ended=False) == []


async def test_what_no_entry_refreshes_any_more_is_forgotten() -> None:
    with fast_folder() as folder:
        async with companion(folder) as (one, store):
            await one.ask(AskedRefreshes(JOBS, ["public.jobs:1", EVERYTHING]))
            await one.ask(AskedRefreshes(TAGS, [f"public.tags:{n}" for n in range(1500)]))
            await forget(store, SLOT, one.main, one.sink.related)
            assert one.main.counters.refreshes == 1502
            others = [entry.model_copy(update={"sql": "select 1"}) for entry in one.sink.related]
            await forget(store, SLOT, one.main, others[:2])
            assert due(store) == [(JOBS, "public.jobs:1"), (JOBS, EVERYTHING)]
            assert one.main.counters.refreshes == 2
            assert store.backfills("jobs~related", ended=False) != []
            await forget(store, SLOT, one.main, ())
            assert due(store) == []
            assert one.main.counters.refreshes == 0
            assert store.backfills("jobs~related", ended=False) == []


async def test_which_changes_were_kept_with_other_columns_is_remembered() -> None:
    no_job = "\n".join(line for line in FILE.splitlines() if "columns: [job]" not in line)
    with fast_folder() as folder:
        for lsn, file, below in (
            (100, FILE, -1),
            (200, FILE, -1),
            (300, no_job, 200),  # the values of one column, where they were those of two
            (400, FILE.replace("columns: [job]", "columns: [id]"), 300),
            (500, FILE.replace("public.skills", "public.others"), 300),
            (600, FILE.replace("columns: [job]", "columns: [id]"), 300),
            (700, FILE.replace(", columns: [job]", "").replace(", columns: [tag]", ""), 600),
            (800, FILE, 700),
        ):
            async with companion(folder, file) as (one, store):
                assert one.others_below.get(("public", "skills")) == below, lsn
                assert one.others_below[("public", "companies")] == -1
                store.write(Write("jobs~related", position=Position(lsn, 0, 0)))
