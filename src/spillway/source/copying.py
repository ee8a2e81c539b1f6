"""COPY TO STDOUT on a connection of psycopg, row by row into a decoder, without an await for each.

psycopg's own COPY gives a Python object and an await per row. Here libpq is asked for what is whole in memory by the
decoder itself (`Decoder.fill_page`), and a wait comes once per bite, as in spillway.source.stream. While this is going
on nothing else may use the connection.
"""

from __future__ import annotations

import contextlib

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from spillway.pgoutput import Decoder, Full
from spillway.source.connect import Connection
from spillway.source.readiness import Readiness
from spillway.source.stream import TLS_HIDDEN_READS

BITE_READS = 8  # of at least 8 kB each: what libpq may hold beside a large row
CANCEL_TIMEOUT_SECONDS = 5.0  # a cancel request that does not get through: the rows are read to their end

_ENDED = -1  # what libpq returns as a size when the server has ended COPY


class CopyOut:
    """`start`, then `fill` once, then `cancel` if that has not come to the end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._socket = Readiness(connection.pgconn)

    async def start(self, statement: bytes) -> None:
        self._pgconn.send_query(statement)
        while self._pgconn.flush():
            await self._socket.wait(writing=True)
        result = await self._result()
        if result is None or result.status != ExecStatus.COPY_OUT:
            while await self._result() is not None:
                pass
            raise self._error(result)

    async def fill(self, decoder: Decoder, oid: int, credit_bytes: int, max_changes: int) -> Full | None:
        """All rows (None), or as many as there was room for."""
        while True:
            stop = decoder.fill_page(self._pgconn, oid, credit_bytes, max_changes)
            if isinstance(stop, Full):
                return stop
            if stop is not None:
                await self._end(stop.size)
                return None
            await self._bite()

    async def cancel(self) -> None:
        """Have the server stop, and take what was on its way. The transaction is aborted, unless all had been sent."""
        with contextlib.suppress(psycopg.Error):  # then it sends all that it has, for as long as its timeout lets it
            await self._connection.cancel_safe(timeout=CANCEL_TIMEOUT_SECONDS)
        while True:
            size, _ = self._pgconn.get_copy_data(1)
            if size == 0:
                await self._bite()
            elif size < 0:
                break
        with contextlib.suppress(psycopg.errors.QueryCanceled):
            await self._end(size)

    async def _end(self, size: int) -> None:
        if size != _ENDED:
            raise self._error(None)
        first: PGresult | None = None
        while (result := await self._result()) is not None:
            first = first or result
        if first is None or first.status != ExecStatus.COMMAND_OK:
            raise self._error(first)

    async def _result(self) -> PGresult | None:
        while self._pgconn.is_busy():
            await self._bite()
        return self._pgconn.get_result()

    def _error(self, result: PGresult | None) -> psycopg.Error:
        if result is None or result.status != ExecStatus.FATAL_ERROR:
            return psycopg.OperationalError(self._pgconn.get_error_message())
        return psycopg.errors.error_from_result(result, "utf-8")

    async def _bite(self) -> None:
        await self._socket.wait(writing=False)
        for _ in range(BITE_READS):
            self._pgconn.consume_input()
            if not self._socket.queued_bytes():
                break
        if self._socket.encrypted:
            for _ in range(TLS_HIDDEN_READS):
                self._pgconn.consume_input()
