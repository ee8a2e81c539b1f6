"""What a sink's functions are, as plain values: what `spillway.functions.build` is given, and the worker after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PythonFunction:
    """A Python function of the user: ``text`` that defines it, or ``module``, ``"package.module:function"``."""

    name: str  # in the configuration
    file: str  # as tracebacks and errors name the text
    text: str | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class PathExpression:
    path: str  # record, record.address.city, metadata.table_name, ...


@dataclass(frozen=True, slots=True)
class FieldOperation:
    """See `spillway.functions.fields`."""

    kind: Literal["select", "rename", "drop", "mask", "hash", "flatten", "set"]
    columns: tuple[str, ...] = ()  # of all but rename and set
    names: Mapping[str, str] = field(default_factory=dict)  # of rename: new names by old ones
    values: Mapping[str, object] = field(default_factory=dict)  # of set


@dataclass(frozen=True, slots=True)
class FieldOperations:
    operations: tuple[FieldOperation, ...]


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """The functions of one sink and their limits. ``search_path``: where modules are looked for before Python's own."""

    filter: PythonFunction | None = None
    routing: PythonFunction | None = None
    transform: PythonFunction | PathExpression | FieldOperations | None = None
    timeout_seconds: float = 1.0  # for one message, all functions together
    memory_bytes: int = 64 * MIB  # what user code may take beyond what it holds once it is loaded
    result_bytes: int = 16 * MIB  # what may come of one message: its bodies and routes, and OUTPUT_BYTES for each
    search_path: tuple[str, ...] = ()

    @property
    def python(self) -> dict[str, PythonFunction]:
        """By step."""
        steps = {"filter": self.filter, "routing": self.routing, "transform": self.transform}
        return {step: one for step, one in steps.items() if isinstance(one, PythonFunction)}
