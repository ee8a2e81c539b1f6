"""One life of the product: ``spillway run`` on a slot, watched from outside, and what it took.

**Watching must not disturb.** A status costs the product some tenths of a millisecond. It is asked every 20 ms until
the first message is delivered, then at most four times a second, sooner the nearer the end is by the rate so far, and
every 10 ms at the very end: 20 to 30 times in a drain of some seconds, under half a percent of its time.

**The end** is right to 10 ms. `Drained.seconds` begins at START_REPLICATION (see `speed`).

**CPU** of a drain is that since START_REPLICATION; it is read every 5 ms until the stream is seen, and the last reading
before it counts as the start's.

The process ends with SIGTERM and must end with 0.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psycopg

from oracle.product import SAMPLE_SECONDS, TOKEN, Product, ProductFailed
from peers.source import Slot
from speed.results import PRODUCT_RSS

LIMIT_MB = 128
STALLED_SECONDS = 60.0
MIB = 1 << 20

_STARTING_SECONDS = 0.02
_SELDOM_SECONDS = 0.25
_OFTEN_SECONDS = 0.01
_CPU_READ_SECONDS = 0.005

Json = dict[str, object]


def sink(name: str, destination: Mapping[str, object], **more: object) -> Json:
    return {"name": name, "database": "app", "destination": dict(destination), **more}


BLACKHOLE: Mapping[str, object] = {"type": "blackhole"}


@dataclass(frozen=True, slots=True)
class Drained:
    rows: int
    seconds: float  # from START_REPLICATION
    gross_seconds: float  # from the start of the process
    start_seconds: float  # from the start of the process to START_REPLICATION
    cpu_seconds: float  # since START_REPLICATION
    start_cpu_seconds: float  # before it
    walsender_cpu_seconds: float

    def values(self, life: Life) -> dict[str, float]:
        return {
            "rows_per_second": self.rows / self.seconds,
            "gross_rows_per_second": self.rows / self.gross_seconds,
            "cpu_us_per_row": self.cpu_seconds / self.rows * 1e6,
            "walsender_us_per_row": self.walsender_cpu_seconds / self.rows * 1e6,
            "start_seconds": self.start_seconds,
            "start_cpu_seconds": self.start_cpu_seconds,
            "most_stored": life.most_stored,
            PRODUCT_RSS: life.peak_rss_mb,
        }


class StreamStart:
    """When the walsender of a slot was told to start, and its CPU, as the server and the kernel tell."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot.name
        self._connection = psycopg.connect(slot.dsn(unix=True), autocommit=True)
        self.at: float | None = None  # wall seconds
        self.pid = 0

    def look(self) -> bool:
        if self.at is None:
            found = self._connection.execute(
                "SELECT extract(epoch FROM a.query_start)::float8, a.pid FROM pg_replication_slots s"
                " JOIN pg_stat_activity a ON a.pid = s.active_pid"
                " WHERE s.slot_name = %s AND a.query ILIKE 'START_REPLICATION%%'",
                [self._slot],
            ).fetchone()
            if found is not None:
                self.at, self.pid = found
        return self.at is not None

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid) if self.pid else 0.0

    def close(self) -> None:
        self._connection.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, by the kernel's clock of it (to the nanosecond)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:  # it has ended
        return 0.0


