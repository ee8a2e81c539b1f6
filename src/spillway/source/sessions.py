"""Some connections for questions that are asked on behalf of changes, made when they are first needed.

`Sessions.one` gives a connection to one piece of work at a time and makes as many as were asked for; who comes when all
are at work waits. What differs from other query connections (`spillway.source.connect`):

- transactions are read only, no statement takes longer than its timeout, and nothing is compiled (JIT): the statements
  are many and short;
- the ``search_path`` may be the role's own, since the SQL is the user's and was written for that. Values of regclass
  and its like then have their schema where the path makes it necessary;
- the server was found to be the one that is expected (`spillway.source.origin`).

A connection whose work was broken off in the middle is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from spillway.errors import SourceUnavailable
from spillway.source.connect import Connection, connect_query
from spillway.source.origin import Expected, check_origin
from spillway.source.queries import fetch_one
from spillway.source.refusal import query_refusal
from spillway.source.wrapped import Prepared

GRACE_SECONDS: Final = 30.0  # on top of what the server is told to keep to; then the connection counts as dead

_OURS: Final[Mapping[str, str]] = {
    "default_transaction_read_only": "on",
    "jit": "off",
    "lock_timeout": "0",
}


@dataclass(slots=True)
class Session:
    connection: Connection
    standby: bool  # the server is in recovery
    prepared: dict[tuple[str, str], Prepared] = field(default_factory=dict)  # by table
    numbered: int = 0  # names given to prepared statements
    served: bool = False  # it has done a piece of work before

    def number(self) -> int:
        self.numbered += 1
        return self.numbered


class Sessions:
    """``purpose``: part of the connections' application_name. ``expected`` is asked for each new connection.
    ``settings`` go on top of all others."""

    def __init__(
        self,
        conninfo: str,
        slot: str,
        purpose: str,
        expected: Callable[[], Expected],
        timeout_seconds: float,
        connections: int,
        *,
        own_search_path: bool,
        settings: Mapping[str, str],
    ) -> None:
        self.expected = expected
        self.timeout_seconds = timeout_seconds
        self._conninfo = conninfo
        self._slot = slot
        self._purpose = purpose
        self._own_search_path = own_search_path
        self._settings = settings
        self._turns = asyncio.Semaphore(connections)
        self._idle: list[Session] = []
        self._closed = False

    @contextlib.asynccontextmanager
    async def one(self, *, fresh: bool) -> AsyncIterator[Session]:
        """``fresh``: made now, and those that wait for work are given up: they may be lost, too. Raises what
        `connect_query` and `check_origin` do, and SourceUnavailable ``no_answer``."""
        async with self._turns:
            if self._closed:
                raise SourceUnavailable("closed", f"the connections for {self._purpose} were closed")
            if fresh:
                await self._close_idle()
            seconds = self.timeout_seconds + GRACE_SECONDS
            session: Session | None = None
            try:
                async with asyncio.timeout(seconds):
                    session = self._idle.pop() if self._idle else await self._connect()
                    yield session
            except TimeoutError as error:
                raise SourceUnavailable("no_answer", f"no answer to a query in {seconds:g} s") from error
            finally:
                if session is not None:
                    await self._give_back(session)

    async def close(self) -> None:
        """For good. What is being done goes on to its end."""
        self._closed = True
        await self._close_idle()

    async def _give_back(self, session: Session) -> None:
        session.served = True
        usable = session.connection.pgconn.transaction_status == TransactionStatus.IDLE
        if usable and not self._closed:
            self._idle.append(session)
        else:
            await session.connection.close()

    async def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for session in idle:
            await session.connection.close()

    async def _connect(self) -> Session:
        connection = await connect_query(self._conninfo, f"{self._slot}:{self._purpose}")
        try:
            await connection.execute(self._session_sql())
            seen = await fetch_one(connection, "reader")
            assert seen is not None  # it always gives a row
            await check_origin(connection, self._conninfo, self._slot, self.expected(), standby=seen["standby"])
        except BaseException as error:  # cancelled, too: nobody uses a connection that was not looked at
            await connection.close()
            if isinstance(error, psycopg.Error):
                raise query_refusal(error) from error
            raise
        return Session(connection, seen["standby"])

    def _session_sql(self) -> sql.Composed:
        settings = {
            **_OURS,
            "statement_timeout": f"{max(1, round(self.timeout_seconds * 1000))}ms",
            **self._settings,
        }
        one = sql.SQL("SET {} = {}")
        statements: list[sql.Composable] = [
            one.format(sql.Identifier(name), sql.Literal(value)) for name, value in settings.items()
        ]
        if self._own_search_path:
            statements.append(sql.SQL("RESET search_path"))
        return sql.SQL("; ").join(statements)
