"""Field operations: what can be said of columns without code. They act on ``record`` and ``changes`` alike; the message
keeps its form. In the order in which they are written:

- ``select``: keeps these columns and no others, in the order of the row.
- ``drop``: leaves these columns out.
- ``rename``: gives columns new names, all at once (two may swap theirs); a renamed column takes the place of one that
  has its new name.
- ``mask``: ``"***"`` instead of the value.
- ``hash``: SHA-256 of the value's text instead of the value, in hexadecimal; the text of what is not text is its JSON.
- ``flatten``: the keys of an object become columns of their own, ``address: {city: x}`` is ``address_city: x``, at any
  depth; lists stay. A column that has the name already stays as it is.
- ``set``: gives columns fixed values. A fixed value has no old one: ``changes`` loses these columns.

What a column is in ``changes`` it is in ``record``: which names are taken there is judged by the record, which has all
columns, while ``changes`` has those that changed.

Null stays null under `mask` and `hash`. A column that is not there is passed over: not every table has every column,
and an update may come without its TOAST columns.

Values are moved as slices of the message's text (`spillway.members`), so that not a digit of them changes; only what is
hashed is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256

import orjson

from spillway.change import RECORD_START
from spillway.functions import jsontext
from spillway.functions.spec import FieldOperation
from spillway.impl import end_of_value, joined, members
from spillway.members import named

Row = dict[bytes, bytes]  # by name, in its quotes; JSON
Change = Callable[[Row, Row], Row]  # of a row, whose names are judged by the record (which it may be)

MASK = b'"***"'
_CHANGES = b',"changes":'


def apply(operations: Sequence[FieldOperation]) -> Callable[[bytes], bytes]:
    """A function that changes a message by these."""
    steps = [(_operation(one), _without(one) if one.kind == "set" else _operation(one)) for one in operations]

    def change(message: bytes) -> bytes:
        record_end = end_of_value(message, RECORD_START)
        changes_start = record_end + len(_CHANGES)
        changes_end = end_of_value(message, changes_start)
        record = dict(members(message[RECORD_START:record_end]))
        changes = _row(message[changes_start:changes_end])
        for on_record, on_changes in steps:
            if changes is not None:
                changes = on_changes(changes, record)
            record = on_record(record, record)
        after = message[changes_start:changes_end] if changes is None else joined(changes.items())
        return b"".join((message[:RECORD_START], joined(record.items()), _CHANGES, after, message[changes_end:]))

    return change


def _row(text: bytes) -> Row | None:
    return dict(members(text)) if text.startswith(b"{") else None


def _without(one: FieldOperation) -> Change:
    names = frozenset(map(_quoted, one.values))
    return lambda row, _: {name: value for name, value in row.items() if name not in names}


def _operation(one: FieldOperation) -> Change:
    columns = frozenset(map(_quoted, one.columns))
    match one.kind:
        case "select":
            return lambda row, _: {name: value for name, value in row.items() if name in columns}
        case "drop":
            return lambda row, _: {name: value for name, value in row.items() if name not in columns}
        case "rename":
            names = {_quoted(old): _quoted(new) for old, new in one.names.items()}
            return lambda row, record: _rename(row, record, names)
        case "mask":
            return lambda row, _: _replace(row, columns, lambda _: MASK)
        case "hash":
            return lambda row, _: _replace(row, columns, _hash)
        case "flatten":
            return lambda row, record: _flatten(row, record, columns)
        case "set":
            values = {_quoted(name): jsontext.dumps(value) for name, value in one.values.items()}
            return lambda row, _: {**row, **values}


def _quoted(name: str) -> bytes:
    """As the decoder writes the names of columns."""
    return orjson.dumps(name)


def _rename(row: Row, record: Row, names: Mapping[bytes, bytes]) -> Row:
    taken = {new for old, new in names.items() if old in record}
    return {names.get(name, name): value for name, value in row.items() if name in names or name not in taken}


def _replace(row: Row, columns: Iterable[bytes], by: Callable[[bytes], bytes]) -> Row:
    for name in columns:
        value = row.get(name)
        if value is not None and value != b"null":
            row[name] = by(value)
    return row


def _hash(text: bytes) -> bytes:
    if text.startswith((b'"', b"{", b"[")):
        value = jsontext.loads(text)
        text = value.encode(errors="surrogatepass") if isinstance(value, str) else jsontext.dumps(value)
    return b'"%b"' % sha256(text).hexdigest().encode()


def _flatten(row: Row, record: Row, columns: Iterable[bytes]) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name in columns and value.startswith(b"{"):
            for inner, leaf in _leaves(name, value):
                if inner not in record:
                    flat[inner] = leaf
        else:
            flat[name] = value
    return flat


def _leaves(prefix: bytes, text: bytes) -> list[tuple[bytes, bytes]]:
    leaves: list[tuple[bytes, bytes]] = []
    for name, value in named(members(text)).items():
        path = b"%b_%b" % (prefix[:-1], name[1:])
        if value.startswith(b"{"):
            leaves += _leaves(path, value)
        else:
            leaves.append((path, value))
    return leaves
