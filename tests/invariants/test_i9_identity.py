"""I9: state belongs to (system identifier, timeline, slot, epoch). Whatever does not fit stops the process with a
finding that says what happened; going on is a command, which raises the epoch and records the gap; nothing is ever
skipped because of a position from another history.

With real servers and the real process: each test does to an installation what operators do to theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from invariants.installation import Installation
from servers.postgres import Postgres
from spillway.flow.identity import judge
from spillway.source.session import SourceState
from spillway.store.base import Identity

Install = Callable[[str], Installation]


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    made: list[Installation] = []

    def make(url: str) -> Installation:
        folder = tmp_path / f"installation{len(made)}"
        folder.mkdir()
        made.append(Installation(folder, url, f"i9_{url.rsplit('/', 1)[1]}"))
        return made[-1]

    yield make
    for one in made:
        one.product.close()


@pytest.fixture
def installed(install: Install, database: str) -> Installation:
    """It has delivered a row and was stopped."""
    one = install(database)
    one.run_for(1)
    assert one.received() == [1]
    return one


def goes_on_with_a_gap(installed: Installation, *expected: int) -> None:
    """After `adopt` it runs again; the sink has a gap, and the epoch is higher than it was."""
    assert "gap" in installed.adopt()
    installed.start()
    sink = installed.product.sink("out")
    assert sink["state"] == "gap"
    assert sink["gap"]["last_lsn"] is not None
    assert sink["remedy"]
    installed.insert(*expected)
    installed.delivered(*expected)
    installed.stop()


def test_a_clean_stop_and_a_restart_repeat_nothing_and_find_nothing(installed: Installation) -> None:
    installed.insert(2)
    installed.run_for(3)
    assert installed.received() == [1, 2, 3]


def test_a_lost_slot(installed: Installation) -> None:
    installed.drop_slot()
    installed.insert(2)  # nobody keeps it
    assert "is gone" in installed.refused()
    assert installed.sql(f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{installed.slot}'") == []
    epoch, mark = installed.identity()
    goes_on_with_a_gap(installed, 3)
    assert installed.identity()[0] == epoch + 1
    assert 2 not in installed.received()
    installed.start()  # the finding is gone, the gap is not
    gap = installed.product.sink("out")["gap"]
    assert gap is not None
    assert int(gap["first_lsn"].split("/")[1], 16) <= mark
    installed.stop()
    assert "nothing to adopt" in installed.adopt()


def test_a_slot_that_was_made_again(installed: Installation) -> None:
    installed.drop_slot()
    installed.go_far_in_the_log()
    installed.create_slot()
    assert "beyond anything confirmed" in installed.refused()
    goes_on_with_a_gap(installed, 3)


def test_a_slot_that_somebody_else_has_advanced(installed: Installation) -> None:
    installed.insert(2)
    installed.go_far_in_the_log()
    installed.sql(f"SELECT pg_replication_slot_advance('{installed.slot}', pg_current_wal_lsn())")
    assert "somebody else has read from it" in installed.refused()
    assert installed.received() == [1], "nothing was delivered"
    goes_on_with_a_gap(installed, 3)


def test_an_old_state_file_that_was_copied_back(installed: Installation, tmp_path: Path) -> None:
    installed.copy_state(tmp_path / "old")
    installed.start()
    installed.insert(2)
    installed.delivered(2)
    installed.go_far_in_the_log()
    installed.insert(3)
    installed.delivered(3)
    target = installed.lsn()
    installed.product.wait(lambda: installed.confirmed() >= target, "confirmation", seconds=30)
    installed.stop()
    installed.bring_back_state(tmp_path / "old")
    assert "old copy" in installed.refused()
    goes_on_with_a_gap(installed, 4)


def test_a_missing_state_file(installed: Installation) -> None:
    installed.lose_state()
    said = installed.refused()
    assert "state file is new" in said
    assert "spillway state adopt" in said
    goes_on_with_a_gap(installed, 2)


def test_another_database_system_whose_positions_are_below_those_of_the_old(
    installed: Installation,
) -> None:
    """With what waits kept, and nothing of the new history skipped for a position of the old one."""
    installed.go_far_in_the_log()
    installed.start()
    assert installed.product.pid
    installed.insert(2)
    installed.delivered(2)
    installed.stop()
    with Postgres("18", fresh=True) as other:
        url = other.create_database(installed.url.rsplit("/", 1)[1])
        old_mark = installed.identity()[1]
        installed.move_to(url)
        assert "database system" in installed.refused()
        assert installed.sql("SELECT 1 FROM pg_replication_slots") == [], "it has not even made a slot there"
        goes_on_with_a_gap(installed, 101, 102)
        assert installed.lsn() < old_mark, "the test is of something"
        installed.run_for(103)
        assert installed.received() == [1, 2, 101, 102, 103]


def test_a_slot_that_nobody_has_read_yet_is_taken_without_a_finding(install: Install, database: str) -> None:
    one = install(database)
    one.sql("CREATE PUBLICATION spillway FOR ALL TABLES")
    one.create_slot()
    one.insert(1)
    one.start()
    one.delivered(1)
    one.stop()


def test_one_state_file_one_process(installed: Installation, unused_port: int) -> None:
    installed.start()
    second = installed.folder / "second.yml"
    second.write_text(installed.product.file.read_text().replace(str(installed.product.port), str(unused_port)))
    assert "state.db is in use" in installed.refused(second)
    installed.insert(2)
    installed.delivered(2)
    installed.stop()


def test_the_mark_is_durable_before_a_position_is_confirmed(installed: Installation) -> None:
    installed.start()
    for number in range(10, 14):
        installed.go_far_in_the_log()
        installed.insert(number)
        target = installed.lsn()
        installed.product.wait(lambda t=target: installed.confirmed() >= t, "confirmation", seconds=30, every=0.01)
        confirmed = installed.confirmed()
        assert installed.identity()[1] >= confirmed
    installed.stop()


# -- the judgement itself ----------------------------------------------------------------------------------------------
MINE = Identity("7", 1, "slot", 1, 10_000)


def server(**changes: object) -> SourceState:
    given = {
        "system_id": "7", "timeline": 1, "forked_lsn": None, "slot_exists": True, "slot_created": False,
        "slot_used": True, "slot_reader": "", "confirmed_lsn": 9_000,
    }  # fmt: skip
    return SourceState(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("identity", "changes", "code"),
    [
        (MINE, {}, None),
        (MINE, {"confirmed_lsn": 10_000}, None),
        (MINE, {"confirmed_lsn": 10_001}, "slot_beyond_mark"),
        (MINE, {"system_id": "8"}, "other_system"),
        (MINE, {"timeline": 2, "forked_lsn": 9_999}, "timeline_forked"),
        (MINE, {"timeline": 2, "forked_lsn": 10_000}, None),
        (MINE, {"timeline": 2, "forked_lsn": None}, "timeline_forked"),
        (MINE, {"slot_exists": False}, "slot_lost"),
        (MINE, {"slot_created": True}, "slot_lost"),
        (MINE, {"slot_reader": "pg_recvlogical"}, None),  # who reads it now may stop; nothing is lost by waiting
        (None, {}, "state_missing"),
        (None, {"slot_reader": "pg_recvlogical"}, "slot_active"),
        (None, {"slot_used": False}, None),
        (None, {"slot_created": True}, None),
        (None, {"slot_exists": False, "slot_used": False}, None),
    ],
)
def test_judgements(identity: Identity | None, changes: dict[str, object], code: str | None) -> None:
    finding = judge("slot", identity, server(**changes))
    assert (finding.code if finding else None) == code
    if finding is not None:
        assert "spillway state adopt" in finding.remedy or finding.code == "slot_active"
