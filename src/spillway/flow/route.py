"""Which sink wants what, and as which messages.

The router makes spans of a chunk: per sink, which of its changes it gets. For each table it keeps which sinks want it,
decided when the table's Relation message arrives (again when it changes); what no sink wants is not even decoded
(`wanted`).

- Sinks of *events* get one message per change, ordered by the configured columns, else by the primary key; a change of
  the key is ordered under both keys, the old one and the new one.
- Sinks of *state* are ordered by the primary key, which is the document's identity; a change of the primary key is two
  messages at one position: the delete of the old key, and the change itself.
- A sink may have *filters*: conditions on a table's columns. The router numbers the different ones, the decoder says of
  every change which of them it meets (spillway.pgoutput.filters), and what meets none of those whose sinks want it is
  not even rendered. A row that leaves the filter of a sink that keeps rows is a delete for it; sinks of events are not
  told.
- Sinks that keep rows in one transaction (``atomic``) are ordered as events by the primary key, and move the row
  themselves.

By which keys a sink orders is one number for all tables (`spillway.chunk.Keying`): every sink with group columns has a
set of groups of its own in the chunks, in which the tables without such columns stand with their primary keys.

A table that a sink cannot take (its key is not part of the replica identity, a filter does not fit it) is refused for
that sink when the Relation message comes: `refused` names it and the finding; its changes are not routed to that sink,
and health says so. That a gap is on record begins then; when it is mended the gap reaches to that place.

Partitions are judged each by itself, published by themselves or by their root, whose name their rows have in either
case: the table is refused as long as one of them is. Those that can be taken flow on where the rows of the others do
not come, because no other sink wants them; where they do come they cannot be told from the rest, and none is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spillway.change import ACTIONS, Action
from spillway.chunk import LEFT, YES, Chunk, Keying, Span
from spillway.columns import GONE_DELETE, OLD_DELETE
from spillway.errors import Finding, SpillwayError
from spillway.flow.delivery import Delivery
from spillway.impl import by_kind
from spillway.pgoutput import concerns_inserts
from spillway.pgoutput.conditions import Condition, compiled
from spillway.pgoutput.emitted import SCHEMA
from spillway.pgoutput.filters import Check, Filter, Filters, no_filters
from spillway.pgoutput.relation import Relation, TableInfo

ROW_ACTIONS: frozenset[Action] = frozenset({"insert", "update", "delete"})
_INSERT, _UPDATE, _DELETE, _READ, _TRUNCATE = range(len(ACTIONS))
_MOVED_AWAY = _DELETE + OLD_DELETE  # the delete of the old key, of a change of the key
_GONE = _DELETE + GONE_DELETE  # the delete of a row that has left a filter

Columns = tuple[str, ...]
Table = tuple[str, str]  # schema, table
# Judges a set of key columns (None: the primary key) of a table for a sink that needs a key, or can do without.
Unkeyable = Callable[[Columns | None, bool], Finding | None]
# Judges a column that says the shard of a row's document, for a sink that takes these actions.
Unroutable = Callable[[str, frozenset[Action]], Finding | None]
# Makes conditions on a table into checks, or says why that cannot be.
Compile = Callable[[Sequence[Condition]], tuple[Check, ...] | Finding]


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
    truncates_of_partitions: bool = False  # takes these as well, of partitions that are published by themselves
    filters: tuple[Condition, ...] = ()  # of all its tables
    routing_column: str | None = None  # says the shard of a row's document
    wants_totals: bool = False  # how many operations a transaction has
    prefix: str | None = None  # of logical messages that it wants (spillway.pgoutput.emitted)


@dataclass(frozen=True, slots=True)
class _Route:
    """One sink's way for one table."""

    delivery: Delivery
    # What it takes of `by_kind`: all of them (None), or those of which its filter says one of these.
    kinds: Mapping[int, tuple[int, ...] | None]
    filter: int
    ignores_truncate: bool


