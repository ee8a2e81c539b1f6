"""The invariants' worlds are made per test, in the test's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from invariants import world as the_world
from invariants.instruments import HeldStore, RecordedStream
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


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[HeldStore]:
    """The stores that the world opens from now on, the newest last; their commits can be held."""
    opened: list[HeldStore] = []
    open_store = the_world.open_store

    def open_held(path: Path, clock: the_world.FastClock) -> HeldStore:
        opened.append(HeldStore(open_store(path, clock)))
        return opened[-1]

    monkeypatch.setattr(the_world, "open_store", open_held)
    return opened


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[RecordedStream]:
    """The connections that the world opens from now on, the newest last."""
    opened: list[RecordedStream] = []

    class Stream(RecordedStream):
        streams = opened

    monkeypatch.setattr(the_world, "FakeStream", Stream)
    return opened
