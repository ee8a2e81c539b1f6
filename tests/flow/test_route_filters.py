"""Filters from the frames to the sinks: what a sink holds is what its filter lets through.

A table is changed at random; its changes go through a decoder and the router to sinks that keep rows (state, atomic)
and sinks of events, some of them with filters. The oracle is the table itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgoutput import frames
from pgoutput.compare import DOMAIN
from pgoutput.frames import META, Connection, xlog
from pgoutput.given import If
from pgoutput.twins import TWINS
from spillway.change import Action, Change
from spillway.chunk import Chunk, Keying, Span
from spillway.errors import Finding, SpillwayError
from spillway.flow.delivery import Delivery
from spillway.flow.route import Router, Subscription, filters_of_pages
from spillway.pgoutput import Relation, TableInfo
from spillway.pgoutput.conditions import compiled
from spillway.pgoutput.decoder import Decoder

COLUMNS = (("id", 23), ("tenant", 23), ("name", 25))
Row = tuple[int, int, str]


@dataclass
class Sink:
    """What the router knows of a delivery, and what the sink holds."""

    name: str
    truncates_ignored: int = 0
    missed_for: list[str] = field(default_factory=list)
    documents: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)  # action, key, record
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return id(self)

    @property
    def gaps(self) -> Sink:
        return self

    def missed(self, since: int, lsn: int, reason: str, table: tuple[str, str]) -> None:
        self.missed_for.append(reason)

    def take(self, span: Span, *, is_state: bool) -> None:
        last = (0, 0, -1)
        for place in range(len(span)):
            assert span.position(place) > last
            last = span.position(place)
            change = span.chunk.change(span.indices[place])
            self.seen.append((change.action, change.key or "", change.record))
            assert orjson.loads(change.body + b"}}")["action"] == change.action
            if is_state:
                self._keep(change, moves=span.keying != Keying.STATE)

    def _keep(self, change: Change, *, moves: bool) -> None:
        assert change.key is not None
        if not moves:
            version = (change.commit_lsn, change.n)
            assert version > self.versions.get(change.key, (0, 0))
            self.versions[change.key] = version
        if moves and change.was is not None:
            self.documents.pop(change.was, None)
        if change.action == "delete":
            self.documents.pop(change.key, None)
        else:
            self.documents[change.key] = change.record


def subscription(
    sink: Sink,
    kind: str,
    filters: tuple[If, ...] = (),
    actions: frozenset[Action] = frozenset({"insert", "update", "delete"}),
) -> Subscription:
    return Subscription(
        cast(Delivery, sink),
        lambda _schema, table: table == "jobs",
        actions,
        needs_key=kind != "events",
        splits_key_change=kind == "state",
        filters=filters,
    )


class Pipe:
    """A decoder and a router in one."""

    def __init__(self, twin: type[Decoder], wants: list[Subscription], identity: str = "d") -> None:
        self.router = Router(wants)
        self.kinds = {s.delivery: s.needs_key for s in wants}
        router = self.router
        self.decoder = twin(
            META, router.group_columns, router.groups, 1 << 20, 0, 1 << 30, lambda _: None, router.filters,
            router.filter_count,
        )  # fmt: skip
        self.learn(frames.relation(COLUMNS, identity=identity))

    def learn(self, payload: bytes) -> None:
        stop = self.decoder.fill(Connection(xlog(payload)), 1 << 30, 1000)
        assert isinstance(stop, Relation)
        info = TableInfo(stop.oid, ("id",), {})
        wanted = self.router.learn("public", "jobs", lambda *_: None, 0, lambda some: compiled(stop, info, some))
        self.decoder.learn(stop, info, wanted)

    def send(self, *payloads: bytes) -> Chunk:
        assert self.decoder.fill(Connection(*map(xlog, payloads)), 1 << 30, 1000) is None
        chunk = self.decoder.take()
        for delivery, span in self.router.route(chunk):
            cast(Sink, delivery).take(span, is_state=self.kinds[delivery])
        return chunk


def values(row: Row) -> list[bytes]:
    return [str(value).encode() for value in row]


def record(row: Row) -> bytes:
    return b'{"id":%d,"tenant":%d,"name":%b}' % (row[0], row[1], orjson.dumps(row[2]))


FILTERS: list[tuple[tuple[If, ...], Callable[[Row], bool]]] = [
    ((), lambda _: True),
    ((If("tenant", "eq", 1),), lambda row: row[1] == 1),
    ((If("name", "like", "a%"),), lambda row: row[2].startswith("a")),
    ((If("tenant", "gte", 1), If("name", "ne", "b")), lambda row: row[1] >= 1 and row[2] != "b"),
    ((If("id", "in", (1, 3)),), lambda row: row[0] in (1, 3)),
    ((If("name", "like", "%b_"),), lambda row: row[2][-2:-1] == "b"),
    ((If("tenant", "is_null"),), lambda _: False),
]
ROWS = st.tuples(st.integers(0, 4), st.integers(0, 2), st.sampled_from(["a", "ab", "b", "bc", ""]))
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["insert", "update", "update", "update", "delete", "commit"]), ROWS, st.integers(0, 4)),
    max_size=25,
)
SINKS = st.lists(
    st.tuples(st.sampled_from(["state", "atomic", "events"]), st.sampled_from(FILTERS)), min_size=1, max_size=4
)


@pytest.mark.parametrize("twin", TWINS)
@given(OPERATIONS, SINKS, st.sampled_from("df"))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_sink_holds_what_its_filter_lets_through(
    twin: type[Decoder],
    operations: list[tuple[str, Row, int]],
    sinks: list[tuple[str, tuple[tuple[If, ...], Callable[[Row], bool]]]],
    identity: str,
) -> None:
    built = [(Sink(str(number)), kind, *filtered) for number, (kind, filtered) in enumerate(sinks)]
    pipe = Pipe(twin, [subscription(sink, kind, filters) for sink, kind, filters, _ in built], identity)
    table: dict[int, Row] = {}
    events: list[tuple[str, Row | None, Row | None]] = []  # action, old, new
    sent = [frames.begin(1000)]
    lsn = 1000
    for action, row, other in operations:
        if action == "commit":
            pipe.send(*sent, frames.commit(lsn, lsn + 50))
            lsn += 1000
            sent = [frames.begin(lsn)]
        elif action == "insert" and row[0] not in table:
            table[row[0]] = row
            events.append(("insert", None, row))
            sent.append(frames.insert(*values(row)))
        elif action == "delete" and row[0] in table:
            old = table.pop(row[0])
            events.append(("delete", old, None))
            key = [b"%d" % old[0], None, None]
            sent.append(frames.delete(old=values(old)) if identity == "f" else frames.delete(key=key))
        elif action == "update" and other in table and (row[0] == other or row[0] not in table):
            old = table.pop(other)
            table[row[0]] = row
            events.append(("update", old, row))
            if identity == "f":
                sent.append(frames.update(*values(row), old=values(old)))
            else:
                moved: list[frames.Value] = [b"%d" % other, None, None] if row[0] != other else []
                sent.append(frames.update(*values(row), key=moved))
    pipe.send(*sent, frames.commit(lsn, lsn + 50))
    for sink, kind, _, matches in built:
        if kind == "events":
            got = [(action, row) for action, _, row in sink.seen]
            wanted = [
                (action, record(new))
                for action, _, new in events
                if action != "delete" and new is not None and matches(new)
            ]
            assert [one for one in got if one[0] != "delete"] == wanted
            deleted = sum(1 for action, old, _ in events if action == "delete" and old is not None and matches(old))
            assert len(got) - len(wanted) >= deleted
            assert identity == "d" or len(got) - len(wanted) == deleted
        else:
            assert sink.documents == {f"public.jobs:{row[0]}": record(row) for row in table.values() if matches(row)}


@pytest.mark.parametrize("twin", TWINS)
def test_what_nobody_wants_takes_no_place_and_counts(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "events", (If("tenant", "eq", 1),))])
    chunk = pipe.send(
        frames.begin(),
        frames.insert(b"7", b"2", b"x"),
        frames.update(b"7", b"2", b"y"),
        frames.update(b"7", b"1", b"z"),
        frames.update(b"7", b"2", b"z"),
        frames.delete(key=[b"7", None, None]),
        frames.insert(b"8", None, b"x"),
        frames.commit(),
    )
    assert [(c.action, c.commit_idx, c.n) for c in map(chunk.change, range(chunk.count))] == [
        ("update", 2, 3), ("delete", 4, 5)
    ]  # fmt: skip
    assert chunk.commit_lsn


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("identity", "df")
def test_who_leaves_is_deleted_beside_the_update(twin: type[Decoder], identity: str) -> None:
    kept, all_of_it = Sink("kept"), Sink("all")
    wants = [subscription(kept, "state", (If("name", "eq", "in"),)), subscription(all_of_it, "state")]
    pipe = Pipe(twin, wants, identity)
    old = {"old": [b"7", b"2", b"in"]} if identity == "f" else {}
    chunk = pipe.send(
        frames.begin(), frames.insert(b"7", b"2", b"in"), frames.update(b"7", b"2", b"out", **old), frames.commit()
    )
    gone = b'{"id":7,"tenant":2,"name":"in"}' if old else b'{"id":7,"tenant":null,"name":null}'
    assert kept.seen == [("insert", "public.jobs:7", record((7, 2, "in"))), ("delete", "public.jobs:7", gone)]
    assert [action for action, _, _ in all_of_it.seen] == ["insert", "update"]
    assert [(c.commit_idx, c.n) for c in map(chunk.change, range(3))] == [(0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize("twin", TWINS)
def test_what_was_known_to_be_outside_does_not_leave(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "state", (If("id", "gt", 100),))])
    # The key has not changed: it was as it is.
    assert not pipe.send(frames.begin(), frames.update(b"7", b"2", b"x"), frames.commit()).count
    chunk = pipe.send(frames.begin(), frames.update(b"7", b"2", b"x", key=[b"101", None, None]), frames.commit())
    assert [chunk.change(0).action, chunk.change(0).key, chunk.count] == ["delete", "public.jobs:101", 1]


@pytest.mark.parametrize("twin", TWINS)
def test_actions_that_are_not_wanted(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "state", (If("tenant", "eq", 1),), frozenset({"insert", "delete"}))])
    pipe.send(
        frames.begin(),
        frames.insert(b"7", b"1", b"x"),
        frames.update(b"7", b"2", b"x"),
        frames.delete(key=[b"7", None, None]),
        frames.commit(),
    )
    assert [action for action, _, _ in sink.seen] == ["insert", "delete"]


@pytest.mark.parametrize("twin", TWINS)
def test_unchanged_toast_counts_as_holding(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "events", (If("name", "eq", "x"),))])
    pipe.send(frames.begin(), frames.update(b"7", b"1", frames.UNCHANGED), frames.commit())
    assert [action for action, _, _ in sink.seen] == ["update"]
    full = Pipe(twin, [subscription(sink, "events", (If("name", "eq", "x"),))], "f")
    full.send(
        frames.begin(),
        frames.update(b"7", b"1", frames.UNCHANGED, old=[b"7", b"2", b"y"]),
        frames.update(b"8", b"1", frames.UNCHANGED, old=[b"8", b"2", b"x"]),
        frames.commit(),
    )
    assert [(action, key) for action, key, _ in sink.seen[1:]] == [("update", "public.jobs:8")]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(("operator", "passes"), [("is_null", False), ("is_not_null", True)])
def test_unchanged_toast_is_not_null(twin: type[Decoder], operator: str, passes: bool) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "events", (If("name", operator, None),))])
    pipe.send(frames.begin(), frames.update(b"7", b"1", frames.UNCHANGED), frames.commit())
    assert [action for action, _, _ in sink.seen] == ["update"] * passes


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("semantics", ["state", "atomic"])
def test_who_takes_no_deletes_keeps_the_rows_that_leave_its_filter(twin: type[Decoder], semantics: str) -> None:
    sink = Sink("archive")
    wants = subscription(sink, semantics, (If("tenant", "eq", 2),), frozenset({"insert", "update"}))
    Pipe(twin, [wants]).send(
        frames.begin(),
        frames.insert(b"7", b"2", b"x"),
        frames.update(b"7", b"2", b"y"),
        frames.update(b"7", b"3", b"z"),
        frames.update(b"9", b"3", b"z", key=[b"7", None, None]),
        frames.delete(key=[b"9", None, None]),
        frames.commit(),
    )
    assert [action for action, _, _ in sink.seen] == ["insert", "update"]


@pytest.mark.parametrize("twin", TWINS)
def test_rows_that_are_too_large_are_filtered_as_far_as_is_known(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "state", (If("tenant", "eq", 1), If("name", "ne", "y")))], "f")
    large = b"x" * (1 << 20)
    chunk = pipe.send(
        frames.begin(),
        frames.insert(b"1", b"1", large),
        frames.insert(b"2", b"2", large),
        frames.update(b"1", b"2", large, old=[b"1", b"1", large]),
        frames.update(b"2", b"3", large, old=[b"2", b"2", large]),
        frames.commit(),
    )
    found = [(c.action, c.key, c.too_large_bytes > 0) for c in map(chunk.change, range(chunk.count))]
    assert found == [("insert", "public.jobs:1", True), ("delete", "public.jobs:1", False)]


@pytest.mark.parametrize("twin", TWINS)
def test_truncate_passes_all_filters(twin: type[Decoder]) -> None:
    sink = Sink("s")
    pipe = Pipe(twin, [subscription(sink, "events", (If("tenant", "eq", 1),))])
    pipe.send(frames.begin(), frames.truncate(16_400), frames.commit())
    assert sink.truncates_ignored == 1


def test_a_filter_that_does_not_fit_refuses_the_table_for_its_sink() -> None:
    one, other = Sink("one"), Sink("other")
    wants = [subscription(one, "events", (If("nope", "eq", 1),)), subscription(other, "events")]
    pipe = Pipe(TWINS[-1], wants)
    assert pipe.router.refused["one", "public", "jobs"].code == "filter_column_missing"
    pipe.send(frames.begin(), frames.insert(b"1", b"1", b"x"), frames.commit())
    assert not one.seen and other.seen
    pipe.learn(frames.relation((*COLUMNS, ("nope", 23))))
    assert one.missed_for and not pipe.router.refused
    pipe.send(frames.begin(), frames.insert(b"2", b"1", b"x", b"1"), frames.insert(b"3", b"1", b"x", b"2"))
    assert [key for _, key, _ in one.seen] == ["public.jobs:2"]


def test_the_same_filter_has_one_number() -> None:
    same, another = (If("tenant", "eq", 1),), (If("tenant", "eq", 2),)
    sinks = [Sink(name) for name in "abc"]
    router = Router([subscription(s, "events", f) for s, f in zip(sinks, (same, another, same), strict=True)])
    assert router.filter_count == 2


@pytest.mark.parametrize("twin", TWINS)
def test_pages_leave_out_what_the_filter_does(twin: type[Decoder]) -> None:
    filters = filters_of_pages((If("tenant", "eq", 1),))
    decoder = twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 30, lambda _: None, filters, 1)
    stop = decoder.fill(Connection(xlog(frames.relation(COLUMNS))), 1 << 30, 10)
    assert isinstance(stop, Relation)
    decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset({"read", "insert"}))
    decoder.begin_page(b"page", 1000, 1_735_689_600_000_000)
    lines = [frames.copy_line(b"%d" % number, b"%d" % (number % 2), b"x") for number in range(5)]
    assert decoder.fill_page(Connection(*lines), stop.oid, 1 << 30, 10) is None
    assert (decoder.page_rows, decoder.count, decoder.last_key) == (5, 2, b"4")
    assert [change.pks for change in map(decoder.take().change, range(2))] == [("1",), ("3",)]


def test_a_page_whose_filter_does_not_fit_is_an_error() -> None:
    filters = filters_of_pages((If("tenant", "eq", "x"),))
    decoder = TWINS[-1](META, lambda *_: (), 0, 1 << 20, 0, 1 << 30, lambda _: None, filters, 1)
    stop = decoder.fill(Connection(xlog(frames.relation(COLUMNS))), 1 << 30, 10)
    assert isinstance(stop, Relation)
    with pytest.raises(SpillwayError, match="no integer") as raised:
        decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset())
    assert raised.value.code == "filter_does_not_fit"


@pytest.mark.parametrize(
    ("column", "condition"),
    [
        (23, If("c", "eq", 1.5)), (23, If("c", "eq", True)), (23, If("c", "eq", 2**31)), (21, If("c", "eq", "-32769")),
        (23, If("c", "like", "1%")), (25, If("c", "eq", 1)), (25, If("c", "like", "a\\")), (16, If("c", "eq", "maybe")),
        (2950, If("c", "eq", "0-1")), (1082, If("c", "eq", "2024-02-30")), (1082, If("c", "gt", "2024-01-01 12:00")),
        (1114, If("c", "gt", "2024-01-01T00:00:00Z")), (1114, If("c", "gt", 5)), (1700, If("c", "eq", "one")),
        (700, If("c", "eq", "1e39")), (701, If("c", "eq", "1e400")), (869, If("c", "lt", "10.0.0.1")),
        (25, If("c", "eq", "x", ("a",))), (114, If("c", "eq", float("nan"), ("a",))), (1184, If("c", "eq", "now")),
        (DOMAIN, If("c", "eq", "12")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(column: int, condition: If) -> None:
    payload = frames.relation([("id", 23), ("c", column)])
    stop = TWINS[0](META, lambda *_: (), 0, 1 << 20, 0, 1 << 30).fill(Connection(xlog(payload)), 1 << 30, 1)
    assert isinstance(stop, Relation)
    found = compiled(stop, TableInfo(stop.oid, ("id",), {}), [condition])
    if column == DOMAIN:  # of which the catalogue says nothing: text
        assert not isinstance(found, Finding)
    else:
        assert isinstance(found, Finding)
        assert found.code == "filter_does_not_fit"
        assert found.remedy
