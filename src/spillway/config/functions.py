"""`functions[]`: what users say about single messages, by name; a sink names those that it uses.

A function has one source. Python (`transform`, `filter`, `routing`): ``code``, ``file`` or ``module``; SQL
(`enrichment`): ``code`` or ``file``; `path`: ``path``; `fields`: ``fields``. A ``file`` is read when the configuration
is, so ``code`` has the text in either case. Python is compiled here, never executed.

Old spellings of Sequin: ``type: function`` is `transform`; what is nested in ``function:`` or ``transform:`` stands
beside the name; ``sink_type: http_push`` is `webhook`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from spillway.config.code import python_problem, sql_problem
from spillway.config.destination import NOT_YET, OLD_SPELLINGS, TYPES
from spillway.config.document import Block, Items
from spillway.config.section import Reading, Section, nearest
from spillway.config.values import Name, Whole, Wrong, plain

FunctionType = Literal["path", "transform", "filter", "routing", "enrichment", "fields"]
FieldKind = Literal["select", "rename", "drop", "mask", "hash", "flatten", "set"]
KINDS: tuple[FieldKind, ...] = ("select", "rename", "drop", "mask", "hash", "flatten", "set")

# By type: the keys of which a function has exactly one.
SOURCES: dict[str, tuple[str, ...]] = {
    "path": ("path",),
    "fields": ("fields",),
    "enrichment": ("code", "file"),
    **dict.fromkeys(("transform", "filter", "routing"), ("code", "file", "module")),
}
PYTHON = ("transform", "filter", "routing")

_PATH = re.compile(r"(record|changes|action|metadata)(\.[a-zA-Z0-9_\-.]+)*")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, slots=True)
class FieldOperation:
    """One step of a function of type fields."""

    kind: FieldKind
    columns: tuple[str, ...] = ()  # select, drop, mask, hash, flatten
    names: dict[str, str] = field(default_factory=dict)  # rename: old -> new
    values: dict[str, object] = field(default_factory=dict)  # set


def _function_name(name: str) -> str:
    if name.lower() in ("none", "null", "nil"):
        raise ValueError("may not be none, null or nil: they mean that there is no function")
    return name


def _path(path: str) -> str:
    if len(path) > 2000 or not _PATH.fullmatch(path):
        raise ValueError("must be a path such as record, record.address.city, changes, action or metadata.table_name")
    return path


def _module(module: str) -> str:
    if not _MODULE.fullmatch(module):
        raise ValueError("must be PACKAGE.MODULE:FUNCTION")
    return module


def _sink_type(kind: str) -> str:
    kind = OLD_SPELLINGS.get(kind, kind)
    if kind not in (*TYPES, *NOT_YET):
        raise ValueError("is no type of a sink" + nearest(kind, [*TYPES, *NOT_YET]))
    return kind


def _operations(value: object) -> object:
    """``[{drop: [a, b]}, {rename: {c: d}}]`` as operations."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of {', '.join(KINDS)}")  # noqa: TRY004 - pydantic collects ValueErrors
    if not value:
        raise ValueError("may not be empty")
    return tuple(
        item if isinstance(item, FieldOperation) else _operation(item, str(index)) for index, item in enumerate(value)
    )


def _operation(item: object, at: str) -> FieldOperation:
    if not isinstance(item, dict) or len(item) != 1:
        raise Wrong(at, f"must be one of {', '.join(KINDS)}, such as - drop: [password]")
    kind, given = next(iter(plain_items(item)))
    for known in KINDS:
        if known != kind:
            continue
        if known == "rename":
            return FieldOperation(kind=known, names=_renaming(given, f"{at}.{kind}"))
        if known == "set":
            if not isinstance(given, dict) or not given:
                raise Wrong(f"{at}.{kind}", "must be a mapping of columns to their values")
            return FieldOperation(kind=known, values=given)
        return FieldOperation(kind=known, columns=_columns(given, f"{at}.{kind}"))
    raise Wrong(f"{at}.{kind}", "unknown operation" + nearest(kind, KINDS))


