"""When the backlog of a sink with ``on_full: compact`` gets its next pass of compaction. Pure: it is told the time.

A pass looks at all that waits (spillway.store.compact), so passes are made in proportion to what has come since the
last one: at the cap; when the backlog has doubled, so that it stays in proportion to its keys; and now and then, at
last when nothing comes any more. A start looks at nothing; what was put before counts some time after.
"""

from __future__ import annotations

from spillway.store.base import Counters

LEAST_MESSAGES = 100_000  # fewer newcomers are not worth a pass at once
LEAST_BYTES = 256 << 20  # nor are so few bytes
GROWTH = 1.01  # since the last pass: less is not worth another while more comes
BETWEEN_SECONDS = 1.0  # from pass to pass, and from the last newcomer to the last pass
REST = 4  # a pass comes at least so many times as long after the last one as that took
LONG_REST = 10  # if there is no hurry
START_SECONDS = 30.0  # after a start, if nothing else calls for a pass: what was put before a crash
PASS_BYTES = 16 << 20  # of what a pass remembers


class Passes:
    """Of one backlog: `begin`, then `step` before and after each step of the store, then `ended`."""

    def __init__(self, now: float, counters: Counters) -> None:
        self.running = False
        self.steps = 0  # counts before and after each step
        self.removed = 0  # messages, in this run
        self.keys = 0  # that the last pass has found
        self._left_messages = counters.messages  # of what the last pass looked at
        self._left_bytes = counters.bytes
        self._unseen = False  # something was put since the last pass began
        # When there is to be a pass though nothing was put: what was put in another run, or left being in flight.
        self._look_again_at = now + START_SECONDS
        self._began_at = 0.0
        self._began_with = self._removed_before = 0  # messages that waited, and that had been removed
        self._ended_at = float("-inf")
        self._took_seconds = 0.0

    @property
    def unknown(self) -> bool:
        """No pass has looked at all that waits."""
        return self._unseen or self.running

    def put(self) -> None:
        """Something was added to what waits."""
        self._unseen = True

    def due(self, now: float, counters: Counters, last_intake_at: float, *, newcomers: bool, full: bool) -> bool:
        """``newcomers``: there is something that no pass has looked at. ``full``: the backlog is at its cap."""
        if self.running:
            return False
        if not newcomers:
            return counters.messages > 0 and now >= self._look_again_at
        many = counters.messages >= 2 * self._left_messages + LEAST_MESSAGES
        many = many or counters.bytes >= 2 * self._left_bytes + LEAST_BYTES
        quiet = now - last_intake_at >= BETWEEN_SECONDS
        if not many and not quiet and counters.messages < self._left_messages * GROWTH:
            return full
        rest = self._took_seconds * (REST if many or quiet else LONG_REST)
        return full or now - self._ended_at >= max(rest, 0.0 if many else BETWEEN_SECONDS)

    def begin(self, now: float, counters: Counters) -> None:
        """What is put from here on is for the next."""
        self.running, self._unseen = True, False
        self._began_at, self._began_with, self._removed_before = now, counters.messages, self.removed

    def step(self, removed: int = 0) -> None:
        self.steps += 1
        self.removed += removed

    def ended(self, now: float, counters: Counters, *, keys: int, spared: bool) -> None:
        """Or was broken off. ``spared``: something was passed over, being in flight."""
        self.keys = keys
        # Of what came meanwhile nothing is known, nor how much of it came before the first step; of each key one is
        # left. The bytes of what is left are taken for average ones.
        left = min(max(keys, self._began_with - (self.removed - self._removed_before)), counters.messages)
        self._left_messages, self._left_bytes = left, counters.bytes * left // max(1, counters.messages)
        self._ended_at, self._took_seconds = now, now - self._began_at
        rest = max(BETWEEN_SECONDS, self._took_seconds * REST)
        self._look_again_at = now + rest if spared else float("inf")
        self.running = False
