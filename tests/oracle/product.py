"""The product from outside: a command, a file of YAML, HTTP, and what the kernel says of its memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx
import psycopg
import yaml

from oracle.cgroup import MemoryCgroup
from servers.ports import free_port
from servers.process import tell_reaper
from servers.reaper import family, send, started_at

TOKEN = "judge"
SAMPLE_SECONDS = 0.05
MIB = 1 << 20


class ProductFailed(Exception):
    """The product did something that no scenario allows; the text ends with the end of its log."""


class Product:
    """``spillway run`` on a configuration of ours, in a folder of ours.

    ``environment`` is added to its own: the mutants come in by PYTHONPATH.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, object],
        *,
        cgroup: MemoryCgroup | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.life = -1
        self.started_at = 0.0  # wall seconds, before the process was spawned
        self.memory = MemorySampler()
        self._cgroup = cgroup
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.file = folder / "spillway.yml"
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=10,
            trust_env=False,
        )
        self.configure(config)

    def configure(self, config: Mapping[str, object]) -> None:
        """Writes the file; the next start reads it."""
        whole = {"server": {"listen": f"127.0.0.1:{self.port}", "token": TOKEN}, **config}
        self.file.write_text(yaml.safe_dump(whole, sort_keys=False))

    @property
    def log(self) -> Path:
        return self.folder / "spillway.log"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ProductFailed("the product is not running")
        return self._process.pid

    def start(self) -> None:
        """Spawns the process and returns at once; ``started_at`` is the moment before."""
        if self._process is not None:
            raise ProductFailed("the product is running already")
        command = [*spillway_command(), "run", str(self.file)]
        if self._cgroup is not None:
            command = self._cgroup.command(command)
        self.life += 1
        with self.log.open("ab") as log:
            log.write(f"---- life {self.life}\n".encode())
            log.flush()
            self.started_at = time.time()
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        tell_reaper(f"watch {self.pid} {started_at(self.pid)} {int(signal.SIGKILL)}")
        self.memory.watch(self.pid)

    def kill(self) -> None:
        """SIGKILL to the process, and to it alone; what it leaves behind must end by itself."""
        pid = self.pid
        self.check_alive()
        left = {child: started_at(child) for child in family(pid) if child != pid}
        self.memory.stop()
        os.kill(pid, signal.SIGKILL)
        self._wait(10)
        deadline = time.monotonic() + 5
        while alive := [child for child, at in left.items() if at is not None and started_at(child) == at]:
            if time.monotonic() > deadline:
                for child in alive:
                    send(child, signal.SIGKILL)
                raise ProductFailed(f"children outlived a killed process by 5 s: {alive}")
            time.sleep(0.01)

    def terminate(self, seconds: float = 30) -> int:
        """SIGTERM; returns the exit status."""
        self.check_alive()
        self.memory.stop()
        os.kill(self.pid, signal.SIGTERM)
        return self._wait(seconds)

    def close(self) -> None:
        """Ends it, whatever its state."""
        self.memory.stop()
        if self._process is not None:
            for pid in family(self.pid):
                send(pid, signal.SIGKILL)
            self._wait(10)
        self._client.close()

    def check_alive(self) -> None:
        """Raises when it has ended by itself: no scenario allows that."""
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            tell_reaper(f"forget {self.pid}")
            self._process = None
            raise ProductFailed(f"the product ended by itself with {code}\n{self.log_end()}")

    def _wait(self, seconds: float) -> int:
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ProductFailed(f"the product did not end within {seconds} s\n{self.log_end()}") from None
        tell_reaper(f"forget {self._process.pid}")
        self._process = None
        return code

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    # -- HTTP -------------------------------------------------------------------------------------------------------
    def status(self) -> dict:
        """``/api/status``."""
        return dict(self._client.get("/api/status").raise_for_status().json())

    def sink(self, name: str) -> dict:
        return next(sink for sink in self.status()["sinks"] if sink["name"] == name)

    def metric(self, name: str) -> float:
        """One sample of ``/metrics``, with its labels as printed: ``spillway_backlog_messages{sink="jobs"}``."""
        for line in self._client.get("/metrics").raise_for_status().text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def start_backfill(self, sink: str, **order: object) -> list[dict]:
        """The backfills that this order begins, one a table."""
        answer = self._client.post(f"/api/sinks/{sink}/backfills", json=order)
        if not answer.is_success:
            raise ProductFailed(f"a backfill was refused: {answer.status_code} {answer.text}")
        started = answer.json()
        return list(started["data"]) if "data" in started else [started]

    def backfills(self, sink: str) -> list[dict]:
        """All that it knows of, the newest last."""
        return list(self._client.get(f"/api/sinks/{sink}/backfills").raise_for_status().json()["data"])

    def change_backfill(self, sink: str, backfill_id: str, state: str) -> dict:
        path = f"/api/sinks/{sink}/backfills/{backfill_id}"
        return dict(self._client.patch(path, json={"state": state}).raise_for_status().json())

    def is_up(self) -> bool:
        self.check_alive()
        try:
            return self._client.get("/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def wait_up(self, seconds: float = 30) -> None:
        self.wait(self.is_up, "start of the product", seconds=seconds)

    def wait(self, done: Callable[[], bool], what: str, *, seconds: float, every: float = 0.1) -> None:
        """Waits until ``done`` while the product lives; a status that cannot be had yet is not done."""
        deadline = time.monotonic() + seconds
        while True:
            self.check_alive()
            with suppress(httpx.TransportError, httpx.HTTPStatusError):
                if done():
                    return
            if time.monotonic() > deadline:
                raise ProductFailed(f"{what}: not within {seconds} s\n{self._last_status()}\n{self.log_end()}")
            time.sleep(every)

    def wait_streaming(self, conninfo: str, slot: str = "spillway", seconds: float = 30) -> None:
        """Waits until it is up and reads its slot, as the source tells it: what is committed now is its to deliver."""

        def active() -> bool:
            with psycopg.connect(conninfo) as connection:
                query = "select from pg_replication_slots where slot_name = %s and active"
                return connection.execute(query, [slot]).fetchone() is not None

        self.wait_up(seconds)
        self.wait(active, f"the slot {slot} to be read", seconds=seconds)

    def _last_status(self) -> str:
        try:
            return str(self.status())
        except (httpx.HTTPError, ValueError) as error:
            return f"no status: {error}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemorySampler:
    """The memory of a process while it lives: VmHWM, which misses nothing, and with children the family's PSS.

    ``peaks`` holds the most per label; `label` names the phase from now on. VmHWM only rises, so a phase's figure
    includes what the process had used before it, in the same life.
    """

    def __init__(self) -> None:
        self.label = "start"
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pid, self._stop), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample and ends; to be called before the process is."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self, pid: int, stop: threading.Event) -> None:
        while True:
            last = stop.is_set()
            try:
                self.peaks[self.label] = max(self.peaks.get(self.label, 0), memory_bytes(pid))
            except OSError:
                return  # it has ended
            if last:
                return
            stop.wait(SAMPLE_SECONDS)


def memory_bytes(pid: int) -> int:
    """VmHWM of the process; with children the PSS sum of its family, where that is more."""
    own = _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM") << 10
    members = _children(pid)
    if not members:
        return own
    total = 0
    for member in [pid, *members]:
        with suppress(OSError):  # ended meanwhile
            total += _kilobytes(Path(f"/proc/{member}/smaps_rollup"), "Pss") << 10
    return max(own, total)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found.extend(int(child) for child in (task / "children").read_text().split())
    return found + [grandchild for child in found for grandchild in _children_of_one_that_may_end(child)]


def _children_of_one_that_may_end(pid: int) -> list[int]:
    try:
        return _children(pid)
    except OSError:
        return []


def _kilobytes(path: Path, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def spillway_command() -> list[str]:
    """The console script beside this interpreter, as a user would start it."""
    script = Path(sys.executable).parent / "spillway"
    if not script.exists():
        raise ProductFailed(f"{script} is not there: install the project into the environment of {sys.executable}")
    return [str(script)]
