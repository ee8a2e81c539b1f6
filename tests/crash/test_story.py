"""The story at a tenth (``bench/story.py``): every line of its report holds. How fast the second sink is beside a
healthy run is the bench's business: a test on a shared machine does not judge latencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STORY = Path(__file__).resolve().parents[2] / "bench" / "story.py"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batch_size", [500, 1])
def test_the_story_at_a_tenth(batch_size: int, tmp_path: Path) -> None:
    command = [sys.executable, STORY, "--scale", "0.1", "--limit-mb", "32", "--batch-size", str(batch_size)]
    command.append("--only-failing")
    done = subprocess.run(
        [*command, "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout)
    failed = [line for line in done.stdout.splitlines() if "[FAILED]" in line]
    assert done.returncode == 0, "\n".join(failed or done.stdout.splitlines()[-20:])
