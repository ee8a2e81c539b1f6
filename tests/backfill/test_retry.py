"""Dead letters of a sink that keeps rows: what comes in their place is the row, as the publication shows it, and never
an older one than the stream has brought."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from backfill.load import commit_late
from backfill.site import Site, sink
from oracle.documents import Index
from oracle.product import memory_bytes
from servers.opensearch import OpenSearch
from servers.postgres import Postgres, Standby

T = "public.t"
MAPPING = {"mappings": {"properties": {"kind": {"type": "integer"}, "doc": {"type": "text", "index": False}}}}
MIB = 1 << 20


@contextmanager
def rejecting(conninfo: str, folder: Path, opensearch: OpenSearch, *schema: str) -> Iterator[tuple[Site, Index]]:
    """A sink that buries rows whose kind is no number."""
    name = f"retry-{uuid4().hex}"
    destination = {"type": "opensearch", "endpoint_url": opensearch.url, "index_name": name}
    kept = sink("kept", [T], destination, on_reject="dead_letter", toast="omit")
    with Site(conninfo, folder, [kept]) as site, Index(opensearch.url, name) as index:
        index.create(MAPPING)
        site.sql(*schema)
        site.begin()
        yield site, index
        index.delete()


def buried(site: Site, count: int) -> None:
    site.wait(lambda: site.status("kept")["dead_letters"] == count, f"{count} dead letters")


def retried(site: Site, count: int) -> list[dict]:
    """What it took."""
    assert site.post("kept/dead-letters/retry", all=True)["count"] == count
    buried(site, 0)
    ended = site.ended("kept", [item["id"] for item in site.product.backfills("kept") if item["origin"] == "retry"])
    site.drained("kept")
    return ended


def test_what_the_publication_does_not_show(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    """Columns stay where they are. A row that it leaves out is deleted, as one that is gone."""
    table = "create table t (id int primary key, kind text, secret text)"
    publication = "create publication spillway for table t (id, kind) where (id < 100)"
    with rejecting(database, tmp_path, opensearch, table, publication) as (site, index):
        site.sql("insert into t select n, '7', 'S' from generate_series(1, 3) n")
        site.drained("kept")
        site.sql("update t set kind = 'w'")
        buried(site, 3)
        site.stop()
        site.sql(
            "alter publication spillway set (publish = 'insert')",
            "update t set kind = '5'",
            "update t set id = 100 where id = 2",
            "delete from t where id = 3",
            "alter publication spillway set (publish = 'insert, update, delete')",
        )
        site.begin()
        (item,) = retried(site, 3)
        assert (item["rows_processed_count"], item["swept"]) == (1, 2)
        assert dict(index.documents()) == {"1": {"id": 1, "kind": "5"}}


def test_a_retry_that_is_cut_short_goes_on(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    """The letters are gone, so their rows must come, whatever else is read of the table."""
    table = "create table t (id int primary key, kind text)"
    publication = "create publication spillway for all tables"
    with rejecting(database, tmp_path, opensearch, table, publication) as (site, index):
        site.sql("insert into t select n, 'w' from generate_series(1, 3) n")
        buried(site, 3)
        site.post("kept/pause")
        site.start("kept")
        site.sql("update t set kind = '5' where id < 3", "delete from t where id = 3")
        assert [site.post("kept/dead-letters/retry", key=f"{T}:{n}")["count"] for n in (1, 2, 3)] == [1, 1, 1]
        site.again()
        buried(site, 0)
        site.post("kept/resume")
        site.ended("kept", [item["id"] for item in site.product.backfills("kept")])
        site.drained("kept")
        assert dict(index.documents()) == {str(n): {"id": n, "kind": "5"} for n in (1, 2)}
        assert site.status("kept")["state"] in ("idle", "caught_up")


def test_a_row_that_cannot_be_seen_yet_does_not_come_from_before(tmp_path: Path, opensearch: OpenSearch) -> None:
    table = "create table t (id int primary key, kind text)"
    with Postgres("18") as primary, Standby(primary, settings={"recovery_min_apply_delay": "3s"}):
        conninfo = primary.create_database("app")
        publication = "create publication spillway for all tables"
        with rejecting(conninfo, tmp_path, opensearch, table, publication) as (site, index):
            site.sql("insert into t values (1, 'w')")
            buried(site, 1)
            commit_late(conninfo)
            late = threading.Thread(target=site.sql, args=("update t set kind = '6'",))
            late.start()
            site.wait(lambda: index.get("1") is not None, "the change")
            assert site.sql("select kind from t") == [("w",)], "it is streamed, and not visible"
            retried(site, 1)
            late.join()
            assert index.get("1") == {"id": 1, "kind": "6"}
            assert site.status("kept")["dead_letters"] == 0


def test_large_rows_come_within_the_limit(database: str, tmp_path: Path, opensearch: OpenSearch) -> None:
    large = 60
    table = "create table t (id int primary key, kind text, doc text); alter table t alter doc set storage external"
    publication = "create publication spillway for all tables"
    with rejecting(database, tmp_path, opensearch, table, publication) as (site, index):
        site.sql(f"insert into t select n, 'w' from generate_series(1, {large}) n")
        buried(site, large)
        site.stop()
        site.sql(
            "alter publication spillway set (publish = 'insert')",
            "update t set kind = '1', doc = repeat('x', 4000000)",
            "alter publication spillway set (publish = 'insert, update, delete')",
        )
        site.begin()
        retried(site, large)
        assert index.count() == large
        assert memory_bytes(site.product.pid) < 228 * MIB