class Life:
    """See `living`."""

    def __init__(self, product: Product, slot: Slot, sinks: Sequence[str]) -> None:
        self._product, self._sinks = product, sinks
        self._stream = StreamStart(slot)
        self._connection = http.client.HTTPConnection("127.0.0.1", product.port, timeout=30)
        self._slot = slot
        self.ended = False
        self._cpu_readings: list[tuple[float, float]] = []  # (wall seconds, CPU seconds so far), until it streams
        self._closing = Event()
        self._cpu_pid = 0
        self._reader = Thread(target=self._read_cpu)
        self.started_at = 0.0  # wall seconds
        self.asked = 0
        self.most_stored = 0  # messages in the store, of all sinks, as far as it was looked
        self.impl = ""

    # -- what it says -----------------------------------------------------------------------------------------------
    def status(self) -> Json | None:
        """None while it does not answer yet."""
        self._product.check_alive()
        try:
            self._connection.request("GET", "/api/status", headers={"authorization": f"Bearer {TOKEN}"})
            answer = self._connection.getresponse()
            told = answer.read()
        except ConnectionRefusedError:
            return None
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return None
        if answer.status != 200:
            raise ProductFailed(f"/api/status: {answer.status} {told[:500]!r}")
        self.asked += 1
        status: Json = json.loads(told)
        self.most_stored = max(self.most_stored, self.total("backlog_messages", status))
        self.impl = str(status.get("impl", ""))
        return status

    def post(self, path: str) -> None:
        self.ask("POST", path)

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Json:
        """One request to its HTTP interface, once it is up; anything but success is a failure."""
        self._product.check_alive()
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        self._connection.close()  # the server may have closed one that was idle
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._connection.getresponse()
        told = answer.read()
        if answer.status not in (200, 201):
            raise ProductFailed(f"{path}: {answer.status} {told[:500]!r}\n{self._product.log_end()}")
        return dict(json.loads(told)) if told else {}

    def total(self, what: str, status: Json | None) -> int:
        """The sum of a number over the sinks; none while there is no status."""
        if status is None:
            return 0
        sinks = status["sinks"]
        assert isinstance(sinks, list)
        return sum(int(one[what]) for one in sinks)

    @property
    def pid(self) -> int:
        return self._product.pid

    def cpu_seconds(self) -> float:
        """Of the whole life so far."""
        return cpu_seconds(self._cpu_pid)

    @property
    def peak_rss_mb(self) -> float:
        """The most so far, or at all once it has ended."""
        if not self.ended:
            time.sleep(2 * SAMPLE_SECONDS)
        return max(self._product.memory.peaks.values()) / MIB

    # -- waiting ----------------------------------------------------------------------------------------------------
    def wait_for(self, reached: Callable[[Json | None], int], goal: int, what: str) -> float:
        """Waits until ``reached`` is ``goal``; returns the wall time at which it was seen so. More is a failure."""
        began = last_at = time.monotonic()
        first = last = 0
        while True:
            status = self.status()
            now, wall = time.monotonic(), time.time()
            count = reached(status)
            if count > goal:
                raise ProductFailed(f"{what}: {count}, which is more than {goal}\n{status}\n{self._product.log_end()}")
            if count == goal and self._stream.look():
                return wall
            if count > last:
                if not first:
                    first, began = count, now
                last, last_at = count, now
            elif now - last_at > STALLED_SECONDS:
                log = self._product.log_end()
                raise ProductFailed(f"{what}: {count} of {goal}, none in {STALLED_SECONDS} s\n{status}\n{log}")
            self._stream.look()
            time.sleep(_pause_seconds(now - began, last - first, goal - last) if first else _STARTING_SECONDS)

    def delivered(self, status: Json | None) -> int:
        return self.total("delivered", status)

    def drained(self, *, rows: int | None = None, messages: int | None = None) -> Drained:
        """Waits until everything is acknowledged. ``messages``: how many in all sinks; None: each gets every row."""
        rows = self._slot.rows if rows is None else rows
        messages = rows * len(self._sinks) if messages is None else messages
        wall = self.wait_for(self.delivered, messages, "delivered")
        cpu, walsender = self.cpu_seconds(), self._stream.cpu_seconds()
        start_cpu = self.start_cpu_seconds
        return Drained(
            rows,
            seconds=wall - self.stream_began,
            gross_seconds=wall - self.started_at,
            start_seconds=self.stream_began - self.started_at,
            cpu_seconds=cpu - start_cpu,
            start_cpu_seconds=start_cpu,
            walsender_cpu_seconds=walsender,
        )

    def wait_streaming(self) -> None:
        """Waits until the slot is read."""
        began = time.monotonic()
        while self.status() is None or not self._stream.look():
            if time.monotonic() - began > STALLED_SECONDS:
                raise ProductFailed(f"it does not read its slot\n{self._product.log_end()}")
            time.sleep(_STARTING_SECONDS)

    def check_within(self, seconds: float) -> None:
        """For who waits by itself."""
        if seconds > STALLED_SECONDS:
            raise ProductFailed(f"not delivered within {seconds:.0f} s: {self.status()}\n{self._product.log_end()}")

    @property
    def start_cpu_seconds(self) -> float:
        """What it had taken at START_REPLICATION: the last reading before."""
        return max((cpu for at, cpu in self._cpu_readings if at <= self.stream_began), default=0.0)

    @property
    def stream_began(self) -> float:
        assert self._stream.at is not None
        return self._stream.at

    # -- its ends ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._product.start()
        self._cpu_pid = self._product.pid
        self.started_at = self._product.started_at
        self._reader.start()

    def _read_cpu(self) -> None:
        while self._stream.at is None and not self._closing.wait(_CPU_READ_SECONDS):
            self._cpu_readings.append((time.time(), self.cpu_seconds()))

    def finish(self) -> None:
        """Ends it, as a service manager would; another status than 0 is a failure."""
        code = self._product.terminate()
        self.ended = True
        if code != 0:
            raise ProductFailed(f"it ended with {code}\n{self._product.log_end()}")

    def close(self) -> None:
        self._closing.set()
        if self._reader.ident is not None:
            self._reader.join()
        self._connection.close()
        self._stream.close()


def _pause_seconds(since: float, done: int, left: int) -> float:
    if not done:
        return _STARTING_SECONDS
    return min(_SELDOM_SECONDS, max(_OFTEN_SECONDS, 0.4 * left * since / done))


def configuration(
    slot: Slot,
    sinks: Sequence[Mapping[str, object]],
    *,
    unix: bool = False,
    endpoint: str | None = None,
    limit_mb: int = LIMIT_MB,
) -> Json:
    database = {
        "name": "app",
        "url": slot.dsn(unix=unix),
        "slot": {"name": slot.name},
        "publication": {"name": slot.publication},
    }
    endpoints = [{"name": "receiver", "url": endpoint}] if endpoint else []
    return {
        "memory": {"limit_mb": limit_mb},
        "databases": [database],
        **({"http_endpoints": endpoints} if endpoints else {}),
        "sinks": list(sinks),
    }


@contextmanager
def living(
    slot: Slot,
    sinks: Sequence[Mapping[str, object]],
    *,
    unix: bool = False,
    endpoint: str | None = None,
    environment: Mapping[str, str] | None = None,
    limit_mb: int = LIMIT_MB,
) -> Iterator[Life]:
    """The product at work on a slot. On the way out it is ended cleanly, or killed if something went wrong."""
    with tempfile.TemporaryDirectory(prefix="spillway-speed-") as name:
        config = configuration(slot, sinks, unix=unix, endpoint=endpoint, limit_mb=limit_mb)
        with Product(Path(name), config, environment=environment) as product:
            life = Life(product, slot, [str(one["name"]) for one in sinks])
            try:
                life.start()
                yield life
                if not life.ended:
                    life.finish()
            finally:
                with suppress(OSError):
                    life.close()
