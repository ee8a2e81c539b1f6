"""Messages that functions have made, in the sinks that have no routes."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sinks.conformance import send
from sinks.messages import change, context, shaped
from spillway.chunk import Batch
from spillway.sinks.base import OK
from spillway.sinks.blackhole import BlackholeSink
from spillway.sinks.file import FileSink
from spillway.sinks.sqlite import SqliteSink
from spillway.sinks.stdout import StdoutSink

LSN = 0x16B3748


def made(*bodies: Any) -> Batch:
    return shaped([(change({}, pks=(str(i),), idx=i), body, None) for i, body in enumerate(bodies)])


async def test_a_file_has_them_as_lines(tmp_path: Path) -> None:
    sink = FileSink(context(tmp_path), path="out", rotate_bytes=20)
    for _ in range(2):
        assert await sink.send(made({"a": 1}, [2])) == OK
    await sink.close()
    assert (tmp_path / "out").read_bytes() == b'{"a":1}\n[2]\n'
    assert len(os.listdir(tmp_path)) == 2, "rotated by the bytes that are written"


async def test_the_standard_output_too() -> None:
    reading, writing = os.pipe()
    sink = StdoutSink(context(Path()), fd=writing)
    assert await sink.send(made({"a": 1}, "text")) == OK
    await sink.close()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b'{"a":1}\n"text"\n'


async def test_blackhole_counts_what_would_be_sent() -> None:
    sink = BlackholeSink(context(Path()))
    assert await sink.send(made({"a": 1}, 2)) == OK
    assert (sink.messages, sink.bytes) == (2, len(b'{"a":1}2'))


async def test_a_table_keeps_them_as_rows(tmp_path: Path) -> None:
    sink = SqliteSink(context(tmp_path), path="copy.db")
    assert await send(sink, made({"id": 0, "made": "x"}, {"id": 1, "made": 1})) == [OK, OK]
    again = change({}, pks=("0",), action="update", lsn=LSN + 64)
    gone = change({}, pks=("1",), action="delete", lsn=LSN + 64)
    assert await send(sink, shaped([(again, {"made": "y"}, None), (gone, {}, None)])) == [OK, OK]
    for bodies, reason in (([[1]], "not_an_object"), (["text"], "not_an_object")):
        (result,) = await send(sink, made(*bodies))
        assert (result.outcome, result.reason) == ("reject", reason)
    one = change({}, pks=("5",), lsn=LSN + 128)
    several = shaped([(one, {"id": 5}, None), (one, {"id": 6}, None)])
    assert {result.reason for result in await send(sink, several)} == {"document_id_missing"}
    assert [r.reason for r in [*await send(sink, several[:1]), *await send(sink, several[1:])]] == [
        "",
        "document_id_missing",
    ]
    await sink.close()
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("SELECT id, made FROM jobs ORDER BY 1").fetchall() == [(None, "y"), (5, None)]
    connection.close()


@pytest.mark.parametrize("restarted", [False, True])
async def test_columns_that_somebody_else_has_added_are_left_alone(tmp_path: Path, restarted: bool) -> None:
    sink = SqliteSink(context(tmp_path), path="copy.db")
    assert await send(sink, made({"id": 0, "a": 1, "b": 1})) == [OK]
    connection = sqlite3.connect(tmp_path / "copy.db", isolation_level=None)
    connection.execute("ALTER TABLE jobs ADD COLUMN checked TEXT DEFAULT 'no'")
    connection.execute("UPDATE jobs SET checked = 'mine'")
    if restarted:
        await sink.close()
        sink = SqliteSink(context(tmp_path), path="copy.db")
    again = change({}, pks=("0",), action="update", lsn=LSN + 64)
    new = change({}, pks=("1",), lsn=LSN + 64)
    assert await send(sink, shaped([(again, {"id": 0, "a": 2}, None), (new, {"id": 1, "c": 3}, None)])) == [OK, OK]
    assert connection.execute("SELECT id, a, b, c, checked FROM jobs ORDER BY id").fetchall() == [
        (0, 2, None, None, "mine"),
        (1, None, None, 3, "no"),
    ]
    connection.close()
    await sink.close()
