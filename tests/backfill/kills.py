"""One run of the kill test: a backfill of many rows into a file, SIGKILL at random moments, the oracle.

While pages are read one writer goes on, so that no two pages stand at the same ``commit_lsn``: rows of one page are
those that say the same. A row that was *read* again in the same backfill, which its ``idempotency_key`` tells, comes
with another page; what the store had at the kill is *sent* again as it was. Of what one life had sent one page for each
parallel reader may be read again, in whichever life that is: the pages after a restart are small, and a further kill
may come before all of the large one that was lost has come again. A backfill that completes before the last kill is
followed by another.
"""

from __future__ import annotations

import base64
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from backfill.rows import RowsLoad, fill
from backfill.stage import Stage, file_sink, shown
from oracle.reads import is_read
from oracle.rules import Delivery, Violation

ROWS = range(20_000)
TABLE = "public.items"
MOMENT_ROWS = 3_000  # between two kills, about
LINE_BYTES = 400


@dataclass(slots=True)
class Verdict:
    seed: int
    kills: int
    parallel: int
    backfills: int = 0
    reads: int = 0
    again: list[int] = field(default_factory=list)  # rows that were read again, by the life that had sent them
    pages_again: list[int] = field(default_factory=list)
    sent_again: int = 0  # rows that were in the store at a kill, or on their way
    largest_page: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.kills} kills of {self.backfills} backfills of {len(ROWS)} rows with "
            f"{self.parallel} readers: {self.reads} reads; read again: {sum(self.again)} rows, "
            f"by life {self.again}, in pages {self.pages_again}; sent again by the store: {self.sent_again}; "
            f"the largest page had {self.largest_page} rows; {shown(self.violations)}"
        )


def run(
    conninfo: str, folder: Path, *, seed: int, kills: int, parallel: int, say: Callable[[str], None] = print
) -> Verdict:
    rng = random.Random(seed)
    verdict = Verdict(seed, kills, parallel)
    sinks = [file_sink("file", [TABLE])]

    def existing(connection: psycopg.Connection) -> None:
        fill(connection, items=ROWS, docs=range(0))
        connection.execute("analyze public.items")

    with Stage(conninfo, folder, sinks, existing=existing) as stage, RowsLoad(conninfo, seed, 1) as load:
        stage.begin()
        order = {"table": TABLE, "parallel": parallel}
        ids = stage.backfill("file", **order)
        for life in range(kills):
            if life > 0:
                stage.product.start()
                stage.product.wait_up()
            if stage.item("file", ids[-1])["state"] == "completed":
                ids += stage.backfill("file", **order)
            _random_moment(stage, load, rng)
            stage.kill("file")
        stage.product.start()
        stage.wait_completed({"file": ids}, seconds=90, meanwhile=lambda: load.keep(2))
        load.finish()
        stage.drained("file")
        verdict.backfills = len(ids)
        _judge(stage, ids, verdict)
        verdict.violations += stage.judge_file("file", [TABLE])
        stage.product.terminate()
    say(str(verdict))
    return verdict


def _random_moment(stage: Stage, load: RowsLoad, rng: random.Random) -> None:
    """Returns when it is time to kill: the moment is what is random here, nothing is synchronised by it."""
    file = stage.folder / "file.ndjson"
    size = file.stat().st_size if file.exists() else 0
    goal = size + LINE_BYTES * int(rng.expovariate(1 / MOMENT_ROWS))
    patience = time.monotonic() + 3
    while (not file.exists() or file.stat().st_size < goal) and time.monotonic() < patience:
        load.keep(2)
        time.sleep(0.001)
    time.sleep(rng.choice((0, 0, rng.uniform(0, 0.03))))


def _judge(stage: Stage, ids: list[str], verdict: Verdict) -> None:
    reads = [_Read.of(delivery) for delivery in stage.lines("file") if is_read(delivery)]
    verdict.reads = len(reads)
    verdict.largest_page = max(Counter(read.page for read in reads).values())
    once = Counter((read.life, read.identity, read.page) for read in reads)
    if len(once) < len(reads):
        text = f"{len(reads) - len(once)} reads came twice without a kill between"
        verdict.violations.append(Violation("went back", text))
    came: dict[str, tuple[tuple[str, int], int]] = {}  # with which page a row came the last time, and in which life
    lost: dict[int, list[tuple[str, int]]] = defaultdict(
        list
    )  # by the life that was killed: pages that were read again
    for read in reads:
        before = came.get(read.identity)
        if before is not None and before[0] == read.page:
            verdict.sent_again += 1
            continue
        if before is not None:
            lost[before[1]].append(before[0])
        came[read.identity] = (read.page, read.life)
    for life in range(verdict.kills + 1):
        pages = set(lost[life])
        verdict.again.append(len(lost[life]))
        verdict.pages_again.append(len(pages))
        if len(pages) > (verdict.parallel if life < verdict.kills else 0):
            text = f"of life {life} {len(lost[life])} rows of {len(pages)} pages were read again"
            verdict.violations.append(Violation("went back", text))
    touched = {key for event in stage.history().of([TABLE]) if event.number not in stage.before for key in event.keys}
    untouched = {str(number) for number in ROWS if (TABLE, str(number)) not in touched}
    for backfill_id in ids:
        left_out = untouched - {read.key for read in reads if read.backfill == backfill_id}
        if left_out:
            text = f"backfill {backfill_id} completed without {len(left_out)} rows, {sorted(left_out)[:5]} among them"
            verdict.violations.append(Violation("lost", text))


@dataclass(frozen=True, slots=True)
class _Read:
    life: int
    identity: str  # the same row in the same backfill
    backfill: str
    key: str
    page: tuple[str, int]

    @classmethod
    def of(cls, delivery: Delivery) -> _Read:
        metadata = delivery.message["metadata"]
        assert isinstance(metadata, dict)
        backfill, _, key = base64.b64decode(metadata["idempotency_key"]).decode().partition(":")
        return cls(delivery.life, metadata["idempotency_key"], backfill, key, (backfill, metadata["commit_lsn"]))
