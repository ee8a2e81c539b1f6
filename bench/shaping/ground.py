"""What the parts stand on: the job board in PostgreSQL, an index, the process in a memory cgroup; and what the server
says of queries (``pg_stat_statements``)."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg

import stage
from oracle import documents
from oracle.cgroup import MemoryCgroup
from oracle.documents import Index
from oracle.product import Product
from servers.opensearch import OpenSearch
from servers.postgres import Postgres
from shape import board
from shape.load import at_rest

SINK = "documents"
INDEX = "jobs"
OVER_LIMIT_MB = 100  # that VmHWM may have beyond limit_mb
CGROUP_OVER_LIMIT_MB = 128
SETTINGS = {
    "max_wal_size": "2GB", "shared_preload_libraries": "pg_stat_statements", "shared_buffers": "512MB",
    "pg_stat_statements.max": "10000",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What the server has executed of the enrichment."""

    queries: int
    rows: int

    def __sub__(self, other: Asked) -> Asked:
        return Asked(self.queries - other.queries, self.rows - other.rows)


class Ground:
    """``with Ground(options, report, ...) as ground``. ``jobs``: those that are there before the process begins."""

    def __init__(
        self, options: Namespace, report: stage.Report, *, children: range, jobs: range, company: str | None = None
    ) -> None:
        self.options, self.report = options, report
        self._children, self._jobs, self._company = children, jobs, company
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        stack = self._stack
        with stack:
            self.postgres = stack.enter_context(Postgres(self.options.postgres, settings=SETTINGS))
            self.search = stack.enter_context(OpenSearch(heap_mb=2048))
            self.conninfo = self.postgres.create_database("app")
            self.index = stack.enter_context(Index(self.search.url, INDEX))
            self._cgroup = stack.enter_context(MemoryCgroup((self.options.limit_mb + CGROUP_OVER_LIMIT_MB) * stage.MIB))
            with psycopg.connect(self.conninfo, autocommit=True) as connection:
                connection.execute("create extension pg_stat_statements")
            board.prepare(self.conninfo, self._children, with_jobs=False)
            with psycopg.connect(self.conninfo, autocommit=True) as connection:
                board.insert_jobs(connection, self._jobs, company=self._company)
                connection.execute("vacuum analyze public.jobs")
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-shape-")))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def product(self, endpoint_url: str, sinks: Sequence[Mapping[str, object]] = (), **more: object) -> Product:
        """``more`` of the sink of documents."""
        destination = {"type": "opensearch", "endpoint_url": endpoint_url, "index_name": INDEX}
        database = {
            "name": "app", "url": self.conninfo, "slot": {"name": "spillway", "create_if_not_exists": True},
            "publication": {"name": "spillway"},
        }  # fmt: skip
        config = {
            "memory": {"limit_mb": self.options.limit_mb},
            "databases": [database],
            "functions": [dict(board.FUNCTION)],
            "sinks": [board.documents_sink(SINK, destination, **more), *sinks],
        }
        return self._stack.enter_context(Product(self.folder, config, cgroup=self._cgroup))

    def asked(self) -> Asked:
        """So far."""
        query = (
            "select coalesce(sum(calls), 0)::bigint, coalesce(sum(rows), 0)::bigint from pg_stat_statements"
            f" where query like '%{board.MARK}%' and query like '%octet_length%' and query not ilike 'explain%'"
        )
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return Asked(*row)

    def wait_read(self, product: Product, seconds: float = 60) -> None:
        """Everything that is committed by now has come, as the slot says."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            (lsn,) = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone() or ("0/0",)
            connection.execute("select txid_current()")  # something to confirm, behind it
            query = "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots where slot_name = 'spillway'"
            product.wait(
                lambda: connection.execute(query, [lsn]).fetchone() == (True,), "the slot to be read", seconds=seconds
            )

    def judge_memory(self, product: Product) -> None:
        bound = self.options.limit_mb + OVER_LIMIT_MB
        for label, peak in product.memory.peaks.items():
            self.report.at_most(f"VmHWM {label}", peak / stage.MIB, bound, "MB")
        self.report.inform(
            f"peak of the cgroup (v{self._cgroup.version}), page cache included",
            self._cgroup.peak_bytes / stage.MIB, "MB",
        )  # fmt: skip
        self.report.equal("kills by the kernel for want of memory", self._cgroup.oom_kills, 0)

    def judge_documents(self) -> None:
        found = documents.differences(self.conninfo, self.index)
        for violation in found[:10]:
            self.report.say(str(violation))
        self.report.equal("documents that differ from a fresh build", len(found), 0, "documents")


__all__ = ["INDEX", "SINK", "Asked", "Ground", "at_rest"]
