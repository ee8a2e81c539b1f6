"""A re-index as it is kept, and the sink that fills the new index.

The document of a re-index is in the store under its sink's name, with the id `REINDEX`; there is one, that of the last,
and it stays (`drop_old` needs it). While a re-index is under way a *shadow* of its sink takes part in the slot: the
sink's own configuration with another name and the new index as its destination, built at every start from the document.

What differs besides: a document that the new index rejects parks its key until a newer version of the row is accepted
(``latest_wins``), and nothing is buried for the number of its attempts, since a row that is given up on would be
missing after the switch. A backlog of the shadow never blocks the slot: at its cap the re-index fails instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter

from spillway.config import Search, Sink
from spillway.store.base import BackfillDocument, Store

REINDEX = "reindex"

Step = Literal["backfilling", "catching_up", "verifying", "swapped", "done", "failed", "cancelled"]
UNDER_WAY: frozenset[Step] = frozenset(("backfilling", "catching_up", "verifying", "swapped"))


@dataclass(slots=True)
class ReindexState:
    id: str
    sink: str
    alias: str
    into: str
    epoch: int  # of the history that its rows belong to
    replace_index: bool = False
    parallel: int = 1
    definition: dict[str, object] | None = None  # what the new index is to be created with; None: it has been
    state: Step = "backfilling"
    ending: Literal["failed", "cancelled"] | None = None  # decided, and not yet done
    reason: str = ""  # why it has failed
    backfills: dict[str, str] = field(default_factory=dict)  # by table: the id
    relations: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # by table: what was backfilled
    ended_backfills: list[dict[str, object]] = field(default_factory=list)  # as they were at the end
    old: list[str] = field(default_factory=list)  # what the alias stood for, as far as it is kept
    swapped_lsn: int = 0  # up to there the main sink may have written into the old index; 0: not known
    documents: int = 0  # rows compared with the new index
    differing: int = 0  # of these, to be looked at again
    started: float = 0.0  # wall seconds
    ended: float | None = None

    @property
    def under_way(self) -> bool:
        return self.state in UNDER_WAY

    @property
    def shadow(self) -> str:
        return f"{self.sink}@{self.into}"

    def as_document(self) -> BackfillDocument:
        return BackfillDocument(REINDEX, _ADAPTER.dump_json(self), ended=False)

    def as_item(self, waiting: str, backfills: list[dict[str, object]]) -> dict[str, object]:
        """For people and their programs."""
        return {
            "sink": self.sink,
            "alias": self.alias,
            "into": self.into,
            "old": list(self.old),
            "state": self.ending or self.state,
            "reason": self.reason or waiting,
            "backfills": backfills,
            "documents": self.documents,
            "differing": self.differing,
            "started_at": _time(self.started),
            "ended_at": None if self.ended is None else _time(self.ended),
        }


_ADAPTER = TypeAdapter(ReindexState)


def kept(store: Store, sink: str) -> ReindexState | None:
    """The last re-index of a sink."""
    for number, document in store.backfills(sink, ended=False):
        if number == REINDEX:
            return _ADAPTER.validate_json(document)
    return None


def shadow_of(sink: Sink, into: str) -> Sink:
    destination = sink.destination
    assert isinstance(destination, Search)
    return sink.model_copy(
        update={
            "name": f"{sink.name}@{into}",
            "destination": destination.model_copy(update={"index_name": into, "mapping": None}),
            "status": "active",
            "initial_backfill": (),
            "on_reject": "latest_wins",
            "max_retry_count": None,
            "backlog": sink.backlog.model_copy(update={"on_full": "pause"}),
        }
    )


def shadows(sinks: Iterable[Sink], store: Store) -> list[tuple[Sink, Sink]]:
    """Those of the re-indexes under way, each with its sink. Not before the index is there, nor when it is to go: for a
    sink creates the index that it misses."""
    found = []
    for sink in sinks:
        state = kept(store, sink.name)
        if state is None or not state.under_way or not isinstance(sink.destination, Search):
            continue
        if state.definition is None and state.ending is None:
            found.append((shadow_of(sink, state.into), sink))
    return found


def _time(wall_seconds: float) -> str:
    return datetime.fromtimestamp(wall_seconds, UTC).isoformat(timespec="milliseconds")
