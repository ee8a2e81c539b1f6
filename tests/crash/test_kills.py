"""Nothing is lost and no key is out of order, wherever the process is killed (I1, I2, I3).

``KILLS=200 KILLS_SEED=7`` in the environment make it longer and repeat a run. The names are not SPILLWAY_*, which the
tests take out of the environment.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from crash.scenario import Scenario
from servers.opensearch import OpenSearch
from servers.postgres import Postgres

KILLS = int(os.environ.get("KILLS", "25"))
SEED = int(os.environ.get("KILLS_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.mark.timeout(120 + 12 * KILLS)
def test_kills_under_load_with_sinks_that_fail(tmp_path: Path) -> None:
    with Postgres("18") as server:
        verdict = Scenario(server.create_database("app"), tmp_path, seed=SEED, kills=KILLS).run()
    assert verdict.good, str(verdict)


@pytest.mark.parametrize("version", ["12", "15", "18"])
def test_kills_with_a_file_on_every_version(version: str, tmp_path: Path) -> None:
    with Postgres(version) as server:
        conninfo = server.create_database("app")
        verdict = Scenario(conninfo, tmp_path, seed=SEED, kills=max(6, KILLS // 5), sinks=["file"]).run()
    assert verdict.good, str(verdict)


def test_kills_with_a_search_index(tmp_path: Path, opensearch: OpenSearch) -> None:
    with Postgres("15") as server:
        conninfo = server.create_database("app")
        kills = max(6, KILLS // 5)
        scenario = Scenario(conninfo, tmp_path, seed=SEED, kills=kills, sinks=["search"], search_url=opensearch.url)
        verdict = scenario.run()
    assert verdict.good, str(verdict)
