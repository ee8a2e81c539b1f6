"""Backfills: how fast beside COPY, what they do to live changes, and where a broken sink stops them.

    python bench/backfill.py                                         10,000,000 rows, three rounds
    python bench/backfill.py rate --rows 300000 --rounds 1 --out /tmp/look

**Rate.** One table is backfilled into the null sink under a limit of `LIMIT_MB`, by one, two and four readers. Time is
from the POST until ``delivered`` of the status is the number of rows, seen to 10 ms; the backfill must then say that it
is complete, with as many rows. Beside it, in the same round, ``COPY (SELECT row_to_json(t) FROM t t) TO STDOUT`` over
the same TCP: by psql to /dev/null, timed from its start to its end, and by psycopg in a process of its own, timed from
the statement to its end. The faster of the two counts. The product has to place, deliver and settle what COPY throws
away, and reads by the primary key. Everybody takes turns; the table is vacuumed first and is in memory. Tables: 200 B
a row, 18 kB a row (a hundredth of the rows, out of line as they would be if they did not compress), and 200 B under a
key of two texts that lies across the order of the heap (a tenth of the rows).

*Server* is CPU of all backends of the run: that of children that the postmaster has buried, to 10 ms.

**Live.** Commits of single rows of another table to a webhook (the receiver and the writer of ``bench/speed``), alone,
beside a backfill into the same sink, and beside one into a null sink: 500 a second to a webhook that takes batches of
1,000, and 100 a second to one that takes one message a request, which is slow. *After a hiccup*: the receiver stands
still for a second, so that what waits goes to the store, and what is committed in the second half of the run counts;
else all but the first second does. A backfill that comes to its end is started again. Live messages are told from
backfilled ones by their commit timestamps, which PostgreSQL keeps; those that a page happens to share (a microsecond)
are left out.

**Broken.** How many rows the server has read (``pg_stat_user_tables``) and the sink has not got, when nothing moves any
more: with a sink that refuses connections from the start, with one that dies under way, and with one that falls silent
under way. A page that was begun below the cap may go above it, so the bound is twice ``run_ahead``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import stage
from oracle.product import ProductFailed
from peers import PeerFailed, recvlogical
from peers.source import DATABASE, TABLES, Slot, Source, Table, Waiting, ten_columns
from servers.ports import free_port
from servers.postgres import SUPERUSER
from speed.bench import Bench
from speed.latency import WEBHOOK, Load, Writer
from speed.life import BLACKHOLE, Json, Life, living, sink
from speed.receiver import Receiver
from speed.results import Results

FULL_ROWS = 10_000_000
ROUNDS = 3
LIMIT_MB = 512
READERS = (1, 2, 4)
RATIO_BOUND = 0.5
RSS_BOUND_MB = LIMIT_MB + 100
LIVE_SECONDS = 16
LEFT_OUT_SECONDS = 1.0
LIVE_TIMES_BOUND, LIVE_MORE_MS_BOUND = 2.0, 50.0
RUN_AHEAD = 10_000
STILL_SECONDS = 5.0  # nothing has moved for so long
WITHIN_SECONDS = 120.0

PARTS = ("rate", "live", "broken")
BATCHES, ONE_BY_ONE = "live, batches of 1,000", "live, one message a request"
HOOKS = {
    BATCHES: sink("hook", WEBHOOK, batch_size=1_000),
    ONE_BY_ONE: sink("hook", {**WEBHOOK, "batch": False}),
}
LIVE_RATES = {BATCHES: 500, ONE_BY_ONE: 100}
ALONE, SAME, OTHER = "alone", "backfill into the same sink", "backfill into another sink"
HICCUP = "backfill into the same sink, after a hiccup"
INTO = {ALONE: None, SAME: "hook", OTHER: "null", HICCUP: "hook"}
HICCUP_SECONDS = 1.0
PSQL, PSYCOPG = "COPY, psql", "COPY, psycopg"

_LIVE = ten_columns(200, name="latency")
_READ = """
import sys, time, psycopg
with psycopg.connect(sys.argv[1]) as connection:
    began = time.perf_counter()
    with connection.cursor().copy(sys.argv[2]) as copy:
        for _ in copy:
            pass
    print(time.perf_counter() - began)
