"""The story, and the checks at its end.

A sink works, then rejects every row; the engine is killed with SIGKILL while the backlog grows, and started again; the
sink is mended; source and sinks are compared. A second sink works all the while.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spillway.demo import outside, server
from spillway.demo.load import Load, create_table
from spillway.demo.outside import MB, Source
from spillway.demo.running import LIMIT_MB, SLOT, Engine
from spillway.demo.screen import Sample, Screen
from spillway.errors import SpillwayError

SLOT_SECONDS = 15.0
HEALTHY_SECONDS = 8.0
BROKEN_SECONDS = 20.0
RESTARTED_SECONDS = 10.0
MENDED_SECONDS = 3.0
DRAIN_SECONDS = 60.0
SETTLE_SECONDS = 3.0  # after a start, before its figures count
SAMPLE_SECONDS = 1.0

# What a process needs besides the memory it is limited to: the interpreter and its libraries.
OVERHEAD_MB = 100
SLOT_BEHIND_MB = 16
HEALTHY_SINK_SECONDS = 5.0
ON_DISK_MB = 10

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130


def play() -> int:
    """Returns the exit status."""
    if not Path("/proc/self/status").exists():
        raise SpillwayError("demo_linux", "the demo reads the engine's memory from /proc", "run it on Linux")
    began = time.monotonic()
    screen = Screen()
    with _interruptible():
        try:
            checks = _play(screen)
        except KeyboardInterrupt:
            screen.say("interrupted; everything that was started has been ended")
            return _INTERRUPTED
    screen.say("")
    for what, held in checks:
        screen.say(f"{'ok    ' if held else 'FAILED'} {what}", "green" if held else "bold red")
    good = all(held for _, held in checks)
    screen.say(f"\n{'All of it held' if good else 'Not all of it held'}, after {time.monotonic() - began:.0f} seconds.")
    return 0 if good else 1


def _play(screen: Screen) -> list[tuple[str, bool]]:
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        (folder / "pg").mkdir()
        (folder / "spillway").mkdir(mode=0o700)
        screen.say("Starting a PostgreSQL 18 of its own ...")
        url = stack.enter_context(server.running(folder / "pg"))
        create_table(url)
        source = stack.enter_context(Source(url, SLOT))
        engine = stack.enter_context(Engine(folder / "spillway", url))
        load = Load(url)
        stack.callback(lambda: [signal.signal(number, signal.SIG_IGN) for number in _SIGNALS])
        seconds = engine.start()
        screen.say(f"spillway run spillway.yml, with memory.limit_mb: {LIMIT_MB}: it answers after {seconds:.1f} s.")
        _wait_for_slot(source, engine)
        with load, screen:
            return _Story(engine, load, source, screen).tell()


def _wait_for_slot(source: Source, engine: Engine) -> None:
    """What is changed before there is a slot is not streamed."""
    deadline = time.monotonic() + SLOT_SECONDS
    while not source.confirmed_bytes():
        engine.check()
        if time.monotonic() > deadline:
            raise SpillwayError("demo_slot", f"there is no slot after {SLOT_SECONDS:.0f} s; {engine.log_end()}")
        time.sleep(0.05)


class _Story:
    def __init__(self, engine: Engine, load: Load, source: Source, screen: Screen) -> None:
        self._engine, self._load, self._source, self._screen = engine, load, source, screen
        self._began = time.monotonic()
        self._outage: list[Sample] = []  # samples while the sink is broken, but for the first seconds of a process
        self._peaks_mb: list[float] = []  # of each life of the engine, as of its last sample

    def tell(self) -> list[tuple[str, bool]]:
        self._works()
        confirmed = self._source.confirmed_bytes()
        self._breaks()
        self._is_killed()
        moved_mb = (self._source.confirmed_bytes() - confirmed) / MB
        drained = self._is_mended()
        return self._checks(moved_mb, drained)

    # -- stages -----------------------------------------------------------------------------------------------------
    def _works(self) -> None:
        self._peaks_mb.append(0.0)
        self._screen.headline("1. Inserts, updates and deletes flow into two sinks: an SQLite table, and a file.")
        self._watch(HEALTHY_SECONDS)

    def _breaks(self) -> None:
        outside.break_table(self._engine.table)
        self._screen.headline("2. The table now rejects every row (a trigger does). Its changes wait on disk.")
        self._outage += self._watch(BROKEN_SECONDS)
        status = self._engine.sink("table")
        self._screen.say(f"   The engine says why: {status['reason']}\n   and what to do: {status['remedy']}")

    def _is_killed(self) -> None:
        self._screen.headline("3. kill -9, and start again, with the backlog on disk and the sink still broken.")
        self._engine.kill()
        self._peaks_mb.append(0.0)
        began = time.monotonic()
        answers = self._engine.start()
        while not self._engine.sink("table")["last_error"] and time.monotonic() - began < SETTLE_SECONDS:
            time.sleep(0.05)
        asked = time.monotonic() - began
        self._screen.say(f"   It answers after {answers:.1f} s; the sink has been asked again after {asked:.1f} s.")
        self._watch(SETTLE_SECONDS)
        self._outage += self._watch(RESTARTED_SECONDS - SETTLE_SECONDS)

    def _is_mended(self) -> bool:
        """Whether everything has arrived in time, as the slot sees it."""
        outside.mend_table(self._engine.table)
        self._screen.headline("4. The table is mended. What waited arrives, in order.")
        answer = self._engine.command("backlog", "retry", "table", "--all")
        self._screen.say(f"   $ spillway backlog retry table --all\n   {answer}")
        self._watch(MENDED_SECONDS)
        self._load.stop()
        end = self._source.wal_bytes()
        self._watch(DRAIN_SECONDS, until=lambda: self._source.confirmed_bytes() >= end and not self._waiting())
        return self._source.confirmed_bytes() >= end and not self._waiting()

    def _waiting(self) -> int:
        return sum(int(str(self._engine.sink(name)["backlog_messages"])) for name in ("table", "audit"))

    # -- looking ----------------------------------------------------------------------------------------------------
    def _watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> list[Sample]:
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            self._load.check()
            self._engine.check()
            samples.append(self._look())
            self._screen.show(samples[-1])
            time.sleep(max(0.0, min(SAMPLE_SECONDS, end - time.monotonic())))
        return samples

    def _look(self) -> Sample:
        now_mb, peak_mb = outside.memory_mb(self._engine.pid)
        self._peaks_mb[-1] = peak_mb
        table = self._engine.sink("table")
        return Sample(
            second=time.monotonic() - self._began,
            changes=self._load.changes,
            memory_mb=now_mb,
            peak_mb=peak_mb,
            waiting=int(str(table["backlog_messages"])),
            disk_mb=outside.size_mb(self._engine.state),
            slot_behind_mb=(self._source.wal_bytes() - self._source.confirmed_bytes()) / MB,
            state=str(table["state"]),
            audit_seconds=outside.seconds_behind(self._engine.audit) if self._load.running else None,
        )

    # -- the end ----------------------------------------------------------------------------------------------------
    def _checks(self, moved_mb: float, drained: bool) -> list[tuple[str, bool]]:
        self._screen.headline("5. Source and sinks, row by row.")
        peak_mb = max(self._peaks_mb)
        disk_mb = max(sample.disk_mb for sample in self._outage)
        behind_mb = max(sample.slot_behind_mb for sample in self._outage)
        late = max(sample.audit_seconds or 0.0 for sample in self._outage)
        status = self._engine.stop()
        rows, wrong = outside.differences(self._source, self._engine.table)
        changes, repeated = outside.audit_changes(self._engine.audit)
        return [
            (
                f"memory: at most {peak_mb:.0f} MB in either life (VmHWM; the limit of {LIMIT_MB} MB and"
                f" {OVERHEAD_MB} MB for the interpreter are allowed)",
                peak_mb <= LIMIT_MB + OVERHEAD_MB,
            ),
            (f"backlog: {disk_mb:.0f} MB in the state file while the sink was broken", disk_mb > ON_DISK_MB),
            (
                f"slot: confirmed_flush_lsn went on by {moved_mb:.0f} MB during the outage, at most"
                f" {behind_mb:.1f} MB behind (PostgreSQL)",
                moved_mb > 0 and behind_mb < SLOT_BEHIND_MB,
            ),
            (f"healthy sink: at most {late:.1f} s late during the outage", late < HEALTHY_SINK_SECONDS),
            (f"mended: everything delivered and confirmed within {DRAIN_SECONDS:.0f} s", drained),
            (f"table: {rows:,} rows in the source, {wrong} differ in the sink", rows > 0 and wrong == 0),
            (
                f"file: {changes:,} of {self._load.changes:,} changes, {repeated:,} lines repeated after the kill",
                changes == self._load.changes,
            ),
            (f"stop: SIGTERM ended the engine with status {status}", status == 0),
        ]


@contextmanager
def _folder() -> Iterator[Path]:
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > 40:
        parent = Path("/tmp")  # noqa: S108 - the path of a Unix socket has room for some hundred characters
    folder = Path(tempfile.mkdtemp(prefix="spillway-demo-", dir=parent))
    folder.chmod(0o711)  # PostgreSQL may run as another user
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, was in before.items():
        if was is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
