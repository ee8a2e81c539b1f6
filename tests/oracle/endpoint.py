"""Starts the recorder and the proxy, and reads what they wrote."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from oracle.rules import Delivery
from servers.ports import free_port
from servers.process import Server, wait_until

HERE = Path(__file__).parent
APPLIED = {"ok", "slow", "apply_cut"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the recorder saw it."""

    number: int
    at: float  # wall seconds of its arrival
    life: int
    path: str
    do: str
    status: int
    messages: Sequence[Mapping[str, object]]

    @property
    def applied(self) -> bool:
        return self.do in APPLIED

    @property
    def acknowledged(self) -> bool:
        return 200 <= self.status < 300


class Recorder(Server):
    """The recording endpoint. It keeps its log over ``stop`` and ``start``, and forgets its script."""

    name = "recorder"

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.port = free_port()
        self.requests_log = self.folder / "requests.ndjson"
        self._seed = seed
        self._client = httpx.Client(base_url=self.url, timeout=10, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        program = [sys.executable, "-I", HERE / "recorder.py", "--port", str(self.port)]
        self._spawn([*program, "--log", self.requests_log, "--seed", str(self._seed)], {})
        self._wait_ready(lambda: answers(self._client, "/_control/state"), seconds=20)
        return self

    def stop(self) -> None:
        """Closes the port: from now on connections are refused."""
        self._end(self.stop_signal, seconds=10)

    def close(self) -> None:
        self._client.close()
        super().close()

    def script(self, rules: Sequence[Mapping[str, object]]) -> None:
        self._client.post("/_control/script", json=rules).raise_for_status()

    def mark(self, **what: object) -> None:
        """Writes a line into the log; ``life=N`` numbers the requests that follow."""
        self._client.post("/_control/mark", json=what).raise_for_status()

    def applied_messages(self) -> dict[str, int]:
        """How many messages were applied, by path."""
        state = self._client.get("/_control/state").raise_for_status().json()
        return dict(state["applied_messages"])

    def wait_no_connections(self) -> None:
        """All requests of a process that is gone are in the log once this returns."""

        def alone() -> bool:
            return self._client.get("/_control/state").json()["connections"] == 0

        wait_until(alone, "end of the connections to the recorder", seconds=30)

    @property
    def size(self) -> int:
        """Where the log ends now: an ``offset`` for `requests`."""
        return self.requests_log.stat().st_size if self.requests_log.exists() else 0

    def requests(self, path: str = "/", offset: int = 0) -> Iterator[Request]:
        """Everything received so far below a path, in order of arrival, from a place in the log on."""
        for line in json_lines(self.requests_log, offset):
            if "mark" not in line and str(line["path"]).startswith(path):
                body = json.loads(line["body"])
                data = body.get("data")
                messages = data if isinstance(data, list) else [body]
                yield Request(line["n"], line["t"], line["life"], line["path"], line["do"], line["status"], messages)

    def deliveries(self, path: str) -> Iterator[Delivery]:
        for request in self.requests(path):
            for message in request.messages:
                yield Delivery(request.number, request.life, message, request.applied, request.acknowledged)


@dataclass(frozen=True, slots=True)
class Passed:
    """One request as the proxy saw it."""

    at: float
    method: str
    path: str
    bytes: int


class Proxy(Server):
    """Stands before the server on ``upstream_port`` and writes down the time of each request."""

    name = "proxy"

    def __init__(self, upstream_port: int) -> None:
        super().__init__()
        self.port = free_port()
        self.requests_log = self.folder / "requests.ndjson"
        self._upstream_port = upstream_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        program = [sys.executable, "-I", HERE / "proxy.py", "--port", str(self.port)]
        self._spawn([*program, "--upstream", str(self._upstream_port), "--log", self.requests_log], {})
        self._wait_ready(self._listens, seconds=20)
        return self

    def _listens(self) -> bool:
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            try:
                client.get("/", timeout=2)
            except httpx.ConnectError:
                return False
            except httpx.TransportError:
                return True  # it took the connection; the server behind is down
        return True

    def passed(self, offset: int = 0) -> Iterator[Passed]:
        """Requests from a place in the log on (see `size`)."""
        for line in json_lines(self.requests_log, offset):
            if "method" in line:
                yield Passed(line["t"], line["method"], line["path"], line["bytes"])

    @property
    def size(self) -> int:
        return self.requests_log.stat().st_size if self.requests_log.exists() else 0


def answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


def json_lines(path: Path, offset: int = 0) -> Iterator[dict]:
    """The whole lines of a file that another process appends to."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset, os.SEEK_SET)
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
