"""The schedules that break naive backfills, each step by step on PostgreSQL 12, 15 and 18.

A page is stopped in the middle, behind its snapshot, by ``where => public.gate(id)``: the function waits for an
advisory lock that the test holds (`gate`), lock 1 in the first page and lock 2 in a late one. Everything else is a
matter of who has committed what.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from backfill.conftest import Pair
from backfill.rows import SCHEMA, fill
from backfill.stage import Stage, file_sink, shown, sqlite_sink

ITEMS = ("public.items",)
LATE = (500, 501, 502)  # keys of the rows -600 ... 599 that no first page reaches
GATE_SCHEMA = f"""
create table public.trifles (id int);
create function public.gate(id bigint) returns boolean language plpgsql volatile set lock_timeout = 0
as 'begin
    if id = -600 then perform pg_advisory_xact_lock_shared(1); end if;
    if id = {LATE[0]} then perform pg_advisory_xact_lock_shared(2); end if;
    return true;
end';
"""
GATED = "public.gate(id)"
PATIENT = {"backfill": {"timeout_ms": 60_000}}  # a page that is stopped shall not be given up
SOON_SECONDS = 10
TRIFLE = "insert into trifles values (1)"  # a commit that waits for a synchronous standby


def existing(connection: psycopg.Connection) -> None:
    fill(connection, docs=range(0))


def stage_of(conninfo: str, folder: Path, *, schema: str = SCHEMA, replica_url: str | None = None) -> Stage:
    sinks = [file_sink("file", ITEMS, **PATIENT), sqlite_sink("mirror", ITEMS, **PATIENT)]
    return Stage(
        conninfo,
        folder,
        sinks,
        schema=schema + GATE_SCHEMA,
        existing=existing,
        replica_url=replica_url,
        memory_mb=512,  # pages of two sinks at once
    )


@contextmanager
def gate(dsn: str, *locks: int) -> Iterator[psycopg.Connection]:
    """While this is open every page that comes to it waits there."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for lock in locks:
            connection.execute("select pg_advisory_lock(%s)", [lock])
        yield connection


@contextmanager
def transaction(dsn: str, *statements: str) -> Iterator[psycopg.Connection]:
    """A transaction that has done this and commits at the end."""
    with psycopg.connect(dsn) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        yield connection


def judged(stage: Stage) -> None:
    stage.drained("file", "mirror")
    found = stage.judge_file("file", ITEMS) + stage.judge_sqlite("mirror", ITEMS)
    assert found == [], shown(found)


def reads(stage: Stage) -> list[str]:
    """The keys of the reads in the file, in order."""
    found = [delivery.message for delivery in stage.lines("file") if delivery.message["action"] == "read"]
    return [str(message["record"]["id"]) for message in found]  # type: ignore[index]


def test_a_rewriting_alter_in_front_of_a_page(conninfo: str, tmp_path: Path) -> None:
    """A page that took its snapshot and then waited for the table's lock would find a new file that seems empty."""
    with stage_of(conninfo, tmp_path) as stage, psycopg.connect(conninfo) as altering:
        stage.begin()
        with gate(conninfo, 1) as held:
            started = {"file": stage.backfill("file", table="public.items", where=GATED)}
            stage.wait_blocked("advisory")
            alter = in_background(altering, "alter table items alter id type bigint")
            stage.wait_blocked("relation")
            held.execute("select pg_advisory_unlock(1)")
        alter.join()
        stage.wait_item("file", started["file"][0], lambda item: "locked" in item["waiting"], "wait for the lock")
        assert 0 < len(reads(stage)) < 1000
        altering.commit()
        stage.wait_completed(started)
        assert list(map(int, reads(stage))) == list(range(-600, 600))
        stage.run_backfill("mirror", table="public.items")
        judged(stage)


def test_a_rewriting_alter_between_two_pages(conninfo: str, tmp_path: Path) -> None:
    """It waits for one page, and the next has the new shape."""
    with stage_of(conninfo, tmp_path) as stage, psycopg.connect(conninfo, autocommit=True) as altering:
        stage.begin()
        with gate(conninfo, 1) as held:
            started = {"file": stage.backfill("file", table="public.items", where=GATED)}
            stage.wait_blocked("advisory")
            alter = in_background(altering, "alter table items alter id type bigint, add w int default 7")
            stage.wait_blocked("relation")
            held.execute("select pg_advisory_unlock(1)")
        alter.join()
        stage.wait_completed(started)
        found = [delivery.message["record"] for delivery in stage.lines("file")]
        assert [int(row["id"]) for row in found] == list(range(-600, 600))  # type: ignore[index]
        widths = [len(row) for row in found]  # type: ignore[arg-type]
        assert widths == sorted(widths)
        assert (widths[0], widths[-1]) == (3, 4)
        assert all(row["w"] == 7 for row in found if len(row) == 4)  # type: ignore[arg-type, index]


def test_a_table_enters_the_publication_while_a_transaction_has_changed_it(conninfo: str, tmp_path: Path) -> None:
    """The changes that were made before are not published, whenever they commit: only a page read later has them."""
    schema = SCHEMA.replace("for table public.items, public.docs", "for table public.docs")
    with stage_of(conninfo, tmp_path, schema=schema) as stage:
        stage.begin()
        changes = (
            "insert into items values (7000, 1, 'new')",
            "update items set seq = 2 where id = 5",
            "delete from items where id = 6",
        )
        with transaction(conninfo, *changes):
            stage.sql("alter publication spillway add table items")
            started = {sink: stage.backfill(sink, table="public.items") for sink in ("file", "mirror")}
            stage.wait_item(
                "file", started["file"][0], lambda item: "running" in item["waiting"], "wait for the transaction"
            )
            assert reads(stage) == []
        stage.wait_completed(started)
        stage.drained("file", "mirror")
        found = stage.judge_sqlite("mirror", ITEMS)
        assert found == [], shown(found)
        assert sorted(map(int, reads(stage))) == sorted([*range(-600, 6), *range(7, 600), 7000])
        stage.sql("update items set seq = 3 where id = 5")
        stage.drained("file", "mirror")
        assert stage.came("file", "update", id=5, seq=3)
        assert stage.judge_sqlite("mirror", ITEMS) == []


