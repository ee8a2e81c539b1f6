"""One HTTP/1.1 connection: made, used for one request after the other, and dropped when it is in doubt.

h11 keeps to the protocol (framing, states, limits of heads); this brings it to a socket of the loop, with back-pressure
in both directions: a body is written as the socket takes it, an answer is read as it is asked for. It is used directly
because a request costs a sixth of what it costs through httpx, which is written for all that HTTP can be.

- A connection on which anything arrives between two requests is dropped: an answer that nobody asked for must not be
  taken for that of the next request.
- An answer that comes while the body does not get through (413) ends the sending, and the connection after it.
- Names are resolved for every connection. Addresses are tried in turn; one that is silent for `ADDRESS_SECONDS` gives
  way to the next.
- Through a proxy: with TLS by CONNECT, else by naming the whole URL (RFC 9110, 9.3.6 and 9112, 3.2.2).
"""

from __future__ import annotations

import asyncio
import base64
import select
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import h11

ADDRESS_SECONDS = 5.0
_UNREAD_BYTES = 256 * 1024

Headers = list[tuple[bytes, bytes]]


class Unreachable(Exception):
    """No connection came about; the cause says why."""


class Cut(Exception):
    """The connection has ended in a request."""


@dataclass(frozen=True, slots=True)
class Proxy:
    host: str
    port: int
    user_password: str = ""  # user:password

    @property
    def headers(self) -> Headers:
        token = base64.b64encode(self.user_password.encode())
        return [(b"proxy-authorization", b"Basic " + token)] if self.user_password else []


@dataclass(frozen=True, slots=True)
class Server:
    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: Proxy | None


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: dict[bytes, bytes]  # names in lower case
    body: bytes
    whole: bool  # False: there is more than was asked for


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._busy = False
        self._full = False  # the socket takes nothing more for now
        self._unread_bytes = 0  # received since all that there was has been taken
        self._changed: asyncio.Future[None] | None = None
        self._lost: BaseException | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.idle_since = 0.0  # of the loop's clock

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def quiet(self) -> bool:
        """Nothing has arrived, not even the end, that the loop has not come to yet."""
        assert self._transport is not None
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def exchange(
        self, method: bytes, target: bytes, headers: Headers, pieces: Iterable[bytes], most_bytes: int
    ) -> Response:
        """Raises `Cut` and h11.ProtocolError. Whatever it raises, the connection is closed after it."""
        self._busy = True
        self._unread_bytes = 0
        try:
            await self._send(h11.Request(method=method, target=target, headers=headers))
            for piece in pieces:
                if not await self._send(h11.Data(data=piece)):
                    break
            else:
                await self._send(h11.EndOfMessage())
            return await self._answer(most_bytes)
        except BaseException:
            self.abort()
            raise
        finally:
            self._busy = False
            self.idle_since = self._loop.time()

    async def tunnel(self, server: Server, tls: ssl.SSLContext, proxy: Proxy) -> None:
        """Have the proxy connect to the server, and begin TLS with that."""
        assert self._transport is not None
        self._busy = True
        authority = b"%b:%d" % (
            server.host.encode("idna") if ":" not in server.host else b"[%b]" % server.host.encode(),
            server.port,
        )
        await self._send(
            h11.Request(method=b"CONNECT", target=authority, headers=[(b"host", authority), *proxy.headers])
        )
        await self._send(h11.EndOfMessage())
        event = await self._event()
        if not isinstance(event, h11.Response) or event.status_code >= 300:
            status = f"{event.status_code}" if isinstance(event, h11.Response) else "no answer"
            raise Cut(f"the proxy did not connect: {status}")
        self._http = h11.Connection(h11.CLIENT)
        self._transport = await self._loop.start_tls(self._transport, self, tls, server_hostname=server.host)
        self._busy = False

    async def _send(self, event: h11.Event) -> bool:
        """False: there is no point in sending more."""
        data = self._http.send(event)
        if not self.usable:
            return False
        assert self._transport is not None
        if data:
            self._transport.write(data)
        while self._full:
            if self._lost is not None or self._unread_bytes:
                return False
            await self._change()
        return True

    async def _answer(self, most_bytes: int) -> Response:
        status, headers = 0, dict[bytes, bytes]()
        body: list[bytes] = []
        left = most_bytes
        while left >= 0:
            event = await self._event()
            if isinstance(event, h11.Response):
                status, headers = event.status_code, dict(event.headers)
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data[:left]))
                left -= len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif not isinstance(event, h11.InformationalResponse):
                raise Cut("the server closed it")
        if self._http.our_state is self._http.their_state is h11.DONE and not self._http.trailing_data[0]:
            self._http.start_next_cycle()
        else:
            self.abort()
        return Response(status, headers, b"".join(body), left >= 0)

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._lost is not None:
                raise Cut(str(self._lost)) from self._lost
            self._unread_bytes = 0
            assert self._transport is not None
            self._transport.resume_reading()
            await self._change()
        return event

    async def _change(self) -> None:
        self._changed = self._loop.create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # -- what the transport says --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by its class

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            self.abort()
            return
        self._http.receive_data(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > _UNREAD_BYTES and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """The transport closes itself then."""
        self._http.receive_data(b"")
        self._wake()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()

    def connection_lost(self, error: BaseException | None) -> None:
        self._lost = error or ConnectionAbortedError("it was closed")
        self.closed.set_result(None)
        self._wake()


async def connect(server: Server) -> Connection:
    """Raises `Unreachable`."""
    loop = asyncio.get_running_loop()
    at = server.proxy or server
    try:
        found = await _socket(at.host, at.port)
        if server.proxy is None or server.tls is None:
            name = server.host if server.tls else None
            _, connection = await loop.create_connection(Connection, sock=found, ssl=server.tls, server_hostname=name)
            return connection
        _, connection = await loop.create_connection(Connection, sock=found)
        try:
            await connection.tunnel(server, server.tls, server.proxy)
        except BaseException:
            connection.abort()
            raise
    except (OSError, Cut, h11.ProtocolError) as error:
        raise Unreachable(str(error) or type(error).__name__) from error
    return connection


async def _socket(host: str, port: int) -> socket.socket:
    """Connected to the first address that answers."""
    loop = asyncio.get_running_loop()
    addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for place, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        tried = socket.socket(family, kind, protocol)
        try:
            tried.setblocking(False)
            async with asyncio.timeout(ADDRESS_SECONDS if place < len(addresses) else None):
                await loop.sock_connect(tried, address)
        except OSError:  # a time-out is one, too
            tried.close()
            if place == len(addresses):
                raise
        except BaseException:
            tried.close()
            raise
        else:
            return tried
    raise OSError(f"{host} has no address")
