"""The process with its sinks, what was ordered of it, and what came out: the material of the judgement."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psycopg

from backfill.rows import KEY_COLUMNS, SCHEMA, TABLES
from oracle.history import History, SlotHistory, parse_lsn
from oracle.product import Product, ProductFailed
from oracle.reads import folded, judge_backfilled
from oracle.rules import Delivery, Violation, judge_rows
from oracle.tables import source_rows, sqlite_rows

DRAIN_SECONDS = 90
POLL_SECONDS = 0.02
ENDED = ("completed", "failed", "cancelled")


def file_sink(name: str, tables: Sequence[str] = TABLES, **more: object) -> dict[str, object]:
    return _sink(name, tables, {"type": "file", "path": f"{name}.ndjson"}, more)


def sqlite_sink(name: str, tables: Sequence[str] = TABLES, **more: object) -> dict[str, object]:
    return _sink(name, tables, {"type": "sqlite", "path": f"{name}.db"}, more)


def webhook_sink(name: str, tables: Sequence[str] = TABLES, **more: object) -> dict[str, object]:
    """Wants a `Stage` with an endpoint."""
    destination = {
        "type": "webhook", "http_endpoint": "recorder", "http_endpoint_path": f"/{name}",
        "batch": True, "timeout_seconds": 2,
    }  # fmt: skip
    return _sink(name, tables, destination, {"batch_size": 20, **more})


def _sink(
    name: str, tables: Sequence[str], destination: Mapping[str, object], more: Mapping[str, object]
) -> dict[str, object]:
    source = {"include_tables": list(tables)}
    return {"name": name, "database": "app", "source": source, "destination": destination, **more}


class Stage:
    """``with Stage(...) as stage`` makes the schema and the oracle's slot; `begin` starts the process.

    ``existing``: fills the tables before. What it commits is in the history, and not the stream's to deliver.
    """

    def __init__(
        self,
        conninfo: str,
        folder: Path,
        sinks: Sequence[Mapping[str, object]],
        *,
        schema: str = SCHEMA,
        existing: Callable[[psycopg.Connection], None] | None = None,
        replica_url: str | None = None,
        endpoint_url: str | None = None,
        memory_mb: int = 128,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.conninfo, self.folder = conninfo, folder
        self._schema, self._existing = schema, existing
        database: dict[str, object] = {
            "name": "app",
            "url": conninfo,
            "slot": {"name": "spillway", "create_if_not_exists": True},
            "publication": {"name": "spillway"},
        }
        if replica_url is not None:
            database["replica_url"] = replica_url
        endpoints = [] if endpoint_url is None else [{"name": "recorder", "url": endpoint_url}]
        config = {
            "memory": {"limit_mb": memory_mb}, "databases": [database],
            "http_endpoints": endpoints, "sinks": list(sinks),
        }  # fmt: skip
        self.product = Product(folder, config, environment=environment)
        self._source = SlotHistory(conninfo, "oracle", KEY_COLUMNS)
        self.before: set[int] = set()  # numbers of events that are not the stream's
        self._file_at_kill: dict[str, list[int]] = {}

    def __enter__(self) -> Self:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(self._schema.encode())
            self._source.create()
            if self._existing is not None:
                self._existing(connection)
        return self

    def __exit__(self, *_: object) -> None:
        self.product.close()

    def begin(self) -> None:
        """What is committed from now on is the stream's."""
        self.before = {event.number for event in self.history().events}
        self.product.start()
        self.product.wait_streaming(self.conninfo)

    def kill(self, *files: str) -> None:
        """These sinks' lines are told apart by life: what a crash has torn goes when the file is opened again."""
        self.product.kill()
        for name in files:
            self._file_at_kill.setdefault(name, []).append(_end_of_last_line(self.folder / f"{name}.ndjson"))

    def sql(self, *statements: str) -> list[tuple]:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    # -- backfills ------------------------------------------------------------------------------------------------
    def backfill(self, sink: str, **order: object) -> list[str]:
        return [item["id"] for item in self.product.start_backfill(sink, **order)]

    def item(self, sink: str, backfill_id: str) -> dict:
        return next(item for item in self.product.backfills(sink) if item["id"] == backfill_id)

    def wait_completed(
        self, started: Mapping[str, Sequence[str]], *, seconds: float = 60, meanwhile: Callable[[], None] | None = None
    ) -> list[dict]:
        """All of these, by sink; ``meanwhile`` is called again and again. Returns what became of them."""
        ended: list[dict] = []

        def done() -> bool:
            if meanwhile is not None:
                meanwhile()
            items = [i for sink, ids in started.items() for i in self.product.backfills(sink) if i["id"] in ids]
            ended[:] = [item for item in items if item["state"] in ENDED]
            return len(ended) == sum(map(len, started.values()))

        try:
            self.product.wait(done, "the end of the backfills", seconds=seconds, every=POLL_SECONDS)
        except ProductFailed as error:
            if self.product.is_up():
                raise ProductFailed(f"{self.product.status()['backfills']}\n{error}") from None
            raise
        failed = [item for item in ended if item["state"] != "completed"]
        if failed:
            raise ProductFailed(f"backfills did not complete: {failed}\n{self.product.log_end()}")
        return ended

    def run_backfill(self, sink: str, *, seconds: float = 60, **order: object) -> list[dict]:
        return self.wait_completed({sink: self.backfill(sink, **order)}, seconds=seconds)

    def wait_item(self, sink: str, backfill_id: str, holds: Callable[[dict], bool], what: str) -> dict:
        found: list[dict] = []

        def done() -> bool:
            found[:] = [self.item(sink, backfill_id)]
            return holds(found[0])

        try:
            self.product.wait(done, what, seconds=30, every=POLL_SECONDS)
        except ProductFailed as error:
            raise ProductFailed(f"{found}\n{error}") from None
        return found[0]

    def wait_blocked(self, kind: str, count: int = 1, dsn: str | None = None) -> None:
        """Until so many wait for locks of this kind (``advisory``, ``relation``), as the server tells it."""
        query = (
            "select count(*) >= %s from pg_locks join pg_database d on d.oid = database"
            " where locktype = %s and not granted and datname = current_database()"
        )
        with psycopg.connect(dsn or self.conninfo, autocommit=True) as connection:

            def blocked() -> bool:
                return connection.execute(query, [count, kind]).fetchone() == (True,)

            what = f"{count} waiting for locks of kind {kind}"
            try:
                self.product.wait(blocked, what, seconds=30, every=POLL_SECONDS)
            except ProductFailed as error:
                raise ProductFailed(f"{self.product.status()['backfills']}\n{error}") from None

    # -- what comes out -------------------------------------------------------------------------------------------
    def drained(self, *sinks: str) -> None:
        """Everything committed by now is delivered: by the slot, and by what the sinks say."""
        lsn = parse_lsn(self.sql("select pg_current_wal_insert_lsn()::text")[0][0])

        def confirmed() -> bool:
            query = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = 'spillway'"
            return parse_lsn(self.sql(query)[0][0]) >= lsn

        def nothing_waits() -> bool:
            states = {sink["name"]: sink for sink in self.product.status()["sinks"]}
            return all(
                states[name]["backlog_messages"] == 0 and states[name]["state"] in ("idle", "caught_up")
                for name in sinks
            )

        # Something to confirm at once, behind it; not a commit that a synchronous standby could hold.
        self.sql("set synchronous_commit = off; select txid_current()")
        self.product.wait(confirmed, "confirmation of all that was committed", seconds=DRAIN_SECONDS)
        self.product.wait(nothing_waits, "an empty backlog of every sink", seconds=DRAIN_SECONDS)

    def history(self) -> History:
        return self._source.read()

    def lines(self, sink: str) -> Iterator[Delivery]:
        """The whole lines of a file sink."""
        path, kills = self.folder / f"{sink}.ndjson", self._file_at_kill.get(sink, [])
        offset = 0
        if not path.exists():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    return
                life = bisect.bisect_right(kills, offset)
                offset += len(line)
                yield Delivery(number, life, json.loads(line))

    def came(self, sink: str, action: str, **record: object) -> bool:
        """Whether the file has a line with this action and these values."""
        for delivery in self.lines(sink):
            row = delivery.message["record"]
            assert isinstance(row, dict)
            if delivery.message["action"] == action and all(row.get(c) == v for c, v in record.items()):
                return True
        return False

    # -- judgement ------------------------------------------------------------------------------------------------
    def judge_file(
        self, sink: str, tables: Sequence[str] = TABLES, actions: Sequence[str] = ("insert", "update", "delete")
    ) -> list[Violation]:
        return self.judge(self.lines(sink), tables, actions)

    def judge(
        self,
        deliveries: Iterable[Delivery],
        tables: Sequence[str] = TABLES,
        actions: Sequence[str] = ("insert", "update", "delete"),
    ) -> list[Violation]:
        """Order and content of every message, and whether they come to the source's rows."""
        history = self.history()
        lines = list(deliveries)
        not_taken = {event.number for event in history.events if event.action not in actions}
        found = judge_backfilled(history, tables, lines, self.before | not_taken)
        rows = folded(history, lines)
        for table in tables:
            ours = {key: row for key, row in rows.items() if key[0] == table}
            found += judge_rows(source_rows(self.conninfo, table), ours)
        return found

    def judge_sqlite(self, sink: str, tables: Sequence[str] = TABLES) -> list[Violation]:
        found = []
        for table in tables:
            rows = sqlite_rows(self.folder / f"{sink}.db", self.conninfo, table)
            found += judge_rows(source_rows(self.conninfo, table), rows)
        return found


def shown(found: Sequence[Violation]) -> str:
    return "\n".join([f"{len(found)} violations", *map(str, found[:20])])


def _end_of_last_line(path: Path) -> int:
    if not path.exists():
        return 0
    data = path.read_bytes()
    return data.rfind(b"\n") + 1
