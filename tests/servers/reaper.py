"""Ends what a dead test run left behind.

One small process per test run, in a session of its own. It reads from a pipe whose other end the run holds:

    watch PID STARTED SIGNAL    a process to end, known by its pid and start time (a pid alone may be reused)
    forget PID                  it has ended
    folder PATH                 a folder to remove; ``keep PATH`` takes that back

The pipe ends when the run does, however it dies. Then each process still watched gets its signal and five seconds
later SIGKILL, with all its descendants, and the folders go. ``PR_SET_PDEATHSIG`` will not do: it follows the *thread*
that started a server.

Run as a script, with nothing but the standard library, so that it starts in the time of a bare interpreter.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE_SECONDS = 5.0


def started_at(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def family(pid: int) -> list[int]:
    """A process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we read
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found


def send(pid: int, number: int) -> None:
    """Signals a process that may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watched: dict[int, tuple[str, int]] = {}
    folders: list[str] = []
    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        match verb:
            case "watch":
                pid, started, number = rest.split()
                watched[int(pid)] = (started, int(number))
            case "forget":
                watched.pop(int(rest), None)
            case "folder":
                folders.append(rest)
            case "keep":
                folders = [folder for folder in folders if folder != rest]
    _end(watched)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _end(watched: dict[int, tuple[str, int]]) -> None:
    servers = [pid for pid, (started, _) in watched.items() if started_at(pid) == started]
    members = {member: started_at(member) for pid in servers for member in family(pid)}

    def alive() -> list[int]:
        return [pid for pid, started in members.items() if started is not None and started_at(pid) == started]

    for pid in servers:
        send(pid, watched[pid][1])
    for pid in members:
        send(pid, signal.SIGCONT)  # a suspended process would not see the signal, nor the end of its parent
    deadline = time.monotonic() + GRACE_SECONDS
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive():
        send(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
