"""Each seeded defect turns the suite red; the unmutated sources pass the same tests in the same suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crash.scenario import Scenario
from mutants.mutants import MUTANTS, Mutant
from servers.postgres import Postgres

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1  # pytest's exit status; 2 and above would be an error of the run


def environment(mutant: Mutant, folder: Path) -> dict[str, str]:
    """In which Python finds the mutant in place of the installed sources."""
    path = str(mutant.seed(folder))
    found = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    question = [sys.executable, "-c", "import spillway; print(spillway.__file__)"]
    answer = subprocess.run(question, env=found, capture_output=True, text=True, check=True).stdout
    assert answer.startswith(path), f"Python found {answer}"
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mutant_turns_the_suite_red(mutant: Mutant, tmp_path: Path) -> None:
    env = environment(mutant, tmp_path)
    for test in mutant.red:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == TESTS_FAILED, f"{test} did not fail:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.shows_at_sinks], ids=lambda mutant: mutant.name)
def test_the_oracle_sees_the_mutant(mutant: Mutant, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with Postgres("18") as server:
        scenario = Scenario(
            server.create_database("app"),
            tmp_path / "run",
            seed=1,
            kills=6,
            sinks=["single", "batch"],
            environment=environment(mutant, tmp_path),
        )
        verdict = scenario.run()
    rules = {violation.rule for found in verdict.violations.values() for violation in found}
    assert rules & {"overtaken", "skipped", "went back"}, str(verdict)
