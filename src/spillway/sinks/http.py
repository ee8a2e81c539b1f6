"""What the sinks that speak HTTP share: one request, its bounds, and a name for everything that can go wrong.

- **A body is never copied as a whole.** It is given as parts, which may be made one by one, and goes to the socket in
  pieces of at most `PIECE_BYTES`, each after the socket has taken the one before. Its length is stated, so nothing is
  sent chunked. With gzip the compressed body is in memory once; large ones are compressed in a thread.
- **An answer is read up to a limit**; what is beyond is never held and ends the connection. It is asked for
  uncompressed: a compressed one could be of any size.
- **One deadline** covers a request from the connection to the last byte of the answer.
- Redirects are not followed: a POST would become a GET on the way.
- TLS is verified, always, against ``ca_file`` where given, else against the certificates httpx comes with (or
  ``SSL_CERT_FILE``). Proxies are taken from the environment (``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``,
  ``NO_PROXY``).

`Failure` says how far a request got, because only the sink knows what that means for a message.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.request import getproxies, proxy_bypass

import h11
import httpx

from spillway import __version__
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.sinks.connection import Connection, Cut, Proxy, Server, Unreachable, connect

PIECE_BYTES = 1024 * 1024
SMALL_BYTES = 64 * 1024  # parts below are put together
GZIP_LEVEL = 1  # a larger one costs more processor time than the network between the two is usually worth
IDLE_SECONDS = 4.0  # below the 5 s after which common servers close an idle connection

Method = Literal["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"]

_HEADERS = {"accept": "*/*", "accept-encoding": "identity", "user-agent": f"spillway/{__version__}"}


@dataclass(frozen=True, slots=True)
class Body:
    """``length_bytes`` None: not known before all parts are there; they are collected then."""

    parts: Iterable[bytes]
    length_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    whole: bool  # False: the answer was longer than what was read of it
    retry_after_seconds: float | None
    location: str = ""

    @property
    def text(self) -> str:
        """For people."""
        return self.body.decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class Failure:
    """There is no answer. ``unsent``: the server never got the request; ``timeout`` and ``cut``: it may have."""

    kind: Literal["unsent", "timeout", "cut"]
    reason: str
    detail: str


class Http:
    """Requests of one sink to one server, over kept connections. Safe to use from several tasks."""

    def __init__(
        self, url: httpx.URL, *, connections: int, timeout_seconds: float, ca_file: Path | None, clock: Clock
    ) -> None:
        self._url = url
        self._timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self._clock = clock
        self._server: Server | None = None
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(connections)

    def open(self) -> Server:
        """Repeatable. Raises SpillwayError for a CA file or a proxy that cannot be used."""
        if self._server is None:
            tls = _tls(self._ca_file) if self._url.scheme == "https" else None
            port = self._url.port or (80 if tls is None else 443)
            self._server = Server(self._url.host, port, tls, _proxy(self._url))
        return self._server

    async def close(self) -> None:
        """Idempotent."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()
        for connection in idle:
            await connection.closed

    async def request(
        self,
        method: Method,
        url: httpx.URL,
        headers: Mapping[str, str],
        content: Body | None = None,
        *,
        gzip: bool = False,
        max_answer_bytes: int = 64 * 1024,
    ) -> Answer | Failure:
        """``headers``: their names in lower case."""
        server = self.open()
        headers = {"host": self._url.netloc.decode(), **_HEADERS, **headers}
        try:
            async with asyncio.timeout(self._timeout_seconds), self._free:
                parts: Iterable[bytes] = ()
                if content is not None:
                    parts, length_bytes = content.parts, content.length_bytes
                    if gzip:
                        parts, length_bytes = await _compressed(parts), None
                        headers["content-encoding"] = "gzip"
                    if length_bytes is None:
                        parts = list(parts)
                        length_bytes = sum([len(part) for part in parts])
                    headers["content-length"] = str(length_bytes)
                encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
                target = url.raw_path
                if server.proxy is not None and server.tls is None:
                    target = b"http://" + url.netloc + target
                    encoded += server.proxy.headers
                connection = self._kept() or await connect(server)
                response = await connection.exchange(method.encode(), target, encoded, _pieces(parts), max_answer_bytes)
                if connection.usable:
                    self._idle.append(connection)
        except TimeoutError:
            return Failure("timeout", "timeout", f"no answer within {self._timeout_seconds:g} s")
        except Unreachable as error:
            return _unsent(error)
        except (Cut, h11.ProtocolError) as error:
            return Failure("cut", "connection_cut", f"the connection ended before the answer: {error}")
        return Answer(
            response.status,
            response.body,
            response.whole,
            self._retry_after(response.headers.get(b"retry-after", b"").decode("latin-1").strip()),
            response.headers.get(b"location", b"").decode("latin-1"),
        )

    def _kept(self) -> Connection | None:
        """The connection that was used last; those that have been idle for long are closed."""
        oldest = asyncio.get_running_loop().time() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since >= oldest and connection.quiet:
                return connection
            connection.abort()
        return None

    def _retry_after(self, value: str) -> float | None:
        """The header Retry-After, which holds seconds or a date (RFC 9110, section 10.2.3)."""
        if not value:
            return None
        if value.isascii() and value.isdigit():
            return float(value)
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - self._clock.wall())
        except ValueError:
            return None