class Router:
    def __init__(self, subscriptions: Sequence[Subscription], before: Router | None = None) -> None:
        """``before``: the router in whose place it comes. Its sinks come first, in their order: what is in memory and
        in the store is numbered by that (`Keying`)."""
        self._subscriptions = tuple(subscriptions)
        self._grouped = [s for s in subscriptions if s.grouping and not s.needs_key and s.group_columns]
        self._keying = {s.delivery: self._keying_of(s) for s in subscriptions}
        self._filters: list[tuple[Condition, ...]] = []  # the different ones
        for subscription in subscriptions:
            if subscription.filters and subscription.filters not in self._filters:
                self._filters.append(subscription.filters)
        self._routes: dict[tuple[str, str], list[_Route]] = {}
        for subscription in subscriptions:
            if subscription.prefix is not None:
                routes = self._routes.setdefault((SCHEMA, subscription.prefix), [])
                routes.append(_Route(subscription.delivery, {_INSERT: None}, -1, True))
        # By sink and table (the root of a partition), then by the relation's own name; from which LSN on.
        self._refusals: dict[tuple[str, Table], dict[Table, tuple[Finding, int]]] = {}
        # By table, then by the relation's own name: the sinks' ways for its rows.
        self._ways: dict[Table, dict[Table, list[_Route]]] = {}
        if before is not None:
            wants = {s.delivery.name: s.wants_table for s in subscriptions}
            for (name, table), refusals in before._refusals.items():
                if name in wants and wants[name](*table):
                    self._refusals[name, table] = dict(refusals)

    @property
    def refused(self) -> dict[tuple[str, str, str], Finding]:
        """By sink, schema, table: why the sink cannot take it, or one of its partitions."""
        return {(name, *table): next(iter(some.values()))[0] for (name, table), some in self._refusals.items()}

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

    @property
    def prefixes(self) -> frozenset[str]:
        """Of logical messages that a sink wants."""
        return frozenset(s.prefix for s in self._subscriptions if s.prefix is not None)

    @property
    def totals(self) -> bool:
        """Whether a sink wants to know how many operations a transaction has."""
        return any(subscription.wants_totals for subscription in self._subscriptions)

    @property
    def filter_count(self) -> int:
        """How many filters there are in all."""
        return len(self._filters)

    def filters(self, relation: Relation, info: TableInfo) -> Sequence[Filter]:
        """The filters on a table that was learned. One that does not fit is left out: `learn` has refused the table for
        its sinks."""
        own = relation.schema, relation.table
        schema, table = info.root or own
        found: list[Filter] = []
        for number, conditions in enumerate(self._filters):
            sinks = [
                s
                for s in self._subscriptions
                if s.filters == conditions
                and s.wants_table(schema, table)
                and own not in self._refusals.get((s.delivery.name, (schema, table)), ())
            ]
            checks = _checks_of(conditions, schema, table, lambda some: compiled(relation, info, some))
            if checks and sinks and not isinstance(checks, Finding):
                leaves = any(map(_deletes_who_left, sinks))
                found.append(Filter(number, checks, frozenset().union(*(s.actions for s in sinks)), leaves))
        return found

    def learn(
        self,
        schema: str,
        table: str,
        unkeyable: Unkeyable,
        lsn: int = 0,
        compile_checks: Compile = lambda _: (),
        unroutable: Unroutable = lambda _column, _actions: None,
        partition: tuple[str, str] | None = None,
    ) -> frozenset[Action]:
        """A table's shape is known as of ``lsn``: decide its routes. ``partition``: its own name, if it is one that is
        published by itself; its rows go by the name of its root, its TRUNCATE by this. Returns the actions of which
        some sink wants all rows."""
        own = partition or (schema, table)
        routes: list[_Route] = []
        emptied: list[_Route] = []
        wanted: set[Action] = set()
        self._elsewhere(own, (schema, table), lsn)
        for subscription in self._subscriptions:
            if not subscription.wants_table(schema, table):
                continue
            finding = None
            if subscription.grouping:
                finding = unkeyable(self._columns(subscription, schema, table), subscription.needs_key)
                if finding is not None and subscription.actions == {"insert"} and not concerns_inserts(finding):
                    finding = None
            if finding is None and subscription.routing_column is not None:
                finding = unroutable(subscription.routing_column, subscription.actions)
            checks = _checks_of(subscription.filters, schema, table, compile_checks)
            if isinstance(checks, Finding):
                finding = finding or checks
            if finding is not None:
                self._refuse(subscription.delivery, (schema, table), own, finding, lsn)
                continue
            self._mended(subscription.delivery, (schema, table), own, lsn)
            number = self._filters.index(subscription.filters) if checks else -1
            if number < 0:
                wanted |= subscription.actions
            elif _takes_any_delete(subscription):
                wanted.add("delete")
            kinds = _kinds(subscription, filtered=number >= 0)
            routes.append(_Route(subscription.delivery, kinds, number, not subscription.applies_truncate))
            if subscription.truncates_of_partitions:
                emptied.append(_Route(subscription.delivery, {_TRUNCATE: None}, -1, False))
        self._ways.setdefault((schema, table), {})[own] = routes
        self._routes[schema, table] = self._together((schema, table))
        if partition is not None:
            self._routes[partition] = emptied
        return frozenset(wanted)

    def left(self, own: Table, lsn: int) -> None:
        """No relation has this name of its own any more."""
        self._elsewhere(own, own, lsn)

    def takes(self, schema: str, table: str) -> bool:
        """Whether a sink wants changes of that name."""
        return any(subscription.wants_table(schema, table) for subscription in self._subscriptions)

    def unpublished(self, found: Mapping[str, Mapping[Table, Finding]], since: int, lsn: int) -> None:
        """By sink, of the tables that it names: nothing comes of these, as of some place behind ``since``, and up to
        ``lsn``. All others do come."""
        for subscription in self._subscriptions:
            delivery = subscription.delivery
            missing = found.get(delivery.name, {})
            for table, finding in missing.items():
                known = table in self._refusals.get((delivery.name, table), {})
                self._refuse(delivery, table, table, finding, lsn if known else since)
            for name, table in list(self._refusals):
                finding_of, _ = self._refusals[name, table].get(table, (None, 0))
                gone = finding_of is not None and finding_of.code == "table_not_published"
                if gone and name == delivery.name and table not in missing:
                    self._mended(delivery, table, table, lsn)

    def renamed(self, was: Table, now: Table, partition: Table | None, lsn: int) -> bool:
        """A table that was learned goes by another name than before: whoever knows it by the old one alone does not get
        it any more, and is told as of a table that it cannot take. ``partition``: as `learn` has it. Returns whether
        there is such a sink."""
        told = False
        for subscription in self._subscriptions:
            if subscription.wants_table(*was) and not subscription.wants_table(*now):
                name, old, new = subscription.delivery.name, ".".join(was), ".".join(now)
                finding = Finding(
                    "table_renamed",
                    f"table {old} is called {new} now: its changes pass by",
                    f"rename it back, or name {new} in the sink's source; then: spillway backfill start {name}",
                )
                self._refuse(subscription.delivery, was, partition or was, finding, lsn)
                told = True
        return told

    def _together(self, table: Table) -> list[_Route]:
        """The ways of a table's rows, whichever partition they are of."""
        ways = self._ways[table]
        taken: dict[Delivery, _Route] = {route.delivery: route for routes in ways.values() for route in routes}
        for delivery in list(taken):
            without = self._refusals.get((delivery.name, table), {})
            # Rows that come by the root's own relation are of any partition.
            if without and (table in ways or any(ways.get(own) for own in without)):
                del taken[delivery]
        return list(taken.values())

    def _elsewhere(self, own: Table, table: Table, lsn: int) -> None:
        """A relation that was of another table, as a partition that was attached or detached, is of this one now."""
        for other, ways in self._ways.items():
            if other != table and ways.pop(own, None) is not None:
                for subscription in self._subscriptions:
                    self._mended(subscription.delivery, other, own, lsn)
                self._routes[other] = self._together(other)

    def _mended(self, delivery: Delivery, table: Table, own: Table, lsn: int) -> None:
        refusals = self._refusals.get((delivery.name, table), {})
        refusal = refusals.pop(own, None)
        if not refusals:
            self._refusals.pop((delivery.name, table), None)
        if refusal is not None:
            finding, since = refusal
            delivery.gaps.missed(since, lsn, finding.what, table)

    def _refuse(self, delivery: Delivery, table: Table, own: Table, finding: Finding, lsn: int) -> None:
        """Its changes pass by from here on. None is confirmed before that is on record: whoever mends it may do so with
        the process stopped."""
        refusals = self._refusals.setdefault((delivery.name, table), {})
        _, since = refusals.get(own, (finding, lsn))
        refusals[own] = finding, since
        delivery.gaps.missed(since, lsn, finding.what, table)

    def route(self, chunk: Chunk) -> list[tuple[Delivery, Span]]:
        """The span of each sink that gets something."""
        kinds = by_kind(chunk)
        parts: dict[Delivery, list[Sequence[int]]] = {}
        for (table, kind), indices in kinds.items():
            for route in self._routes.get(chunk.tables[table], ()):
                if kind in route.kinds:
                    said = route.kinds[kind]
                    some = indices if said is None else _said(chunk, route.filter, said, indices)
                    if some:
                        parts.setdefault(route.delivery, []).append(some)
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


