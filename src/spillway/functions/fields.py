"""Field operations: what can be said of columns without code. They act on ``record`` and ``changes`` alike (`set` on
``record`` alone); the message keeps its form. In the order in which they are written:

- ``select``: keeps these columns and no others, in the order of the row.
- ``drop``: leaves these columns out.
- ``rename``: gives columns new names, all at once (two may swap theirs); a renamed column takes the place of one that
  has its new name.
- ``mask``: ``"***"`` instead of the value.
- ``hash``: SHA-256 of the value's text instead of the value, in hexadecimal; the text of what is not text is its JSON.
- ``flatten``: the keys of an object become columns of their own, ``address: {city: x}`` is ``address_city: x``, at any
  depth; lists stay. A column that has the name already stays as it is.
- ``set``: gives columns fixed values.

Null stays null under `mask` and `hash`. A column that is not there is passed over: not every table has every column,
and an update may come without its TOAST columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

from spillway.functions import jsontext
from spillway.functions.spec import FieldOperation

Row = dict[str, object]
Change = Callable[[Row], Row]

MASK = "***"


def apply(operations: Sequence[FieldOperation]) -> Callable[[Row], Row]:
    """A function that changes a message (its object) by these; the object is used up."""
    on_record = [_operation(one) for one in operations]
    on_changes = [_operation(one) for one in operations if one.kind != "set"]

    def change(message: Row) -> Row:
        for part, steps in (("record", on_record), ("changes", on_changes)):
            row = message.get(part)
            if isinstance(row, dict):
                for step in steps:
                    row = step(row)
                message[part] = row
        return message

    return change


def _operation(one: FieldOperation) -> Change:
    columns = tuple(dict.fromkeys(one.columns))
    match one.kind:
        case "select":
            kept = frozenset(columns)
            return lambda row: {name: value for name, value in row.items() if name in kept}
        case "drop":
            left_out = frozenset(columns)
            return lambda row: {name: value for name, value in row.items() if name not in left_out}
        case "rename":
            return lambda row: _rename(row, one.names)
        case "mask":
            return lambda row: _replace(row, columns, lambda _: MASK)
        case "hash":
            return lambda row: _replace(row, columns, _hash)
        case "flatten":
            return lambda row: _flatten(row, columns)
        case "set":
            return lambda row: {**row, **one.values}


def _rename(row: Row, names: Mapping[str, str]) -> Row:
    taken = {new for old, new in names.items() if old in row}
    return {names.get(name, name): value for name, value in row.items() if name in names or name not in taken}


def _replace(row: Row, columns: Sequence[str], by: Callable[[object], object]) -> Row:
    for name in columns:
        value = row.get(name)
        if value is not None:
            row[name] = by(value)
    return row


def _hash(value: object) -> str:
    text = value.encode(errors="surrogatepass") if isinstance(value, str) else jsontext.dumps(value)
    return sha256(text).hexdigest()


def _flatten(row: Row, columns: Sequence[str]) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name in columns and isinstance(value, dict):
            for inner, leaf in _leaves(name, value):
                if inner not in row:
                    flat[inner] = leaf
        else:
            flat[name] = value
    return flat


def _leaves(prefix: str, value: Row) -> list[tuple[str, object]]:
    leaves: list[tuple[str, object]] = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            leaves += _leaves(f"{prefix}_{name}", inner)
        else:
            leaves.append((f"{prefix}_{name}", inner))
    return leaves
