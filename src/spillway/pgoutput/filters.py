"""Column filters as the decoder applies them: what of a table's changes a sink wants, by what the rows say.

A `Filter` is what one sink (or several) says of one table: `Check`s that must all hold. They are compiled by
`spillway.pgoutput.conditions` against a relation; here stands what they mean for a change.

A check of a value that is null does not hold, unless it asks for null, as in SQL. A check of a value that is not known
counts as holding, so that nothing is left out which may have been meant: a delete must go through. Not known are

- in a delete, what is not part of the replica identity;
- in an update, an unchanged TOAST column that the old row does not tell, except that it is not null; and of the old row
  what was not sent. Of that the primary key is taken as unchanged, as everywhere (spillway.pgoutput.decoder);
- in a row above ``max_message_bytes``, a value above `CHECKED_BYTES`;
- text that is not of its column's type, which no server sends.

**What a filter says of a change** (`spillway.chunk`): of an insert and of an existing row `YES` if the row matches, of
a delete `YES` if the old row does. Of an update `YES` if the new row matches, else `LEFT` if the old one did, or may
have; else `NO`. Of the delete of an update's old row: `NO` if that did not match, else `YES`, or `LEFT` if the new one
does not match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from spillway.change import Action
from spillway.chunk import LEFT, NO, YES
from spillway.pgoutput.relation import Relation, TableInfo

CHECKED_BYTES = 65_536

# How the compiled decoder evaluates a check: "null" looks at no value; "integer", "text" and "moment" (microseconds)
# compare with `values`, "text" without blanks at the end if ``trimmed``; for "path" ``holds`` is a
# `spillway.pgoutput.paths.Told`; for "python", and for what is not of the usual form, it calls ``holds``.
CheckKind = Literal["null", "integer", "text", "moment", "path", "python"]
CheckOperator = Literal["eq", "ne", "lt", "lte", "gt", "gte", "in", "not_in", "prefix", ""]

# Stands for the value of an unchanged TOAST column. Compared by identity: a value may read the same.
UNCHANGED = b"<unchanged toast>"

Row = Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class Check:
    """Of one column. ``holds`` gives None for text that cannot be told. It never raises."""

    column: int
    of_null: bool  # holds of null
    holds: Callable[[bytes], bool | None]
    kind: CheckKind = "python"
    operator: CheckOperator = ""
    values: tuple[int, ...] | tuple[bytes, ...] = ()
    trimmed: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """Of one table. ``number`` is the filter's place in ``Chunk.matched``."""

    number: int
    checks: tuple[Check, ...]
    actions: frozenset[Action] = frozenset()  # some sink wants them of rows that match
    leaves: bool = False  # some sink that keeps rows must be told of those that match no more


# A relation's filters, when it is learned.
Filters = Callable[[Relation, TableInfo], Sequence[Filter]]


def no_filters(_relation: Relation, _info: TableInfo) -> Sequence[Filter]:
    return ()


def admits(checks: Sequence[Check], row: Row, *, partial: bool = False) -> bool:
    """Whether all checks hold. ``partial``: what is null is not known."""
    for check in checks:
        value = row[check.column]
        if value is UNCHANGED:
            if check.kind == "null" and check.of_null:  # what is stored apart is no null
                return False
            continue
        if partial and value is None:
            continue
        if value is None:
            if not check.of_null:
                return False
        elif check.holds(value) is False:
            return False
    return True


def said_of_row(filters: Sequence[Filter], count: int, row: Row, *, partial: bool) -> bytes:
    """What ``count`` filters say of an insert, a delete or an existing row. Those that have nothing about the table say
    yes."""
    said = bytearray([YES]) * count
    for one in filters:
        if not admits(one.checks, row, partial=partial):
            said[one.number] = NO
    return bytes(said)


def said_of_update(filters: Sequence[Filter], count: int, row: Row, old: Row, *, full: bool) -> tuple[bytes, bytes]:
    """What they say of an update, and of the delete of its old row. ``full``: what is null in the old row was null."""
    said, of_old = bytearray([YES]) * count, bytearray([YES]) * count
    for one in filters:
        is_in = admits(one.checks, row)
        was_in = admits(one.checks, old, partial=not full)
        said[one.number] = YES if is_in else LEFT if was_in else NO
        of_old[one.number] = (YES if is_in else LEFT) if was_in else NO
    return bytes(said), bytes(of_old)
