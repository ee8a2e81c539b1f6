"""The stream of one slot: a single START_REPLICATION, frames in and feedback out. Knows nothing of pgoutput's content.

The caller's loop is ``while (stop := stream.fill(decoder, ...)) is None: await stream.more()``. `fill` lets the decoder
take what is whole in memory; it never waits and never reads the socket. `more` waits until there is something to read,
reads one bite and may return with nothing whole; `again` does the same without waiting. So an await is paid per bite,
not per row.

What it promises:

- **Bounded.** A bite is at most `READ_BYTES`, so libpq holds that much, or the one frame that is larger. libpq's buffer
  grows to at least the largest frame and never shrinks: the decoder says when the connection is to be renewed
  (`Renew`; design.md: 8 MB). A frame exists twice while it is copied out.
- **Large bites under load**, and no wait at low load: see spillway.source.pace. At most one nap per bite.
- **Nothing is lost between the last frame and an error.** A broken connection is reported only after every frame that
  had arrived was taken and the caller had its turn to hand out what was made of them: a `fill` that took something
  returns as ever, the next one raises. The server's own last words are preferred to libpq's.
- **Feedback never goes back.** `send_feedback` is the one place where a flush position is sent; it is clamped to what
  was sent before, beginning with ``start_lsn``.
- **A skipped publication ends the stream.** PostgreSQL 18 no longer fails when the publication is missing at a place in
  the WAL: it warns, sends no rows and moves on in keepalives. The warning is taken as the error that it was, before
  `fill` returns: what was filled meanwhile is to be dropped, it comes again.

One task reads; another may call `send_feedback`, `flush` and `close` at any time.

Protocol: PostgreSQL documentation, "Streaming Replication Protocol". pgoutput's options are ``proto_version`` 1 and the
publications, and from 14 on ``messages``, without which annotations would not come.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Sequence

import psycopg
from psycopg.pq import ExecStatus

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.pgoutput import Committed, Decoder, Ended, Full, Keepalive, Relation, Renew, Stop
from spillway.position import format_lsn
from spillway.source.connect import Connection, connect_replication
from spillway.source.pace import Pace
from spillway.source.readiness import Readiness
from spillway.source.refusal import missing_publication, quoted, slot_refusal, stream_refusal

READ_BYTES = 128 * 1024
LIBPQ_BUFFER_BYTES = 16 * 1024  # what libpq's buffer starts with
START_TIMEOUT_SECONDS = 30
# A TLS record is at most 16 kB and libpq makes at least 8 kB of room: so many reads empty what OpenSSL holds.
TLS_HIDDEN_READS = 2

_POSTGRES_EPOCH_SECONDS = 946_684_800  # 2000-01-01 UTC
_ENDED = -1  # what libpq returns as a size when the server has ended COPY
_FEEDBACK = struct.Struct(">cQQQqB")  # write, flush, apply, time, reply requested


class Stream:
    """See the module. Made by `open`; of no use after the first error it raised."""

    def __init__(self, connection: Connection, slot: str, publications: tuple[str, ...], start_lsn: int) -> None:
        self.slot = slot
        self.publications = publications
        self._connection = connection
        self._pgconn = connection.pgconn
        self._socket = Readiness(connection.pgconn)
        self._flush_sent = start_lsn
        self._pace: Pace | None = None  # once the stream has started
        self._taken_frames = 0  # since the last bite
        self._taken_bytes = 0
        self._buffer_bytes = LIBPQ_BUFFER_BYTES  # what libpq's buffer has grown to by our asking
        self._hidden_reads = 0  # worth trying although the socket is silent (TLS)
        self._lost: SpillwayError | None = None
        self._skipped = ""  # PostgreSQL 18's warning that it skips the publication
        self._open = True
        connection.add_notice_handler(self._notice)

    @classmethod
    async def open(
        cls, conninfo: str, slot: str, publications: Sequence[str], start_lsn: int, server_version: int
    ) -> Stream:
        """Connect and start at ``start_lsn``, or where the slot was confirmed if that is later (0: always there)."""
        connection = await connect_replication(conninfo, slot)
        stream = cls(connection, slot, tuple(publications), start_lsn)
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                await stream._start(start_command(slot, publications, start_lsn, server_version))
        except TimeoutError as error:
            stream._finish()
            raise SourceUnavailable(
                "start_timeout", f"slot {slot}: no answer to START_REPLICATION in {START_TIMEOUT_SECONDS} s"
            ) from error
        except BaseException:
            # Whatever ended the start, a half-started walsender must not keep the slot.
            stream._finish()
            raise
        return stream

    async def _start(self, command: bytes) -> None:
        pgconn = self._pgconn
        try:
            pgconn.nonblocking = 1
            pgconn.send_query(command)
            while pgconn.flush():
                await self._wait(writing=True)
            while pgconn.is_busy():
                await self._wait(writing=False)
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None or result.status != ExecStatus.COPY_BOTH:
                raise _error_of(result, "the server did not start the stream")
            self._pace = Pace(self._socket.descriptor)
        except psycopg.Error as error:
            raise slot_refusal(error, self.slot, self._connection.info.dbname) from error

    def fill(
        self, decoder: Decoder, credit_bytes: int, max_changes: int
    ) -> Full | Keepalive | Relation | Renew | Committed | None:
        """Let the decoder take what is whole in memory (`Decoder.fill`). None: there is no more. Raises when nothing is
        left to take before the error."""
        used_bytes = decoder.used_bytes
        stop: Stop = None
        try:
            stop = decoder.fill(self._pgconn, credit_bytes, max_changes)
        except psycopg.Error as error:
            self._lose(stream_refusal(error, self.slot, self.publications))
        self._taken_frames += decoder.taken_frames
        self._taken_bytes += decoder.taken_bytes
        decoder.taken_frames = decoder.taken_bytes = 0
        if self._skipped:
            raise missing_publication(self.publications, self.slot, self._skipped)
        if isinstance(stop, Ended):
            self._end(stop)
            stop = None
        if stop is None and self._lost is not None and decoder.used_bytes == used_bytes:
            raise self._lost
        return stop

    def _end(self, ended: Ended) -> None:
        if ended.size == _ENDED:  # the server has left COPY: its error, or its shutdown
            result = None if self._pgconn.is_busy() else self._pgconn.get_result()
            error = _error_of(result, "the server ended the stream")
            self._lost = None  # this comes before what libpq made of it
        else:
            error = psycopg.OperationalError(self._pgconn.get_error_message())
        self._lose(stream_refusal(error, self.slot, self.publications))

    async def more(self) -> None:
        """Wait until the server has sent something and read one bite of it."""
        if not await self.again():
            await self._wait(writing=False)
            self._read_bite()

    async def again(self) -> bool:
        """Read one bite of what is there, or is there after a nap (under load). False: there is nothing."""
        assert self._pace is not None, "the stream has started"
        self._pace.took(self._taken_frames, self._taken_bytes)
        self._taken_frames = self._taken_bytes = 0
        await self._pace.beat()  # under full load this is the only turn that other tasks get
        queued_bytes = self._queued_bytes()
        if queued_bytes == 0 and await self._pace.nap():
            queued_bytes = self._queued_bytes()
        if queued_bytes:
            self._hidden_reads = TLS_HIDDEN_READS if self._socket.encrypted else 0
        elif self._hidden_reads:
            self._hidden_reads -= 1
        else:
            return False
        self._read_bite()
        return True

    def _read_bite(self) -> None:
        """Read what fits libpq's buffer. libpq doubles it whenever it is asked to read into a full one, so it is asked
        again only while the buffer is certainly full and still below the size of a bite."""
        room_bytes = self._buffer_bytes
        while self._lost is None:
            queued_bytes = self._queued_bytes()
            try:
                self._pgconn.consume_input()
            except psycopg.Error as error:
                self._lost = stream_refusal(error, self.slot, self.publications)
            if queued_bytes < room_bytes or self._buffer_bytes >= READ_BYTES:
                return
            room_bytes = self._buffer_bytes
            self._buffer_bytes *= 2

    def send_feedback(self, write_lsn: int, flush_lsn: int, reply: bool = False) -> None:
        """Tell the server what was received and what may be forgotten; ``reply`` asks it to answer at once."""
        self._flush_sent = max(self._flush_sent, flush_lsn)
        written = max(write_lsn, self._flush_sent)
        now = int((time.time() - _POSTGRES_EPOCH_SECONDS) * 1_000_000)
        message = _FEEDBACK.pack(b"r", written, self._flush_sent, self._flush_sent, now, reply)
        if self._lost is not None:
            raise self._lost
        try:
            sent = self._pgconn.put_copy_data(message)
            blocked = self._pgconn.flush()
        except psycopg.Error as error:
            raise self._lose(stream_refusal(error, self.slot, self.publications)) from error
        if sent == 0:
            raise self._lose(SourceUnavailable("connection_lost", f"slot {self.slot}: libpq takes no more feedback"))
        if blocked:
            self._socket.wake()  # libpq reads while it cannot write: a frame may be whole although the socket is silent

    async def flush(self) -> None:
        """Wait until the feedback has left this process."""
        try:
            while self._lost is None and self._pgconn.flush():
                self._socket.wake()
                await self._wait(writing=True)
        except psycopg.Error as error:
            raise self._lose(stream_refusal(error, self.slot, self.publications)) from error
        if self._lost is not None:
            raise self._lost

    @property
    def flush_sent(self) -> int:
        """The highest position that the server was told it may forget."""
        return self._flush_sent

    async def close(self) -> None:
        """Hang up. The server frees the slot as soon as it notices; may be called at any time and more than once."""
        self._finish()

    def _finish(self) -> None:
        if not self._open:
            return
        self._open = False
        self._socket.close()
        self._lose(SourceUnavailable("closed", f"slot {self.slot}: the stream was closed"))
        if self._pace is not None:
            self._pace.close()
        self._pgconn.finish()

    def _lose(self, error: SpillwayError) -> SpillwayError:
        """Remember why the stream is over and let those who wait find out."""
        if self._lost is None:
            self._lost = error
        self._socket.wake()
        return error

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        text = diagnostic.message_primary or ""
        if diagnostic.sqlstate == "55000" and any(name in text for name in self.publications):
            self._skipped = text

    def _queued_bytes(self) -> int:
        return self._socket.queued_bytes() if self._lost is None else 0

    async def _wait(self, *, writing: bool) -> None:
        """Until the socket is ready, the stream is lost, or (TLS) it is time to look again."""
        if self._lost is None:
            await self._socket.wait(writing=writing)


def start_command(slot: str, publications: Sequence[str], start_lsn: int, server_version: int) -> bytes:
    """START_REPLICATION as the replication grammar wants it: strings in quotes, doubled inside, no parameters."""
    names = ",".join(quoted(name) for name in publications).replace("'", "''")
    options = f"\"proto_version\" '1', \"publication_names\" '{names}'"
    if server_version >= 140000:
        options += ", \"messages\" 'true'"
    return f"START_REPLICATION SLOT {quoted(slot)} LOGICAL {format_lsn(start_lsn)} ({options})".encode()


def _error_of(result: psycopg.pq.abc.PGresult | None, otherwise: str) -> psycopg.Error:
    if result is None or result.status != ExecStatus.FATAL_ERROR:
        return psycopg.OperationalError(otherwise)
    return psycopg.errors.error_from_result(result, "utf-8")
