"""A server process: started in a run folder of its own, watched by the reaper, ended by its pid.

``Server`` is what all servers share. A server class says what to run and when it is ready; see ``postgres``.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from servers import reaper
from servers.cache import cache_folder

POLL_SECONDS = 0.02

_reaper_lock = threading.Lock()
_reaper_pipes: dict[int, IO[str]] = {}


class ServerFailed(Exception):
    """A server did not start or did not stop; the text ends with the end of its log."""


def tell_reaper(line: str) -> None:
    """Tells this process' reaper, which is started by the first word to it."""
    with _reaper_lock:
        pipe = _reaper_pipes.get(os.getpid())
        if pipe is None:
            child = subprocess.Popen(
                [sys.executable, "-I", reaper.__file__], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            # It outlives us by design, so nobody waits for it, and Popen shall not complain about that.
            child.returncode = 0
            assert child.stdin is not None
            pipe = _reaper_pipes[os.getpid()] = child.stdin
        pipe.write(line + "\n")
        pipe.flush()


def wait_until(done: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Asks every few milliseconds until ``done``; TimeoutError names ``what`` was waited for."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(POLL_SECONDS)


class Server(ABC):
    """One server process with a run folder that ``close`` removes."""

    name: str
    stop_signal = signal.SIGTERM

    def __init__(self, *, user: str | None = None) -> None:
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        runs = cache_folder() / "run"
        runs.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=runs))
        tell_reaper(f"folder {self.folder}")
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _spawn(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        if self._process is not None:
            raise RuntimeError(f"{self.name} is running already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        pid = self._process.pid
        tell_reaper(f"watch {pid} {reaper.started_at(pid)} {int(self.stop_signal)}")

    def _wait_ready(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Waits until ``ready``; a server that ends or takes too long is killed and reported with its log."""

        def ready_or_dead() -> bool:
            return not self.running or ready()

        try:
            wait_until(ready_or_dead, f"start of {self.name}", seconds=seconds)
        except TimeoutError as error:
            self.kill()
            raise ServerFailed(f"{error}\n{self._log_end()}") from error
        if not self.running:
            code = self._wait_ended(seconds=0)
            raise ServerFailed(f"{self.name} ended with {code} while starting\n{self._log_end()}")

    def _log_end(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def _end(self, number: signal.Signals, *, seconds: float) -> None:
        """Sends a signal and waits for the end; SIGKILL and an error when it does not come."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self.resume()  # a suspended process would not see the signal
        try:
            self._wait_ended(seconds=seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise ServerFailed(f"{self.name} did not stop within {seconds} s\n{self._log_end()}") from error

    def _wait_ended(self, *, seconds: float) -> int:
        assert self._process is not None
        code = self._process.wait(seconds)
        tell_reaper(f"forget {self._process.pid}")
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the process and its descendants at once, as when the machine loses power."""
        if self._process is None:
            return
        # Stopped first, so that the parent can neither start another child nor bid those it has goodbye.
        self._process.send_signal(signal.SIGSTOP)
        members = {pid: reaper.started_at(pid) for pid in reaper.family(self._process.pid)}
        for pid in members:
            reaper.send(pid, signal.SIGKILL)
        self._wait_ended(seconds=30)

        def gone() -> bool:
            return all(started is None or reaper.started_at(pid) != started for pid, started in members.items())

        wait_until(gone, f"end of the processes of {self.name}", seconds=30)

    def suspend(self) -> None:
        """Stops every process of the server where it stands: connections stay open and nothing answers."""
        for pid in reaper.family(self.pid):
            reaper.send(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in reaper.family(self.pid):
            reaper.send(pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the server, whatever its state, and removes its folder."""
        self.kill()
        shutil.rmtree(self.folder)
        tell_reaper(f"keep {self.folder}")

    @abstractmethod
    def start(self) -> Self:
        """Starts the server, for the first time or again, and returns when it can be used."""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:  # the caller gets no server to close, so whatever happened it is closed here
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
