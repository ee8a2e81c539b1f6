"""Which sink wants what, and as which messages.

The router makes spans of a chunk: per sink, which of its changes it gets. For each table it keeps which sinks want it,
decided when the table's Relation message arrives (again when it changes); what no sink wants is not even decoded
(`wanted`).

- Sinks of *events* get one message per change, ordered by the configured columns, else by the primary key; a change of
  the key is ordered under both keys, the old one and the new one.
- Sinks of *state* are ordered by the primary key, which is the document's identity; a change of the primary key is two
  messages at one position: the delete of the old key, and the change itself.
- Sinks that keep rows in one transaction (``atomic``) are ordered as events by the primary key, and move the row
  themselves.

By which keys a sink orders is one number for all tables (`spillway.chunk.Keying`): every sink with group columns has a
set of groups of its own in the chunks, in which the tables without such columns stand with their primary keys.

A table that a sink cannot take (its key is not part of the replica identity) is refused for that sink when the
Relation message comes: `refused` names it and the finding; its changes are not routed to that sink, and health says so.
When it is mended, what the sink missed becomes a gap on record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spillway.change import ACTIONS, Action
from spillway.chunk import Chunk, Keying, Span
from spillway.columns import OLD_DELETE
from spillway.errors import Finding
from spillway.flow.delivery import Delivery
from spillway.impl import by_kind

ROW_ACTIONS: frozenset[Action] = frozenset({"insert", "update", "delete"})
_INSERT, _UPDATE, _DELETE, _READ, _TRUNCATE = range(len(ACTIONS))
_MOVED_AWAY = _DELETE + OLD_DELETE  # the delete of the old key, of a change of the key

Columns = tuple[str, ...]
# Judges a set of key columns (None: the primary key) of a table for a sink that needs a key, or can do without.
Unkeyable = Callable[[Columns | None, bool], Finding | None]


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one sink wants of the slot."""

    delivery: Delivery
    wants_table: Callable[[str, str], bool]  # schema, table
    actions: frozenset[Action] = ROW_ACTIONS
    # By table; where a sink has none at all it is ordered by the primary key.
    group_columns: Mapping[tuple[str, str], Columns] | None = None
    grouping: bool = True
    needs_key: bool = False  # keeps rows: ordered by the primary key always, refuses tables without one
    splits_key_change: bool = False  # state sinks: delete of the old key, index of the new one
    applies_truncate: bool = False


@dataclass(frozen=True, slots=True)
class _Route:
    """One sink's way for one table."""

    delivery: Delivery
    kinds: frozenset[int]  # what it takes of `by_kind`
    ignores_truncate: bool


class Router:
    def __init__(self, subscriptions: Sequence[Subscription], before: Router | None = None) -> None:
        """``before``: the router in whose place it comes. Its sinks come first, in their order: what is in memory and
        in the store is numbered by that (`Keying`)."""
        self._subscriptions = tuple(subscriptions)
        self._grouped = [s for s in subscriptions if s.grouping and not s.needs_key and s.group_columns]
        self._keying = {s.delivery: self._keying_of(s) for s in subscriptions}
        self._routes: dict[tuple[str, str], list[_Route]] = {}
        self.refused: dict[tuple[str, str, str], Finding] = {}  # sink, schema, table
        self._refused_since: dict[tuple[str, str, str], int] = {}  # from which LSN on
        if before is not None:
            self.refused |= before.refused
            self._refused_since |= before._refused_since

    @property
    def groups(self) -> int:
        """How many sets of groups a chunk must have."""
        return len(self._grouped)

    def keying(self, delivery: Delivery) -> int:
        """What the sink orders its messages by (`spillway.chunk.Keying`)."""
        return self._keying[delivery]

    def group_columns(self, schema: str, table: str) -> tuple[Columns | None, ...]:
        """By which columns each of the groups orders this table; None: by its primary key."""
        return tuple(self._columns(s, schema, table) for s in self._grouped)

    def learn(self, schema: str, table: str, unkeyable: Unkeyable, lsn: int = 0) -> frozenset[Action]:
        """A table's shape is known as of ``lsn``: decide its routes. Returns the actions that some sink wants."""
        routes: list[_Route] = []
        wanted: set[Action] = set()
        for subscription in self._subscriptions:
            if not subscription.wants_table(schema, table):
                continue
            name = subscription.delivery.name
            finding = None
            if subscription.grouping:
                finding = unkeyable(self._columns(subscription, schema, table), subscription.needs_key)
            if finding is not None:
                self.refused[name, schema, table] = finding
                self._refused_since.setdefault((name, schema, table), lsn)
                continue
            mended = self.refused.pop((name, schema, table), None)
            if mended is not None:
                since = self._refused_since.pop((name, schema, table))
                reason = f"table {schema}.{table} was refused: {mended.what}"
                subscription.delivery.missed(since, lsn, reason, (schema, table))
            wanted |= subscription.actions
            kinds = {ACTIONS.index(action) for action in subscription.actions}
            if subscription.splits_key_change and "update" in subscription.actions:
                kinds.add(_MOVED_AWAY)
            if subscription.applies_truncate:
                kinds.add(_TRUNCATE)
            routes.append(_Route(subscription.delivery, frozenset(kinds), not subscription.applies_truncate))
        self._routes[schema, table] = routes
        return frozenset(wanted)

    def route(self, chunk: Chunk) -> list[tuple[Delivery, Span]]:
        """The span of each sink that gets something."""
        kinds = by_kind(chunk)
        parts: dict[Delivery, list[Sequence[int]]] = {}
        for (table, kind), indices in kinds.items():
            for route in self._routes.get(chunk.tables[table], ()):
                if kind in route.kinds:
                    parts.setdefault(route.delivery, []).append(indices)
                elif kind == _TRUNCATE and route.ignores_truncate:
                    route.delivery.truncates_ignored += len(indices)
        return [(d, Span(chunk, self._keying[d], _merged(chunk, found))) for d, found in parts.items()]

    def _keying_of(self, subscription: Subscription) -> int:
        if not subscription.grouping:
            return Keying.UNGROUPED
        if subscription in self._grouped:
            return Keying.GROUPED + self._grouped.index(subscription)
        return Keying.STATE if subscription.splits_key_change else Keying.EVENTS

    @staticmethod
    def _columns(subscription: Subscription, schema: str, table: str) -> Columns | None:
        if not subscription.grouping or subscription.needs_key or subscription.group_columns is None:
            return None
        return subscription.group_columns.get((schema, table))


def _merged(chunk: Chunk, parts: Sequence[Sequence[int]]) -> Sequence[int] | None:
    """Rising indices; None: all of the chunk."""
    if sum(map(len, parts)) == chunk.count:
        return None
    if len(parts) == 1:
        return parts[0]
    return sorted(index for part in parts for index in part)