"""

# 200 B: 12 + 16 of the key, 43 of the other columns, the rest is the payload.
_TEXT_KEY = Table(
    "text_key",
    "CREATE TABLE text_key (tenant text, code text, quantity integer NOT NULL, amount numeric(12,2) NOT NULL,"
    " active boolean NOT NULL, created_at timestamptz NOT NULL, payload text NOT NULL, PRIMARY KEY (tenant, code))",
    "INSERT INTO text_key SELECT 'tenant ' || 10000 + i %% 1000, 'order ' || lpad(i::text, 10, '0'),"
    " (100 + i %% 900)::int, 1000 + (i %% 900000) / 100.0, i %% 2 = 0,"
    " timestamptz '2026-01-01 00:00:00.123457+00' + i %% 1000000 * interval '10 seconds',"
    " substr(repeat(md5(i::text), 5), 1, 131) FROM generate_series(%(first)s::bigint, %(last)s::bigint) i",
)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    table: Table
    share: int  # one of so many of the rows

    def filled(self, rows: int) -> Table:
        """The table with its rows, to be made before there is a publication or a slot."""
        insert = self.table.batch % {"first": 1, "last": self.rows(rows)}
        return Table(self.table.name, f"{self.table.create}; {insert}", "")

    def rows(self, rows: int) -> int:
        return max(1, rows // self.share)


ROWS_200 = Case("200 B", TABLES["rows_200"], 1)
CASES = (ROWS_200, Case("18 kB", TABLES["rows_18000"], 100), Case("text key", _TEXT_KEY, 10))


class Backfills:
    def __init__(self, options: argparse.Namespace, report: stage.Report, source: Source) -> None:
        self._rows: int = options.rows
        self._rounds: int = options.rounds
        self._live_seconds: float = options.live_seconds
        self._parts: Sequence[str] = options.parts
        self._report = report
        self._source = source
        self._bench = Bench(source, Results(), options.rows, options.rounds, full=False)

    def go(self) -> None:
        for case in CASES:
            if case is not ROWS_200 and "rate" not in self._parts:
                continue
            with self._there(case) as waiting:
                if "rate" in self._parts:
                    self._part(f"rate, {case.name}", partial(self._rate, case, waiting))
                if case is ROWS_200 and "live" in self._parts:
                    self._part("live", partial(self._live, waiting))
                if case is ROWS_200 and "broken" in self._parts:
                    self._part("broken", partial(self._broken, waiting))

    def _part(self, name: str, run: Callable[[], None]) -> None:
        try:
            run()
        except (ProductFailed, PeerFailed, OSError, subprocess.CalledProcessError) as error:
            self._report.failed(f"{name}: {str(error).splitlines()[0]}")
            self._report.say(str(error))

    @contextmanager
    def _there(self, case: Case) -> Iterator[Waiting]:
        """The table with its rows, vacuumed, an empty one for live changes, and a slot that has nothing of them."""
        began = time.monotonic()
        with self._bench.filled([case.filled(self._rows), _LIVE], 0) as waiting:
            with self._source.connect() as connection:
                connection.execute(f"VACUUM (ANALYZE) {case.table.name}".encode())
            self._report.say(f"{case.rows(self._rows):,} rows of {case.name} in {time.monotonic() - began:.0f} s")
            yield waiting

    # -- rate -------------------------------------------------------------------------------------------------------
    def _rate(self, case: Case, waiting: Waiting) -> None:
        tools: dict[str, Callable[[], dict[str, float]]] = {
            PSQL: partial(self._copy, case, _psql_seconds),
            PSYCOPG: partial(self._copy, case, _psycopg_seconds),
            **{_readers(n): partial(self._backfill, case, waiting, n) for n in READERS},
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(self._rounds):
            rounds.append({})
            for name, run in tools.items():
                before = self._server_cpu_seconds()
                figures = run()
                figures["server, us a row"] = (self._server_cpu_seconds() - before) / case.rows(self._rows) * 1e6
                rounds[-1][name] = figures
                shown = ", ".join(f"{what} {figure:,.5g}" for what, figure in figures.items())
                self._report.say(f"{case.name}, round {number + 1}, {name}: {shown}")
        for name in tools:
            for what in rounds[0][name]:
                figure = statistics.median(one[name][what] for one in rounds)
                label = f"{case.name}, {name}: {what.partition(',')[0]}"
                if what == "peak RSS, MB":
                    figure = max(one[name][what] for one in rounds)
                    self._report.at_most(label, figure, RSS_BOUND_MB, "MB")
                else:
                    self._report.inform(label, figure, what.partition(", ")[2])
        for readers in READERS:
            ratios = [_ratio(one, _readers(readers)) for one in rounds]
            label = f"{case.name}, {_readers(readers)}: its rate over that of COPY"
            if case is ROWS_200:
                self._report.at_least(label, statistics.median(ratios), RATIO_BOUND, "")
            else:
                self._report.inform(label, statistics.median(ratios), "")

    def _backfill(self, case: Case, waiting: Waiting, readers: int) -> dict[str, float]:
        rows = case.rows(self._rows)
        with self._slot(waiting) as slot, self._living(slot, [sink("out", BLACKHOLE)]) as life:
            life.wait_streaming()
            cpu, began = life.cpu_seconds(), time.time()
            started = _start(life, "out", case, parallel=readers)
            ended = life.wait_for(life.delivered, rows, "delivered")
            seconds, cpu = ended - began, life.cpu_seconds() - cpu
            done = _wait_ended(life, "out", started)
            if (done["state"], done["rows_processed_count"]) != ("completed", rows):
                raise ProductFailed(f"the backfill of {rows} rows ended as {done}")
            pages = int(str(done["pages"]))
            life.finish()
            return {
                "rate, rows/s": rows / seconds,
                "CPU, us a row": cpu / rows * 1e6,
                "pages, ": pages,
                "a page, ms": seconds / pages * readers * 1e3,
                "peak RSS, MB": life.peak_rss_mb,
            }

    def _copy(self, case: Case, read: Callable[[str, str], float]) -> dict[str, float]:
        query = f"COPY (SELECT row_to_json(t) FROM {case.table.name} t) TO STDOUT"
        url = f"postgresql://{SUPERUSER}@127.0.0.1:{self._source.server.port}/{DATABASE}"
        return {"rate, rows/s": case.rows(self._rows) / read(url, query)}

    def _server_cpu_seconds(self) -> float:
        """Of the postmaster's children that have ended, which those that served a run have."""
        self._wait_alone()
        fields = Path(f"/proc/{self._source.server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / 100

    def _wait_alone(self) -> None:
        """Until the postmaster has buried whoever served us, to be asked while we are not connected."""
        postmaster = Path(f"/proc/{self._source.server.pid}/task/{self._source.server.pid}/children")
        self._wait(lambda: not any(map(_serves, postmaster.read_text().split())), "the end of backends")

    # -- live -------------------------------------------------------------------------------------------------------
    def _live(self, waiting: Waiting) -> None:
        writer = Writer(self._bench)
        for hook, per_second in LIVE_RATES.items():
            self._live_into(waiting, writer, hook, Load(per_second, self._live_seconds))

    def _live_into(self, waiting: Waiting, writer: Writer, hook: str, load: Load) -> None:
        p50: dict[str, list[float]] = {}
        p99: dict[str, list[float]] = {}
        beside: dict[str, list[float]] = {}
        for number in range(self._rounds):
            for name in INTO:
                took, rate = self._live_run(waiting, writer, HOOKS[hook], load, name)
                p50.setdefault(name, []).append(stage.percentile(took, 0.5))
                p99.setdefault(name, []).append(stage.percentile(took, 0.99))
                beside.setdefault(name, []).append(rate)
                self._report.say(
                    f"{hook}, round {number + 1}, {name}: p50 {p50[name][-1]:.2f} ms, p99 {p99[name][-1]:.2f} ms, most"
                    f" {took[-1]:.1f} ms, of {len(took)}; the backfill came to {rate:,.0f} rows/s"
                )
        alone = statistics.median(p99[ALONE])
        for name in INTO:
            self._report.inform(f"{hook}, {name}: p50", statistics.median(p50[name]), "ms")
            if name == ALONE:
                self._report.inform(f"{hook}, {name}: p99", alone, "ms")
                continue
            bound = max(LIVE_TIMES_BOUND * alone, alone + LIVE_MORE_MS_BOUND)
            self._report.at_most(f"{hook}, {name}: p99", statistics.median(p99[name]), bound, "ms")
            self._report.inform(f"{hook}, {name}: the backfill meanwhile", statistics.median(beside[name]), "rows/s")

    def _live_run(
        self, waiting: Waiting, writer: Writer, hook: Json, load: Load, name: str
    ) -> tuple[list[float], float]:
        """Milliseconds from commit to arrival, in order, and how many rows a second the backfill came to meanwhile."""
        sinks = [hook, sink("null", BLACKHOLE)]
        with self._source.connect() as connection:
            connection.execute("TRUNCATE latency")
        with (
            self._slot(waiting) as slot,
            Receiver(latencies=True) as receiver,
            self._living(slot, sinks, endpoint=receiver.url) as life,
            ThreadPoolExecutor(1) as aside,
        ):
            life.wait_streaming()
            into = INTO[name]
            keeper = _Keeper(life, into) if into else None
            if keeper is not None:
                keeper.wait_reading()
            began, before = time.monotonic(), keeper.rows() if keeper is not None else 0
            writing = aside.submit(writer.write, load)
            hiccup_at = began + load.seconds / 4 if name == HICCUP else math.inf
            while not writing.done():
                time.sleep(0.25)
                if time.monotonic() > hiccup_at:
                    hiccup_at = math.inf
                    receiver.suspend()
                    time.sleep(HICCUP_SECONDS)
                    receiver.resume()
                if keeper is not None:
                    keeper.rows()
            rate = (keeper.rows() - before) / (time.monotonic() - began) if keeper is not None else 0.0
            if keeper is not None:
                keeper.cancel()
            written = writing.result()
            if written < 0.95 * load.per_second:
                raise ProductFailed(f"the writer came to {written:.0f} commits/s beside it, not {load.per_second}")
            return self._live_latencies(receiver, load, load.seconds / 2 if name == HICCUP else LEFT_OUT_SECONDS), rate

    def _live_latencies(self, receiver: Receiver, load: Load, left_out_seconds: float) -> list[float]:
        query = "SELECT (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM latency"
        with self._source.connect() as connection:
            committed = {int(str(row[0])) for row in connection.execute(query)}
        deadline = time.monotonic() + WITHIN_SECONDS
        while True:
            arrivals = [(at, when) for at, when in receiver.arrivals() if when in committed]
            times = Counter(when for _, when in arrivals)
            if len(times) == len(committed):
                break
            if time.monotonic() > deadline:
                raise ProductFailed(f"{len(times)} of {len(committed)} live messages came within {WITHIN_SECONDS} s")
            time.sleep(0.2)
        start = min(committed) + left_out_seconds * 1_000_000
        took = sorted((at - when) / 1000 for at, when in arrivals if when >= start and times[when] == 1)
        if len(took) < 0.98 * load.per_second * (load.seconds - left_out_seconds - 1):
            raise ProductFailed(f"only {len(took)} live messages can be told from backfilled ones")
        return took

    # -- broken -----------------------------------------------------------------------------------------------------
    def _broken(self, waiting: Waiting) -> None:
        self._broken_run(waiting, "refuses from the start", None)
        self._broken_run(waiting, "dies under way", Receiver.kill)
        self._broken_run(waiting, "falls silent under way", Receiver.suspend)

    def _broken_run(self, waiting: Waiting, name: str, breaks: Callable[[Receiver], None] | None) -> None:
        hook = sink("hook", {**WEBHOOK, "timeout_seconds": 60}, batch_size=1_000, backfill={"run_ahead": RUN_AHEAD})
        before = self._rows_read()
        with self._slot(waiting) as slot, Receiver() as receiver:
            endpoint = receiver.url if breaks else f"http://127.0.0.1:{free_port()}"
            with self._living(slot, [hook], endpoint=endpoint) as life:
                life.wait_streaming()
                started = _start(life, "hook", ROWS_200)
                got = 0
                if breaks is not None:
                    underway = min(100_000, self._rows // 10)
                    self._wait(lambda: receiver.told()["messages"] > underway, "rows at the sink")
                    got = receiver.told()["messages"]
                    breaks(receiver)
                self._wait_still(life, started)
                shown = _shown(life, "hook", started)
                status = life.status()
        # Backends report what they have read at their end at the latest.
        ahead = self._rows_read() - before - got
        self._report.say(f"broken, {name}: {shown}")
        self._report.at_most(f"broken, {name}: rows read that it had not got", ahead, 2 * RUN_AHEAD, "rows")
        self._report.inform(f"broken, {name}: in the store", life.total("backlog_messages", status), "messages")

    def _wait_still(self, life: Life, started: str) -> None:
        """Until the backfill says for some seconds that it has read no more, and why it waits."""
        last, since = -1, time.monotonic()

        def still() -> bool:
            nonlocal last, since
            shown = _shown(life, "hook", started)
            if shown["state"] != "active":
                raise ProductFailed(f"a backfill into a broken sink is {shown}")
            rows = int(str(shown["rows_processed_count"]))
            if rows != last:
                last, since = rows, time.monotonic()
            return time.monotonic() - since > STILL_SECONDS

        self._wait(still, "a backfill into a broken sink to stop")

    def _rows_read(self) -> int:
        self._wait_alone()
        with self._source.connect() as connection:
            found = connection.execute(
                "SELECT coalesce(idx_tup_fetch, 0) + coalesce(seq_tup_read, 0) FROM pg_stat_user_tables"
                " WHERE relname = %s",
                [ROWS_200.table.name],
            ).fetchone()
        assert found is not None
        return int(str(found[0]))

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WITHIN_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise ProductFailed(f"{what}: not within {WITHIN_SECONDS} s")
            time.sleep(0.05)

    @contextmanager
    def _slot(self, waiting: Waiting) -> Iterator[Slot]:
        """One that has nothing of what was committed before."""
        with self._source.connect() as connection:
            connection.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [waiting.slot])
        with self._source.copy(waiting) as slot:
            yield slot

    @contextmanager
    def _living(self, slot: Slot, sinks: Sequence[Json], *, endpoint: str | None = None) -> Iterator[Life]:
        with living(slot, sinks, endpoint=endpoint, limit_mb=LIMIT_MB) as life:
            yield life


class _Keeper:
    """Keeps a backfill going: starts the next when one has ended."""

    def __init__(self, life: Life, into: str) -> None:
        self._life, self._into = life, into
        self._before = 0  # rows of those that have ended
        self._id = _start(life, into, ROWS_200)

    def rows(self) -> int:
        """Read so far, by all of them."""
        shown = _shown(self._life, self._into, self._id)
        rows = int(str(shown["rows_processed_count"]))
        if shown["state"] == "completed":
            self._before += rows
            self._id = _start(self._life, self._into, ROWS_200)
            return self._before
        if shown["state"] != "active":
            raise ProductFailed(f"the backfill beside live changes is {shown}")
        return self._before + rows

    def wait_reading(self) -> None:
        deadline = time.monotonic() + WITHIN_SECONDS
        while self.rows() < 1_000:
            if time.monotonic() > deadline:
                raise ProductFailed(f"a backfill came to {self.rows()} rows within {WITHIN_SECONDS} s")
            time.sleep(0.05)

    def cancel(self) -> None:
        self._life.ask("PATCH", f"/api/sinks/{self._into}/backfills/{self._id}", {"state": "cancelled"})


def _start(life: Life, into: str, case: Case, **more: object) -> str:
    order = {"table": f"public.{case.table.name}", **more}
    return str(life.ask("POST", f"/api/sinks/{into}/backfills", order)["id"])


def _shown(life: Life, into: str, number: str) -> Json:
    return life.ask("GET", f"/api/sinks/{into}/backfills/{number}")


def _wait_ended(life: Life, into: str, number: str) -> Json:
    deadline = time.monotonic() + 10
    while (shown := _shown(life, into, number))["state"] == "active" and time.monotonic() < deadline:
        time.sleep(0.02)
    return shown


def _serves(pid: str) -> bool:
    """Whether a child of the postmaster serves a client, or has ended and is not buried yet."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False
    return not title or b" [local] " in title or b" 127.0.0.1(" in title


def _readers(number: int) -> str:
    return f"parallel: {number}"


def _ratio(one: dict[str, dict[str, float]], name: str) -> float:
    rate = "rate, rows/s"
    return one[name][rate] / max(one[PSQL][rate], one[PSYCOPG][rate])


def _psql_seconds(url: str, query: str) -> float:
    program = recvlogical.program().with_name("psql")
    began = time.perf_counter()
    subprocess.run([program, "-X", "-q", "-d", url, "-c", query], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _psycopg_seconds(url: str, query: str) -> float:
    done = subprocess.run([sys.executable, "-c", _READ, url, query], stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rows", type=int, default=FULL_ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--live-seconds", type=float, default=LIVE_SECONDS)
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    parts = ", ".join(options.parts)
    report = stage.Report("backfill", {**stage.parameters(options, "parts"), "parts": parts, "limit_mb": LIMIT_MB})
    with Source() as source:
        Backfills(options, report, source).go()
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
