"""Rows by key, on behalf of changes: `spillway.source.enrich` and `spillway.source.reselect` say which.

One call is one question for all keys of a batch (`spillway.source.wrapped`), by the extended protocol, prepared once
per connection and table. Several calls at a time are as many connections at work (`spillway.source.sessions`).

**Freshness.** A commit is streamed before it is visible. The first row of every answer says what the statement's own
snapshot sees; if that is not everything that the caller has seen, the answer counts for nothing, and the question is
asked again once the server says that it does: it is asked for that alone at first after 5 ms, then ever more seldom. So
a commit that is held back costs one question, not one for each look. On a standby transactions cannot be told, and
visibility follows replay: its position is read *before* the question, which is not asked until that is far enough.

**Columns.** A question is prepared for the columns that its tables have. Whether it is still the same is looked at
now and then, and right after an answer for changes with a column that the stream had not carried by then: a migration
adds a column and fills it, and no later change would mend what was read without it.

**Memory.** The server never sends more than ``credit_bytes``, nor a row of more than ``row_bytes``, and of what was
sent only what is within the credit once it is JSON is kept, too (a control character takes six bytes there). Rows come
one by one, and of large ones a piece at a time: beside what is kept there is one row, or piece, in libpq and in the
making, which is why a caller takes `making_bytes` beside the credit.

**What fails whom.** `BatchFailed`: a value in one row is wrong for the question (division by zero, a text that is no
number, a key that is not of its column's type any more, an exception that a function raises), and the others suffer
from that. Ask again with fewer keys: what fails for one key alone concerns its message. Any other SpillwayError
concerns all: the SQL is wrong, or may not be run. SourceUnavailable: later it may succeed. A connection that is lost, a
conflict, a deadlock or a table that was altered meanwhile are tried once more, with a new connection, before they are
told.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

import orjson
import psycopg
from psycopg import generators, waiting
from psycopg.abc import PQGen
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.pgoutput.relation import TypeInfo
from spillway.pgoutput.types import renderer_for
from spillway.position import parse_lsn
from spillway.source.catalog import types as catalogue_types
from spillway.source.connect import Connection
from spillway.source.mistakes import locate, told
from spillway.source.origin import check_standby
from spillway.source.pieces import streamed
from spillway.source.queries import fetch_one
from spillway.source.reading import Fetched, Reading
from spillway.source.refusal import query_refusal
from spillway.source.sessions import Session, Sessions
from spillway.source.snapshot import Seen
from spillway.source.wrapped import INT8_OID, WHOLE_BYTES, Prepared, Question, statement, types_of

__all__ = ["BatchFailed", "ByKeys", "making_bytes"]

# libpq's buffer, the row in libpq or as JSON, its values.
_FETCH_FACTOR: Final = 4

VISIBLE_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 2.0  # for so long a question counts as found to be the same

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.2

# Classes of SQLSTATEs, and what they mean. Cardinality, data, constraint, limit of the program, PL/pgSQL's RAISE.
_OF_THE_DATA: Final = ("21", "22", "23", "54", "P0")
_AGAIN: Final = ("08", "40")  # connection, transaction rollback: deadlock, conflict with replay
# Of a statement that was prepared before: what it stands on may be another (feature not supported: "cached plan must
# not change result type", syntax or name, no such statement).
_OUTDATED: Final = ("0A", "42", "26")
_LATER: Final = ("53", "55", "57", "58", "XX")  # resources, not ready, intervention, system, corruption
_SHUTDOWN: Final = ("57P01", "57P02", "57P03", "57P05")
_CANCELLED: Final = "57014"


def making_bytes(row_bytes: int) -> int:
    """Credit to take for rows of at most so many bytes, beside what is kept of them (measured by
    tests/source/test_enrich.py)."""
    return _FETCH_FACTOR * min(row_bytes, WHOLE_BYTES)


class BatchFailed(SpillwayError):
    """The data of one row, or a few, is wrong for the SQL, and who asks for it gets nothing: ask with fewer keys."""


class _AgainError(Exception):
    """To be tried once more with a new connection; ``reason`` is what is told if that does not help."""

    def __init__(self, reason: SpillwayError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class ByKeys(ABC):
    """Opened by the first `fetch`. ``what`` is the prefix of the errors' codes, ``subject`` what they are said of."""

    def __init__(self, sessions: Sessions, what: str, subject: str, remedy: str, visible_seconds: float) -> None:
        self._sessions = sessions
        self._what = what
        self._subject = subject
        self._remedy = remedy
        self._visible_seconds = visible_seconds

    @abstractmethod
    async def _question(self, connection: Connection, table: tuple[str, str]) -> Question:
        """A table's, by the catalogue; asked for again every now and then."""

    async def columns(self, table: tuple[str, str]) -> tuple[str, ...]:
        """Those of the question, for whoever checks it: it is prepared and planned, and not run. Raises as `fetch`."""
        async with self._sessions.one(fresh=True) as session:
            try:
                return (await self._prepare(session, table)).columns
            except psycopg.Error as error:
                raise self._refusal(error) from error

    async def plan(self, table: tuple[str, str]) -> object:
        """Of the question's own SQL, for no keys; not run. Raises as `columns`, after which it is called."""
        async with self._sessions.one(fresh=True) as session:
            connection = session.connection
            try:
                question = await self._question(connection, table)
                explain = f"EXPLAIN (FORMAT JSON, VERBOSE) {question.sql}".encode()
                connection.pgconn.send_query_params(explain, question.literals([]), param_types=question.types)
                return orjson.loads((await _result(connection)).get_value(0, 0) or b"[{}]")[0].get("Plan")
            except psycopg.Error as error:
                raise self._refusal(error) from error

    async def fetch(
        self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
    ) -> Fetched:
        """``keys``: values of the primary key in column order, as `change.key_values` gives them. ``credit_bytes``:
        what the rows may take, and ``row_bytes`` what one of them may; the caller has taken `making_bytes` besides.
        Raises BatchFailed, SourceUnavailable, SpillwayError (see the module); what the server is found not to be, as
        `spillway.source.origin` says it."""
        until = time.monotonic() + self._visible_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        seconds, queries, tried = 0.0, 0, False
        while True:
            reading = None
            try:
                async with self._sessions.one(fresh=tried) as session:
                    if not (queries or session.standby) or await _sees(session, seen):
                        began = time.monotonic()
                        queries += 1
                        reading = await self._ask(session, table, keys, seen, (credit_bytes, row_bytes))
                        seconds += time.monotonic() - began
            except _AgainError as again:
                if tried:
                    raise again.reason from again
                tried = True
                continue
            if reading is not None and reading.visible:
                reading.fetched.seconds, reading.fetched.queries = seconds, queries
                return reading.fetched
            if time.monotonic() > until:
                raise SourceUnavailable(
                    "not_visible",
                    f"{self._subject}: what the stream has carried cannot be seen after {self._visible_seconds:g} s",
                    "see pg_stat_activity for commits that wait for a synchronous standby (SyncRep), or the replay lag"
                    " of the replica",
                )
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    async def close(self) -> None:
        await self._sessions.close()

    async def _ask(
        self,
        session: Session,
        table: tuple[str, str],
        keys: Sequence[tuple[str, ...]],
        seen: Seen,
        limits: tuple[int, int],
    ) -> Reading:
        prepared_before = session.served
        try:
            prepared = await self._prepared(session, table)
            question = prepared.question
            if any(len(key) != len(question.key) for key in keys):
                raise BatchFailed(
                    f"{self._what}_key",
                    f"{self._subject}: the primary key of {table[0]}.{table[1]} has {len(question.key)} columns now",
                    "discard the messages of before",
                )
            reading = Reading(session, prepared, keys, seen, limits)
            session.connection.pgconn.send_query_prepared(
                prepared.statement,
                [*question.literals(reading.distinct), *(str(limit).encode() for limit in limits)],
                result_format=Format.BINARY,
            )
            session.connection.pgconn.set_single_row_mode()
            await session.connection.wait(_rows(session.connection.pgconn, reading.take))
            reading.end()
            if reading.visible and not prepared.carried.issuperset(seen.columns):
                await self._look(session, table, prepared)  # now it sees whatever the answer has seen
                prepared.carried.update(seen.columns)
        except psycopg.Error as error:
            raise self._failure(error, session, prepared_before=prepared_before) from error
        except SourceUnavailable as error:  # of a look into the catalogue
            if session.connection.closed:
                raise _AgainError(error) from error
            raise
        check_standby(self._sessions.expected(), standby=session.standby)
        if reading.outdated:
            raise self._altered()
        return reading

    # The question on a connection.

    async def _prepared(self, session: Session, table: tuple[str, str]) -> Prepared:
        known = session.prepared.get(table)
        if known is None:
            return await self._prepare(session, table)
        if time.monotonic() - known.looked_at > LOOK_SECONDS:
            await self._look(session, table, known)
        return known

    async def _look(self, session: Session, table: tuple[str, str], known: Prepared) -> None:
        """Whether the question is still the same: raises if not."""
        now = time.monotonic()
        connection = session.connection
        if await self._question(connection, table) != known.question:
            raise self._altered()
        # Refused if the result would be another one ("cached plan must not change result type").
        connection.pgconn.send_describe_prepared(known.name)
        await _result(connection)
        known.looked_at = now

    def _altered(self) -> _AgainError:
        return _AgainError(SourceUnavailable(f"{self._what}_altered", f"{self._subject}: its tables are being altered"))

    async def _prepare(self, session: Session, table: tuple[str, str]) -> Prepared:
        connection, number = session.connection, session.number()
        question = await self._question(connection, table)
        name, around = b"question%d" % number, b"around%d" % number
        pgconn = connection.pgconn
        # By itself at first: so it is one whole statement, and the server's message is about the user's text.
        pgconn.send_prepare(name, question.sql.encode(), question.types)
        await _result(connection, question.sql)
        pgconn.send_describe_prepared(name)
        described = await _result(connection)
        columns = tuple((described.fname(i) or b"").decode() for i in range(described.nfields))
        self._check(table, question, columns, described.nparams)
        pgconn.send_query_params(
            types_of(question, columns).encode(), question.literals([]), param_types=question.types
        )
        types = ((await _result(connection, "")).get_value(0, 0) or b"").decode()
        oids = [int(oid) for oid in types.split(",")]
        infos: dict[int, TypeInfo] = await catalogue_types(connection, oids)
        renderers = tuple(renderer_for(oid, infos) for oid in oids)
        looked_at = {check.column for check in question.checks}
        collected = frozenset(i for i, one in enumerate(renderers) if i in looked_at or not streamed(one))
        encoding = connection.info.parameter_status("server_encoding") or ""
        around_sql = statement(question, columns, encoding, collected)
        pgconn.send_prepare(around, around_sql.encode(), [*question.types, INT8_OID, INT8_OID])
        await _result(connection)
        prepared = Prepared(question, name, around, columns, types, renderers, collected, time.monotonic())
        session.prepared[table] = prepared
        return prepared

    def _check(self, table: tuple[str, str], question: Question, columns: Sequence[str], parameters: int) -> None:
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise SpillwayError(
                f"{self._what}_columns",
                f"{self._subject} has several columns named {', '.join(twice)}",
                "name each of them with AS",
            )
        missing = [column for column in question.key if column not in columns]
        if missing:
            raise SpillwayError(
                f"{self._what}_key",
                f"{self._subject} does not select {', '.join(missing)}, which the primary key of"
                f" {table[0]}.{table[1]} has: rows cannot be told apart",
                f"SELECT all of {', '.join(question.key)} under these names",
            )
        if parameters > len(question.parameters):
            raise SpillwayError(
                f"{self._what}_parameters",
                f"{self._subject} uses ${parameters}, and the primary key of {table[0]}.{table[1]} has"
                f" {len(question.parameters)} columns",
                "$1, $2, ... are arrays of the primary key's columns in alphabetical order",
            )

    # Refusals.

    def _failure(self, error: psycopg.Error, session: Session, *, prepared_before: bool) -> SpillwayError | _AgainError:
        state = error.sqlstate or ""
        if (
            session.connection.closed
            or not state
            or state in _SHUTDOWN
            or state[:2] in _AGAIN
            or (prepared_before and state[:2] in _OUTDATED)
        ):
            return _AgainError(self._refusal(error))
        return self._refusal(error)

    def _refusal(self, error: psycopg.Error) -> SpillwayError:
        state = error.sqlstate or ""
        text = f"{self._subject}: {told(error)}"
        if state == _CANCELLED:
            return SourceUnavailable(
                f"{self._what}_timeout",
                text,
                f"the limit is {self._sessions.timeout_seconds:g} s for all keys of a batch: mend the plan (EXPLAIN), "
                "or allow for more time: enrichment_timeout_ms of the sink",
            )
        if not state or state[:2] in (*_AGAIN, *_LATER):
            return query_refusal(error)
        if state[:2] in _OF_THE_DATA:
            return BatchFailed(f"{self._what}_failed", text, self._remedy)
        if state == "42501":
            return SpillwayError(f"{self._what}_failed", text, "grant it; see the grants in docs/postgres.md")
        return SpillwayError(f"{self._what}_failed", text, self._remedy)


