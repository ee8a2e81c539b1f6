"""One run of the load test: backfills in a row of both tables into every sink, while eight clients write.

=========  ========================================================================================================
file       NDJSON: its lines in order are what order is judged by
mirror     the sqlite sink: a table kept equal
hook       webhook, up to 20 messages a request, some of whose keys are refused now and then
=========  ========================================================================================================

The sinks begin with an initial backfill. Each one that follows is ordered when the one before has completed in every
sink. At the end the load stops, one more backfill runs if the sinks do not take all actions, and the oracle judges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from backfill.rows import HOT_ITEMS, TABLES, RowsLoad, fill
from backfill.stage import Stage, file_sink, shown, sqlite_sink, webhook_sink
from oracle.endpoint import Recorder
from oracle.reads import is_read
from oracle.rules import Violation
from servers.process import wait_until

SINKS = ("file", "mirror", "hook")
WRITERS = 8
BUSY_TRANSACTIONS = 10  # allowed at each look, some tens of milliseconds apart
ALL_ACTIONS = ("insert", "update", "delete")


@dataclass(slots=True)
class Verdict:
    """What a run showed. ``violations`` by sink; empty: every sink equal, no key went back."""

    seed: int
    backfills: int
    changes: int = 0
    rows: int = 0  # read from the source
    superseded: int = 0  # of these: not sent, since the stream had brought something newer
    pages: int = 0
    seconds: list[float] = field(default_factory=list)  # of each round
    reads: int = 0  # in the file
    violations: dict[str, list[Violation]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not any(self.violations.values())

    def __str__(self) -> str:
        rounds = sorted(self.seconds)
        lines = [
            f"seed {self.seed}: {self.backfills} backfills of every sink in a row, {self.changes} committed changes, "
            f"{self.pages} pages, {self.rows} rows read, {self.superseded} of them superseded, "
            f"{self.reads} reads in the file"
            + (f"; a round took {rounds[len(rounds) // 2]:.2f} s (median)" if rounds else "")
        ]
        lines += [f"  {sink}: {shown(found)}" for sink, found in self.violations.items()]
        return "\n".join(lines)


def run(
    conninfo: str,
    folder: Path,
    *,
    seed: int,
    backfills: int,
    actions: Sequence[str] = ALL_ACTIONS,
    late: bool = False,
    early: bool = False,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Verdict:
    """``late``: a standby named ``standby`` keeps commits from being seen until it has applied them. ``early``: the
    load begins with the sinks, not behind their initial backfills."""
    more: dict[str, object] = {"initial_backfill": True, "actions": list(actions)}
    sinks = [file_sink("file", **more), sqlite_sink("mirror", **more), webhook_sink("hook", **more)]
    verdict = Verdict(seed, backfills)
    with (
        Recorder(seed=seed) as recorder,
        Stage(conninfo, folder, sinks, existing=fill, endpoint_url=recorder.url, environment=environment) as stage,
    ):
        if late:
            commit_late(conninfo)
        refused = [str(id) for id in HOT_ITEMS[:6]]
        recorder.script([{"path": "/hook", "pks": refused, "probability": 0.1, "do": "status", "status": 422}])
        stage.begin()
        if not early:
            stage.wait_completed(_initial(stage, lambda: None))
        with RowsLoad(conninfo, seed, WRITERS, moves="update" in actions) as load:

            def keep_busy() -> None:
                load.keep(BUSY_TRANSACTIONS)

            if early:
                stage.wait_completed(_initial(stage, keep_busy), meanwhile=keep_busy)
            for _ in range(backfills):
                began = time.monotonic()
                started = {sink: stage.backfill(sink) for sink in SINKS}
                for item in stage.wait_completed(started, meanwhile=keep_busy):
                    verdict.rows += item["rows_processed_count"]
                    verdict.superseded += item["superseded"]
                    verdict.pages += item["pages"]
                verdict.seconds.append(time.monotonic() - began)
            load.finish()
        stage.drained(*SINKS)
        if set(actions) != set(ALL_ACTIONS):
            stage.wait_completed({sink: stage.backfill(sink) for sink in SINKS})
            stage.drained(*SINKS)
        _judge(stage, recorder, actions, verdict, late=late)
        code = stage.product.terminate()
        if code != 0:
            verdict.violations["process"] = [Violation("state", f"SIGTERM ended it with {code}")]
    say(str(verdict))
    return verdict


def _judge(stage: Stage, recorder: Recorder, actions: Sequence[str], verdict: Verdict, *, late: bool) -> None:
    verdict.changes = len(stage.history().of(TABLES))
    verdict.reads = sum(map(is_read, stage.lines("file")))
    verdict.violations["file"] = stage.judge_file("file", actions=actions)
    verdict.violations["mirror"] = stage.judge_sqlite("mirror")
    verdict.violations["hook"] = stage.judge(recorder.deliveries("/hook"), actions=actions)
    if late and verdict.superseded == 0:
        verdict.violations["load"] = [
            Violation("state", "no page held a row that the stream had superseded: it tried nothing")
        ]


def _initial(stage: Stage, meanwhile: Callable[[], None]) -> dict[str, list[str]]:
    """Those that began by themselves."""
    found: dict[str, list[str]] = {}

    def all_began() -> bool:
        meanwhile()
        for sink in SINKS:
            found[sink] = [item["id"] for item in stage.product.backfills(sink) if item["origin"] == "initial"]
        return all(len(ids) == len(TABLES) for ids in found.values())

    stage.product.wait(all_began, "the initial backfills", seconds=30)
    return found


def commit_late(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("alter system set synchronous_standby_names = 'standby'")
        connection.execute("alter system set synchronous_commit = 'remote_apply'")
        connection.execute("select pg_reload_conf()")
        query = "select from pg_stat_replication where sync_state = 'sync'"
        wait_until(lambda: connection.execute(query).fetchone() is not None, "the standby", seconds=30)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        began = time.monotonic()
        connection.execute("create table public.late ()")
        assert time.monotonic() - began > 0.15, "commits are not late"
