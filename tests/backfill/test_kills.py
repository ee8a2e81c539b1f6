"""kill -9 while a backfill runs: nothing is left out, and at most one page per reader is read again.

``BACKFILL_KILLS=50 BACKFILLS_SEED=7`` in the environment make it longer and repeat a run.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from backfill.kills import run

KILLS = int(os.environ.get("BACKFILL_KILLS", "5"))
SEED = int(os.environ.get("BACKFILLS_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize("parallel", [1, 3])
def test_kills(parallel: int, database: str, tmp_path: Path) -> None:
    verdict = run(database, tmp_path, seed=SEED, kills=KILLS, parallel=parallel)
    assert verdict.good, str(verdict)
