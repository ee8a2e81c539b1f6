"""Messages as the decoder would make them, for tests of sinks."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spillway.change import BODY_START, Action, Change, make_key
from spillway.chunk import Batch, Keying, Route, Span, chunk_of, reshaped
from spillway.sinks.base import SinkContext, message_suffix

SUFFIX = message_suffix("3f0c", "jobs_sink", {})


def context(folder: Path, *, epoch: int = 1, started_lsn: int = 0, name: str = "jobs_sink") -> SinkContext:
    return SinkContext(name, SUFFIX, folder, epoch, started_lsn)


def change(
    record: dict[str, Any] | str,
    *,
    pks: tuple[str, ...] = ("1",),
    action: Action = "insert",
    lsn: int = 0x16B3748,
    idx: int = 0,
    n: int = 1,
    whole: bool = True,
    was: tuple[str, ...] | None = None,
    too_large_bytes: int = 0,
    schema: str = "public",
    table: str = "jobs",
    changes: dict[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Change:
    rendered = (record if isinstance(record, str) else _json(record)).encode()
    metadata = {
        "table_schema": schema,
        "table_name": table,
        "idempotency_key": idempotency_key or base64.b64encode(f"{lsn}:{idx}".encode()).decode(),
        "commit_timestamp": "2024-10-28T21:39:21.127470Z",
        "commit_lsn": lsn,
        "commit_idx": idx,
        "database_name": "app",
        "record_pks": list(pks),
        "transaction_annotations": None,
    }
    rest = f',"changes":{_json(changes)},"action":"{action}","metadata":{_json(metadata).removesuffix("}")}'
    body = BODY_START + rendered + rest.encode()
    key, old_key = (make_key(schema, table, values) if values else None for values in (pks, was))
    return Change(
        lsn, idx, schema, table, action, key, pks, body, len(rendered), n, whole, 1730151561.0, old_key, too_large_bytes
    )  # fmt: skip


def batch_of(changes: Sequence[Change], keying: int = Keying.STATE) -> Batch:
    """All of them, from one chunk."""
    span = Span(chunk_of(changes), keying)
    return Batch([(span, 0, span.size)])


def shaped(documents: Sequence[tuple[Change, Any, Route | None]], keying: int = Keying.STATE) -> Batch:
    """As functions have made them: the change, what is sent of it, and where; a change may stand there several times,
    one after the other."""
    changes = list(dict.fromkeys(one for one, _, _ in documents))
    messages = dict(zip(changes, batch_of(changes, keying).messages, strict=True))
    routes = [route for _, _, route in documents]
    return reshaped(
        [messages[one] for one, _, _ in documents],
        [_json(body).encode() for _, body, _ in documents],
        routes if any(route is not None for route in routes) else None,
    )


def scattered(changes: Sequence[Change]) -> Batch:
    """The same in pieces: of two chunks, each of which holds other changes, too, and the second only in places."""
    middle = len(changes) // 3
    other = change({"id": "of another sink"}, pks=("other",))
    first = Span(chunk_of([other, *changes[:middle], other]), Keying.STATE)
    between = [one for mine in changes[middle:] for one in (mine, other)]
    second = Span(chunk_of(between), Keying.STATE, list(range(0, len(between), 2)))
    half = second.size // 2
    return Batch([(first, 1, 1 + middle), (second, 0, half), (second, half, second.size)])


def full(one: Change) -> dict[str, Any]:
    """The message as a sink of messages must give it out."""
    parsed: dict[str, Any] = json.loads(one.body + SUFFIX)
    return parsed


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
