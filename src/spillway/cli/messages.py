"""Messages that people try functions with: from a file, or made up; and how they and their like are shown.

No number changes on the way: what is read and shown keeps the digits that it has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from spillway.change import ACTIONS
from spillway.cli import UsageError

MAX_FILE_BYTES = 64 << 20
WIDTH = 100
_IN_ORDER = ("record", "changes", "action", "metadata")  # as a sink's messages have them: some functions go by place
_FORMS = "a message as Sequin has it, a list of them, or one a line"


class _Number(str):
    """As it is written."""

    __slots__ = ()


_decode = json.JSONDecoder(parse_float=_Number, parse_int=_Number).decode


def from_file(path: Path) -> list[bytes]:
    """The messages of a file, or of standard input for ``-``. Raises UsageError."""
    try:
        data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if str(path) == "-" else _read(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8", f"give it {_FORMS}") from None
    found = [_message(value, f"{path}: message {number}") for number, value in enumerate(_values(text, path), 1)]
    if not found:
        raise UsageError(f"{path} holds no message", f"give it {_FORMS}")
    return found


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _values(text: str, path: Path) -> list[object]:
    try:
        whole = _decode(text)
    except ValueError:
        return list(_by_line(text, path))
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]  # as a webhook has them
    return whole if isinstance(whole, list) else [whole]


def _by_line(text: str, path: Path) -> Iterator[object]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _decode(line)
            except ValueError:
                raise UsageError(f"{path}:{number}: is no JSON", f"give it {_FORMS}") from None


def _message(value: object, where: str) -> bytes:
    if not isinstance(value, dict) or not isinstance(value.get("record"), dict):
        raise UsageError(f"{where} has no record", f"give it {_FORMS}")
    if value.get("action") not in ACTIONS:
        raise UsageError(f"{where}: its action must be one of {', '.join(ACTIONS)}")
    if not isinstance(value.get("metadata", {}), dict) or not isinstance(value.get("changes"), dict | None):
        raise UsageError(f"{where}: changes and metadata must be objects, changes may be null")
    return compact(dict.fromkeys(_IN_ORDER) | {"metadata": {}} | value).encode()


_LIKE_MANY: dict[str, object] = {
    "id": 1,
    "name": "Example",
    "email": "example@example.com",
    "inserted_at": "2026-01-02T03:04:05.000000Z",
}


def made_up(table: str, suffix: bytes, record: Mapping[str, object] | None = None) -> list[bytes]:
    """An insert, an update and a delete of a row; None: of a table that looks like many. ``suffix``: of the sink, see
    `spillway.change`."""
    schema, _, name = table.rpartition(".")
    row = _LIKE_MANY if record is None else record
    first, *others = row
    changed = {"name": "Before"} if record is None else dict.fromkeys(others[:1])
    changes = (
        ("insert", row, None),
        ("update", row, changed),
        ("delete", {**dict.fromkeys(row), first: row[first]}, None),
    )
    return [
        _body(action, record, old, schema or "public", name, index) + suffix
        for index, (action, record, old) in enumerate(changes)
    ]


def _body(action: str, record: object, changes: object, schema: str, table: str, index: int) -> bytes:
    metadata = {
        "table_schema": schema,
        "table_name": table,
        "idempotency_key": "MTIzNDU2NzkwOjA=",
        "commit_timestamp": "2026-01-02T03:04:05.123456Z",
        "commit_lsn": 123456790,
        "commit_idx": index,
        "database_name": "example",
        "transaction_annotations": None,
        "record_pks": ["1"],
        "database": {"id": "", "name": "example", "annotations": {}, "database": "example", "hostname": "localhost"},
    }
    message = {"record": record, "changes": changes, "action": action, "metadata": metadata}
    return json.dumps(message, separators=(",", ":")).encode().removesuffix(b"}}")


def compact(value: object) -> str:
    """JSON on one line."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quoted(str(key))}:{compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(compact, value)) + "]"
    return _quoted(value)


def laid_out(text: bytes, indent: str = "") -> str:
    """JSON over as many lines as it needs. Characters that a terminal would obey are escapes."""
    return _laid_out(_decode(text.decode(errors="replace")), indent)


def _laid_out(value: object, indent: str) -> str:
    line = compact(value)
    if len(indent) + len(line) <= WIDTH or not isinstance(value, dict | list) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [f"{_quoted(str(key))}: {_laid_out(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _laid_out(item, deeper) for item in value) + f"\n{indent}]"


def _quoted(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
