"""The limits of a backlog: how much may wait, and what happens at the cap. Pure.

The cap is the smallest of what is configured (messages, bytes, age) and what the disk has left. Below it a warning;
at it ``on_full``: ``block`` stops the reading of the slot until there is room again (nothing is lost, and it is said
on every sink of the slot), ``pause`` takes this one sink out and records the gap, ``compact`` blocks, too, but first
only until a pass of compaction has ended (spillway.store.compact). A cap that was reached is left only when the backlog
is a tenth below it: the state does not flicker, and a pass at the cap is worth its while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spillway.store.base import Counters

# Free space that the backlog leaves alone: for positions, parks and marks, and whatever else lives on that disk.
DISK_RESERVE_BYTES = 256 << 20
ROOM = 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    warn_messages: int | None = None
    max_messages: int | None = None
    max_bytes: int | None = None
    max_age_seconds: float | None = None
    on_full: Literal["block", "pause", "compact"] = "block"

    def full(self, counters: Counters, oldest_seconds: float, free_bytes: int, *, was_full: bool) -> str | None:
        """Why the backlog is full, or None."""
        factor = ROOM if was_full else 1.0
        if self.max_messages is not None and counters.messages >= self.max_messages * factor:
            return f"{counters.messages} messages wait, backlog.max_messages is {self.max_messages}"
        if self.max_bytes is not None and counters.bytes >= self.max_bytes * factor:
            return f"{counters.bytes} bytes wait, backlog.max_bytes is {self.max_bytes}"
        if self.max_age_seconds is not None and counters.messages and oldest_seconds >= self.max_age_seconds * factor:
            return (
                f"the oldest message waits for {oldest_seconds:.0f} s, backlog.max_age is {self.max_age_seconds:.0f} s"
            )
        if counters.messages and free_bytes * factor < DISK_RESERVE_BYTES:
            return f"the state disk has {free_bytes} bytes left"
        return None

    def warning(self, counters: Counters) -> str | None:
        if self.warn_messages is not None and counters.messages >= self.warn_messages:
            return f"{counters.messages} messages wait, backlog.warn_messages is {self.warn_messages}"
        return None
