"""When to try again, and with how much: the back-off of a message, the breaker of a sink, the throttle of its stream,
and the size of its batches.

Two failures, kept apart (design.md §2). What concerns the *sink* (refused, 401, 429, 503, time-out) opens its
`Breaker`: deliveries stop, one probe per back-off, no attempt is counted on any message. What concerns a *message*
parks its key, and the `Throttle` watches over the whole: when batch after batch fails without a single success, the
stream narrows, by halves, down to single probes at growing distances, so that a hundred thousand documents that a
mapping rejects cost some hundred probes; a success widens it again, by eights.

All of it is pure: time comes in as monotonic seconds, randomness as a function.
"""

from __future__ import annotations

import random
from collections.abc import Callable

# "a probe of a failing sink comes at least every 30 s, a held key's retry at least every 3 minutes": caps stay below,
# since the jitter may add to them and the probe takes its time.
PROBE_CAP_SECONDS = 22.0
RETRY_CAP_SECONDS = 140.0
JITTER = 0.15
NARROWEST = 10  # failed batches in a row until the stream is down to single probes (1000 >> 10 == 0)
REQUEST_SECONDS = 2.0  # the longest that one request should take
PARKED_ROUNDS = 6  # in how many probes all parked keys are seen: 6 * 25 s < 3 minutes

Random = Callable[[], float]  # uniform in [0, 1)


def backoff_seconds(
    attempts: int, base: float = 1.0, cap: float = RETRY_CAP_SECONDS, rng: Random = random.random
) -> float:
    """Exponential with jitter, also at the cap, so that keys parked together do not come back together."""
    return min(cap, base * 2.0 ** min(attempts, 30)) * (1 - JITTER + 2 * JITTER * rng())


class Breaker:
    """Of one sink. Open: nothing is sent until ``probe_at``, then one small probe at a time."""

    def __init__(self, rng: Random = random.random) -> None:
        self._rng = rng
        self.failures = 0
        self.probe_at = 0.0
        self.reason = ""
        self.detail = ""

    @property
    def open(self) -> bool:
        return self.failures > 0

    def failed(self, now: float, reason: str, detail: str, retry_after_seconds: float | None = None) -> None:
        if now < self.probe_at:
            return  # of the same wave: batches that were in flight together count once
        delay = backoff_seconds(self.failures, 0.25, PROBE_CAP_SECONDS, self._rng)
        if retry_after_seconds is not None:
            delay = min(max(delay, retry_after_seconds), PROBE_CAP_SECONDS)
        self.failures += 1
        self.probe_at = now + delay
        self.reason, self.detail = reason, detail

    def succeeded(self) -> None:
        self.failures = 0
        self.probe_at = 0.0


class Throttle:
    """Of one stream of messages (a sink's queue, or its parked keys). Wide by default."""

    def __init__(self, streak: int = 0, rng: Random = random.random) -> None:
        self._rng = rng
        self.streak = streak  # batches in a row of which every message failed
        self.not_before = 0.0

    @property
    def narrow(self) -> bool:
        return self.streak >= NARROWEST

    def allowance(self, batch_size: int) -> int:
        """How many messages the next batch may hold."""
        return max(1, batch_size >> self.streak)

    def failed(self, now: float) -> None:
        self.streak += 1
        if self.narrow:
            self.not_before = now + backoff_seconds(self.streak - NARROWEST, 0.1, PROBE_CAP_SECONDS, self._rng)

    def succeeded(self) -> None:
        self.streak = max(0, min(self.streak, NARROWEST) - 3)
        self.not_before = 0.0


class BatchSize:
    """How many messages a request to a sink may hold: as many as it takes in `REQUEST_SECONDS`, at most what is
    configured. A request that is refused for now (429) or not answered in time halves it, full ones that are answered
    sooner double it."""

    def __init__(self, most: int, timeout_seconds: float) -> None:
        self._most = most
        self._target_seconds = min(REQUEST_SECONDS, timeout_seconds / 4)
        self.messages = most

    def answered(self, count: int, seconds: float) -> None:
        if seconds > self._target_seconds:
            self.messages = max(1, min(self.messages, round(count * self._target_seconds / seconds)))
        elif count >= self.messages:
            self.messages = min(self._most, 2 * self.messages)

    def refused(self, count: int) -> None:
        self.messages = max(1, min(self.messages, count // 2))
