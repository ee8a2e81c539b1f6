"""Documents of twelve tables stay right, whatever changes and however late commits are seen: see `shape.load`. The
bench (``bench/shape.py random``) runs it longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from servers.opensearch import OpenSearch
from servers.postgres import Postgres, Standby
from shape.load import run

SEED = 20260901


def test_under_random_changes_the_index_equals_a_fresh_build(
    database: str, tmp_path: Path, opensearch: OpenSearch
) -> None:
    verdict = run(database, tmp_path, opensearch.url, seed=SEED, seconds=10)
    assert verdict.good, str(verdict)


@pytest.mark.timeout(400)
def test_though_commits_are_seen_late(tmp_path: Path, opensearch: OpenSearch) -> None:
    """A commit is streamed 200 ms before it can be seen."""
    with Postgres("18") as primary, Standby(primary, settings={"recovery_min_apply_delay": "200ms"}):
        conninfo = primary.create_database("app")
        verdict = run(conninfo, tmp_path, opensearch.url, seed=SEED, seconds=10, late=True)
    assert verdict.good, str(verdict)
