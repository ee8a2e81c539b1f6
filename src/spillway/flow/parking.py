"""Which keys are being parked just now, and which have been since somebody asked the store.

The store says which keys are parked by what has committed. From the call that parks or holds something of a key until
its commit the key is held back here; and whoever asks the store meanwhile must not miss a key whose park commits after
the answer was read and before it is used (I3). So a look-up is *open* from before the store is asked until its answer
is used, and learns the keys that are done within that time. One that is not closed would learn for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Parked:
    """The answer of a look-up: keys that were parked when it began, and those whose park has committed since."""

    __slots__ = ("found", "since")

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.since: set[str] = set()


class HeldBack:
    """The keys of parks and diversions of one sink that have not committed. True while there are any."""

    def __init__(self) -> None:
        self._writes: dict[str, int] = {}  # by key: how many that have not committed
        self._open: set[Parked] = set()

    def __bool__(self) -> bool:
        return bool(self._writes)

    def hold(self, keys: Iterable[str]) -> None:
        """What comes of these keys is held: the keys are being parked."""
        for key in keys:
            self._writes[key] = self._writes.get(key, 0) + 1

    def done(self, keys: Iterable[str]) -> None:
        """It has committed: a look-up that begins from now on sees whether they are parked."""
        for key in keys:
            if self._writes[key] > 1:
                self._writes[key] -= 1
                continue
            del self._writes[key]
            for parked in self._open:
                parked.since.add(key)

    def open(self) -> Parked:
        """A look-up begins. To be closed."""
        parked = Parked()
        self._open.add(parked)
        return parked

    def close(self, parked: Parked) -> None:
        """Its answer has been used, or nobody wants it. Idempotent."""
        self._open.discard(parked)

    @contextmanager
    def looking_up(self) -> Iterator[Parked]:
        parked = self.open()
        try:
            yield parked
        finally:
            self.close(parked)

    def union(self, parked: Parked) -> set[str]:
        """What must be held, as of now, by an open look-up."""
        return parked.found.union(parked.since, self._writes)
