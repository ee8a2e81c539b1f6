"""One run of the kill test: a load, sinks that fail at random, SIGKILL again and again, and then the oracle.

Each **life** of the process begins with a start and, but for the last, ends with SIGKILL at a random moment: one in six
anywhere in the first second and a half (the start included), else shortly after some number of deliveries to one of
the sinks, drawn for each life, so that the kill falls into work. Before each life the recorder gets another mood: well,
picky (rejects hot keys), moody (500, cut connections, stalls, slowness), or down. The sinks:

=========  ========================================================================================================
single     webhook, a message a request
batch      webhook, up to 20 messages a request
file       NDJSON
mirror     the sqlite sink: a table kept equal
search     a real OpenSearch, where one is given
=========  ========================================================================================================

After the last kill the recorder is well, the load ends, and the process must come to rest by itself: nothing waiting
by ``/api/status`` and everything confirmed by ``pg_replication_slots``. What the two say is only when to stop waiting;
the judgement is the oracle's. Everything random comes from the seed, the moments of the operating system excepted.
"""

from __future__ import annotations

import bisect
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg

from oracle.endpoint import Recorder
from oracle.history import SlotHistory, parse_lsn
from oracle.product import Product
from oracle.rules import Delivery, Key, Row, Violation, as_text, judge_events, judge_rows
from oracle.tables import source_rows, sqlite_rows
from oracle.workload import KEY_COLUMNS, SCHEMA, Load

TABLES = tuple(KEY_COLUMNS)
QUIET_SECONDS = 120
TRANSACTIONS_A_LIFE = 150
SINKS = ("single", "batch", "file", "mirror")


@dataclass(slots=True)
class Verdict:
    """What a run showed. ``violations`` by sink; empty: nothing lost, nothing out of order, states equal."""

    seed: int
    kills: int
    committed: int = 0
    received: dict[str, int] = field(default_factory=dict)
    violations: dict[str, list[Violation]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not any(self.violations.values())

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.kills} kills, {self.committed} committed changes"]
        for sink, found in self.violations.items():
            lines.append(f"  {sink}: {self.received.get(sink, 0)} received, {len(found)} violations")
            lines.extend(f"    {violation}" for violation in found[:10])
        return "\n".join(lines)