def plain_items(block: dict[str, object]) -> list[tuple[str, object]]:
    return [(str(key), plain(value)) for key, value in block.items()]


def _columns(given: object, at: str) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Wrong(at, "must be a column or a list of columns")
    if len(set(names)) < len(names):
        raise Wrong(at, "names a column twice")
    return tuple(names)


def _renaming(given: object, at: str) -> dict[str, str]:
    if not isinstance(given, dict) or not given:
        raise Wrong(at, "must be a mapping of old names to new ones")
    names = {str(old): new for old, new in given.items() if isinstance(new, str) and new}
    if len(names) < len(given):
        raise Wrong(at, "must be a mapping of old names to new ones")
    if len(set(names.values())) < len(names):
        raise Wrong(at, "gives two columns the same name")
    return names


FieldOperations = Annotated[tuple[FieldOperation, ...], BeforeValidator(_operations)]


class Function(Section):
    name: Annotated[Name, AfterValidator(_function_name)]
    description: str | None = None
    type: FunctionType
    sink_type: Annotated[str, AfterValidator(_sink_type)] | None = None
    code: str | None = None  # also what ``file`` holds
    file: Path | None = None
    module: Annotated[str, AfterValidator(_module)] | None = None
    path: Annotated[str, AfterValidator(_path)] | None = None
    fields: FieldOperations = ()

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        for key in ("function", "transform"):
            nested = block.get(key)
            if isinstance(nested, Block):
                del block[key]
                _unnest(nested, block, reading)
        if block.get("type") == "function":
            block["type"] = "transform"
        read_file(block, "code", reading)

    @model_validator(mode="after")
    def _one_source(self) -> Function:
        sources = SOURCES[self.type]
        named = {"code": self.code if self.file is None else None, "file": self.file, "module": self.module}
        given = [key for key, value in {**named, "path": self.path, "fields": self.fields or None}.items() if value]
        for key in given:
            if key not in sources:
                raise Wrong(key, f"has no meaning with type: {self.type}, which has {' or '.join(sources)}")
        if not given:
            raise Wrong(sources[0], "is required" + (f", or {' or '.join(sources[1:])}" if sources[1:] else ""))
        if len(given) > 1:
            raise Wrong(given[1], f"give either {' or '.join(given)}")
        if self.sink_type is not None and self.type != "routing":
            raise Wrong("sink_type", "is for functions of type: routing")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Function:
        if self.code is None:
            return self
        problem = sql_problem(self.code) if self.type == "enrichment" else python_problem(self.code, self.type)
        if problem is not None:
            raise Wrong("code" if self.file is None else "file", problem)
        return self


class FunctionLimits(Section):
    """What Python functions may use, for one message; how long the result may be is `max_message_bytes` of the sink."""

    timeout_ms: Annotated[Whole, Field(ge=1, le=600_000)] = 1000
    memory_mb: Annotated[Whole, Field(ge=16, le=65_536)] | None = None  # None: an eighth of memory.limit_mb, 16 to 64


def read_file(block: Block, into: str, reading: Reading) -> None:
    """``file: x.sql`` -> the same, and its text in the key ``into``."""
    name = block.get("file")
    if name is None:
        return
    line, key = block.line_of("file"), block.key_path("file")
    if block.get(into) is not None:
        reading.problem(block.line_of(into), block.key_path(into), f"give either {into} or file")
    elif not isinstance(name, str) or not name:
        reading.problem(line, key, "must be the path of a file")
    else:
        try:
            block[into] = (reading.base_dir / Path(name).expanduser()).read_bytes().decode("utf-8-sig")
            block["file"], block.lines[into] = reading.base_dir / Path(name).expanduser(), line
        except (OSError, ValueError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            reading.problem(line, key, f"cannot be read: {why}" if isinstance(error, OSError) else str(why))


def _unnest(nested: Block, block: Block, reading: Reading) -> None:
    for key, value in nested.items():
        if block.get(key) is not None:
            reading.problem(nested.line_of(key), nested.key_path(key), "is given twice")
            continue
        if isinstance(value, Block | Items):
            value.path = block.key_path(key)
        block[key], block.lines[key] = value, nested.line_of(key)
