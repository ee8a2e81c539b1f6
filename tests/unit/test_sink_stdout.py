"""The stdout sink: a pipe that is slow, full, or has lost its reader."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinks.messages import batch_of, change, context, full
from spillway.sinks.base import OK
from spillway.sinks.stdout import StdoutSink


@dataclass
class Pipe:
    read_fd: int
    write_fd: int
    reader_gone: bool = False

    def leave(self) -> None:
        os.close(self.read_fd)
        self.reader_gone = True


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(*os.pipe())
    yield pipe
    os.close(pipe.write_fd)
    if not pipe.reader_gone:
        os.close(pipe.read_fd)


async def test_each_line_is_the_message(pipe: Pipe, tmp_path: Path) -> None:
    sink = StdoutSink(context(tmp_path), fd=pipe.write_fd)
    batch = [change({"v": i}, idx=i) for i in range(3)]
    assert await sink.send(batch_of(batch)) == OK
    await sink.close()
    assert [json.loads(line) for line in os.read(pipe.read_fd, 1 << 16).splitlines()] == [full(m) for m in batch]


async def test_a_reader_that_left_is_the_sinks_failure(pipe: Pipe, tmp_path: Path) -> None:
    sink = StdoutSink(context(tmp_path), fd=pipe.write_fd)
    pipe.leave()
    result = await sink.send(batch_of([change({"v": 1})]))
    assert (result.outcome, result.reason) == ("sink_down", "broken_pipe")
    await sink.close()


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_reader_that_does_not_read_holds_up_this_sink_alone(pipe: Pipe, tmp_path: Path, blocking: bool) -> None:
    os.set_blocking(pipe.write_fd, blocking)
    sink = StdoutSink(context(tmp_path), fd=pipe.write_fd)
    sending = asyncio.create_task(sink.send(batch_of([change({"v": "x" * 500_000})])))
    done, _ = await asyncio.wait([sending], timeout=0.05)
    assert not done
    await sink.close()
    result = await sending
    assert (result.outcome, result.reason) == ("sink_down", "closed")
