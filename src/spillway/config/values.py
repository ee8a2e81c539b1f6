"""The kinds of values that the file holds, and how each is read from text.

Anything may arrive as text, because interpolation gives text: numbers, sizes and true/false are read from it. Nothing
else is converted: `NO` is not false, 5432 is not text. No error repeats the value, which may be a secret.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, SecretStr

from spillway.config.document import Block, Items

# As in PostgreSQL's own settings, 1 MB is 1024 * 1024 bytes.
_SIZES = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


class Wrong(ValueError):
    """What is wrong with one key of the section that is being validated."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key = key


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("must be true or false")


def _size(value: object) -> int:
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        unit = match[2].upper().replace("IB", "B")
        if unit in _SIZES:
            return int(float(match[1]) * _SIZES[unit]) if "." in match[1] else int(match[1]) * _SIZES[unit]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be a size such as 50GB, 16MB or a number of bytes")


def _duration(value: object) -> float:
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None and match[2] in _SECONDS:
        return float(match[1]) * _SECONDS[match[2]]
    raise ValueError("must be a time such as 7d, 12h, 30m or 90s")


def _name(value: str) -> str:
    if not value or value != value.strip() or not value.isprintable() or len(value) > 255:
        raise ValueError("must be a name: 1 to 255 printable characters, no blanks around it")
    return value


def _secret(value: SecretStr) -> SecretStr:
    if not value.get_secret_value():
        raise ValueError("is empty")
    return value


def _text(value: object) -> object:
    """Text, or a number as it would be written."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def plain(value: object) -> object:
    """The same without lines and paths."""
    if isinstance(value, Block):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Items):
        return [plain(item) for item in value]
    return value


class TableName(NamedTuple):
    """A table as it is called in the database: no folding to lower case."""

    schema: str
    table: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


_PART = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')


def parse_table(text: str) -> TableName:
    """``schema.table``, or ``table`` in the schema public. A part that holds a dot stands in double quotes."""
    parts: list[str] = []
    at = 0
    while True:
        match = _PART.match(text, at)
        if match is None:
            break
        parts.append(match[1].replace('""', '"') if match[1] else match[2])
        at = match.end()
        if at == len(text):
            if len(parts) > 2:
                break
            return TableName(*parts) if len(parts) == 2 else TableName("public", parts[0])
        if text[at] != ".":
            break
        at += 1
    raise ValueError('must be a table: schema.table, with "..." around a part that holds a dot')


def _table(value: object) -> TableName:
    if isinstance(value, TableName):
        return value
    if isinstance(value, str):
        return parse_table(value)
    raise ValueError("must be a table: schema.table")


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]
Flag = Annotated[bool, BeforeValidator(_flag)]
SizeBytes = Annotated[int, BeforeValidator(_size)]
DurationSeconds = Annotated[float, BeforeValidator(_duration)]
Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, BeforeValidator(_text)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Table = Annotated[TableName, BeforeValidator(_table)]
Annotations = Annotated[dict[str, object], BeforeValidator(plain)]
