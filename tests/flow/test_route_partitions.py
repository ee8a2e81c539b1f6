"""Partitions are judged each by itself; the rows of all go by the name of their root."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flow.test_route_filters import Sink
from pgoutput import frames
from pgoutput.frames import META, Connection, xlog
from pgoutput.twins import TWINS
from spillway.errors import Finding
from spillway.flow.delivery import Delivery
from spillway.flow.route import Router, Subscription
from spillway.pgoutput import Relation, TableInfo
from spillway.pgoutput.decoder import Decoder

COLUMNS = (("id", 23), ("tenant", 23))
ROOT = ("public", "t")
KEY = Finding("key_not_in_replica_identity", "not carried", "ALTER TABLE ...")


class Log(Sink):
    """Knows from where to where it has missed something."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gaps_told: list[tuple[int, int]] = []

    def missed(self, since: int, lsn: int, reason: str, table: tuple[str, str]) -> None:
        assert table == ROOT
        self.gaps_told.append((since, lsn))


class Partitions:
    """A decoder and a router; a sink of ``grouped`` takes relations with REPLICA IDENTITY FULL alone."""

    def __init__(self, twin: type[Decoder], sinks: Sequence[Log], grouped: Sequence[Log]) -> None:
        self.sinks = sinks
        self.router = Router([subscription(s, ("tenant",) if s in grouped else None) for s in sinks])
        self.decoder = twin(META, self.router.group_columns, self.router.groups, 1 << 20, 0, 1 << 30)
        assert self.decoder.fill(Connection(xlog(frames.begin())), 1 << 30, 1000) is None

    def learn(self, table: str, oid: int, identity: str, lsn: int, root: tuple[str, str] | None = ROOT) -> None:
        stop = self._fill(frames.relation(COLUMNS, identity=identity, table=table, oid=oid))
        assert isinstance(stop, Relation)

        def unkeyable(columns: tuple[str, ...] | None, _needs_key: bool) -> Finding | None:
            return KEY if columns and identity != "f" else None

        own = ("public", table)
        wanted = self.router.learn(*(root or own), unkeyable, lsn, partition=own if root else None)
        self.decoder.learn(stop, TableInfo(oid, ("id",), {}, root), wanted)

    def send(self, *payloads: bytes) -> list[tuple[str, list[str]]]:
        """By sink: the keys that have come."""
        assert self._fill(*payloads) is None
        chunk = self.decoder.take()
        spans = {delivery.name: span for delivery, span in self.router.route(chunk)}
        keys = {name: [str(span.chunk.change(i).key) for i in span.indices] for name, span in spans.items()}
        return [(s.name, keys[s.name]) for s in self.sinks if s.name in keys]

    def _fill(self, *payloads: bytes) -> object:
        return self.decoder.fill(Connection(*map(xlog, payloads)), 1 << 30, 1000)


def subscription(sink: Log, columns: tuple[str, ...] | None) -> Subscription:
    delivery: Delivery = sink  # type: ignore[assignment]
    return Subscription(delivery, lambda _, table: table == "t", group_columns={ROOT: columns} if columns else None)


@pytest.mark.parametrize("twin", TWINS)
def test_a_partition_that_can_be_taken_does_not_mend_another(twin: type[Decoder]) -> None:
    one = Log("one")
    place = Partitions(twin, [one], [one])
    place.learn("t2", 2, "d", 10)
    place.learn("t1", 1, "f", 20)
    assert place.router.refused == {("one", *ROOT): KEY}
    assert one.gaps_told == [(10, 10)]
    assert place.send(frames.insert(b"101", b"1", oid=2), frames.insert(b"1", b"1", oid=1)) == [("one", ["public.t:1"])]
    place.learn("t2", 2, "f", 30)
    assert not place.router.refused
    assert one.gaps_told == [(10, 10), (10, 30)]
    assert place.send(frames.insert(b"102", b"1", oid=2)) == [("one", ["public.t:102"])]


@pytest.mark.parametrize("twin", TWINS)
def test_rows_of_a_refused_partition_that_another_sink_takes_do_not_come_to_the_one_that_cannot(
    twin: type[Decoder],
) -> None:
    one, other = Log("one"), Log("other")
    place = Partitions(twin, [one, other], [one])
    place.learn("t1", 1, "f", 10)
    place.learn("t2", 2, "d", 20)
    rows = frames.insert(b"101", b"1", oid=2), frames.insert(b"1", b"1", oid=1)
    assert place.send(*rows) == [("other", ["public.t:101", "public.t:1"])]
    place.learn("t2", 2, "f", 30)
    assert one.gaps_told == [(20, 20), (20, 30)]
    assert [name for name, _ in place.send(*rows)] == ["one", "other"]


@pytest.mark.parametrize("twin", TWINS)
def test_by_the_root_one_refused_partition_refuses_all(twin: type[Decoder]) -> None:
    """Its rows cannot be told from the others'."""
    one = Log("one")
    place = Partitions(twin, [one], [one])
    place.learn("t", 9, "f", 10, None)
    place.learn("t2", 2, "d", 10)
    place.learn("t", 9, "f", 20, None)
    place.learn("t1", 1, "f", 20)
    assert place.router.refused
    assert place.send(frames.insert(b"1", b"1", oid=9)) == []


def test_a_refused_partition_that_is_a_table_of_its_own_now_is_none_any_more() -> None:
    one = Log("one")
    place = Partitions(TWINS[0], [one], [one])
    place.learn("t1", 1, "f", 10)
    place.learn("t2", 2, "d", 10)
    place.learn("t2", 2, "d", 30, None)
    assert not place.router.refused
    assert one.gaps_told == [(10, 10), (10, 30)]


def test_a_table_that_has_left_the_source_is_not_refused_any_more() -> None:
    one = Log("one")
    place = Partitions(TWINS[0], [one], [one])
    place.learn("t", 9, "d", 10, None)
    kept = subscription(one, ("tenant",))
    assert Router([kept], place.router).refused == {("one", *ROOT): KEY}
    delivery: Delivery = one  # type: ignore[assignment]
    assert not Router([Subscription(delivery, lambda *_: False)], place.router).refused
    assert not Router([], place.router).refused
