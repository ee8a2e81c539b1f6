"""The contract of a sink.

A sink turns a batch into one request (or one write) and says what became of each message. Everything else lives
outside, once: batching, retry, back-off, the breaker, halving of rejected batches, order, metrics, logging. A sink
holds no queue, starts no task, retries nothing and sleeps never.

Life: ``open()`` before the first ``send`` (lazily, again after a failure: it must be repeatable), ``close()`` once.
``send`` runs under a deadline and may be cancelled at any await: what it did until then may or may not have been
applied, and the batch comes again.

``semantics`` says what a batch means:

- ``ordered``: applied in order; it stops at the first failure, and answers for the batch as a whole. One batch in
  flight, two of a key may share a batch.
- ``atomic``: the same, all or nothing.
- ``state``: independent results, the last write per key wins. Several batches in flight, never two of a key at once;
  earlier messages of a key are left out of a batch when a later whole image or delete is in it.
- ``events``: independent results, every message counts. Several batches in flight, never two of a key at once.

A batch is columns (`spillway.chunk.Batch`): ``send`` turns them into bytes without an object per message, and looks at
single messages only where something about them calls for it. It never keeps a batch beyond its answer.

What functions have made of messages (`Batch.complete`) is sent as it is: a body is the whole message, or row, or
document, and a message may stand there several times, or as something else than an object. Where it goes may be said
for each (`Chunk.route`): `spillway.sinks.routing` has what a sink of each type understands, and has checked it.

``send`` returns one `Result` alone when the answer concerns the batch as a whole, and that is always so when everything
is ``ok``: the caller then does nothing per message either. Else it returns one `Result` per message, in the order of
the batch. A whole-batch ``reject`` (400, 413) is halved by the caller until the culprit is alone.
It raises nothing for what a server or a network does: a refused connection is ``sink_down``.

The caller has taken credit for one encoded copy of the batch, and for the answer; a sink holds no more than that.

- ``ok``: acknowledged durably, or superseded there (a version conflict with a version this sink can have written).
- ``retry``: this message may go through later (429 of one item, 503 of one shard); counts as an attempt on it.
- ``reject``: this message will not go through as it is (a mapping error). Its key is parked.
- ``sink_down``: says nothing of the message, all of the sink (refused, 401, 429, 503, time-out). Opens the breaker; no
  attempt is counted. ``retry_after_seconds`` where the server said when.

``reason`` is a short, stable name of few values (``strict_dynamic_mapping_exception``, ``http_422``, ``timeout``,
``connection_refused``): it becomes a metric's label and what ``--reason`` selects. ``detail`` is free text for people,
at most 1,000 characters, and never holds secrets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import orjson

from spillway.chunk import Batch

Semantics = Literal["ordered", "atomic", "state", "events"]
Outcome = Literal["ok", "retry", "reject", "sink_down"]

DETAIL_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Result:
    outcome: Outcome
    reason: str = ""
    detail: str = ""
    retry_after_seconds: float | None = None


OK = Result("ok")
# Of an update that was passed over: it lacks its TOAST columns, and the row it is of comes with a backfill.
ROW_AWAITED = Result("ok", "row_awaited")


def retry(reason: str, detail: str = "") -> Result:
    return Result("retry", reason, detail[:DETAIL_CHARACTERS])


def reject(reason: str, detail: str = "") -> Result:
    return Result("reject", reason, detail[:DETAIL_CHARACTERS])


def sink_down(reason: str, detail: str = "", retry_after_seconds: float | None = None) -> Result:
    return Result("sink_down", reason, detail[:DETAIL_CHARACTERS], retry_after_seconds)


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink is told of the world when it is built."""

    name: str
    suffix: bytes  # closes a body into this sink's message, see spillway.change
    base_dir: Path  # the configuration file's folder: relative paths start here
    epoch: int  # for versions, see spillway.position.version
    started_lsn: (
        int  # of what this sink sends in this epoch nothing is before the byte before it (pages may stand there)
    )


class Sink(Protocol):
    semantics: Semantics
    max_in_flight: int  # batches at once; 1 for ordered and atomic
    single: bool  # a request carries one message: batches should be of one

    async def open(self) -> None:
        """Connect or open files. Raises SpillwayError for what no retry mends; a server that is down is no error."""

    async def send(self, batch: Batch) -> Sequence[Result] | Result: ...

    async def close(self) -> None: ...


@runtime_checkable
class Awaiting(Protocol):
    """A sink that keeps rows, and cannot take an update without its TOAST columns of a row that it has not. ``awaited``
    are the tables (schema, name) of which all rows are on their way: there it passes such an update over, and answers
    with `ROW_AWAITED`."""

    awaited: set[tuple[str, str]]


@runtime_checkable
class Readable(Protocol):
    """A sink that can say which rows it holds: what a sweep compares with the source."""

    async def keys(
        self, table: tuple[str, str], columns: Sequence[str], after: str | None, limit: int, below_version: int | None
    ) -> tuple[list[tuple[str, ...]], str | None]:
        """Primary keys of rows that the sink holds of a table (schema, name): their texts as PostgreSQL prints them, in
        the order of ``columns``, which are the key's. In pages: ``after`` is what the page before gave as its second
        value, None at the beginning; that value is None after the last page. At most ``limit`` keys; a page may have
        none and still not be the last.

        ``below_version``: rows that the sink holds in this version (`spillway.position.version`) or a later one were
        written since and are left out; a sink without versions gives them, too. What is written while the pages are
        read may be given or not; everything else is given, once or more often. The pages end however much is written.
        A cursor stays good over a restart.

        Raises SpillwayError: ``sink_unreachable`` where asking again may help, another where it will not.
        """


def message_suffix(sink_id: str, name: str, annotations: dict[str, object]) -> bytes:
    """What closes a body into the message of one sink (see spillway.change)."""
    consumer = orjson.dumps({"id": sink_id, "name": name, "annotations": annotations})
    return b',"enrichment":null,"consumer":' + consumer + b"}}"