def _checks_of(
    conditions: Sequence[Condition], schema: str, table: str, compile_checks: Compile
) -> tuple[Check, ...] | Finding:
    """Of those on this table; none: it is not filtered."""
    some = [condition for condition in conditions if condition.table == (schema, table)]
    return compile_checks(some) if some else ()


def _kinds(subscription: Subscription, *, filtered: bool) -> dict[int, tuple[int, ...] | None]:
    """As `_Route` has them."""
    kinds: dict[int, tuple[int, ...] | None] = {
        ACTIONS.index(action): (YES,) if filtered and action != "truncate" else None for action in subscription.actions
    }
    if filtered and _takes_any_delete(subscription):
        kinds[_DELETE] = None
    if "update" in subscription.actions:
        leaves = filtered and _deletes_who_left(subscription)
        if subscription.splits_key_change:
            kinds[_MOVED_AWAY] = ((YES, LEFT) if leaves else (YES,)) if filtered else None
        elif leaves:  # it moves a row itself, but what has left is to be deleted
            kinds[_MOVED_AWAY] = (LEFT,)
        if leaves:
            kinds[_GONE] = (LEFT,)
    if subscription.applies_truncate:
        kinds[_TRUNCATE] = None
    return kinds


def _deletes_who_left(subscription: Subscription) -> bool:
    """Whether a row that leaves its filter is deleted. Not from an archive, which takes no deletes."""
    return subscription.needs_key and {"update", "delete"} <= subscription.actions


