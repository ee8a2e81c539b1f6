"""The operations of a bulk request one by one: for batches of which something is said of single messages.

A batch where every message goes to the same index as a whole document is made into a request by `spillway.impl.bulk`,
which looks at no message. Here is what it cannot do: routes, updates, a column that says the shard, a message that has
become several documents.

**What is done** is the route's ``op``; else a delete is a delete, and anything else what the destination says.

**Which document.** The route's ``id``, else the row's (`spillway.sinks.document`). Of the documents that one message
has become, one at most can have the row's: the others need ids of their own, or they are rejected
(``document_id_missing``).

**Which shard.** The route's ``routing``, else the value of ``routing_column``: text as it is, of any other value its
JSON. A document is found again only with the same value, so a message without it (of a delete the replica identity must
hold the column) is rejected, ``routing_missing``. An update that has changed the value is also a delete of the document
at the old place, where the message tells the old value: replica identity FULL, and no function that hides ``changes``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, cast

import orjson

from spillway.change import ACTIONS, RECORD_START, key_values
from spillway.chunk import ACTION, FLAGS, HASH, INDEX, LSN, TOO_LARGE, WHOLE, Batch, Chunk, N, Route
from spillway.position import version
from spillway.sinks.base import Result, reject
from spillway.sinks.document import document_id
from spillway.sinks.encode import nth
from spillway.sinks.mapping import Document

Op = Literal["index", "update", "delete"]
Place = tuple[str, str]  # index and _id

_DELETE: Final = ACTIONS.index("delete")
_TRUNCATE: Final = ACTIONS.index("truncate")
_NO_CHANGES: Final = b',"changes":{}'


@dataclass(frozen=True, slots=True)
class Destination:
    """What the configuration says for messages whose route says nothing else."""

    index: str
    document: Document
    suffix: bytes  # closes a body into the message, see spillway.change
    epoch: int
    op: Op = "index"
    doc_as_upsert: bool = False
    pipeline: str = ""
    routing_column: str = ""
    takes_partial: bool = False  # rows without their unchanged TOAST columns


@dataclass(slots=True, eq=False)
class Operation:
    message: int  # its place in the batch
    op: Op
    index: str
    identity: str
    routing: str
    pipeline: str
    upsert: bool
    version: int
    body: tuple[bytes, ...]  # the document, in parts
    partial_of: str = ""  # the table of a row without its TOAST columns: good for an update, not for a new document
    conflicts: int = 0  # how often somebody else was quicker

    @property
    def place(self) -> Place:
        return self.index, self.identity


@dataclass(frozen=True, slots=True)
class Current:
    """The write that an update builds upon ("Optimistic concurrency control" of the Elasticsearch reference)."""

    seq_no: int
    primary_term: int


def why_unfit(chunk: Chunk, index: int, *, takes_partial: bool, has_id: bool = False) -> Result | None:
    """What keeps a change from being an operation. ``has_id``: its route says the document's."""
    if not chunk.word(index, HASH) and not has_id:
        return reject("no_primary_key", f"{'.'.join(chunk.table(index))} has no primary key to make an _id of")
    action, flags = chunk.byte(index, ACTION), chunk.byte(index, FLAGS)
    if action == _TRUNCATE:
        return reject("truncate", "an index does not take a TRUNCATE")
    if action == _DELETE:
        return None
    if flags & TOO_LARGE:
        return reject("too_large", "the row was above max_message_bytes: only its key is known")
    if not flags & WHOLE and not takes_partial:
        return unchanged_toast(".".join(chunk.table(index)))
    return None


def unchanged_toast(table: str) -> Result:
    return reject(
        "unchanged_toast",
        "PostgreSQL did not send the row's unchanged TOAST columns; the document would lose these fields. "
        f"ALTER TABLE {table} REPLICA IDENTITY FULL, or set toast: omit",
    )


def row_id(chunk: Chunk, index: int) -> str:
    """The ``_id`` that the row's key makes."""
    return document_id(key_values(*chunk.table(index), chunk.key_texts(index)[0].decode()))


def operations(batch: Batch, destination: Destination) -> tuple[list[Operation], dict[int, Result]]:
    """In the order of the batch; and what is rejected, by place in it."""
    found: list[Operation] = []
    rejected: dict[int, Result] = {}
    for place, message in enumerate(batch):
        chunk, index = message.span.chunk, message.span.indices[message.place]
        route = chunk.route(index)
        operation = _operation(destination, route, chunk, index, place)
        if isinstance(operation, Result):
            rejected[place] = operation
            continue
        if chunk.complete and "id" not in route and _taken(destination, chunk, index, operation):
            rejected[place] = reject(
                "document_id_missing",
                f"the document {operation.identity} is there already: of the documents that one message becomes, "
                "all but one need an id of their own in their route",
            )
            continue
        moved = _left_behind(destination, route, chunk, index, operation)
        found += (operation,) if moved is None else (moved, operation)
    return found, rejected


