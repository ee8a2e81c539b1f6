"""Old rows of a table that is published by its root, whose REPLICA IDENTITY FULL its partitions do not share."""

from __future__ import annotations

import orjson
import pytest

from pgoutput import frames
from pgoutput.frames import META, Connection, xlog
from pgoutput.twins import TWINS
from spillway.change import ACTIONS
from spillway.pgoutput import Relation, TableInfo
from spillway.pgoutput.decoder import Decoder

COLUMNS = (("id", 23), ("tenant", 23))
ROOT = ("public", "t")
UPDATE = frames.update(b"1", b"7", old=(b"1", None), oid=9)


class Stream:
    def __init__(self, twin: type[Decoder]) -> None:
        self.decoder = twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 30)
        assert self.decoder.fill(Connection(xlog(frames.begin())), 1 << 30, 1000) is None

    def root(self, *, partial: bool) -> None:
        self._learn("t", 9, "f", TableInfo(9, ("id",), {}, None, True, partial))

    def leaf(self, table: str, oid: int, identity: str, *, partial: bool) -> None:
        self._learn(table, oid, identity, TableInfo(oid, ("id",), {}, ROOT, False, partial))

    def _learn(self, table: str, oid: int, identity: str, info: TableInfo) -> None:
        payload = frames.relation(COLUMNS, identity=identity, table=table, oid=oid)
        stop = self.decoder.fill(Connection(xlog(payload)), 1 << 30, 1000)
        assert isinstance(stop, Relation)
        self.decoder.learn(stop, info, frozenset(ACTIONS))

    def changes(self, payload: bytes) -> object:
        assert self.decoder.fill(Connection(xlog(payload)), 1 << 30, 1000) is None
        return orjson.loads(self.decoder.take().change(0).body + b"}}")["changes"]


@pytest.mark.parametrize("twin", TWINS)
def test_nulls_of_a_partitions_key_are_no_old_values(twin: type[Decoder]) -> None:
    stream = Stream(twin)
    stream.root(partial=False)
    stream.leaf("t1", 1, "f", partial=False)
    assert stream.changes(UPDATE) == {"tenant": None}
    stream.root(partial=False)  # as it comes before a partition that was attached just now
    stream.leaf("t2", 2, "d", partial=True)
    assert stream.changes(UPDATE) == {}
    stream.root(partial=True)
    stream.leaf("t2", 2, "f", partial=False)  # mended
    assert stream.changes(UPDATE) == {"tenant": None}


@pytest.mark.parametrize("twin", TWINS)
def test_a_partition_that_is_published_by_itself_is_believed(twin: type[Decoder]) -> None:
    stream = Stream(twin)
    stream.leaf("t1", 9, "f", partial=False)
    stream.leaf("t2", 2, "d", partial=True)
    assert stream.changes(UPDATE) == {"tenant": None}
