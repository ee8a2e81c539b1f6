"""A backfill as it is kept and shown: what was asked for, and how far it is.

It is a document in the store (`spillway.store.base.BackfillDocument`), replaced whenever a page has become durable or
its state changes. A *part* is what one reader works off: a range of one relation. Its ``cursor`` says where the next
page begins; everything before it is resolved or durable for the sink, but for the keys in ``again``, which have to be
read once more. A backfill of rows that are named by their keys has no parts but blocks of keys, which are not in here
(`spillway.flow.named`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from spillway.source.page import Cursor, Range, Selection

State = Literal["active", "paused", "completed", "failed", "cancelled"]
Origin = Literal["command", "initial", "gap", "reindex", "replay", "related", "retry"]

ENDED: frozenset[State] = frozenset(("completed", "failed", "cancelled"))


@dataclass(frozen=True, slots=True)
class Named:
    """Rows that are named by their keys, which `spillway.flow.named` keeps."""

    rows: int
    blocks: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: rows of one table for one sink."""

    schema: str
    table: str
    origin: Origin = "command"
    where: str | None = None
    sort_column: str | None = None
    start: str | None = None
    committed_since: str | None = None
    keys: tuple[Cursor, ...] | None = None  # these rows alone: primary keys, in column order; of what is kept `named`
    named: Named | None = None
    least_key: Cursor | None = None  # bounds of the primary key, included; in column order
    most_key: Cursor | None = None
    parallel: int = 1
    max_rows_per_second: int | None = None
    sweep: bool = False  # afterwards, delete what the sink has (or all that is `named`) and the source has not
    gap: tuple[int, float] | None = None  # which gap is refilled (`spillway.flow.gap.gap_token`)

    @property
    def name(self) -> tuple[str, str]:
        """Of the table."""
        return self.schema, self.table

    @property
    def text(self) -> str:
        return f"{self.schema}.{self.table}"


@dataclass(slots=True)
class Part:
    schema: str  # of the relation, which may be a partition of the table
    table: str
    low: Cursor | None = None
    high: Cursor | None = None
    cursor: Cursor | None = None
    done: bool = False
    again: list[Cursor] = field(default_factory=list)

    @property
    def within(self) -> Range:
        return Range(self.low, self.high)

    def selection(self, request: Request) -> Selection:
        return Selection(
            self.schema,
            self.table,
            request.where,
            request.sort_column,
            request.start,
            request.committed_since,
            request.least_key,
            request.most_key,
        )


@dataclass(slots=True)
class BackfillState:
    id: str
    sink: str
    request: Request
    state: State = "active"
    parts: list[Part] | None = None  # None: not laid out yet
    estimate_rows: int | None = None
    started_lsn: int = 0  # all that it sends is above
    rows: int = 0  # read from the source
    superseded: int = 0  # of these: not sent, since the stream had brought something newer
    pages: int = 0
    swept: int = 0  # deletes sent for what the source has not
    sweep_after: str | None = None  # where the sweep goes on in the sink
    block: int = 0  # of the keys, that is being read
    placed: list[int] = field(default_factory=list)  # which of its keys are done, by their numbers in it
    unreadable: int = 0  # rows that were passed over, since they can never be read
    unreadable_named: list[str] = field(default_factory=list)  # the first of them, and why
    created: float = 0.0  # wall seconds
    changed: float = 0.0
    ended: float | None = None
    error: str | None = None

    def as_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    def is_called(self, id_or_table: str) -> bool:
        return id_or_table in (self.id, self.request.text, self.request.table)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def is_owed(self) -> bool:
        """It has failed, and its rows are still promised: somebody has to see to that."""
        return self.state == "failed" and self.request.origin in ("initial", "gap", "related", "retry")


def of_json(document: bytes) -> BackfillState:
    return _ADAPTER.validate_json(document)


_ADAPTER = TypeAdapter(BackfillState)
