"""The worlds and the stores of the invariants' tests."""

from __future__ import annotations

from invariants.conftest import stores, world

__all__ = ["stores", "world"]
