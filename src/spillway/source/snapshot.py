"""What the transaction of a page sees, and where in the WAL it stands.

A page of existing rows and the stream meet by two questions. *When* may the page be placed: once the stream has carried
everything that the page sees, which is the case when the reader has passed ``lsn``, the insert position read after the
snapshot was taken. *Which rows* of it are stale: those whose key the stream has carried a change of that the page does
not see. That is judged by transaction (`Snapshot.sees`), not by LSN: a commit record precedes its visibility, by as
long as a synchronous standby takes.

On a standby the list of running transactions in a snapshot is always empty, but visibility follows replay: what was
replayed before the snapshot was taken is seen, and everything else counts as unseen.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_HALF = 1 << 31


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``xmin``, ``xmax`` and ``running`` are transaction ids of 64 bits (``txid_current_snapshot``)."""

    lsn: int  # everything it sees was committed below
    xmin: int
    xmax: int
    running: frozenset[int]
    microseconds: int  # when it was taken, by the server's clock, since the Unix epoch
    replayed_lsn: int | None = None  # of a standby: what was committed below is seen, nothing else is relied upon

    def sees(self, xid: int, commit_lsn: int) -> bool:
        """Whether the transaction with these 32 bits of an id, whose commit record begins there, is seen for sure."""
        if self.replayed_lsn is not None:
            return commit_lsn < self.replayed_lsn
        return ended(xid, self.xmin, self.xmax, self.running)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a question asked because of changes must see of them: on a primary these transactions, on a standby what was
    committed below; and of the table these columns, some of which may have been added just before."""

    xids: Collection[int]  # 32 bits each, none of them 0
    lsn: int  # where the last of the commits ends
    columns: Collection[str] = ()

    def by(self, snapshot: str) -> bool:
        """Of a primary, as `txid_current_snapshot` writes it."""
        xmin, xmax, running = parsed(snapshot)
        return all(ended(xid, xmin, xmax, running) for xid in self.xids)


def parsed(snapshot: str) -> tuple[int, int, frozenset[int]]:
    """xmin, xmax and who was running, of the text of a `txid_current_snapshot`."""
    xmin, xmax, running = snapshot.split(":")
    return int(xmin), int(xmax), frozenset(int(xid) for xid in running.split(",") if xid)


def ended(xid: int, xmin: int, xmax: int, running: Collection[int]) -> bool:
    """Whether the transaction with these 32 bits of an id is over for such a snapshot of a primary."""
    whole = widened(xid, xmax)
    return whole < xmin or (whole < xmax and whole not in running)


def widened(xid: int, near: int) -> int:
    """The transaction id of 64 bits that ends in these 32 and is nearest to another."""
    difference = (xid - near) & 0xFFFFFFFF
    return near + (difference - (1 << 32) if difference >= _HALF else difference)
