"""An engine without a database: the interface of spillway.engine.Engine over dictionaries, for the API and the CLI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson

from spillway.config import BackfillOrder, ReindexOrder
from spillway.engine.listing import Page
from spillway.errors import SpillwayError
from spillway.metrics import Metrics
from spillway.store.base import Select, Waiting

SINK = "jobs_sink"
EMPTY = "empty_sink"
FIRST_SEEN = 1_760_000_000.25
STARTED = "2025-10-09T08:00:00+00:00"


def backfill(
    id_: str, *, table: str = "public.jobs", origin: str = "command", state: str = "active", rows: int = 2500
) -> dict[str, object]:
    ended = STARTED if state == "completed" else None
    return {
        "id": id_,
        "sink": SINK,
        "table": table,
        "origin": origin,
        "state": state,
        "waiting": "the sink is 10000 messages behind" if state == "active" else "",
        "rows_initial_count": 10_000,
        "rows_processed_count": rows,
        "rows_ingested_count": rows - 100,
        "superseded": 100,
        "swept": 0,
        "pages": 25,
        "rows_per_second": 500.0,
        "seconds_left": 15.0 if ended is None else None,
        "parallel": 1,
        "where": None,
        "sort_column": None,
        "start_position": None,
        "error": None,
        "inserted_at": STARTED,
        "updated_at": STARTED,
        "completed_at": ended,
        "canceled_at": None,
    }


def under_way(item: dict[str, object]) -> bool:
    return item["state"] in ("active", "paused")


class FakeEngine:
    def __init__(self, keys: int = 3) -> None:
        self.metrics = Metrics()
        self.is_ready = (True, "")
        self.paused: dict[str, bool] = {}
        self.calls: list[tuple[str, str, Select]] = []
        self.pages = 0
        self.piles = {name: {SINK: _pile(name, keys), EMPTY: {}} for name in ("backlog", "dead")}
        self.export_fails = False
        self.orders: list[tuple[str, BackfillOrder | ReindexOrder]] = []
        self.changes: list[tuple[str, str, str]] = []
        self.started: list[dict[str, object]] = [backfill("b1", state="completed", rows=10_000)]
        self.reindexed: list[dict[str, object]] = []
        self.progress: list[dict[str, object]] = []  # what the backfills under way become, one step at each look
        self.reindex_progress: list[dict[str, object]] = []

    async def run(self, stop: asyncio.Event) -> None:
        await stop.wait()

    def status(self) -> dict[str, object]:
        return {
            "memory": {"held_bytes": 1024, "limit_bytes": 512 * 1024 * 1024},
            "databases": [{"name": "app", "slot": "spillway", "slot_lag_bytes": 4096, "confirmed_lsn": "16/B374D848"}],
            "sinks": [self._sink(SINK, "parked"), self._sink(EMPTY, "idle")],
            "backfills": list(filter(under_way, self.started)),
            "version": "0.1.0",
            "impl": "python",
            "started": "2025-10-09T08:00:00+00:00",
        }

    def _sink(self, name: str, state: str) -> dict[str, object]:
        return {
            "name": name,
            "database": "app",
            "type": "opensearch",
            "state": "paused" if self.paused.get(name) else state,
            "reason": "strict_dynamic_mapping_exception" if name == SINK else "",
            "since": "2025-10-09T08:00:00+00:00",
            "remedy": "mend the mapping of the index" if name == SINK else "",
            "backlog_messages": len(self.piles["backlog"][name]),
            "backlog_bytes": 18_000,
            "backlog_oldest_seconds": 61.0 if name == SINK else None,
            "parked_keys": len(self.piles["backlog"][name]),
            "dead_letters": len(self.piles["dead"][name]),
            "messages_in_memory": 5,
            "bytes_in_memory": 5000,
            "delivered": 7,
            "last_error": "",
            "gap": None,
        }

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    async def pause(self, sink: str) -> None:
        self._pile("backlog", sink)
        self.paused[sink] = True

    async def resume(self, sink: str) -> None:
        self._pile("backlog", sink)
        self.paused[sink] = False

    async def waiting(self, sink: str, after: str | None, limit: int, reason: str | None = None) -> Page:
        return self._list("backlog", sink, after, limit, reason)

    async def dead(self, sink: str, after: str | None, limit: int, reason: str | None = None) -> Page:
        return self._list("dead", sink, after, limit, reason)

    async def show(self, sink: str, key: str, limit: int) -> list[bytes]:
        return self._show("backlog", sink, key)[:limit]

    async def show_dead(self, sink: str, key: str, limit: int) -> list[bytes]:
        return self._show("dead", sink, key)[:limit]

    async def retry(self, sink: str, select: Select) -> int:
        return self._act("retry", "backlog", sink, select)

    async def discard(self, sink: str, select: Select) -> int:
        return self._act("discard", "backlog", sink, select)

    async def retry_dead(self, sink: str, select: Select) -> int:
        return self._act("retry_dead", "dead", sink, select)

    async def discard_dead(self, sink: str, select: Select) -> int:
        return self._act("discard_dead", "dead", sink, select)

    async def export_dead(self, sink: str, select: Select) -> AsyncIterator[bytes]:
        self.calls.append(("export_dead", sink, select))
        for key in list(self._pile("dead", sink)):
            if select.all or select.key == key:
                yield self._show("dead", sink, key)[0]
            if self.export_fails:
                raise RuntimeError("the disk went away")

    async def backfills(self, sink: str | None, *, ended: bool) -> list[dict[str, object]]:
        if sink is not None:
            self._pile("backlog", sink)
        if self.progress:
            step = self.progress.pop(0)
            self.started = [item | step if under_way(item) else item for item in self.started]
        items = [item for item in self.started if sink in (None, item["sink"])]
        return items if ended else list(filter(under_way, items))

    async def start_backfill(self, sink: str, order: BackfillOrder) -> list[dict[str, object]]:
        self._pile("backlog", sink)
        self.orders.append((sink, order))
        if any(str(table) == "public.nothing" for table in order.tables):
            raise SpillwayError("unknown_table", "there is no table public.nothing", "see spillway check")
        tables = [str(table) for table in order.tables] or ["public.jobs"]
        new = [
            backfill(f"b{number}", table=table, origin="replay" if order.replay else "command")
            for number, table in enumerate(tables, len(self.started) + 1)
        ]
        self.started += new
        return new

    async def change_backfill(self, sink: str, id_or_table: str, verb: str) -> dict[str, object]:
        self._pile("backlog", sink)
        self.changes.append((sink, id_or_table, verb))
        for item in self.started:
            if id_or_table in (item["id"], item["table"]):
                return item | {"state": {"pause": "paused", "resume": "active", "cancel": "cancelled"}[verb]}
        raise SpillwayError("unknown_backfill", f"there is no backfill {id_or_table}", "see the list")

    async def reindex(self, sink: str, order: ReindexOrder) -> dict[str, object]:
        self._pile("backlog", sink)
        self.orders.append((sink, order))
        started = await self.start_backfill(sink, BackfillOrder())
        self.reindexed.append(
            {
                "sink": sink,
                "alias": "jobs",
                "into": order.into,
                "old": ["jobs_v1"],
                "state": "backfilling",
                "reason": "",
                "backfills": started,
                "documents": None,
                "differing": None,
                "started_at": STARTED,
                "ended_at": None,
            }
        )
        return self.reindexed[-1]

    async def change_reindex(self, sink: str, verb: str) -> dict[str, object]:
        self._pile("backlog", sink)
        self.changes.append((sink, "reindex", verb))
        item = self.reindexed[-1]
        return item | ({"state": "cancelled"} if verb == "cancel" else {"old": [], "deleted": item["old"]})

    async def reindexes(self) -> list[dict[str, object]]:
        if self.reindexed and self.reindex_progress:
            self.reindexed[-1] |= self.reindex_progress.pop(0)
        return self.reindexed

    def _pile(self, pile: str, sink: str) -> dict[str, Waiting]:
        try:
            return self.piles[pile][sink]
        except KeyError:
            raise SpillwayError("unknown_sink", f"there is no sink {sink}", f"choose {SINK} or {EMPTY}") from None

    def _list(self, pile: str, sink: str, after: str | None, limit: int, reason: str | None) -> Page:
        self.pages += 1
        rows = [w for k, w in sorted(self._pile(pile, sink).items()) if after is None or k > after]
        page = [w for w in rows if reason is None or w.reason == reason][:limit]
        return page, page[-1].key if len(page) == limit else None

    def _show(self, pile: str, sink: str, key: str) -> list[bytes]:
        waiting = self._pile(pile, sink).get(key)
        return [orjson.dumps({"record": {"id": key, "n": n}, "action": "insert"}) for n in range(2)] if waiting else []

    def _act(self, name: str, pile: str, sink: str, select: Select) -> int:
        self.calls.append((name, sink, select))
        return sum(
            select.all or select.key == w.key or select.reason == w.reason for w in self._pile(pile, sink).values()
        )


def _pile(name: str, keys: int) -> dict[str, Waiting]:
    return {
        key: Waiting(key, "mapping" if n % 2 == 0 else "http_422", f"{name} [detail]", n, FIRST_SEEN, 100 + n, 2)
        for n, key in enumerate(f"public.jobs:{n:05d}" for n in range(keys))
    }
