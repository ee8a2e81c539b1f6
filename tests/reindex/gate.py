"""A TCP relay before a server that holds requests back: ``with Gate(port) as gate``.

`hold` names requests by the beginning of what is sent; such a request stands at the gate until `release`, while others
go through. It is recognised where it begins in a read of its own, which is so for a client that writes one request and
waits for the answer.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_READ_BYTES = 1 << 18


class Gate:
    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._held: dict[bytes, asyncio.Future[bool]] = {}
        self._waiting: dict[bytes, threading.Event] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._closed = False
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        await self._cut()

    # -- what a test does -------------------------------------------------------------------------------------------
    def hold(self, request: str) -> None:
        """From now on, requests that begin so: ``POST /_aliases``."""
        self._waiting[request.encode()] = threading.Event()
        self._held[request.encode()] = self._loop.create_future()

    def wait_held(self, request: str, seconds: float = 60) -> None:
        assert self._waiting[request.encode()].wait(seconds), f"no request {request}"

    def release(self, request: str) -> None:
        """Those that stand there, and all that come."""
        self._loop.call_soon_threadsafe(self._held.pop(request.encode()).set_result, True)

    def drop(self, request: str) -> None:
        """Those that stand there never get through; those that come do."""
        self._loop.call_soon_threadsafe(self._held.pop(request.encode()).set_result, False)

    def close(self) -> None:
        """Nobody gets through, and whoever was is cut off."""
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    def open(self) -> None:
        self._closed = False

    # -- the relay --------------------------------------------------------------------------------------------------
    async def _cut(self) -> None:
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        if self._closed:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        back = asyncio.create_task(self._pump(up_reader, writer))
        try:
            with suppress(ConnectionError):
                while data := await reader.read(_READ_BYTES):
                    await self._pass(data)
                    up_writer.write(data)
                    await up_writer.drain()
        except asyncio.CancelledError:
            pass  # cut off: the streams are closed below
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            writer.transport.abort()
            up_writer.transport.abort()

    async def _pass(self, data: bytes) -> None:
        for request, through in list(self._held.items()):
            if data.startswith(request):
                self._waiting[request].set()
                if not await asyncio.shield(through):
                    raise ConnectionError(f"{request.decode()} was dropped")

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                writer.write(data)
                await writer.drain()