def _taken(destination: Destination, chunk: Chunk, index: int, operation: Operation) -> bool:
    """Whether an earlier document of the same message has the row's id in the same index."""
    routes = [chunk.route(earlier) for earlier in range(index - nth(chunk, index), index)]
    return any("id" not in one and one.get("index_name", destination.index) == operation.index for one in routes)


def _operation(destination: Destination, route: Route, chunk: Chunk, index: int, place: int) -> Operation | Result:
    op = cast(Op, route.get("op") or ("delete" if chunk.byte(index, ACTION) == _DELETE else destination.op))
    takes_all = destination.takes_partial
    unfit = why_unfit(chunk, index, takes_partial=takes_all or op != "index", has_id="id" in route)
    if unfit is not None:
        return unfit
    routing = str(route.get("routing", ""))
    if not routing and destination.routing_column:
        value = _column(destination, chunk, index)
        if value is None:
            return reject(
                "routing_missing",
                f"the message has no value of {destination.routing_column}, which says the document's shard"
                + (": the replica identity of the table must hold it" if op == "delete" else ""),
            )
        routing = value
    return Operation(
        place,
        op,
        str(route.get("index_name", destination.index)),
        str(route["id"]) if "id" in route else row_id(chunk, index),
        routing,
        str(route.get("pipeline", destination.pipeline)) if op == "index" else "",
        bool(route.get("doc_as_upsert", destination.doc_as_upsert)),
        version(destination.epoch, chunk.word(index, LSN), chunk.byte(index, N)),
        () if op == "delete" else _document(destination, chunk, index),
        partial_of="" if takes_all or chunk.byte(index, FLAGS) & WHOLE else ".".join(chunk.table(index)),
    )


def _document(destination: Destination, chunk: Chunk, index: int) -> tuple[bytes, ...]:
    body = chunk.body(index)
    if chunk.complete:
        return (body,)
    if destination.document == "message":
        return (body, destination.suffix)
    return (body[RECORD_START : RECORD_START + (chunk.word(index, INDEX) >> 32)],)


# -- shards -----------------------------------------------------------------------------------------------------------


def _column(destination: Destination, chunk: Chunk, index: int) -> str | None:
    """The value of the routing column in the row."""
    if chunk.complete:
        message = _fields(chunk.body(index))
        record = message if destination.document == "record" else message.get("record")
    else:
        body = chunk.body(index)
        record = _fields(body[RECORD_START : RECORD_START + (chunk.word(index, INDEX) >> 32)])
    return _text(record.get(destination.routing_column)) if isinstance(record, dict) else None


def _left_behind(
    destination: Destination, route: Route, chunk: Chunk, index: int, operation: Operation
) -> Operation | None:
    """The delete of the document in the shard where it was before."""
    column = destination.routing_column
    if not column or "routing" in route or operation.op == "delete" or chunk.action(index) != "update":
        return None
    if chunk.complete and destination.document == "record":
        return None
    body = chunk.body(index)
    if not chunk.complete and body.startswith(_NO_CHANGES, RECORD_START + (chunk.word(index, INDEX) >> 32)):
        return None
    changes = _fields(body if chunk.complete else body + destination.suffix).get("changes")
    before = _text(changes.get(column)) if isinstance(changes, dict) else None
    if before is None or before == operation.routing:
        return None
    return Operation(
        operation.message,
        "delete",
        operation.index,
        operation.identity,
        before,
        "",
        upsert=False,
        version=operation.version,
        body=(),
    )


def _fields(text: bytes) -> dict[str, object]:
    """Numbers are kept apart from texts, with all their digits."""
    found = json.loads(text, parse_float=_Digits, parse_int=_Digits, parse_constant=_Digits)
    return found if isinstance(found, dict) else {}


class _Digits(str):
    """A number as it was written."""

    __slots__ = ()


def _text(value: object) -> str | None:
    if value is None or value == "":
        return None
    return str(value) if isinstance(value, str) else json.dumps(value)


# -- lines of the request ---------------------------------------------------------------------------------------------


def lines(operation: Operation, current: Current | None) -> Iterator[bytes]:
    """``current``: what an update builds upon; None: it makes the document."""
    where: dict[str, object] = {"_index": operation.index, "_id": operation.identity}
    if operation.routing:
        where["routing"] = operation.routing
    if operation.op != "update":
        where |= {"version": operation.version, "version_type": "external_gte"}
        if operation.pipeline:
            where["pipeline"] = operation.pipeline
        yield orjson.dumps({operation.op: where}, option=orjson.OPT_APPEND_NEWLINE)
        if operation.op == "index":
            yield from operation.body
            yield b"\n"
    elif current is None:
        yield orjson.dumps({"create": where}, option=orjson.OPT_APPEND_NEWLINE)
        yield from operation.body
        yield b"\n"
    else:
        where |= {"if_seq_no": current.seq_no, "if_primary_term": current.primary_term}
        yield orjson.dumps({"update": where}, option=orjson.OPT_APPEND_NEWLINE)
        yield b'{"doc":'
        yield from operation.body
        yield b"}\n"
