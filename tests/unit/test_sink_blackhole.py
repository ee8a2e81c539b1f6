"""The blackhole: takes everything and counts it as a sink of messages would."""

from __future__ import annotations

from pathlib import Path

from sinks.messages import SUFFIX, batch_of, change, context, scattered
from spillway.sinks.base import OK
from spillway.sinks.blackhole import BlackholeSink


async def test_everything_is_acknowledged_and_counted(tmp_path: Path) -> None:
    sink = BlackholeSink(context(tmp_path))
    await sink.open()
    changes = [change({"id": i, "text": "x" * i}, pks=(str(i),)) for i in range(9)]
    assert await sink.send(batch_of(changes)) == OK
    assert await sink.send(scattered(changes)) == OK
    assert await sink.send(batch_of([change({}, action="truncate", pks=())])) == OK
    assert sink.messages == 19
    empty = change({}, action="truncate", pks=())
    assert sink.bytes == sum(len(one.body) + len(SUFFIX) for one in [*changes, *changes, empty])
    await sink.close()