def parse_url(what: str, url: str) -> httpx.URL:
    """An absolute http(s) URL, or SpillwayError. The URL is not repeated in the error: it may hold a password."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SpillwayError("url", f"{what} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SpillwayError("url", f"{what} is not a URL", "write http://HOST:PORT/... or https://...")
    return parsed


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts, small ones put together and large ones divided."""
    pending: list[bytes] = []
    size = 0
    for part in parts:
        if len(part) < SMALL_BYTES:
            pending.append(part)
            size += len(part)
            if size < SMALL_BYTES:
                continue
        if pending:
            yield b"".join(pending)
            pending, size = [], 0
        if SMALL_BYTES <= len(part) <= PIECE_BYTES:
            yield part
        elif len(part) > PIECE_BYTES:
            view = memoryview(part)
            for start in range(0, len(part), PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])
    if pending:
        yield b"".join(pending)


async def _compressed(parts: Iterable[bytes]) -> list[bytes]:
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    compressed: list[bytes] = []
    for piece in _pieces(parts):
        if len(piece) < SMALL_BYTES:
            compressed.append(compressor.compress(piece))
        else:  # piece by piece: whoever is cancelled leaves one piece behind, not a body
            compressed.append(await asyncio.to_thread(compressor.compress, piece))
    compressed.append(compressor.flush())
    return compressed


def _proxy(url: httpx.URL) -> Proxy | None:
    proxies = getproxies()
    value = proxies.get(url.scheme) or proxies.get("all")
    if not value or proxy_bypass(url.netloc.decode()):
        return None
    try:
        proxy = httpx.URL(value if "://" in value else f"http://{value}")
        port = proxy.port or 80
    except httpx.InvalidURL:
        proxy = None
    if proxy is None or proxy.scheme != "http" or not proxy.host:
        raise SpillwayError(
            "proxy",
            f"the proxy that the environment names for {url.scheme} is not of the form http://[USER:PASSWORD@]HOST:PORT",
            f"set {url.scheme.upper()}_PROXY, or name {url.host} in NO_PROXY",
        )
    return Proxy(proxy.host, port, f"{proxy.username}:{proxy.password}" if proxy.username else "")


@functools.cache
def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """One context for all sinks that trust the same: loading the certificates takes some 20 ms and a megabyte."""
    if ca_file is None:
        return httpx.create_ssl_context()  # not the system's, which a container may lack
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise SpillwayError(
            "ca_file", f"the CA file {ca_file} cannot be used: {error}", "give a PEM file that can be read"
        ) from error


def _unsent(error: Unreachable) -> Failure:
    reason = "connect_failed"
    match error.__cause__:
        case ssl.SSLError():
            reason = "tls_failed"
        case socket.gaierror():
            reason = "name_not_resolved"
        case ConnectionRefusedError():
            reason = "connection_refused"
    return Failure("unsent", reason, str(error))