class Scenario:
    def __init__(
        self,
        conninfo: str,
        folder: Path,
        *,
        seed: int,
        kills: int,
        sinks: Sequence[str] = SINKS,
        search_url: str | None = None,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._conninfo, self._folder = conninfo, folder
        self._seed, self._kills, self._sinks, self._search_url = seed, kills, tuple(sinks), search_url
        self._environment, self._say = environment, say
        self._rng = random.Random(seed)
        self._file = folder / "out.ndjson"
        self._file_at_kill: list[int] = []

    def run(self) -> Verdict:
        self._say(f"seed {self._seed}, {self._kills} kills, sinks {', '.join(self._sinks)}")
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(SCHEMA)
        history = SlotHistory(self._conninfo, "oracle", KEY_COLUMNS)
        history.create()
        with (
            Recorder(seed=self._seed) as recorder,
            Product(self._folder, self._config(recorder), environment=self._environment) as product,
            Load(self._conninfo, self._seed) as load,
        ):
            # The slot is made by the product: what was committed before is not its to deliver.
            product.start()
            product.wait_streaming(self._conninfo)
            for life in range(self._kills):
                load.allow(TRANSACTIONS_A_LIFE)
                if life > 0:
                    product.start()
                self._random_moment(product, recorder)
                product.kill()
                recorder.wait_no_connections()
                self._file_at_kill.append(_end_of_last_line(self._file))
                recorder.script(self._mood())
                recorder.mark(life=life + 1)
                if life % 10 == 9:
                    self._say(f"{life + 1} kills, {sum(recorder.applied_messages().values())} messages at the webhooks")
            load.allow(TRANSACTIONS_A_LIFE)
            recorder.script([])
            product.start()
            load.finish()
            self._wait_quiet(product)
            code = product.terminate()
            verdict = self._judge(history, recorder)
            if code != 0:
                stopped = Violation("state", f"SIGTERM ended it with {code}")
                verdict.violations.setdefault("process", []).append(stopped)
        self._say(str(verdict))
        return verdict

    # -- the stage ------------------------------------------------------------------------------------------------
    def _config(self, recorder: Recorder) -> dict[str, object]:
        hook = {"type": "webhook", "http_endpoint": "recorder", "timeout_seconds": 1}
        sinks: dict[str, dict[str, object]] = {
            "single": {"destination": {**hook, "http_endpoint_path": "/single", "batch": False}},
            "batch": {"batch_size": 20, "destination": {**hook, "http_endpoint_path": "/batch", "batch": True}},
            "file": {"destination": {"type": "file", "path": self._file.name}},
            "mirror": {"destination": {"type": "sqlite", "path": "mirror.db"}},
            "search": {
                "source": {"include_tables": ["public.jobs"]},
                "destination": {"type": "opensearch", "endpoint_url": self._search_url or "", "index_name": "jobs"},
            },
        }
        return {
            "memory": {"limit_mb": 128},
            "databases": [
                {
                    "name": "app",
                    "url": self._conninfo,
                    "slot": {"name": "spillway", "create_if_not_exists": True},
                    "publication": {"name": "spillway"},
                }
            ],
            "http_endpoints": [{"name": "recorder", "url": recorder.url}],
            "sinks": [
                {"name": name, "database": "app", "source": {"include_tables": list(TABLES)}, **sinks[name]}
                for name in self._sinks
            ],
        }

    def _mood(self) -> list[dict[str, object]]:
        """What the recorder will be like in the next life, drawn for each path."""
        rules: list[dict[str, object]] = []
        for path in ("/single", "/batch"):
            hot = [str(n) for n in range(1, 7)] + ["1-x", "2-x-1"]
            picky = {"pks": self._rng.sample(hot, 3), "probability": 0.7, "do": "status", "status": 422}
            moody = [
                {"probability": 0.01, "do": "status", "status": 500},
                {"probability": 0.01, "do": "cut"},
                {"probability": 0.02, "do": "apply_cut"},
                {"probability": 0.005, "do": "stall"},
                {"probability": 0.02, "do": "slow", "seconds": 0.05},
                {"probability": 0.01, "do": "status", "status": self._rng.choice((400, 404, 408, 413, 429))},
            ]
            down = {"do": "status", "status": 503}
            mood = self._rng.choices(([], [picky], moody, [picky, *moody], [down]), (2, 3, 3, 4, 1))[0]
            rules.extend({"path": path, **rule} for rule in mood)
        return rules

    def _random_moment(self, product: Product, recorder: Recorder) -> None:
        """Returns when it is time to kill: the moment is what is random here, nothing is synchronised by it."""
        if self._rng.random() < 1 / 6:
            time.sleep(self._rng.uniform(0, 1.5))
            return
        watched = self._rng.choice([sink for sink in self._sinks if sink in ("single", "batch", "file")] or ["slot"])
        goal = self._progress(recorder, watched) + int(self._rng.expovariate(1 / 150)) + 1
        patience = time.monotonic() + 4
        while self._progress(recorder, watched) < goal and time.monotonic() < patience:
            product.check_alive()
            time.sleep(0.005)
        time.sleep(self._rng.uniform(0, 0.03))

    def _progress(self, recorder: Recorder, watched: str) -> int:
        """Roughly how many messages a sink has been given so far."""
        if watched == "file":
            return (self._file.stat().st_size if self._file.exists() else 0) // 500
        if watched == "slot":  # of the sinks that are not watched: how far it is confirmed
            return self._confirmed() // 500
        return recorder.applied_messages().get(f"/{watched}", 0)

    # -- rest -----------------------------------------------------------------------------------------------------
    def _wait_quiet(self, product: Product) -> None:
        with psycopg.connect(self._conninfo) as connection:
            row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        target = parse_lsn(row[0])
        product.wait(
            lambda: self._confirmed() >= target, "confirmation of all that was committed", seconds=QUIET_SECONDS
        )
        work_off_seconds = QUIET_SECONDS + 3 * self._kills  # each kill leaves some behind
        product.wait(lambda: self._nothing_waits(product), "an empty backlog of every sink", seconds=work_off_seconds)

    def _confirmed(self) -> int:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            query = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = 'spillway'"
            row = connection.execute(query).fetchone()
            # A standby snapshot a few times a minute would do; this makes something to confirm at once.
            connection.execute("select txid_current()")
        return parse_lsn(row[0]) if row is not None and row[0] is not None else 0

    def _nothing_waits(self, product: Product) -> bool:
        states = {sink["name"]: sink for sink in product.status()["sinks"]}
        return all(
            states[name]["backlog_messages"] == 0 and states[name]["state"] in ("idle", "caught_up")
            for name in self._sinks
        )

    # -- judgement ------------------------------------------------------------------------------------------------
    def _judge(self, source: SlotHistory, recorder: Recorder) -> Verdict:
        history = source.read()
        verdict = Verdict(self._seed, self._kills, len(history.of(TABLES)))
        deliveries: dict[str, Callable[[], list[Delivery]]] = {
            "single": lambda: list(recorder.deliveries("/single")),
            "batch": lambda: list(recorder.deliveries("/batch")),
            "file": lambda: list(self._lines()),
        }
        for sink in self._sinks:
            if sink in deliveries:
                received = deliveries[sink]()
                verdict.received[sink] = len(received)
                verdict.violations[sink] = judge_events(history, TABLES, received)
        if "mirror" in self._sinks:
            found = []
            for table in TABLES:
                rows = sqlite_rows(self._folder / "mirror.db", self._conninfo, table)
                found += judge_rows(source_rows(self._conninfo, table), rows)
            verdict.violations["mirror"] = found
        if "search" in self._sinks:
            assert self._search_url is not None
            expected = source_rows(self._conninfo, "public.jobs")
            verdict.violations["search"] = judge_rows(expected, index_rows(self._search_url, "jobs", "public.jobs"))
        return verdict

    def _lines(self) -> Iterator[Delivery]:
        """The file's lines as deliveries; a line's life follows from where the file ended at each kill."""
        offset = 0
        with self._file.open("rb") as file:
            for number, line in enumerate(file):
                life = bisect.bisect_right(self._file_at_kill, offset)
                offset += len(line)
                try:
                    message = json.loads(line)
                except ValueError:
                    message = {"no JSON": line[:100].decode(errors="replace")}
                yield Delivery(number, life, message)


def index_rows(url: str, index: str, table: str) -> dict[Key, Row]:
    """All documents of an index, by ``_id``: the key is where the document is, not what it says."""
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        client.post(f"/{index}/_refresh").raise_for_status()
        answer = client.post(f"/{index}/_search", json={"size": 10_000}).raise_for_status().json()
    return {
        (table, hit["_id"]): {column: as_text(value) for column, value in hit["_source"].items()}
        for hit in answer["hits"]["hits"]
    }


def _end_of_last_line(path: Path) -> int:
    """Where the last whole line ends: the life that comes cuts off what follows."""
    if not path.exists():
        return 0
    data = path.read_bytes()[-(1 << 20) :]
    return path.stat().st_size - (len(data) - data.rfind(b"\n") - 1)
