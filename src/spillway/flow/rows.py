"""Rows of the source by primary key, for the messages of a part of a batch: reselect and enrichment.

One question per table and part. What a row is for is the step's own: `Reselected` puts it in the place of the
message's, `Enriched` beside it. All else is the same for both: rows that the credit did not allow for put their
messages off, and a question that fails for the data of some row is asked again with halves, until the culprit is
alone. A source that takes too long is down, and smaller batches come (spillway.flow.retry); but not if it answers, and
only a few are left. Nobody is blamed before the source has answered the same question for no key at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import orjson

from spillway.chunk import LARGE, LSN, TIME, Keying, Message
from spillway.clock import Clock
from spillway.errors import SourceUnavailable
from spillway.flow.lending import Credit, Guess
from spillway.impl import members
from spillway.sinks.base import OK, Result, reject
from spillway.source.bykeys import BatchFailed
from spillway.source.reading import Fetched
from spillway.source.snapshot import Seen
from spillway.source.wrapped import WHOLE_BYTES, Row, object_parts, row_bytes

Table = tuple[str, str]
Key = tuple[str, ...]

BLAME_SECONDS = 60.0  # a source that answered so recently is not down because it does not for a few keys
FEW = 8
LONG_SECONDS = 86_400.0  # no commit is kept from sight for so long, and no clock is wrong by as much

_NOTHING = Seen((), 0)


class ByKeys(Protocol):
    """See `spillway.source.bykeys.ByKeys`."""

    async def fetch(
        self, table: Table, keys: Sequence[Key], seen: Seen, credit_bytes: int, row_bytes: int
    ) -> Fetched: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Part:
    """What became of some places of a batch."""

    messages: dict[int, Message]  # as they are after the steps so far
    results: dict[int, Result] = field(default_factory=dict)  # what is decided already
    enrichment: dict[int, Row] = field(default_factory=dict)
    lacking: dict[int, tuple[str, ...]] = field(default_factory=dict)  # the columns of an enrichment that has no row
    read_bytes: dict[int, int] = field(default_factory=dict)  # of rows that were read for it, in credit
    later: dict[int, int] = field(default_factory=dict)  # places for another part, and the bytes that they need in all

    def decide(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.messages.pop(place, None)

    def put_off(self, sizes: Mapping[int, int], *, in_order: bool) -> None:
        """These are for another part, with rows of so many bytes beside what was read for them already; in order, so is
        what stands behind the first."""
        places = [place for place in self.messages if place >= min(sizes)] if sizes and in_order else list(sizes)
        for place in places:
            known = sizes[place] + self.read_bytes.get(place, 0) if place in sizes else 0
            self.later[place] = known or self.later.get(place, 0)
            self.messages.pop(place, None)


class RowStep(ABC):
    """``guess`` learns the sizes of rows."""

    what: ClassVar[str]  # prefix of reasons

    def __init__(self, source: ByKeys, guess: Guess, clock: Clock, *, in_order: bool) -> None:
        self.queries = 0
        self.repeated = 0  # of these, because a snapshot did not see the change yet
        self._source = source
        self._guess = guess
        self._clock = clock
        self._in_order = in_order
        self._answered_at = float("-inf")  # when the source last did, by the monotonic clock

    @abstractmethod
    def _wants(self, message: Message) -> bool: ...

    @abstractmethod
    def _found(self, part: Part, place: int, row: Row) -> None: ...

    @abstractmethod
    def _absent(self, part: Part, place: int, columns: tuple[str, ...], *, filtered: bool) -> None:
        """There is no row of these columns, or one that the sink's filters leave out."""

    async def close(self) -> None:
        await self._source.close()

    async def __call__(self, part: Part, credit: Credit) -> None:
        tables: dict[Table, list[int]] = {}
        for place, message in part.messages.items():
            if self._wants(message):
                change = message.change
                if change.key is not None:
                    tables.setdefault((change.schema, change.table), []).append(place)
        for table, places in tables.items():
            await self._ask(part, table, places, credit)

    async def _ask(self, part: Part, table: Table, places: Iterable[int], credit: Credit) -> None:
        places = [place for place in places if place in part.messages]  # others may have been put off since
        if not places:
            return
        messages = [part.messages[place] for place in places]
        keys = [message.change.pks for message in messages]
        try:
            fetched = await self._source.fetch(table, keys, self._seen(messages), credit.rows_bytes, credit.row_bytes)
        except (BatchFailed, SourceUnavailable) as error:
            for some in await self._halves(part, table, places, error):
                await self._ask(part, table, some, credit)
            return
        self._answered_at = self._clock.monotonic()
        self.queries += fetched.queries
        self.repeated += fetched.queries - 1
        sizes = [row_bytes(row.values()) for row in fetched.rows.values()] + list(fetched.sizes.values())
        beyond = sum(max(0, size - WHOLE_BYTES) for size in sizes)  # a large row says nothing of the next
        self._guess.saw(len(sizes), fetched.kept_bytes + sum(fetched.sizes.values()) - beyond)
        credit.use(fetched.kept_bytes)
        for at, place in enumerate(places):
            if at in fetched.several:
                what = f"there is more than one row of {self.what} for the key of this message"
                part.decide(place, reject(f"{self.what}_rows", what))
            elif at in fetched.rows:
                row = fetched.rows.pop(at)
                part.read_bytes[place] = part.read_bytes.get(place, 0) + row_bytes(row.values())
                self._found(part, place, row)
            elif at not in fetched.sizes:
                self._absent(part, place, fetched.columns, filtered=at in fetched.left)
        part.put_off({places[at]: size for at, size in fetched.sizes.items()}, in_order=self._in_order)

    async def _halves(
        self, part: Part, table: Table, places: Sequence[int], error: BatchFailed | SourceUnavailable
    ) -> Sequence[Sequence[int]]:
        """What to ask for again. Raises the error if it is the source's; who is alone with it is rejected."""
        if isinstance(error, SourceUnavailable):
            if not error.code.endswith("_timeout") or len(places) > FEW:
                raise error
            if len(places) == 1 or self._clock.monotonic() - self._answered_at > BLAME_SECONDS:
                # For no key: it waits for the same locks. Raises, if it is the source.
                await self._source.fetch(table, (), _NOTHING, 0, 0)
                self._answered_at = self._clock.monotonic()
        if len(places) == 1:
            part.decide(places[0], reject(error.code, str(error)))
            return ()
        half = len(places) // 2
        return places[:half], places[half:]

    def _seen(self, messages: Sequence[Message]) -> Seen:
        """What a snapshot must see before its rows may be used for these. What was committed long ago is seen; its id,
        of 32 bits, may mean another transaction by now. Of the columns, those of the last."""
        since = (self._clock.wall() - LONG_SECONDS) * 1_000_000
        words = [(m.span.chunk, m.span.indices[m.place]) for m in messages]
        words = [(chunk, index) for chunk, index in words if chunk.word(index, TIME) > since]
        xids = {chunk.word(index, LARGE) >> 32 for chunk, index in words}
        # A commit begins there; where it ends is above.
        lsn = 1 + max((chunk.word(index, LSN) for chunk, index in words), default=-1)
        columns = frozenset(orjson.loads(name) for name, _ in members(messages[-1].record))
        return Seen(frozenset(xids - {0}), lsn, columns)


