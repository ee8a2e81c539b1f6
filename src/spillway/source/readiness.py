"""The socket of a libpq connection, beside libpq: how much waits in it, and waiting until it is ready.

libpq reads and writes; here is only looked. Several tasks may wait at once, one for reading and one for writing.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios

from psycopg.pq.abc import PGconn

# TLS may hold decrypted bytes that the socket does not show, and libpq has no call to ask for them.
TLS_RECHECK_SECONDS = 0.05


class Readiness:
    def __init__(self, pgconn: PGconn) -> None:
        self.descriptor = pgconn.socket
        self.encrypted = bool(pgconn.ssl_in_use or pgconn.used_gssapi)
        self._waiting: set[asyncio.Future[None]] = set()
        self._open = True

    def queued_bytes(self) -> int:
        """How much the kernel holds for us. 0 also at the end of the stream, which `wait` reports as readable."""
        size = array.array("i", [0])
        fcntl.ioctl(self.descriptor, termios.FIONREAD, size)
        return size[0]

    async def wait(self, *, writing: bool) -> None:
        """Until the socket is ready, somebody calls `wake`, or (TLS) it is time to look again."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        recheck = loop.call_later(TLS_RECHECK_SECONDS, wake) if self.encrypted and not writing else None
        self._waiting.add(ready)
        (loop.add_writer if writing else loop.add_reader)(self.descriptor, wake)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if recheck is not None:
                recheck.cancel()
            if self._open:
                (loop.remove_writer if writing else loop.remove_reader)(self.descriptor)

    def wake(self) -> None:
        """Let all who wait look for themselves."""
        for ready in self._waiting:
            if not ready.done():
                ready.set_result(None)

    def close(self) -> None:
        """Before the descriptor is closed: its number may be another connection's a moment later."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.descriptor)
        loop.remove_writer(self.descriptor)
        self._open = False
