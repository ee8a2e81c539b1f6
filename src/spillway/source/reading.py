"""The rows of one answer (`spillway.source.wrapped`), as they come: which key each is of, and its values as JSON.

The first row says whether the answer counts. Of a row that is within the credit as the server counts it, what it takes
as JSON is looked at before it is made, where that may be much, and once it is: what is above the credit then is let go
of, and told by its size as if it had stayed on the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg.pq.abc import PGresult

from spillway.pgoutput.filters import admits
from spillway.pgoutput.scalars import text, to_text
from spillway.source.sessions import Session
from spillway.source.snapshot import Seen
from spillway.source.wrapped import COST, COVERED, FIRST, HEAD, ROW_BYTES, VALUE_BYTES, Prepared, Row, row_bytes

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
    kept_bytes: int = 0  # of credit that the rows have taken
    seconds: float = 0.0  # that the server was at work on the question
    queries: int = 0  # how often it was asked


class Reading:
    """See the module. ``limits``: what all rows may take, and what one may."""

    def __init__(
        self,
        session: Session,
        prepared: Prepared,
        keys: Sequence[tuple[str, ...]],
        seen: Seen,
        limits: tuple[int, int],
    ) -> None:
        self.fetched = Fetched()
        self.visible = False
        self.outdated = False  # the values are of other types than the renderers
        self._session = session
        self._prepared = prepared
        self._places: dict[tuple[str, ...], list[int]] = {}
        for place, key in enumerate(keys):
            self._places.setdefault(key, []).append(place)
        self._seen = seen
        self._left_bytes, self._row_bytes = limits

    @property
    def distinct(self) -> Sequence[tuple[str, ...]]:
        """Each key once: joined with the same key twice, a row would be two."""
        return list(self._places)

    def take(self, result: PGresult) -> None:
        values = [result.get_value(0, i) for i in range(result.nfields)]
        result.clear()
        if (head := values[HEAD]) is not None:
            self._begin(head.decode())
        cost = values[COST]
        if cost is None or not self.visible or self.outdated:
            return
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
        needed_bytes = int(cost)
        if values[COVERED] == b"t":
            self._session.largest_row_bytes = max(self._session.largest_row_bytes, needed_bytes)
            if not admits(self._prepared.question.checks, values[FIRST:]):
                fetched.left.update(places)
                return
            if needed_bytes > _LARGE_BYTES:
                needed_bytes = max(needed_bytes, self._needed(values))
            if self._fits(needed_bytes, len(places)):
                row = self._rendered(values)
                needed_bytes = max(needed_bytes, row_bytes(row.values()))
                if self._fits(needed_bytes, len(places)):
                    self._left_bytes -= needed_bytes * len(places)
                    fetched.kept_bytes += needed_bytes * len(places)
                    fetched.rows.update(dict.fromkeys(places, row))
                    return
        fetched.sizes.update(dict.fromkeys(places, needed_bytes))

    def _fits(self, needed_bytes: int, places: int) -> bool:
        """What is made of a row is made for each of those who asked for it."""
        return needed_bytes <= self._row_bytes and needed_bytes * places <= self._left_bytes

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

    def _rendered(self, values: list[bytes | None]) -> dict[str, bytes]:
        """Each value is let go of as soon as it is JSON."""
        row: dict[str, bytes] = {}
        for i, (name, renderer) in enumerate(zip(self._prepared.columns, self._prepared.renderers, strict=True), FIRST):
            value, values[i] = values[i], None
            row[name] = b"null" if value is None else value if renderer is None else renderer(value)
        return row
