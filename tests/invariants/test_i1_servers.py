"""I1 before a real server: what it was told is at the sink or on disk, and what was confirmed does not come again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from invariants.installation import Installation
from oracle.endpoint import Recorder
from servers.postgres import Postgres


@pytest.fixture(params=["15", "18"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Installation, Recorder]]:
    """A webhook whose endpoint records, stopped and started at will."""
    server: Postgres = request.getfixturevalue(f"pg{request.param}")
    with Recorder() as recorder:
        name = f"i1_{request.param}"
        url = server.create_database(name)
        hook = {"type": "webhook", "http_endpoint": "recorder", "http_endpoint_path": "/r", "batch": True}
        one = Installation(tmp_path, url, name, {**hook, "timeout_seconds": 2})
        one.extra = {"http_endpoints": [{"name": "recorder", "url": recorder.url}]}
        one.product.configure(one._config())
        yield one, recorder
        one.product.close()
        server.drop_database(name)


def received(recorder: Recorder) -> list[int]:
    """Rows of the requests that were acknowledged."""
    return [int(d.message["record"]["id"]) for d in recorder.deliveries("/r") if d.acknowledged]  # type: ignore[index, call-overload]


def test_what_is_confirmed_is_at_the_sink_or_on_disk_whatever_the_sink_does(
    installed: tuple[Installation, Recorder],
) -> None:
    one, recorder = installed
    dice = random.Random(1)
    one.start()
    committed: dict[int, int] = {}  # row -> an LSN behind its commit
    looked = 0
    for number in range(1, 41):
        mood = dice.choice(("well", "500", "422", "stall", "down", "same", "same"))
        if mood == "down":
            recorder.stop()
            recorder.start()
        elif mood in ("500", "422"):
            recorder.script([{"path": "/r", "do": "status", "status": int(mood), "probability": 0.7}])
        elif mood == "stall":
            recorder.script([{"path": "/r", "do": "stall", "probability": 0.3}])
        elif mood == "well":
            recorder.script([])
        one.insert(number)
        committed[number] = one.lsn()
        confirmed = one.confirmed()  # first what the server was told, then what there is to show for it
        known = set(received(recorder)) | one.stored()
        # A row that is on its way from the disk to the sink is in one of the two: the removal follows the answer.
        lost = [
            row for row, lsn in committed.items() if lsn <= confirmed and row not in known | set(received(recorder))
        ]
        assert not lost, f"confirmed up to {confirmed:X}, but {lost} are nowhere"
        looked += sum(lsn <= confirmed for lsn in committed.values()) > 0
        if dice.random() < 0.15:
            one.product.kill()
            one.start()
    assert looked > 10
    recorder.script([])
    one.product.wait(lambda: set(received(recorder)) == set(committed), "the rest", seconds=60)
    end = one.lsn()
    one.product.wait(lambda: one.confirmed() >= end, "confirmation of everything", seconds=30)


def test_what_was_confirmed_does_not_come_again(installed: tuple[Installation, Recorder]) -> None:
    one, recorder = installed
    one.start()
    one.insert(*range(1, 11))
    one.product.wait(lambda: len(received(recorder)) == 10, "ten rows", seconds=30)
    end = one.lsn()
    one.product.wait(lambda: one.confirmed() >= end, "confirmation", seconds=30)
    one.product.kill()
    one.start()
    one.insert(11)
    one.product.wait(lambda: 11 in received(recorder), "the next row", seconds=30)
    assert sorted(received(recorder)) == list(range(1, 12))
    one.stop()


def test_the_position_never_goes_back(installed: tuple[Installation, Recorder]) -> None:
    one, recorder = installed
    one.start()
    last = 0
    for number in range(1, 16):
        one.insert(number)
        if number % 5 == 0:
            one.sql(
                f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{one.slot}'"
                " AND active"
            )
        confirmed = one.confirmed()
        assert confirmed >= last
        last = confirmed
    one.product.wait(lambda: set(received(recorder)) == set(range(1, 16)), "all", seconds=30)
    one.stop()
    assert one.confirmed() >= last


def test_a_state_file_that_fails_ends_the_process(installed: tuple[Installation, Recorder]) -> None:
    """Nothing is confirmed on the word of a disk that has failed: the file is torn under the running process."""
    one, recorder = installed
    recorder.stop()  # so that there is something to write
    one.start()
    one.insert(1)
    one.product.wait(lambda: one.stored() == {1}, "the row on disk", seconds=30)
    before = one.confirmed()
    for file in (one.state, one.folder / "state.db-wal"):
        with file.open("r+b") as opened:
            opened.write(b"\xff" * 200_000)
    one.insert(*range(2, 40))
    status = one.product._wait(60)
    assert status not in (0, -9)
    assert "Traceback" not in one.product.log_end()
    assert "state" in one.product.log_end()
    assert one.confirmed() <= max(before, one.lsn())
