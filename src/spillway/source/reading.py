"""The rows of one answer (`spillway.source.wrapped`), as they come: which key each is of, and its values as JSON.

The first row says whether the answer counts. Of a row that is within the credit as the server counts it, what it takes
as JSON is looked at before it is made, where that may be much, and once it is: what is above the credit then is let go
of, and told by its size as if it had stayed on the server. A row above `WHOLE_BYTES` comes in pieces
(`spillway.source.pieces`) and is let go of as soon as they are above the credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg.pq.abc import PGresult

from spillway.pgoutput.filters import admits
from spillway.pgoutput.scalars import text, to_text
from spillway.source.pieces import Pieces
from spillway.source.sessions import Session
from spillway.source.snapshot import Seen
from spillway.source.wrapped import (
    COLUMN,
    COST,
    COVERED,
    FIRST,
    HEAD,
    IN_PIECES,
    NO_COLUMN,
    PIECE,
    ROW_BYTES,
    VALUE_BYTES,
    WHOLE,
    Prepared,
    Row,
    row_bytes,
)

# What JSON writes with six bytes, and what with two.
_TWO_IN_JSON: Final = b'\b\t\n\f\r"\\'
_SIX_IN_JSON: Final = bytes(set(range(32)) - set(_TWO_IN_JSON))
_LARGE_BYTES: Final = 64 << 10  # of a row that is looked at for them


@dataclass(slots=True)
class Fetched:
    """By place among the keys. A key that is nowhere here has no row."""

    rows: dict[int, Row] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)  # of rows that the credit did not allow for: what they need
    several: set[int] = field(default_factory=set)  # keys with more than one row
    left: set[int] = field(default_factory=set)  # keys whose row does not pass the question's checks
    columns: tuple[str, ...] = ()  # that a row has
    kept_bytes: int = 0  # of credit that the rows have taken
    seconds: float = 0.0  # that the server was at work on the question
    queries: int = 0  # how often it was asked


@dataclass(slots=True)
class _Row:
    """One that is being taken: its values as they came, and those that come in pieces (by column, from 1 on)."""

    places: list[int]
    cost_bytes: int
    values: list[bytes | None]
    pieces: dict[int, Pieces] = field(default_factory=dict)
    others_bytes: int = 0  # what the values beside the pieces take as JSON
    dropped: bool = False  # it is above the credit: no more than its size is found out


class Reading:
    """See the module. ``limits``: what all rows may take, and what one may. `take` every result, then `end`."""

    def __init__(
        self,
        session: Session,
        prepared: Prepared,
        keys: Sequence[tuple[str, ...]],
        seen: Seen,
        limits: tuple[int, int],
    ) -> None:
        self.fetched = Fetched(columns=prepared.columns)
        self.visible = False
        self.outdated = False  # the values are of other types than the renderers
        self._session = session
        self._prepared = prepared
        self._places: dict[tuple[str, ...], list[int]] = {}
        for place, key in enumerate(keys):
            self._places.setdefault(key, []).append(place)
        self._seen = seen
        self._left_bytes, self._row_bytes = limits
        self._row: _Row | None = None

    @property
    def distinct(self) -> Sequence[tuple[str, ...]]:
        """Each key once: joined with the same key twice, a row would be two."""
        return list(self._places)

    def take(self, result: PGresult) -> None:
        values = [result.get_value(0, i) for i in range(result.nfields)]
        result.clear()
        if (column := values[COLUMN]) != NO_COLUMN:
            self._take_piece(int(column or b""), values[PIECE] or b"")
            return
        self.end()
        if (head := values[HEAD]) is not None:
            self._begin(head.decode())
        if values[COST] is not None and self.visible and not self.outdated:
            self._take_row(values)

    def end(self) -> None:
        """The row that came last is complete."""
        row, self._row = self._row, None
        if row is None:
            return
        if not row.dropped and not self._admits(row):
            self.fetched.left.update(row.places)
            return
        size_bytes = row.cost_bytes
        if row.pieces:
            size_bytes = _size_bytes(row)
        elif size_bytes > _LARGE_BYTES:
            size_bytes = max(size_bytes, self._needed(row.values))
        if not row.dropped and self._fits(size_bytes, row.places):
            made = self._rendered(row)
            size_bytes = max(size_bytes, row_bytes(made.values()))
            if self._fits(size_bytes, row.places):
                self._left_bytes -= size_bytes * len(row.places)
                self.fetched.kept_bytes += size_bytes * len(row.places)
                self.fetched.rows.update(dict.fromkeys(row.places, made))
                return
        self.fetched.sizes.update(dict.fromkeys(row.places, max(size_bytes, row.cost_bytes)))

    def _take_row(self, values: list[bytes | None]) -> None:
        key_values = [values[FIRST + i] for i in self._prepared.key_places]
        key = tuple(to_text(value) for value in key_values if value is not None)
        places = self._places.get(key)
        if places is None or len(key) < len(key_values):
            return
        fetched = self.fetched
        if any(places[0] in known for known in (fetched.rows, fetched.sizes, fetched.several, fetched.left)):
            for place in places:
                fetched.left.discard(place)
                fetched.rows.pop(place, None)
                fetched.sizes.pop(place, None)
                fetched.several.add(place)
            return
        cost_bytes = int(values[COST] or b"")
        if values[COVERED] in (WHOLE, IN_PIECES):
            self._row = _Row(places, cost_bytes, values)
        else:
            fetched.sizes.update(dict.fromkeys(places, cost_bytes))

    def _take_piece(self, column: int, piece: bytes) -> None:
        """Of the row that came last, unless that is nobody's."""
        row = self._row
        if row is None:
            return
        pieces = row.pieces.get(column)
        if pieces is None:
            renderer = self._prepared.renderers[column - 1]
            collected = column - 1 in self._prepared.collected
            pieces = row.pieces[column] = Pieces(renderer, collected=collected)
            row.others_bytes = row.others_bytes or self._needed(row.values)
        pieces.add(piece)
        if row.dropped or not self._fits(_size_bytes(row), row.places):
            row.dropped = True
            for each in row.pieces.values():
                each.drop()

    def _admits(self, row: _Row) -> bool:
        """A value that came in pieces is known as a whole if a check looks at it."""
        checks = self._prepared.question.checks
        values = row.values[FIRST:]
        for column in {check.column + 1 for check in checks} & row.pieces.keys():
            values[column - 1] = row.pieces[column].raw()
        return admits(checks, values)

    def _fits(self, needed_bytes: int, places: Sequence[int]) -> bool:
        """What is made of a row is made for each of those who asked for it."""
        return needed_bytes <= self._row_bytes and needed_bytes * len(places) <= self._left_bytes

    def _begin(self, head: str) -> None:
        snapshot, recovery, *types = head.split(" ")
        if self._session.standby:
            self._session.standby = recovery == "t"  # it may have been promoted, which leaves connections as they are
            self.visible = self._session.standby or self._seen.by(snapshot)
        else:
            self.visible = self._seen.by(snapshot)
        self.outdated = bool(types) and types[0] != self._prepared.types

    def _needed(self, values: Sequence[bytes | None]) -> int:
        """What the row takes as JSON, about, found without making any: texts may grow much."""
        needed_bytes = ROW_BYTES
        for value, renderer in zip(values[FIRST:], self._prepared.renderers, strict=True):
            needed_bytes += VALUE_BYTES + len(value or b"null")
            if value is not None and renderer is not None:
                needed_bytes += 2 + 5 * (len(value) - len(value.translate(None, _SIX_IN_JSON)))
                if renderer is text:
                    needed_bytes += len(value) - len(value.translate(None, _TWO_IN_JSON))
        return needed_bytes

    def _rendered(self, row: _Row) -> dict[str, bytes]:
        """Each value is let go of as soon as it is JSON."""
        made: dict[str, bytes] = {}
        for number, (name, renderer) in enumerate(zip(self._prepared.columns, self._prepared.renderers, strict=True)):
            value, row.values[FIRST + number] = row.values[FIRST + number], None
            pieces = row.pieces.get(number + 1)
            if pieces is not None:
                made[name] = pieces.end()
            else:
                made[name] = b"null" if value is None else value if renderer is None else renderer(value)
        return made


def _size_bytes(row: _Row) -> int:
    """Of one with pieces, as far as they have come."""
    return row.others_bytes + sum([pieces.size_bytes for pieces in row.pieces.values()])
