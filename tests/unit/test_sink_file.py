"""The file sink: every line is JSON, whatever happened to the writer, the disk or the file."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sinks.messages import batch_of, change, context, full
from spillway.change import Change
from spillway.sinks.base import OK, Result
from spillway.sinks.file import FileSink

Make = Callable[..., FileSink]


class FixedClock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 1_772_366_400.0  # 2026-03-01T12:00:00Z

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a sink never sleeps")


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[FileSink] = []

    def make(path: str = "out.ndjson", **options: Any) -> FileSink:
        made.append(FileSink(context(tmp_path), path=path, clock=FixedClock(), **options))
        return made[-1]

    yield make
    for sink in made:
        await sink.close()


def rows(count: int, first: int = 0, text: str = "") -> list[Change]:
    return [change({"id": i, "text": text}, pks=(str(i),), idx=i) for i in range(first, first + count)]


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def ids(path: Path) -> list[int]:
    return [line["record"]["id"] for line in lines(path)]


async def test_each_line_is_the_message(make: Make, tmp_path: Path) -> None:
    batch = rows(3, text="line\nbreak")
    assert await make("a/b/c.ndjson").send(batch_of(batch)) == OK
    assert lines(tmp_path / "a/b/c.ndjson") == [full(m) for m in batch]


async def test_an_absolute_path_stays_absolute(make: Make, tmp_path: Path) -> None:
    assert await make(str(tmp_path / "elsewhere")).send(batch_of(rows(1))) == OK
    assert ids(tmp_path / "elsewhere") == [0]


@pytest.mark.parametrize("torn", [b'{"record":', b"\0\0\0", b"x" * 200_000])
@pytest.mark.parametrize("whole", [0, 2])
async def test_a_torn_last_line_is_cut_at_open(make: Make, tmp_path: Path, torn: bytes, whole: int) -> None:
    path = tmp_path / "out.ndjson"
    path.write_bytes(b'{"record":{"id":9}}\n' * whole + torn)
    sink = make()
    await sink.open()
    assert ids(path) == [9] * whole
    assert await sink.send(batch_of(rows(1))) == OK
    assert ids(path) == [9] * whole + [0]


async def test_whole_lines_stay_at_open(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "out.ndjson"
    path.write_bytes(b'{"record":{"id":9}}\n')
    assert await make().send(batch_of(rows(1))) == OK
    assert ids(path) == [9, 0]


async def test_rotation(make: Make, tmp_path: Path) -> None:
    size = len(full_line(rows(1)[0]))
    sink = make(rotate_bytes=2 * size)
    for i in range(5):
        assert await sink.send(batch_of(rows(1, i))) == OK
    assert await sink.send(batch_of(rows(9))) == OK, "a batch is not divided"
    assert await sink.send(batch_of(rows(1))) == OK
    prefix = "out.ndjson.20260301T120000."
    assert {name: ids(tmp_path / name) for name in os.listdir(tmp_path)} == {
        f"{prefix}1": [0, 1],
        f"{prefix}2": [2, 3],
        f"{prefix}3": [4],
        f"{prefix}4": [*range(9)],
        "out.ndjson": [0],
    }


def full_line(one: Change) -> bytes:
    return one.body + context(Path()).suffix + b"\n"


async def test_a_file_that_grew_before_the_start_is_rotated_too(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out.ndjson").write_bytes(b'{"record":{"id":9}}\n' * 100)
    assert await make(rotate_bytes=1024).send(batch_of(rows(1))) == OK
    assert ids(tmp_path / "out.ndjson") == [0]


@pytest.mark.parametrize("gone", ["moved", "deleted", "replaced"])
async def test_a_file_that_is_taken_away_is_begun_anew(make: Make, tmp_path: Path, gone: str) -> None:
    path = tmp_path / "out.ndjson"
    sink = make()
    assert await sink.send(batch_of(rows(1))) == OK
    if gone == "deleted":
        path.unlink()
    else:
        path.rename(tmp_path / "out.1")
    if gone == "replaced":
        path.write_bytes(b"")
    assert await sink.send(batch_of(rows(1, 1))) == OK
    assert ids(path) == [1]


@contextmanager
def disk_full_at(file_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond: the kernel writes what fits and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_write_that_ends_in_the_middle_is_cut_off_again(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "out.ndjson"
    sink = make()
    assert await sink.send(batch_of(rows(1))) == OK
    with disk_full_at(path.stat().st_size + 100_000):
        result = await sink.send(batch_of(rows(200, 1, text="x" * 1000)))
        assert (result.outcome, result.reason) == ("sink_down", "efbig")
        assert ids(path) == [0]
    assert await sink.send(batch_of(rows(2, 1))) == OK
    assert ids(path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "io_error"), (errno.EROFS, "read_only")],
)
async def test_an_fsync_that_fails(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    sink = make()
    await sink.open()

    def fail(_fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        result = await sink.send(batch_of(rows(2)))
    assert (result.outcome, result.reason) == ("sink_down", reason)
    assert ids(tmp_path / "out.ndjson") == []
    assert await sink.send(batch_of(rows(2))) == OK
    assert ids(tmp_path / "out.ndjson") == [0, 1]


async def test_a_second_writer_is_refused_while_the_first_lives(make: Make, tmp_path: Path) -> None:
    first, second = make(), make()
    assert await first.send(batch_of(rows(1))) == OK
    await second.open()
    result = await second.send(batch_of(rows(1)))
    assert (result.outcome, result.reason) == ("sink_down", "locked")
    await first.close()
    assert await second.send(batch_of(rows(1, 1))) == OK
    assert ids(tmp_path / "out.ndjson") == [0, 1]


async def test_a_pipe_is_refused_instead_of_waiting_for_its_reader(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.ndjson")
    result = await make().send(batch_of(rows(1)))
    assert isinstance(result, Result)
    assert (result.outcome, result.reason) == ("sink_down", "not_a_file")
