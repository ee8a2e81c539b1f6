"""What was promised to a sink and did not come: initial backfills, refills of a gap, backfills for related tables and
retries of dead letters that have failed.

The sink's health says so (`Owed.findings`), over restarts, for their documents stay among those that have not ended,
until the table's rows have come with another, or somebody cancels it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from spillway.config import Sink
from spillway.errors import Finding
from spillway.flow.gap import gap_token
from spillway.flow.progress import BackfillState
from spillway.store.base import Gap

_WHAT: Final[Mapping[str, str]] = {
    "initial": "initial backfill",
    "related": "backfill for its related tables",
    "retry": "retry of dead letters",
}
NAMED = 10  # so many failed backfills are named in the sink's health


class Owed:
    """Of all sinks of a database. What leaves is for the caller to write."""

    def __init__(self) -> None:
        self._states: dict[str, BackfillState] = {}  # by id

    def add(self, state: BackfillState) -> None:
        self._states[state.id] = state

    def forget_sink(self, name: str) -> None:
        self._states = {number: state for number, state in self._states.items() if state.sink != name}

    def made_up_for(self, done: BackfillState) -> list[BackfillState]:
        """Those that this one stands for as well; they leave."""
        return [self._states.pop(owed.id) for owed in list(self._states.values()) if _makes_up_for(done, owed)]

    def done_without(self, sink: str, id_or_table: str) -> BackfillState | None:
        """The last of this name; it leaves."""
        for state in reversed(self._states.values()):
            if state.sink == sink and state.is_called(id_or_table):
                return self._states.pop(state.id)
        return None

    def findings(self, sink: Sink, gap: Gap | None) -> list[Finding]:
        """For the health of a sink that has this gap."""
        found: list[Finding] = []
        for state in self._states.values():
            request, table = state.request, state.request.text
            if state.sink != sink.name or not sink.selects(*request.name):
                continue
            if request.origin == "gap":
                if gap is None or request.gap != gap_token(gap):
                    continue  # acknowledged, or another by now
                what, remedy = "refill", f"then: spillway backfill start {sink.name} --gap"
            else:
                what = _WHAT.get(request.origin, "backfill")
                remedy = f"then: spillway backfill start {sink.name} {table}"
            remedy += f"; or do without: spillway backfill cancel {sink.name} {table}"
            found.append(Finding("backfill_failed", f"the {what} of {table} failed: {state.error}", remedy))
        if len(found) > NAMED:
            more = f"{len(found) - NAMED} more backfills failed"
            found[NAMED:] = [Finding("backfill_failed", more, f"see: spillway backfill list {sink.name} --all")]
        return found


def _makes_up_for(done: BackfillState, owed: BackfillState) -> bool:
    """What one has brought is all that was to come with the other."""
    brought, promised = done.request, owed.request
    if (done.sink, brought.name) != (owed.sink, promised.name):
        return False
    if promised.origin == "gap" and brought.gap != promised.gap:
        return False
    limits = (brought.where, brought.named, brought.least_key, brought.most_key, brought.committed_since)
    whole = brought.start is None or (brought.sort_column, brought.start) == (promised.sort_column, promised.start)
    return whole and limits == (None,) * len(limits)
