"""What a sink says about its messages without code: conditions, related tables, an outbox.

Each of them is about tables of the sink. Where the sink's source names exactly one table, that one need not be said
again: `fill_tables` writes it into the file's tree before it is validated.

``operator`` is canonical in a `Condition`, whichever spelling the file has (Sequin's ``=``, ``!=``, ``is not null``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from spillway.config.code import sql_problem
from spillway.config.document import Block, Items
from spillway.config.functions import read_file
from spillway.config.section import Reading, Section
from spillway.config.values import Name, Table, Wrong, plain

Operator = Literal["eq", "ne", "gt", "lt", "gte", "lte", "in", "not_in", "is_null", "is_not_null", "like"]
_SPELLINGS: dict[str, Operator] = {
    "=": "eq",
    "==": "eq",
    "!=": "ne",
    "<>": "ne",
    ">": "gt",
    "<": "lt",
    ">=": "gte",
    "<=": "lte",
    "not in": "not_in",
    "is null": "is_null",
    "is not null": "is_not_null",
}

Scalar = str | int | float | bool


def _operator(value: object) -> object:
    if isinstance(value, str):
        spelled = " ".join(value.lower().split())
        return _SPELLINGS.get(spelled, spelled)
    return value


def _json_path(value: object) -> object:
    """``a.b`` or a list of its parts; an index of an array is a number."""
    parts = value.split(".") if isinstance(value, str) else plain(value)
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("must be a path inside of the column's JSON, such as address.city, or a list of its parts")
    texts = [str(part) if isinstance(part, int) and not isinstance(part, bool) else part for part in parts]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a path inside of the column's JSON, such as address.city, or a list of its parts")
    return tuple(texts)


def _compared(value: object) -> object:
    value = plain(value)
    if isinstance(value, list | tuple):
        if not all(isinstance(item, Scalar) for item in value):
            raise ValueError("must be a list of texts, numbers, true or false")
        return tuple(value)
    if value is not None and not isinstance(value, Scalar):
        raise ValueError("must be a text, a number, true or false, or a list of them")
    return value


class Condition(Section):
    """One of a sink's filters: they must all hold of a row of their table."""

    inert: ClassVar = {"field_type": "has no effect: values compare as the type of the column does"}

    table: Table
    column: Name
    operator: Annotated[Operator, BeforeValidator(_operator)]
    value: Annotated[object, BeforeValidator(_compared)] = None
    path: Annotated[tuple[str, ...], BeforeValidator(_json_path)] = ()

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        for old, new in (("column_name", "column"), ("comparison_value", "value"), ("field_path", "path")):
            if old not in block:
                continue
            if block.get(new) is not None:
                reading.problem(
                    block.line_of(old), block.key_path(old), f"is an old spelling of {new}; give one of them"
                )
                continue
            block[new], block.lines[new] = block.pop(old), block.line_of(old)
        if block.get("path") in ("", []):
            del block["path"]

    @model_validator(mode="after")
    def _agrees(self) -> Condition:
        if self.operator in ("is_null", "is_not_null"):
            if self.value is not None:
                raise Wrong("value", f"has no meaning with {self.operator}")
        elif self.value is None:
            raise Wrong("value", "is required; for null there are is_null and is_not_null")
        elif self.operator in ("in", "not_in"):
            if not isinstance(self.value, tuple) or not self.value:
                raise Wrong("value", f"must be a list with {self.operator}")
        elif isinstance(self.value, tuple):
            raise Wrong("value", f"may not be a list with {self.operator}")
        elif self.operator == "like" and not isinstance(self.value, str):
            raise Wrong("value", "must be text with like, such as 'abc%'")
        elif self.operator in ("gt", "lt", "gte", "lte") and isinstance(self.value, bool):
            raise Wrong("value", f"may not be true or false with {self.operator}")
        return self


class Related(Section):
    """A table of which a change refreshes documents of ``refreshes``: the SQL has their keys by keys of this table."""

    table: Table
    columns: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None  # None: its primary key
    sql: str
    file: Path | None = None  # where the SQL was read
    refreshes: Table

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        read_file(block, "sql", reading)

    @model_validator(mode="after")
    def _agrees(self) -> Related:
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise Wrong("columns", "names a column twice")
        problem = sql_problem(self.sql, None if self.columns is None else len(self.columns))
        if problem is not None:
            raise Wrong("sql" if self.file is None else "file", problem)
        return self


_COLUMN = re.compile(r"\{([^{}]*)\}")


def columns_in(text: str) -> list[str]:
    """The columns that a text of an outbox has in braces."""
    return _COLUMN.findall(text)


class Outbox(Section):
    """Rows of a table, or what `pg_logical_emit_message` writes under a prefix, as messages of their own."""

    table: Table | None = None
    prefix: Name | None = None
    payload: Name | None = None  # required with table; without: all that was emitted
    key: Name | None = None
    routing: dict[Name, str] = Field(default_factory=dict)  # routing key of the sink -> text with {column}
    headers: dict[Name, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Outbox:
        if (self.table is None) == (self.prefix is None):
            raise Wrong("table" if self.table is None else "prefix", "give either table or prefix")
        if self.table is not None and self.payload is None:
            raise Wrong("payload", "is required: the column with the message")
        if self.prefix is not None and self.key is not None:
            raise Wrong("key", "has no meaning with prefix: emitted messages are not ordered; write them into a table")
        for section, texts in (("routing", self.routing), ("headers", self.headers)):
            for key, text in texts.items():
                left = _COLUMN.sub("", text)
                if "{" in left or "}" in left or not all(columns_in(text)):
                    raise Wrong(f"{section}.{key}", "must be text with columns in braces, such as orders.{kind}")
        path = self.routing.get("endpoint_path", "/")
        if not path.startswith(("/", "?", "#")):
            raise Wrong("routing.endpoint_path", "must begin with /, ? or #: what a column holds is percent-encoded")
        return self


def fill_tables(sink: Block, reading: Reading) -> None:
    """Write the only table of the sink's source where a filter or a related table leaves it out."""
    only = _only_table(sink)
    for section, key in (("filters", "table"), ("related", "refreshes")):
        items = sink.get(section)
        for block in [item for item in items if isinstance(item, Block)] if isinstance(items, Items) else []:
            if block.get(key) is not None:
                continue
            if only is not None:
                block[key], block.lines[key] = only, block.line
            else:
                what = "is required, since the source of the sink does not name exactly one table"
                reading.problem(block.line, block.key_path(key), what)


def _only_table(sink: Block) -> object:
    source = sink.get("source")
    tables = source.get("include_tables") if isinstance(source, Block) else None
    return tables[0] if isinstance(tables, list) and len(tables) == 1 else None  # or as an old spelling made it
