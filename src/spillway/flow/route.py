"""Which sink wants what, and as which messages.

The router is asked per chunk. For each table it keeps a plan, made when the table's Relation message arrives (again
when it changes): the sinks whose source includes the table, which actions they take, and by which key they order.

- Sinks of *events* get one message per change, ordered by the configured columns, else by the primary key; a change of
  the key is ordered under both keys, the old one and the new one.
- Sinks of *state* are ordered by the primary key, which is the document's identity; a change of the primary key is two
  messages at one position: the delete of the old key, and the change itself.
- Sinks that keep rows in one transaction (``atomic``) are ordered by the primary key, too, and move the row themselves.

A table that a sink cannot take (its key is not part of the replica identity) is refused for that sink when the
Relation message comes: `refused` names it and the finding; its changes are not routed to that sink, and health says so.
When it is mended, what the sink missed becomes a gap on record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spillway.change import Change, Message
from spillway.errors import Finding
from spillway.flow.delivery import Delivery

Action = str
ACTIONS: frozenset[Action] = frozenset({"insert", "update", "delete"})


# Judges a set of key columns (None: the primary key) of a table for a sink that needs a key, or can do without.
Unkeyable = Callable[[tuple[str, ...] | None, bool], Finding | None]


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one sink wants of the slot."""

    delivery: Delivery
    wants_table: Callable[[str, str], bool]  # schema, table
    actions: frozenset[Action] = ACTIONS
    group_columns: Callable[[str, str], tuple[str, ...] | None] = lambda _schema, _table: None
    grouping: bool = True
    needs_key: bool = False  # keeps rows: ordered by the primary key always, refuses tables without one
    splits_key_change: bool = False  # state sinks: delete of the old key, index of the new one
    applies_truncate: bool = False


@dataclass(frozen=True, slots=True)
class _Route:
    subscription: Subscription
    group: int | None  # index into Change.groups; None: by primary key


class Router:
    def __init__(self, subscriptions: Sequence[Subscription]) -> None:
        self._subscriptions = subscriptions
        self._routes: dict[tuple[str, str], list[_Route]] = {}
        self.refused: dict[tuple[str, str, str], Finding] = {}  # sink, schema, table
        self._refused_since: dict[tuple[str, str, str], int] = {}  # from which LSN on

    def group_columns(self, schema: str, table: str) -> tuple[tuple[str, ...], ...]:
        """The column sets by which some sink orders this table: what the decoder must make ``Change.groups`` of."""
        sets: list[tuple[str, ...]] = []
        for subscription in self._subscriptions:
            columns = self._columns(subscription, schema, table)
            if columns is not None and columns not in sets:
                sets.append(columns)
        return tuple(sets)

    def learn(self, schema: str, table: str, unkeyable: Unkeyable, lsn: int = 0) -> None:
        """A table's shape is known as of ``lsn``: plan its routes."""
        sets = self.group_columns(schema, table)
        routes: list[_Route] = []
        for subscription in self._subscriptions:
            if not subscription.wants_table(schema, table):
                continue
            columns = self._columns(subscription, schema, table)
            name = subscription.delivery.name
            finding = unkeyable(columns, subscription.needs_key) if subscription.grouping else None
            if finding is not None:
                self.refused[name, schema, table] = finding
                self._refused_since.setdefault((name, schema, table), lsn)
                continue
            mended = self.refused.pop((name, schema, table), None)
            if mended is not None:
                since = self._refused_since.pop((name, schema, table))
                subscription.delivery.missed(since, lsn, f"table {schema}.{table} was refused: {mended.what}")
            routes.append(_Route(subscription, None if columns is None else sets.index(columns)))
        self._routes[schema, table] = routes

    def route(self, changes: Sequence[Change]) -> dict[Delivery, list[Message]]:
        """The messages of each sink, in position order."""
        routed: dict[Delivery, list[Message]] = {}
        for change in changes:
            for route in self._routes.get((change.schema, change.table), ()):
                subscription = route.subscription
                if change.action == "truncate":
                    if subscription.applies_truncate:
                        _append_truncate(routed.setdefault(subscription.delivery, []), change)
                    else:
                        subscription.delivery.truncates_ignored += 1
                elif change.action in subscription.actions:
                    self._append(routed.setdefault(subscription.delivery, []), change, route)
        return routed

    def _append(self, messages: list[Message], change: Change, route: _Route) -> None:
        old = change.old
        if not route.subscription.grouping or change.key is None:
            messages.append(Message(change, ()))
        elif route.subscription.splits_key_change:
            if old is not None and old.key is not None and old.key != change.key:
                messages.append(Message(old, (old.key,), 0))
                messages.append(Message(change, (change.key,), 1))
            else:
                messages.append(Message(change, (change.key,)))
        else:
            key = change.key if route.group is None else change.groups[route.group]
            was = key if old is None else old.key if route.group is None else old.groups[route.group]
            messages.append(Message(change, (key,) if was is None or was == key else (was, key)))

    def _columns(self, subscription: Subscription, schema: str, table: str) -> tuple[str, ...] | None:
        if not subscription.grouping or subscription.needs_key or not subscription.wants_table(schema, table):
            return None
        return subscription.group_columns(schema, table)


def _append_truncate(messages: list[Message], change: Change) -> None:
    """One TRUNCATE of several tables has one position: sub tells its messages apart."""
    sub = 0
    if messages and messages[-1].position[:2] == (change.commit_lsn, change.commit_idx):
        sub = messages[-1].sub + 1
    messages.append(Message(change, (), sub))
