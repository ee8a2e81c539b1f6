"""The receiver of the webhooks: ``receiver.c``, compiled once with gcc into the cache of the servers.

It answers every request at once, with one thread: it is not what a bench measures (see `Receiver.cpu_seconds`).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import time
from array import array
from pathlib import Path
from typing import Self

from servers.cache import ensure, run
from servers.ports import free_port
from servers.process import Server

_SOURCE = Path(__file__).with_name("receiver.c")


def _program() -> Path:
    def build(folder: Path) -> None:
        shutil.copy(_SOURCE, folder)
        run("gcc", "-O2", "-Wall", "-o", "receiver", _SOURCE.name, cwd=folder)

    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    return ensure(f"bench-receiver-{digest}", build) / "receiver"


class Receiver(Server):
    """``with Receiver() as receiver``; with ``latencies`` it notes when each message came and was committed."""

    name = "receiver"

    def __init__(self, *, latencies: bool = False) -> None:
        super().__init__()
        self.port = free_port()
        self._latencies = self.folder / "latencies" if latencies else None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        self._spawn([_program(), str(self.port), *([self._latencies] if self._latencies else [])], {})
        self._wait_ready(self._answers, seconds=20)
        return self

    def _answers(self) -> bool:
        try:
            self.told()
        except OSError:
            return False
        return True

    def told(self) -> dict[str, int]:
        """``requests``, ``messages`` and ``bytes`` so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        return time.clock_gettime(~self.pid << 3 | 2)

    def arrivals(self) -> list[tuple[int, int]]:
        """(when its request was complete, when it was committed) of each message, in microseconds since 1970."""
        assert self._latencies is not None
        self.told()
        pairs = array("q", self._latencies.read_bytes())
        return list(zip(pairs[::2], pairs[1::2], strict=True))
