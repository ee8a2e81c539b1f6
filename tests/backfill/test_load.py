"""Backfills in a row under a load that is hard on them: the sinks end equal to the source, and no key ever goes back.

``BACKFILLS=50 BACKFILLS_SEED=7`` in the environment make it longer and repeat a run; ``bench/backfills.py`` writes the
report of the full size.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from backfill.load import run
from servers.postgres import Postgres, Standby

BACKFILLS = int(os.environ.get("BACKFILLS", "4"))
SEED = int(os.environ.get("BACKFILLS_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.mark.timeout(90 + 6 * BACKFILLS)
@pytest.mark.parametrize("version", ["12", "18"])
def test_backfills_under_load(version: str, tmp_path: Path) -> None:
    with Postgres(version) as server:
        verdict = run(server.create_database("app"), tmp_path, seed=SEED, backfills=BACKFILLS)
    assert verdict.good, str(verdict)


def test_initial_backfills_under_load(tmp_path: Path) -> None:
    """Changes of rows that the sinks have never seen come first, updates without their TOAST columns among them."""
    with Postgres("15") as server:
        verdict = run(server.create_database("app"), tmp_path, seed=SEED, backfills=0, early=True)
    assert verdict.good, str(verdict)


@pytest.mark.timeout(90 + 6 * BACKFILLS)
def test_backfills_while_commits_become_visible_late(tmp_path: Path) -> None:
    """A commit is streamed some 200 ms before anybody sees it, as with a synchronous standby far away."""
    with Postgres("18") as primary, Standby(primary, settings={"recovery_min_apply_delay": "200ms"}):
        conninfo = primary.create_database("app")
        verdict = run(conninfo, tmp_path, seed=SEED, backfills=BACKFILLS, late=True)
    assert verdict.good, str(verdict)


@pytest.mark.timeout(90 + 6 * BACKFILLS)
def test_backfills_into_sinks_that_take_no_updates(tmp_path: Path) -> None:
    """A change of a primary key is an update: the load has none here, for the old row would stay with the sink."""
    with Postgres("18") as server:
        conninfo = server.create_database("app")
        verdict = run(conninfo, tmp_path, seed=SEED, backfills=BACKFILLS, actions=("insert", "delete"))
    assert verdict.good, str(verdict)
