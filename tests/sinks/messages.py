"""Messages as the decoder would make them, for tests of sinks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from spillway.change import BODY_START, Action, Change, Message, make_key
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
    old: Change | None = None,
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
    key = make_key(schema, table, pks) if pks else None
    return Change(lsn, idx, schema, table, action, key, pks, body, len(rendered), n, whole, 1730151561.0, old=old)


def message(record: dict[str, Any] | str, **arguments: Any) -> Message:
    return of(change(record, **arguments))


def of(one: Change, sub: int = 0) -> Message:
    keys = tuple(dict.fromkeys(c.key for c in (one.old, one) if c is not None and c.key is not None))
    return Message(one, keys, sub)


def full(one: Message) -> dict[str, Any]:
    """The message as a sink of messages must give it out."""
    parsed: dict[str, Any] = json.loads(one.change.body + SUFFIX)
    return parsed


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
