"""What every sink must do, as a class of tests. A subclass says how to make its sink and what arrived there.

``received`` is what the sink's other side holds *by now*, as records by primary key: for sinks that keep rows these are
the rows, for the others the last message of each key. Sinks whose other side is a list also give ``lines``.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from sinks.messages import batch_of, change, scattered
from spillway.change import Change
from spillway.chunk import Batch
from spillway.sinks.base import OK, Result, Sink

BIG_BYTES = 8 << 20
LSN = 0x16B3748


class Rig(ABC):
    """A sink and its other side."""

    sink: Sink

    @abstractmethod
    async def received(self) -> dict[str, Any]:
        """What the sink's other side holds, records by primary key."""

    @abstractmethod
    async def break_down(self) -> None:
        """From now on the sink's other side is not there."""

    @abstractmethod
    async def mend(self) -> None: ...


async def send(sink: Sink, changes: Sequence[Change] | Batch) -> list[Result]:
    """One result per message."""
    batch = changes if isinstance(changes, Batch) else batch_of(changes)
    answer = await sink.send(batch)
    assert answer == OK or any(result != OK for result in ([answer] if isinstance(answer, Result) else answer))
    results = [answer] * len(batch) if isinstance(answer, Result) else list(answer)
    assert len(results) == len(batch)
    return results


def rows(count: int, first: int = 0, **columns: Any) -> list[Change]:
    return [change({"id": i, **columns}, pks=(str(i),), idx=i) for i in range(first, first + count)]


class Conformance(ABC):
    @pytest.fixture
    @abstractmethod
    def rig(self) -> AsyncIterator[Rig]: ...

    async def _deliver(self, rig: Rig, batch: Sequence[Change]) -> None:
        step = 1 if rig.sink.single else len(batch)
        for start in range(0, len(batch), step):
            assert await send(rig.sink, batch[start : start + step]) == [OK] * step

    async def test_each_message_has_a_result_and_arrives(self, rig: Rig) -> None:
        await rig.sink.open()
        await self._deliver(rig, rows(3, title="a"))
        assert await rig.received() == {str(i): {"id": i, "title": "a"} for i in range(3)}

    async def test_a_thousand_messages(self, rig: Rig) -> None:
        await rig.sink.open()
        await self._deliver(rig, rows(1000))
        assert await rig.received() == {str(i): {"id": i} for i in range(1000)}

    async def test_existing_rows_are_whole_rows_below_what_comes_later(self, rig: Rig) -> None:
        await rig.sink.open()
        pages = [
            change({"id": i, "title": "read", "more": "x"}, pks=(str(i),), action="read", lsn=LSN, idx=i, n=0)
            for i in range(4)
        ]
        await self._deliver(rig, pages)
        await self._deliver(rig, [change({"id": 1, "title": "new", "more": "y"}, pks=("1",), action="update", lsn=LSN)])
        await self._deliver(
            rig, [change({"id": 2, "title": "again", "more": "z"}, pks=("2",), action="read", lsn=LSN + 32, n=0)]
        )
        assert await rig.received() == {
            "0": {"id": 0, "title": "read", "more": "x"},
            "1": {"id": 1, "title": "new", "more": "y"},
            "2": {"id": 2, "title": "again", "more": "z"},
            "3": {"id": 3, "title": "read", "more": "x"},
        }

    async def test_pieces_of_chunks_that_hold_more(self, rig: Rig) -> None:
        await rig.sink.open()
        batch = scattered(rows(9))
        pieces = [batch] if not rig.sink.single else [batch[i : i + 1] for i in range(9)]
        for piece in pieces:
            assert await send(rig.sink, piece) == [OK] * len(piece)
        assert await rig.received() == {str(i): {"id": i} for i in range(9)}

    async def test_a_big_message_among_small_ones(self, rig: Rig) -> None:
        big = "ü" * (BIG_BYTES // 2)
        batch = [*rows(1), change({"id": 7, "text": big}, pks=("7",)), *rows(1, 8)]
        await rig.sink.open()
        await self._deliver(rig, batch)
        assert await rig.received() == {"0": {"id": 0}, "7": {"id": 7, "text": big}, "8": {"id": 8}}

    @pytest.mark.parametrize("text", ["", "naïve ☃ 🦫 \u2028", '"\\" and \\n', "\t\r\n", "�"])
    async def test_text_of_every_kind_in_value_and_key(self, rig: Rig, text: str) -> None:
        await rig.sink.open()
        await self._deliver(rig, [change({"id": 1, "key": text}, pks=(text,))])
        assert list((await rig.received()).values()) == [{"id": 1, "key": text}]

    async def test_a_record_without_columns(self, rig: Rig) -> None:
        await rig.sink.open()
        await self._deliver(rig, [change({}, pks=("1",))])
        assert await rig.received() == {"1": {}}

    async def test_open_can_be_repeated_and_close_too(self, rig: Rig) -> None:
        await rig.sink.open()
        await self._deliver(rig, rows(1))
        await rig.sink.open()
        await self._deliver(rig, rows(1, 1))
        await rig.sink.close()
        await rig.sink.close()
        assert await rig.received() == {"0": {"id": 0}, "1": {"id": 1}}

    async def test_close_without_open(self, rig: Rig) -> None:
        await rig.sink.close()

    async def test_a_cancelled_batch_can_come_again(self, rig: Rig) -> None:
        """Cancelled at each of its first awaits in turn; then what was begun must not spoil what comes after."""
        await rig.sink.open()
        batch = rows(1 if rig.sink.single else 200, title="x" * 500)
        for turns in range(25):
            task = asyncio.create_task(send(rig.sink, batch))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await self._deliver(rig, batch)
        await self._deliver(rig, rows(3, 500))
        received = await rig.received()
        assert len(received) == len(batch) + 3
        assert received["502"] == {"id": 502}

    async def test_an_outage_is_the_sinks_failure_and_ends(self, rig: Rig) -> None:
        await rig.sink.open()
        await self._deliver(rig, rows(1))
        await rig.break_down()
        for _ in range(2):
            await rig.sink.open()  # a server that is down is no error
            (result,) = await send(rig.sink, rows(1, 1))
            assert result.outcome == "sink_down"
            assert result.reason
        await rig.mend()
        await rig.sink.open()
        await self._deliver(rig, rows(1, 1))
        assert (await rig.received())["1"] == {"id": 1}
