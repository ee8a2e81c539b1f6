"""What may be confirmed to Postgres (I1).

`Watermark` remembers, in stream order, the commits that were routed and not yet confirmed. A commit may be confirmed
when no sink holds an open message (neither resolved nor durable) at or below it; what is sent is its ``end_lsn``: with
``commit_lsn`` the server would send that transaction again. With nothing open anywhere, the position of a keepalive
that was taken in stream order, outside of a transaction, may be confirmed as well, so that an idle slot moves on.
Where a gap is not on disk yet (`spillway.flow.gap.Gaps.lsn`) nothing *beyond* that place may be confirmed, open or not:
what it is about opens nothing.

The idea is Jeffail/checkpoint's; the memory is one pair per transaction that has an open message: commits without one
are merged into their predecessor.

Invariants: `commit` and `keepalive` are called after everything before them in the stream was handed to the sinks.
``confirmed`` never goes back.
"""

from __future__ import annotations

from collections import deque


class Watermark:
    def __init__(self, confirmed_lsn: int) -> None:
        self.confirmed_lsn = confirmed_lsn
        self.last_commit_lsn = 0
        self._commits: deque[tuple[int, int]] = deque()  # (commit_lsn, end_lsn)

    def commit(self, commit_lsn: int, end_lsn: int, *, routed: bool) -> None:
        """A transaction is complete; ``routed``: some sink got a message of it. Repetitions (reconnect) are ignored."""
        if commit_lsn <= self.last_commit_lsn:
            return
        self.last_commit_lsn = commit_lsn
        self._add(commit_lsn, end_lsn, merge=not routed)

    def keepalive(self, wal_end: int) -> None:
        """The server has sent all it has up to ``wal_end``; only outside of a transaction."""
        last = self._commits[-1][1] if self._commits else self.confirmed_lsn
        if wal_end > last:
            self._add(self.last_commit_lsn, wal_end, merge=True)

    def advance(self, first_open_lsn: int | None, gap_lsn: int | None = None) -> int:
        """The LSN that may be confirmed, given the commit LSN of the oldest open message of all sinks, and the place
        from which on the first gap that is not durable needs everything."""
        commits = self._commits
        while commits:
            commit_lsn, end_lsn = commits[0]
            if first_open_lsn is not None and commit_lsn >= first_open_lsn:
                break
            if gap_lsn is not None and end_lsn > gap_lsn:
                break
            commits.popleft()
            self.confirmed_lsn = max(self.confirmed_lsn, end_lsn)
        return self.confirmed_lsn

    def _add(self, commit_lsn: int, end_lsn: int, *, merge: bool) -> None:
        # What opens nothing may be confirmed together with its predecessor, and only then: the predecessor's
        # commit_lsn decides.
        if merge and self._commits:
            commit_lsn = self._commits.pop()[0]
        self._commits.append((commit_lsn, end_lsn))
