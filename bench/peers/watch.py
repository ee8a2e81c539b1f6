"""One run of a tool: its time, CPU and peak memory, and the CPU of the walsender that serves it.

CPU of the tool is what the kernel accounts at its end (``wait4``). Peak memory is ``VmHWM`` of ``/proc``, read every
50 ms (``ru_maxrss`` will not do: it begins with the memory of the process that forked). The walsender's CPU is read as
often, so up to 50 ms of it are missed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from peers import PeerFailed
from peers.source import Slot
from servers import reaper
from servers.process import tell_reaper

_SAMPLE_SECONDS = 0.05
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    walsender_cpu_seconds: float
    output: str


class Process:
    """A child that dies with us. ``sample`` now and then, ``finish`` once it has ended or shall end."""

    def __init__(self, command: Sequence[str | Path], *, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self._name = Path(command[0]).name
        self._log = folder / f"{self._name}.log"
        with self._log.open("wb") as log:
            self.began = time.monotonic()
            self._child = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self._child.pid
        tell_reaper(f"watch {self.pid} {reaper.started_at(self.pid)} {int(signal.SIGKILL)}")
        self._pidfd = os.pidfd_open(self.pid)
        self.peak_rss_bytes = 0

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def sample(self, seconds: float = _SAMPLE_SECONDS) -> bool:
        """Reads VmHWM, waits so long or until the end; False once it has ended."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes(self.pid))
        return not select.select([self._pidfd], [], [], seconds)[0]

    def finish(self, number: signal.Signals | None = None) -> float:
        """Waits for the end, after a signal if it is given; returns its CPU seconds. A status other than 0 fails."""
        if number is not None:
            signal.pidfd_send_signal(self._pidfd, number)
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self._pidfd)
        self._child.returncode = os.waitstatus_to_exitcode(status)
        tell_reaper(f"forget {self.pid}")
        if number is None and self._child.returncode != 0:
            raise PeerFailed(f"{self._name} ended with {self._child.returncode}:\n{self.output[-4000:]}")
        return usage.ru_utime + usage.ru_stime


class Walsender:
    """The CPU of the walsender that serves a slot, from when it is found until it is gone."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot.name
        self._connection = psycopg.connect(slot.dsn(unix=True), autocommit=True)
        self._pid: int | None = None
        self.cpu_seconds = 0.0

    def sample(self) -> None:
        if self._pid is None:
            found = self._connection.execute(
                "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [self._slot]
            ).fetchone()
            self._pid = found[0] if found else None
        if self._pid is not None:
            self.cpu_seconds = max(self.cpu_seconds, cpu_seconds(self._pid))

    def close(self) -> None:
        self._connection.close()


def watched(
    command: Sequence[str | Path],
    slot: Slot,
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 600.0,
) -> Run:
    """Runs a tool that drains the slot and ends by itself."""
    walsender = Walsender(slot)
    process = Process(command, folder=folder, env=env)
    deadline = process.began + timeout_seconds
    try:
        while process.sample():
            walsender.sample()
            if time.monotonic() > deadline:
                process.finish(signal.SIGKILL)
                raise PeerFailed(f"{command[0]} has not ended after {timeout_seconds} s:\n{process.output[-4000:]}")
        seconds = time.monotonic() - process.began
    finally:
        walsender.close()
    cpu = process.finish()
    return Run(seconds, cpu, process.peak_rss_bytes, walsender.cpu_seconds, process.output)


def peak_rss_bytes(pid: int) -> int:
    """VmHWM; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def cpu_seconds(pid: int) -> float:
    """User and system time so far; 0 for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