def test_a_page_on_a_standby_with_a_transaction_running(
    conninfo: str, replica: str, pair: Pair, tmp_path: Path
) -> None:
    """A standby's snapshot names no running transactions. This one commits when the page has been read, and is carried
    before the page has its place."""
    with stage_of(conninfo, tmp_path, replica_url=replica) as stage, psycopg.connect(conninfo) as running:
        stage.begin()
        with gate(replica, 1, 2) as held:
            started = {sink: stage.backfill(sink, table="public.items", where=GATED) for sink in ("file", "mirror")}
            stage.wait_blocked("advisory", 2, replica)
            running.execute(f"update items set seq = 1 where id in ({LATE[0]}, -590)")
            running.execute(f"delete from items where id = {LATE[1]}")
            stage.sql(f"update items set seq = 2 where id = {LATE[2]}")  # by a later transaction: seen
            pair.standby.wait_replayed()
            held.execute("select pg_advisory_unlock(1)")
            for sink, (backfill_id,) in started.items():
                stage.wait_item(sink, backfill_id, lambda item: item["pages"] >= 1, "the first page")
            stage.wait_blocked("advisory", 2, replica)
            running.commit()
            stage.product.wait(lambda: stage.came("file", "update", seq=1), "the running one's change", seconds=30)
        stage.wait_completed(started)
        judged(stage)
        assert stage.item("file", started["file"][0])["superseded"] == 2
        assert not set(map(str, LATE[:2])) & set(reads(stage))


def test_an_idle_database_behind_a_new_wal_file(conninfo: str, tmp_path: Path) -> None:
    """The insert position stands behind the header of a file in which there is nothing yet, and nobody writes."""
    with stage_of(conninfo, tmp_path) as stage:
        stage.begin()
        stage.drained("file")
        stage.sql("set synchronous_commit = off; select txid_current()", "select pg_switch_wal()")
        began = time.monotonic()
        stage.run_backfill("mirror", table="public.items", seconds=SOON_SECONDS)
        stage.run_backfill("file", table="public.items", seconds=SOON_SECONDS)
        assert time.monotonic() - began < SOON_SECONDS
        judged(stage)


def test_a_transaction_carried_before_the_backfill_and_not_yet_visible(
    conninfo: str, pair: Pair, tmp_path: Path
) -> None:
    """A commit waits for a synchronous standby that is not there: streamed, and seen by nobody."""
    with stage_of(conninfo, tmp_path) as stage:
        stage.begin()
        with held_commit(pair, stage, "update items set seq = 1 where id = -599"):
            started = {sink: stage.backfill(sink, table="public.items") for sink in ("file", "mirror")}
            stage.wait_item("file", started["file"][0], lambda item: item["waiting"] != "", "a reason to wait")
        stage.wait_completed(started)
        judged(stage)


def test_a_transaction_carried_between_two_pages_and_not_yet_visible(conninfo: str, pair: Pair, tmp_path: Path) -> None:
    """As before, but it comes while a page is read: the next takes its snapshot when the change was carried before."""
    with stage_of(conninfo, tmp_path) as stage:
        stage.begin()
        with gate(conninfo, 1) as held:
            started = {sink: stage.backfill(sink, table="public.items", where=GATED) for sink in ("file", "mirror")}
            stage.wait_blocked("advisory", 2)
            changes = f"update items set seq = 1 where id in ({LATE[0]}, -590); delete from items where id = {LATE[1]}"
            with held_commit(pair, stage, changes):
                held.execute("select pg_advisory_unlock(1)")
                stage.wait_completed(started)
        judged(stage)
        assert not set(map(str, LATE[:2])) & set(reads(stage))


@contextmanager
def held_commit(pair: Pair, stage: Stage, changes: str) -> Iterator[None]:
    """These are committed, written and streamed, and visible only at the end."""
    pair.set("synchronous_standby_names", "nobody")
    connections = [psycopg.connect(stage.conninfo, autocommit=True) for _ in range(2)]
    try:
        threads = [in_background(connections[0], TRIFLE)]
        while stage.sql("select 1 from pg_stat_activity where wait_event = 'SyncRep'") == []:
            if not threads[0].is_alive():  # the setting was not in force yet
                threads[0] = in_background(connections[0], TRIFLE)
        threads.append(in_background(connections[1], changes))
        stage.product.wait(lambda: stage.came("file", "update", seq=1), "the change that nobody sees", seconds=30)
        assert stage.sql("select 1 from items where seq = 1") == []
        yield
        assert stage.sql("select 1 from items where seq = 1") == []
    finally:
        pair.set("synchronous_standby_names", "")
    for thread, connection in zip(threads, connections, strict=True):
        thread.join()
        connection.close()


def in_background(connection: psycopg.Connection, statements: str) -> threading.Thread:
    thread = threading.Thread(target=lambda: connection.execute(statements.encode()), daemon=True)
    thread.start()
    return thread
