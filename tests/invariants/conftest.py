"""The invariants' worlds are made per test, in the test's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from invariants.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, seed=1)


@pytest.fixture
def worlds(tmp_path: Path) -> Callable[[int], World]:
    def make(seed: int) -> World:
        folder = tmp_path / str(seed)
        folder.mkdir()
        return World(folder, seed)

    return make