class Reselected(RowStep):
    """For updates that came without their TOAST columns: the row as it is now."""

    what = "reselect"

    def _wants(self, message: Message) -> bool:
        return not message.whole and message.action == "update"

    def _found(self, part: Part, place: int, row: Row) -> None:
        part.messages[place] = part.messages[place].with_record(object_parts(row))

    def _absent(self, part: Part, place: int, columns: tuple[str, ...], *, filtered: bool) -> None:  # noqa: ARG002
        """Of a row that is gone the delete follows in the stream, but of its new key, if this update has moved it."""
        message = part.messages[place]
        moves = message.change.was is not None and message.span.keying != Keying.STATE
        if filtered or moves:
            part.messages[place] = message.as_delete()
        else:
            part.decide(place, OK)


class Enriched(RowStep):
    """What the user's SQL says of the changed rows. ``keeps_rows``: there is nothing to say of one that is deleted."""

    what = "enrichment"

    def __init__(self, source: ByKeys, guess: Guess, clock: Clock, *, in_order: bool, keeps_rows: bool) -> None:
        super().__init__(source, guess, clock, in_order=in_order)
        self._without = ("truncate", "delete") if keeps_rows else ("truncate",)

    def _wants(self, message: Message) -> bool:
        return message.action not in self._without

    def _found(self, part: Part, place: int, row: Row) -> None:
        part.enrichment[place] = row

    def _absent(self, part: Part, place: int, columns: tuple[str, ...], *, filtered: bool) -> None:  # noqa: ARG002
        """It goes without. A row or document that is updated may have these columns from before."""
        part.lacking[place] = columns
