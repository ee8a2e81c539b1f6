"""The five mutants: where, what stands there, what stands there instead, and which tests must notice.

A text that is no longer found is an error: whoever changes such a line also says here how it can be broken.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "src"
KEPT = "tests/mutants/test_kept.py::"


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    file: str  # below src/spillway
    old: str
    new: str
    red: tuple[str, ...]  # tests, each of which must fail
    shows_at_sinks: bool = False  # the kill test must fail, too

    def seed(self, folder: Path) -> Path:
        """A copy of the sources with the defect; returns what to put on PYTHONPATH."""
        copy = folder / "src"
        shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / "spillway" / self.file
        text = file.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"mutant {self.name}: {self.file} holds its text {text.count(self.old)} times, not once")
        file.write_text(text.replace(self.old, self.new))
        return copy


MUTANTS = (
    Mutant(
        "confirm before fsync",
        "flow/window.py",
        "        while self._open and (self._open[0].left == 0 or self._open[0].durable):\n",
        "        while self._open and (self._open[0].left == 0 or self._open[0].base):\n",
        (KEPT + "test_nothing_is_confirmed_before_its_commit_is_on_disk",),
    ),
    Mutant(
        "commit_lsn for end_lsn",
        "flow/watermark.py",
        "        self._add(commit_lsn, end_lsn, merge=not routed)\n",
        "        self._add(commit_lsn, commit_lsn, merge=not routed)\n",
        (KEPT + "test_what_is_confirmed_is_the_end_of_the_commit",),
    ),
    Mutant(
        "parked key overtaken after a restart",
        "flow/inflow.py",
        "        return bool(self.counters.parked_keys or self._diverted)\n",
        "        return bool(self._diverted)\n",
        (KEPT + "test_a_parked_key_is_not_overtaken_after_a_restart",),
        shows_at_sinks=True,
    ),
    Mutant(
        "removal not committed before the key is free",
        "flow/settle.py",
        "            await self._commit(Write(self.name, resolved=stored))\n",
        "            self._commit(Write(self.name, resolved=stored))\n",
        (KEPT + "test_a_key_is_free_only_when_the_removal_of_its_row_has_committed",),
    ),
    Mutant(
        "a primary key change ordered by the new key only",
        "flow/route.py",
        "        return Keying.STATE if subscription.splits_key_change else Keying.EVENTS\n",
        "        return Keying.STATE\n",
        (KEPT + "test_a_key_change_waits_for_the_old_key", KEPT + "test_a_key_change_holds_the_old_key"),
        shows_at_sinks=True,
    ),
)
