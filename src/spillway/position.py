"""Positions: the total order of a slot.

A position is ``(commit_lsn, commit_idx, sub)``. ``commit_lsn`` is the final LSN of the transaction as pgoutput's Begin
message states it (PostgreSQL documentation, "Logical Replication Message Formats"): the slot sends transactions in the
order of their commit records, so it rises from one transaction to the next. ``commit_idx`` counts the row operations
of the transaction from 0. ``sub`` tells apart the messages that one row operation becomes (a key change is a delete of
the old key, 0, and an index of the new one, 1).

Invariant: positions are compared only within one epoch of one slot (I9).
"""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    commit_lsn: int
    commit_idx: int
    sub: int = 0

    def __str__(self) -> str:
        return f"{format_lsn(self.commit_lsn)}/{self.commit_idx}.{self.sub}"


ZERO = Position(0, 0, 0)


def format_lsn(lsn: int) -> str:
    """An LSN as PostgreSQL prints a ``pg_lsn``: 0x16B374D848 -> ``16/B374D848``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """The inverse of `format_lsn`. Raises ValueError on anything else."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def version(epoch: int, commit_lsn: int, n: int) -> int:
    """The external version of a change for sinks that keep one: ``epoch:5 | commit_lsn>>5 : 50 | n:8``, 63 bits.

    ``n`` is 1 + the number of earlier changes of that key in the transaction, saturating at 255. Commit records are at
    least 40 bytes apart, so the version rises strictly per key and is the same at every replay.
    """
    return (epoch & 0x1F) << 58 | (commit_lsn >> 5 & 0x3FFFFFFFFFFFF) << 8 | n