def _takes_any_delete(subscription: Subscription) -> bool:
    """What the sink holds may have come by a filter that was another: a delete is for it whatever the old row says."""
    return subscription.needs_key and "delete" in subscription.actions


def _said(chunk: Chunk, number: int, said: Sequence[int], indices: Sequence[int]) -> Sequence[int]:
    """Those of which the filter says one of these."""
    column = chunk.matched[number :: chunk.filters]
    if sum(map(column.count, said)) == chunk.count:
        return indices
    return [index for index in indices if column[index] in said]


def filters_of_pages(conditions: Sequence[Condition]) -> Filters:
    """The filter of one sink, number 0, for whoever reads pages for it. Raises SpillwayError if it does not fit."""
    if not conditions:
        return no_filters

    def filters(relation: Relation, info: TableInfo) -> Sequence[Filter]:
        schema, table = info.root or (relation.schema, relation.table)
        checks = _checks_of(conditions, schema, table, lambda some: compiled(relation, info, some))
        if isinstance(checks, Finding):
            raise SpillwayError.of(checks)
        return [Filter(0, checks)] if checks else []

    return filters


def _merged(chunk: Chunk, parts: Sequence[Sequence[int]]) -> Sequence[int] | None:
    """Rising indices; None: all of the chunk."""
    if sum(map(len, parts)) == chunk.count:
        return None
    if len(parts) == 1:
        return parts[0]
    return sorted(index for part in parts for index in part)