async def _sees(session: Session, seen: Seen) -> bool:
    """Whether a question that is asked now would be answered with what was seen."""
    try:
        if session.standby:
            replayed = await fetch_one(session.connection, "replayed")
            assert replayed is not None
            # No position: it was promoted, which the answer will say.
            return replayed["lsn"] is None or parse_lsn(replayed["lsn"]) >= seen.lsn
        horizon = await fetch_one(session.connection, "horizon")
        assert horizon is not None
        return seen.by(horizon["snapshot"])
    except SourceUnavailable as error:
        raise _AgainError(error) from error


async def _result(connection: Connection, sql: str | None = None) -> PGresult:
    """Of what was sent, which is one thing. ``sql``: what of it is the user's, for the place of a mistake."""
    results: list[PGresult] = await connection.wait(generators.execute(connection.pgconn))
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            error = psycopg.errors.error_from_result(result, "utf-8")
            if sql is not None:
                locate(error, sql)
            raise error
    return results[-1]


def _rows(pgconn: PGconn, take: Callable[[PGresult], None]) -> PQGen[None]:
    """Hands over each row of a query in single row mode. To the end, also after an error, which is raised then."""
    yield from generators.send(pgconn)
    failed: psycopg.Error | None = None
    while True:
        while pgconn.is_busy():
            while not (yield waiting.WAIT_R):
                continue
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        if result.status == ExecStatus.SINGLE_TUPLE:
            take(result)
        elif result.status != ExecStatus.TUPLES_OK:
            failed = failed or psycopg.errors.error_from_result(result, "utf-8")
    if failed is not None:
        raise failed
