"""What the stream has carried lately of the tables that are being backfilled: which rows of a page are stale.

A page's rows are those of its snapshot, and the page is placed later in the stream. A row is stale if the stream has
carried, before that place, a change of its key by a transaction that the snapshot does not see: what the sink got of
the stream is newer, and the row must not overtake it. Since a commit is streamed before it is visible, such a change
may have been carried before the snapshot was taken. So everything carried is remembered until it is seen by the
snapshots of all pages that are open; whatever one has seen, those that are taken later see, too.

Only what a sink got counts for it: a change that it did not want leaves the row in force. One that it got without some
TOAST columns is no substitute for the row: the row is neither sent nor dropped but has to be read again, later. An
unseen TRUNCATE makes the whole page void.

**Bounded.** What is remembered (records and texts of keys, no bodies) is charged to the capture pool, up to a part of
it. Where that does not do, everything is forgotten, pages that are being read are void, and `began` starts anew: its
caller then waits until whatever ran at that moment has ended (spillway.flow.paging).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

from spillway.change import ACTIONS
from spillway.chunk import ACTION, FLAGS, HASH, LARGE, LSN, MOVED, OLD, TOO_LARGE, WAS, WHOLE, Chunk
from spillway.flow.budget import Pool

Table = tuple[str, str]
Sees = Callable[[int, int], bool]  # of a snapshot: a transaction's 32 bits, and its commit LSN

_UPDATE, _DELETE, _TRUNCATE = map(ACTIONS.index, ("update", "delete", "truncate"))
_XID_SHIFT = 32
_PART_BYTES = 512  # what a chunk costs beyond its columns


class View:
    """What an open page sees; before its snapshot is known, what the newest one saw that there was by then."""

    __slots__ = ("sees",)

    def __init__(self, sees: Sees | None) -> None:
        self.sees = sees


class Stale:
    """What of a page may not be placed. By the row's place in the page."""

    __slots__ = ("again", "dropped")

    def __init__(self) -> None:
        self.dropped: set[int] = set()  # the sink has something newer
        self.again: set[int] = set()  # the sink has something newer that is not whole


class Carried:
    def __init__(self, pool: Pool, limit_bytes: int) -> None:
        self._pool = pool
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._tables: Counter[Table] = Counter()
        self._parts: list[Chunk] = []
        self._views: set[View] = set()
        self._newest: Sees | None = None
        self.remembers = False
        self.began = 0  # how often it has begun to remember
        self.quiet = 0  # in which of these everything that was not remembered is visible by now

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def watch(self, table: Table) -> None:
        self._tables[table] += 1

    def unwatch(self, table: Table) -> None:
        self._tables[table] -= 1
        if not self._tables[table]:
            del self._tables[table]
        if not self._tables:
            self.forget_all()

    def begin(self) -> None:
        """Remember from here on, if it does not yet."""
        if not self.remembers:
            self.remembers = True
            self.began += 1

    def add(self, chunk: Chunk) -> None:
        """The stream has carried it. Called before it is handed to the sinks."""
        if not self.remembers or not (chunk.truncates or any(table in self._tables for table in chunk.tables)):
            return
        columns = Chunk(chunk.count, b"", chunk.meta, chunk.keys, chunk.tables, chunk.groups, truncates=chunk.truncates)
        cost = _cost(columns)
        if self._bytes + cost > self._limit_bytes or not self._pool.try_take(cost):
            self.forget_all()
            return
        self._bytes += cost
        self._parts.append(columns)

    def open(self) -> View:
        """A page is about to be read. To be closed."""
        view = View(self._newest)
        self._views.add(view)
        return view

    def close(self, view: View) -> None:
        self._views.discard(view)

    def saw(self, view: View, sees: Sees) -> None:
        """The snapshot of the page is known."""
        view.sees = self._newest = sees
        views = [other.sees for other in self._views]
        kept = [part for part in self._parts if any(see is None or not _sees_all(part, see) for see in views)]
        freed = sum(map(_cost, self._parts)) - sum(map(_cost, kept)) if len(kept) < len(self._parts) else 0
        self._parts = kept
        self._bytes -= freed
        self._pool.give(freed)

    def forget_all(self) -> None:
        """Nothing that was read so far can be judged any more."""
        self.remembers = False
        self._pool.give(self._bytes)
        self._bytes = 0
        self._parts = []
        self._newest = None

    def stale(
        self, page: Chunk, sees: Sees, takes: Callable[[int], bool], relation: Table | None = None
    ) -> Stale | None:
        """Judge a page by what has been carried up to now; None: a TRUNCATE has made it void. ``takes``: whether the
        sink gets changes of this action. ``relation``: which the page was read from, if it was one; a partition is
        emptied under its own name, which is not that of its rows."""
        newer: dict[bytes, bool] = {}  # by key: whether what the sink got last is whole
        hashes: set[int] = set()
        for part, index in self._unseen(sees):
            action, flags = part.byte(index, ACTION), part.byte(index, FLAGS)
            if action == _TRUNCATE and (relation is None or part.table(index) in (relation, *page.tables)):
                return None
            # The delete of an old row goes to whoever takes the update, which comes next, if at all.
            if part.table(index) not in page.tables or not takes(_UPDATE if flags & OLD else action):
                continue
            key, was = part.key_texts(index)[:2]
            if key:
                newer[key] = action == _DELETE or bool(flags & (WHOLE | TOO_LARGE))
                hashes.add(part.word(index, HASH))
            if flags & MOVED:
                newer[was] = True
                hashes.add(part.word(index, WAS))
        found = Stale()
        if newer:
            for place, hashed in enumerate(page.column(HASH)):
                if hashed in hashes:
                    whole = newer.get(page.key_texts(place)[0])
                    if whole is not None:
                        (found.dropped if whole else found.again).add(place)
        return found

    def brought(self, absent: Collection[bytes], sees: Sees) -> set[bytes]:
        """Those of these keys, of rows that a page has not, of which the stream has brought the row: there is one, by
        the last change of it that the page does not see."""
        found: dict[bytes, bool] = {}
        for part, index in self._unseen(sees):
            key, was = part.key_texts(index)[:2]
            if part.byte(index, FLAGS) & MOVED:
                found[was] = False
            found[key] = part.byte(index, ACTION) != _DELETE
        return {key for key in absent if found.get(key)}

    def _unseen(self, sees: Sees) -> Iterator[tuple[Chunk, int]]:
        """Changes of transactions that are not seen, in stream order."""
        for part in self._parts:
            unseen = {pair for pair in _transactions(part) if not sees(*pair)}
            if unseen:
                for index, pair in enumerate(zip(_xids(part), part.column(LSN), strict=True)):
                    if pair in unseen:
                        yield part, index


def _sees_all(part: Chunk, sees: Sees) -> bool:
    return all(sees(xid, lsn) for xid, lsn in _transactions(part))


def _cost(part: Chunk) -> int:
    return len(part.meta) + len(part.keys) + _PART_BYTES


def _xids(part: Chunk) -> list[int]:
    return [word >> _XID_SHIFT for word in part.column(LARGE)]


def _transactions(part: Chunk) -> set[tuple[int, int]]:
    return set(zip(_xids(part), part.column(LSN), strict=True))
