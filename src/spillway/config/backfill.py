"""`sinks[].initial_backfill` and `sinks[].backfill`: existing rows that a sink gets, and how they are read.

`initial_backfill` has Sequin's forms: ``false``, ``true`` (every table of the sink) or a list of tables. Whatever the
file has, a `Sink` holds a tuple of entries; that of ``true`` is one entry without a table.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from spillway.config.section import Section
from spillway.config.values import Name, Table, Text, Whole, Wrong

MAX_PARALLEL = 16

Parallel = Annotated[Whole, Field(ge=1, le=MAX_PARALLEL)]
RowsPerSecond = Annotated[Whole, Field(ge=1)]


class BackfillLimits(Section):
    """How the rows of a sink are read: by how many readers, how fast, how far ahead of the sink."""

    parallel: Parallel = 1
    max_rows_per_second: RowsPerSecond | None = None  # of each backfill
    run_ahead: Annotated[Whole, Field(ge=1)] = (
        10_000  # rows of its backfills that wait for the sink before reading pauses
    )
    timeout_ms: Annotated[Whole, Field(ge=100, le=600_000)] = 5_000  # of the statement of one page


class InitialBackfill(Section):
    """What is read when the sink is new."""

    inert: ClassVar = {"max_timeout_ms": "has no effect here; see backfill.timeout_ms of the sink"}

    table: Table | None  # None: every table of the sink
    sort_column: Name | None = None
    start_position: Text | None = None  # the least value of sort_column that is read
    type: Literal["full", "partial"] = Field(
        default_factory=lambda data: "full" if data.get("sort_column") is None else "partial"
    )

    @model_validator(mode="after")
    def _agrees(self) -> InitialBackfill:
        if self.type == "partial" and self.sort_column is None:
            raise Wrong("sort_column", "is required with type: partial")
        if self.start_position is not None and self.sort_column is None:
            raise Wrong("start_position", "needs a sort_column")
        if self.start_position is not None and self.type == "full":
            raise Wrong("start_position", "has no meaning with type: full; say type: partial")
        return self


def _initial(value: object) -> object:
    """``true`` and ``false``, also as text, as the list that they stand for."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
        return (InitialBackfill(table=None),) if str(value).lower() == "true" else ()
    if isinstance(value, list | tuple):
        return value
    raise ValueError("must be true, false or a list of {table, type, sort_column, start_position}")


InitialBackfills = Annotated[tuple[InitialBackfill, ...], BeforeValidator(_initial)]
