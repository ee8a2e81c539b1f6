"""An HTTP server on a real socket that records what it gets and answers as a test tells it.

For what a real server cannot be made to answer. ``answer`` is called once per request; `CUT` closes the connection
without an answer, `HANG` leaves the request unanswered until the server closes.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

# For 127.0.0.1, signed by itself, valid for a hundred years. Its key is no secret: nobody trusts it but the tests.
CERTIFICATE = Path(__file__).parent / "tls" / "cert.pem"
_KEY = Path(__file__).parent / "tls" / "key.pem"


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> bytes:
        return gzip.decompress(self.raw) if self.headers.get("content-encoding") == "gzip" else self.raw


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


CUT = Reply(0)
HANG = Reply(-1)


class Recorder:
    def __init__(self, answer: Callable[[Request], Reply] = lambda _request: Reply(), *, tls: bool = False) -> None:
        self._tls: ssl.SSLContext | None = None
        if tls:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(CERTIFICATE, _KEY)
        self.answer = answer
        self.requests: list[Request] = []
        self.arrived = asyncio.Event()  # set by every request; a test clears it
        self.in_flight = 0
        self.most_in_flight = 0
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Again after `stop`: on the same port."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test has ended
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        assert "transfer-encoding" not in headers, "every request says its length"
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(method, target, headers, raw)
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.arrived.set()
        try:
            reply = self.answer(request)
            if reply is CUT:
                return False
            if reply is HANG:
                await asyncio.get_running_loop().create_future()
        finally:
            self.in_flight -= 1
        lines = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(reply.body)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        body = b"" if method == "HEAD" else reply.body
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        return True
