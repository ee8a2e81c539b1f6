"""What the sinks that speak HTTP share: one request, its bounds, and a name for everything that can go wrong.

- **A body is never copied as a whole.** It is given as parts, which may be made one by one, and goes to the socket in
  pieces of at most `PIECE_BYTES`, each after the socket has taken the one before. Its length is stated, so nothing is
  sent chunked. With gzip the compressed body is in memory once; large ones are compressed in a thread.
- **An answer is read up to a limit**; what is beyond is never held and ends the connection. It is asked for
  uncompressed: a compressed one could be of any size.
- **One deadline** covers a request from the connection to the last byte of the answer.
- Redirects are not followed: a POST would become a GET on the way.
- TLS is verified, always, against ``ca_file`` where given, else against the certificates httpx comes with (or
  ``SSL_CERT_FILE``). Proxies are taken from the environment (``HTTPS_PROXY``, ``NO_PROXY``).

`Failure` says how far a request got, because only the sink knows what that means for a message.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import httpx

from spillway import __version__
from spillway.clock import Clock
from spillway.errors import SpillwayError

PIECE_BYTES = 1024 * 1024
SMALL_BYTES = 64 * 1024  # parts below are put together
GZIP_LEVEL = 1  # a larger one costs more processor time than the network between the two is usually worth
IDLE_SECONDS = 4.0  # below the 5 s after which common servers close an idle connection


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
    """Requests of one sink, over a pool of kept connections. Safe to use from several tasks."""

    def __init__(self, *, connections: int, timeout_seconds: float, ca_file: Path | None, clock: Clock) -> None:
        self._connections = connections
        self._timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self._clock = clock
        self._client: httpx.AsyncClient | None = None

    def open(self) -> None:
        """Repeatable. Raises SpillwayError for a CA file that cannot be used."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                http2=False,
                verify=_tls(self._ca_file),
                timeout=httpx.Timeout(None),  # one deadline for the whole, below
                follow_redirects=False,
                limits=httpx.Limits(
                    max_connections=self._connections,
                    max_keepalive_connections=self._connections,
                    keepalive_expiry=IDLE_SECONDS,
                ),
                headers={"accept-encoding": "identity", "user-agent": f"spillway/{__version__}"},
            )

    async def close(self) -> None:
        """Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def request(
        self,
        method: Literal["GET", "HEAD", "PUT", "POST"],
        url: httpx.URL,
        headers: httpx.Headers | Mapping[str, str],
        content: Body | None = None,
        *,
        gzip: bool = False,
        max_answer_bytes: int = 64 * 1024,
    ) -> Answer | Failure:
        self.open()
        assert self._client is not None
        headers = httpx.Headers(headers)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                stream = None
                if content is not None:
                    parts, length_bytes = content.parts, content.length_bytes
                    if gzip:
                        parts, length_bytes = await _compressed(parts), None
                        headers["content-encoding"] = "gzip"
                    if length_bytes is None:
                        parts = list(parts)
                        length_bytes = sum([len(part) for part in parts])
                    headers["content-length"] = str(length_bytes)
                    stream = _stream(parts)
                async with self._client.stream(method, url, headers=headers, content=stream) as response:
                    body, whole = await _read(response, max_answer_bytes)
        except (TimeoutError, httpx.TimeoutException):
            return Failure("timeout", "timeout", f"no answer within {self._timeout_seconds:g} s")
        except (httpx.ConnectError, httpx.ProxyError) as error:
            return _unsent(error)
        except httpx.TransportError as error:
            return Failure("cut", "connection_cut", f"the connection ended before the answer: {_words(error)}")
        return Answer(
            response.status_code, body, whole, self._retry_after(response), response.headers.get("location", "")
        )

    def _retry_after(self, response: httpx.Response) -> float | None:
        """The header Retry-After, which holds seconds or a date (RFC 9110, section 10.2.3)."""
        value = response.headers.get("retry-after", "").strip()
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


async def _stream(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in _pieces(parts):
        yield piece


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


async def _read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    chunks: list[bytes] = []
    left = limit
    async for chunk in response.aiter_raw():
        chunks.append(chunk[:left])
        left -= len(chunk)
        if left < 0:
            return b"".join(chunks), False
    return b"".join(chunks), True


@functools.cache
def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """One context for all sinks that trust the same: loading the certificates takes some 20 ms and a megabyte."""
    if ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise SpillwayError(
            "ca_file", f"the CA file {ca_file} cannot be used: {error}", "give a PEM file that can be read"
        ) from error


def _unsent(error: httpx.TransportError) -> Failure:
    """Why no connection came about. httpx keeps that in the causes of its own error."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            return Failure("unsent", "tls_failed", str(cause))
        if isinstance(cause, socket.gaierror):
            return Failure("unsent", "name_not_resolved", str(cause))
        if isinstance(cause, ConnectionRefusedError) or (
            isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED
        ):
            return Failure("unsent", "connection_refused", str(cause))
    return Failure("unsent", "connect_failed", _words(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    pending = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            pending.extend(current.exceptions)
        pending.extend(cause for cause in (current.__cause__, current.__context__) if cause is not None)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
