"""The engine as a user runs it: a file, ``spillway run FILE``, the command line beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

from spillway.errors import SpillwayError

LIMIT_MB = 64
SLOT = "spillway"
START_SECONDS = 30.0
STOP_SECONDS = 20.0

_CONFIG = """\
memory: {{limit_mb: {limit}}}
server: {{listen: "127.0.0.1:{port}"}}
databases:
  - name: shop
    url: "{url}"
    slot: {{name: {slot}, create_if_not_exists: true}}
    publication: {{name: spillway, create_if_not_exists: true}}
sinks:
  - name: table          # a table kept equal to the source table; the one that will break
    database: shop
    source: {{include_tables: [public.orders]}}
    destination: {{type: sqlite, path: table.db}}
  - name: audit          # every change as a line of JSON; it stays healthy
    database: shop
    source: {{include_tables: [public.orders]}}
    destination: {{type: file, path: audit.ndjson}}
"""


class Engine:
    """Started, killed and started again. What it writes goes to a log in its folder."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.table, self.audit, self.state = folder / "table.db", folder / "audit.ndjson", folder / "spillway.db"
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._file, self._log = folder / "spillway.yml", folder / "spillway.log"
        self._file.write_text(
            _CONFIG.format(limit=LIMIT_MB, port=self.url.rpartition(":")[2], url=database_url, slot=SLOT)
        )
        self._http = httpx.Client(base_url=self.url, timeout=10, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None
        # A user's own SPILLWAY_URL or token must not lead elsewhere.
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SPILLWAY_")}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._http.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Returns after how many seconds it answers."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_COMMAND, "run", self._file],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which ends it in its turn
            )
        while time.monotonic() - began < START_SECONDS:
            with suppress(httpx.TransportError):
                if self._http.get("/health").is_success:
                    return time.monotonic() - began
            self.check()
            time.sleep(0.05)
        raise SpillwayError("demo_engine", f"the engine does not answer; its log ends with: {self.log_end()}")

    def kill(self) -> None:
        """SIGKILL: it has no chance to write anything."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)

    def check(self) -> None:
        """Raises when it has ended by itself."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise SpillwayError("demo_engine", f"the engine ended with {status}; its log: {self.log_end()}")

    def sink(self, name: str) -> dict[str, object]:
        """What ``/api/status`` says of a sink."""
        try:
            answer = self._http.get("/api/status").raise_for_status()
        except httpx.HTTPError as error:
            self.check()
            raise SpillwayError("demo_engine", f"no status: {error}; its log: {self.log_end()}") from None
        found: list[dict[str, object]] = answer.json()["sinks"]
        return next(sink for sink in found if sink["name"] == name)

    def command(self, *words: str) -> str:
        """What a command of the user's answers."""
        done = subprocess.run(
            [*_COMMAND, *words, "--url", self.url],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SpillwayError("demo_command", f"spillway {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def log_end(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


_COMMAND = [sys.executable, "-m", "spillway"]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
