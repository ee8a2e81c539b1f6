"""What a sink's messages become between the window and the sink: whole rows, enrichment, functions, envelopes.

A batch is shaped right before it is sent, once per attempt, and what comes of it is never stored: a restart shapes
again. In this order:

1. *Reselect*: an update that came without its TOAST columns gets the row as it is now. A row that is gone leaves
   nothing to send: its delete follows in the stream. Of a row that the sink's filters leave out, which the stream
   could not tell, there is the delete to send. Only sinks that keep rows reselect.
2. *Timestamps* as numbers, where the sink wants them so.
3. *Enrichment*: one query per table and part of a batch, by primary keys; its row becomes ``metadata.enrichment``, and
   of a sink that keeps rows also part of the row. A snapshot that does not see the change is waited out by whoever
   queries (design: a commit is streamed before it is visible).
4. *Functions*: filter, routing, transform (`spillway.functions.base`). One message becomes none, one or several.
5. *Envelope*, where there is no transform.

Failures. What user code or data does costs that message alone: it is rejected with its reason, and parked like any
other. What concerns source or worker as a whole opens the sink's breaker, and no attempt is counted. A query that fails
for the data of some row is asked again with halves, until the culprit is alone.

Credit (I4). Everything made here is covered by the shaping pool, which is taken after all others and held by nobody
who waits for another: so whoever waits here waits for requests in flight, which end by their deadline. A batch is
shaped and sent in *parts* that the credit allows for, by an estimate that follows what was seen. The source never sends
more than the credit: rows that it did not allow for stay there, and come with the next part, alone if they must.

Order. Parts are sent one after the other in the order of the batch. Of sinks that apply their batches in order, what
follows a failed message under one of its keys is `BLOCKED`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from spillway.change import RECORD_START
from spillway.chunk import LARGE, LSN, TIME, Batch, Keying, Message, Piece, Route, reshaped
from spillway.clock import Clock
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.flow.attempt import BLOCKED, Answer, each
from spillway.flow.budget import Share
from spillway.flow.lending import Credit, Lending
from spillway.functions.base import Failure, Functions, Outcome, Output
from spillway.impl import end_of_value, joined, members
from spillway.sinks.base import OK, Result, reject, sink_down
from spillway.source.enrich import BatchFailed, Fetched
from spillway.source.reselect import Rows
from spillway.source.snapshot import Seen
from spillway.source.wrapped import as_object, row_bytes

Table = tuple[str, str]
Key = tuple[str, ...]
Row = Mapping[str, bytes]
Send = Callable[[Batch], Awaitable[Answer]]

MADE_BYTES = 256 << 10  # then the loop has a turn
JOINED_BYTES = 1 << 20  # bodies that become one chunk: so much is there twice
BLAME_SECONDS = 60.0  # a source that answered so recently is not down because it does not for a few keys
FEW = 8
LONG_SECONDS = 86_400.0  # no commit is kept from sight for so long, and no clock is wrong by as much


NOTHING = Seen((), 0)


class Enrich(Protocol):
    """See `spillway.source.enrich.Enricher`."""

    async def fetch(
        self, table: Table, keys: Sequence[Key], seen: Seen, credit_bytes: int, row_bytes: int
    ) -> Fetched: ...

    async def close(self) -> None: ...


class Reread(Protocol):
    """See `spillway.source.reselect.Reselect`."""

    async def fetch(self, table: Table, keys: Sequence[Key], seen: Seen, credit_bytes: int, row_bytes: int) -> Rows: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Steps:
    """What is done with the messages of one sink; None: nothing."""

    suffix: bytes  # closes a body into this sink's message, see spillway.change
    keeps_rows: bool  # a sink of rows or documents: a delete is by key, and passes filter and transform
    as_record: bool  # what is sent is the row, not the message around it
    # What functions make of a message is one in Sequin's format, of which the row may be sent; else it may be anything.
    keeps_form: bool = True
    reread: Reread | None = None
    enrich: Enrich | None = None
    functions: Functions | None = None
    checked: Callable[[Mapping[str, object]], Route] = dict  # a route, or ValueError
    envelope: Callable[[Message, bytes], bytes] | None = None  # of the message, and as it reads in Sequin's format
    timestamps: Callable[[Message], Awaitable[Message]] | None = None
    result_bytes: int = 16 << 20  # what functions may make of one message
    metadata: Callable[[Message], bytes] | None = None  # more of it: bytes like b',"tx":{...}'

    @property
    def only_rereads(self) -> bool:
        """Nothing is done but to rows that came without their TOAST columns."""
        steps = (self.enrich, self.functions, self.envelope, self.timestamps, self.metadata)
        return all(step is None for step in steps)


@dataclass(slots=True)
class _Part:
    """What became of some places of a batch."""

    results: dict[int, Result] = field(default_factory=dict)  # what is decided already
    messages: dict[int, Message] = field(default_factory=dict)  # as they are after the steps so far
    rows: dict[int, Row] = field(default_factory=dict)  # enrichment
    reread: dict[int, int] = field(default_factory=dict)  # bytes of rows that were read anew
    later: dict[int, int] = field(default_factory=dict)  # places for another part, and the bytes that they need in all

    def decide(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.messages.pop(place, None)

    def size(self, place: int) -> int:
        """What was read for it, in bytes of credit."""
        enriched = row_bytes(self.rows[place].values()) if place in self.rows else 0
        return enriched + self.reread.get(place, 0)

    def put_off(self, sizes: Mapping[int, int], *, in_order: bool) -> None:
        """These are for another part, whose rows have so many bytes; in order, so is what stands behind the first."""
        places = [place for place in self.messages if place >= min(sizes)] if sizes and in_order else list(sizes)
        for place in places:
            self.later[place] = sizes.get(place, self.later.get(place, 0))
            self.messages.pop(place, None)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    place: int
    message: Message
    body: bytes
    route: Route | None


class Shaping:
    """Of one sink. ``in_order``: the sink applies its batches in order."""

    def __init__(self, steps: Steps, share: Share, clock: Clock, max_message_bytes: int, *, in_order: bool) -> None:
        self._clock = clock
        self._steps = steps
        self.share = share
        self._max_message_bytes = max_message_bytes
        self._in_order = in_order
        self._lending = Lending(
            share,
            len(steps.suffix),
            None if steps.functions is None else steps.result_bytes,
            rereads=steps.reread is not None,
            enriches=steps.enrich is not None,
        )
        self._answered_at = float("-inf")  # when the source last did, by the monotonic clock
        self.queries = 0
        self.repeated = 0  # of these, because a snapshot did not see the change yet

    @property
    def opaque(self) -> bool:
        """What is sent may say anything of the change that it is sent for."""
        steps = self._steps
        return steps.envelope is not None or (steps.functions is not None and not steps.keeps_form)

    async def close(self) -> None:
        """All of it, whatever one of them says."""
        async with contextlib.AsyncExitStack() as stack:
            for step in (self._steps.reread, self._steps.enrich, self._steps.functions):
                if step is not None:
                    stack.push_async_callback(step.close)

    async def __call__(self, batch: Batch, send: Send) -> Answer:
        """Shape the batch and send what comes of it. One result per message, or one that holds for all."""
        if self._steps.only_rereads and batch.plain:
            return await send(batch)
        messages = batch.messages
        results: list[Result] = [OK] * len(messages)
        left: Sequence[int] = range(len(messages))
        known: dict[int, int] = {}  # bytes of rows by place, where the source has said so
        blocked: set[str] = set()
        while left:
            try:
                before = (len(left), sum(known.values()))
                left = await self._next_part(messages, left, known, results, blocked, send)
                if before == (len(left), sum(known.values())):
                    raise SpillwayError(
                        "shaping_stuck", "what was read did not come within its credit, twice", "report it"
                    )
            except SpillwayError as error:
                down = sink_down(error.code, str(error))
                if len(left) == len(messages):
                    return down
                for place in left:
                    results[place] = down
                break
        return OK if all(result is OK for result in results) else results

    async def _next_part(
        self,
        messages: Sequence[Message],
        left: Sequence[int],
        known: dict[int, int],
        results: list[Result],
        blocked: set[str],
        send: Send,
    ) -> Sequence[int]:
        """The first of what is left, as much as there is credit for. Returns what is left then."""
        async with self._lending.lent(messages, left, known) as credit:
            taken = left[: credit.count]
            part = await self._shape({place: messages[place] for place in taken}, credit)
            self._note_sizes(part, messages, known)
            outgoing = await self._outgoing(part)
            if self._in_order:
                _block(messages, [place for place in taken if place not in part.later], part.results, blocked)
                outgoing = [one for one in outgoing if one.place not in part.results]
            for place, result in part.results.items():
                results[place] = result
            rest = [*(place for place in taken if place in part.later), *left[credit.count :]]
            down = None
            if outgoing:
                places = [one.place for one in outgoing]
                batch = _batch(outgoing, as_they_are=self._steps.only_rereads)
                credit.keep(self._lending.sending(batch))
                down = _spread(await send(batch), places, batch, results)
                if self._in_order:  # what follows in other parts waits, too
                    blocked.update(key for p in places if results[p].outcome != "ok" for key in messages[p].keys)
        if down is not None:
            for place in rest:
                results[place] = down
            return ()
        return rest

    def _note_sizes(self, part: _Part, messages: Sequence[Message], known: dict[int, int]) -> None:
        for place, size in list(part.later.items()):
            if size:
                known[place] = max(size, known.get(place, 0))
            needed = self._lending.needed(messages[place], size)
            if size > self._max_message_bytes:
                why = "more than the sink's max_message_bytes"
            elif needed > self.share.most_bytes:
                why = (
                    f"which takes {needed >> 20} MB of the {self.share.most_bytes >> 20} MB that memory.limit_mb leaves"
                )
            else:
                continue
            del part.later[place]
            part.results[place] = reject("row_too_large", f"what is read for it has {size} bytes, {why}")

    # -- the steps ----------------------------------------------------------------------------------------------------

    async def _shape(self, messages: dict[int, Message], credit: Credit) -> _Part:
        part = _Part(messages=messages)
        steps = self._steps
        if steps.reread is not None:
            lacking = [place for place, m in part.messages.items() if not m.whole and m.action == "update"]
            for table, places in _by_table(part, lacking).items():
                await self._read_anew(part, steps.reread, table, places, credit)
        if steps.timestamps is not None:
            await self._convert(part, steps.timestamps)
        if steps.enrich is not None:
            asking = [
                place
                for place, m in part.messages.items()
                if m.action != "truncate" and not (m.action == "delete" and steps.keeps_rows)
            ]
            for table, places in _by_table(part, asking).items():
                await self._enrich(part, steps.enrich, table, places, credit)
        return part

    async def _convert(self, part: _Part, convert: Callable[[Message], Awaitable[Message]]) -> None:
        made = 0
        for place, message in list(part.messages.items()):
            if message.action == "truncate":
                continue
            made += message.body_bytes
            if made > MADE_BYTES:
                made = await _others_turn()
            try:
                part.messages[place] = await convert(message)
            except SpillwayError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a message holds costs that message alone
                part.decide(place, _defect(error))

    async def _read_anew(
        self, part: _Part, reread: Reread, table: Table, places: Sequence[int], credit: Credit
    ) -> None:
        places = [place for place in places if place in part.messages]  # others may have been put off since
        if not places:
            return
        keys, seen = self._asked(part, places)
        try:
            rows = await reread.fetch(table, keys, seen, credit.rows_bytes, credit.row_bytes)
        except (BatchFailed, SourceUnavailable) as error:
            for some in await self._halves(part, places, error, lambda: reread.fetch(table, (), NOTHING, 0, 0)):
                await self._read_anew(part, reread, table, some, credit)
            return
        self._answered_at = self._clock.monotonic()
        self._lending.reread.saw(len(rows.records) + len(rows.sizes), rows.kept_bytes + sum(rows.sizes.values()))
        credit.use(rows.kept_bytes)
        for at, record in rows.records.items():
            part.messages[places[at]] = part.messages[places[at]].with_record(record)
            part.reread[places[at]] = rows.kept_bytes // len(rows.records)
        for at in rows.missing | rows.left:
            place, message = places[at], part.messages[places[at]]
            moves = message.change.was is not None and message.span.keying != Keying.STATE
            if at in rows.left or moves:
                part.messages[place] = message.as_delete()
            else:  # if it is gone, its delete follows in the stream
                part.decide(place, OK)
        part.put_off({places[at]: size for at, size in rows.sizes.items()}, in_order=self._in_order)

    async def _enrich(self, part: _Part, enrich: Enrich, table: Table, places: Sequence[int], credit: Credit) -> None:
        places = [place for place in places if place in part.messages]  # others may have been put off since
        if not places:
            return
        keys, seen = self._asked(part, places)
        try:
            fetched = await enrich.fetch(table, keys, seen, credit.rows_bytes, credit.row_bytes)
        except (BatchFailed, SourceUnavailable) as error:
            for some in await self._halves(part, places, error, lambda: enrich.fetch(table, (), NOTHING, 0, 0)):
                await self._enrich(part, enrich, table, some, credit)
            return
        self._answered_at = self._clock.monotonic()
        self.queries += fetched.queries
        self.repeated += fetched.queries - 1
        self._lending.enriched.saw(
            len(fetched.rows) + len(fetched.sizes), fetched.kept_bytes + sum(fetched.sizes.values())
        )
        credit.use(fetched.kept_bytes)
        for at, row in fetched.rows.items():
            part.rows[places[at]] = row
        for at in fetched.several:
            what = "the enrichment has more than one row for the key of this message"
            part.decide(places[at], reject("enrichment_rows", what))
        sizes = {places[at]: size + part.reread.get(places[at], 0) for at, size in fetched.sizes.items()}
        part.put_off(sizes, in_order=self._in_order)

    async def _halves(
        self,
        part: _Part,
        places: Sequence[int],
        error: BatchFailed | SourceUnavailable,
        ask_nothing: Callable[[], Awaitable[object]],
    ) -> list[Sequence[int]]:
        """What to ask for again, so that who is at fault is found; alone he is rejected. A source that takes too long
        is down, and smaller batches come (spillway.flow.retry); but not if it answers, and a few are left."""
        if isinstance(error, SourceUnavailable):
            if not error.code.endswith("_timeout") or len(places) > FEW:
                raise error
            if self._clock.monotonic() - self._answered_at > BLAME_SECONDS:
                await ask_nothing()  # raises, if it is the source
                self._answered_at = self._clock.monotonic()
        if len(places) == 1:
            part.decide(places[0], reject(error.code, str(error)))
            return []
        half = len(places) // 2
        return [places[:half], places[half:]]

    def _asked(self, part: _Part, places: Sequence[int]) -> tuple[list[Key], Seen]:
        """Their keys, and what a snapshot must see before its rows may be used for them. What was committed long ago is
        seen; its id, of 32 bits, may mean another transaction by now."""
        messages = [part.messages[place] for place in places]
        since = (self._clock.wall() - LONG_SECONDS) * 1_000_000
        words = [(m.span.chunk, m.span.indices[m.place]) for m in messages]
        words = [(chunk, index) for chunk, index in words if chunk.word(index, TIME) > since]
        xids = {chunk.word(index, LARGE) >> 32 for chunk, index in words}
        # A commit begins there; where it ends is above.
        lsn = 1 + max((chunk.word(index, LSN) for chunk, index in words), default=-1)
        return [m.change.pks for m in messages], Seen(frozenset(xids - {0}), lsn)

    # -- what is sent -------------------------------------------------------------------------------------------------

    async def _outgoing(self, part: _Part) -> list[_Outgoing]:
        """Asks the functions; notes what failed. In the order of the batch."""
        places = sorted(part.messages)
        if self._steps.only_rereads:
            return [_Outgoing(place, part.messages[place], b"", None) for place in places]
        asked = [place for place in places if part.messages[place].action != "truncate"]
        outcomes = await self._ask(part, asked)
        outgoing: list[_Outgoing] = []
        made = 0
        for place in sorted(part.messages):
            outcome = outcomes.pop(place, _AS_IT_IS)
            if isinstance(outcome, Failure):
                part.decide(place, reject(outcome.reason, outcome.detail))
                continue
            try:
                routes = [None if one.route is None else self._steps.checked(one.route) for one in outcome]
            except ValueError as error:
                part.decide(place, reject("routing_failed", str(error)))
                continue
            message = part.messages[place]
            try:
                bodies = [self._body(part, place, one) for one in outcome]
            except Exception as error:  # noqa: BLE001 - whatever a message holds costs that message alone
                part.decide(place, _defect(error))
                continue
            made += sum(map(len, bodies))
            if made > MADE_BYTES:
                made = await _others_turn()
            outgoing += [_Outgoing(place, message, *one) for one in zip(bodies, routes, strict=True)]
            part.rows.pop(place, None)
        return outgoing

    async def _ask(self, part: _Part, places: Sequence[int]) -> dict[int, Outcome]:
        functions = self._steps.functions
        if functions is None or not places:
            return {}
        deletes = [self._steps.keeps_rows and part.messages[place].action == "delete" for place in places]
        messages = [self._message(part, place) for place in places]
        asked_bytes = sum(map(len, messages))
        said = await functions(messages, deletes, int(self._lending.growth * asked_bytes))
        made = [sum(len(one.body or b"") for one in outcome) for outcome in said if not isinstance(outcome, Failure)]
        ratio = 1.25 * sum(made) / max(1, sum(map(len, messages[: len(said)])))
        self._lending.growth = max(1.0, ratio, 0.75 * self._lending.growth + 0.25 * ratio)
        # What there was no room for comes with the next part.
        part.put_off({place: part.size(place) for place in places[len(said) :]}, in_order=self._in_order)
        return dict(zip(places, said, strict=False))

    def _message(self, part: _Part, place: int) -> bytes:
        """As Sequin has it: what functions see."""
        message = part.messages[place]
        row = part.rows.get(place)
        suffix = self._steps.suffix
        if row is not None:
            suffix = b',"enrichment":' + as_object(row) + suffix[len(_NO_ENRICHMENT) :]
        more = b"" if self._steps.metadata is None else self._steps.metadata(message)
        return message.change.body + more + suffix

    def _body(self, part: _Part, place: int, output: Output) -> bytes:
        message, steps = part.messages[place], self._steps
        if output.body is not None and not (steps.as_record and steps.keeps_form):
            return output.body
        if steps.envelope is not None and message.action != "truncate":
            return steps.envelope(message, self._message(part, place))
        if not steps.as_record:
            return self._message(part, place)
        record = message.change.record
        if output.body is not None:
            record = output.body[RECORD_START : end_of_value(output.body, RECORD_START)]
        row = part.rows.get(place)
        return record if row is None else _merged(record, row)


_NO_ENRICHMENT = b',"enrichment":null'
_AS_IT_IS = (Output(None),)


def _block(messages: Sequence[Message], places: Iterable[int], results: dict[int, Result], blocked: set[str]) -> None:
    """What stands behind a failed message under one of its keys waits for it."""
    for place in places:
        if place not in results and not blocked.isdisjoint(messages[place].keys):
            results[place] = BLOCKED
        if results.get(place, OK).outcome != "ok":
            blocked.update(messages[place].keys)


def _by_table(part: _Part, places: Sequence[int]) -> dict[Table, list[int]]:
    """Of those that have a key."""
    tables: dict[Table, list[int]] = {}
    for place in places:
        change = part.messages[place].change
        if change.key is not None:
            tables.setdefault((change.schema, change.table), []).append(place)
    return tables


def _merged(record: bytes, row: Row) -> bytes:
    """The record's columns and those of the enrichment, which wins. Not a byte of a value changes."""
    more = {orjson.dumps(name): value for name, value in row.items()}
    merged = [(name, more.pop(name, value)) for name, value in members(record)]
    return joined([*merged, *more.items()])


async def _others_turn() -> int:
    await asyncio.sleep(0)
    return 0


def _defect(error: Exception) -> Result:
    return reject("shaping_failed", f"{type(error).__name__}: {error}")


def _batch(outgoing: list[_Outgoing], *, as_they_are: bool) -> Batch:
    """Lets go of the bodies as it goes."""
    if as_they_are:
        return Batch.of([one.message for one in outgoing])
    pieces: list[Piece] = []
    some: list[_Outgoing] = []
    size = 0
    outgoing.reverse()
    while outgoing:
        some.append(outgoing.pop())
        size += len(some[-1].body)
        # What one message has become is told apart within a chunk.
        if not outgoing or (size >= JOINED_BYTES and outgoing[-1].place != some[-1].place):
            routes = [one.route for one in some]
            shaped = reshaped(
                [one.message for one in some], [one.body for one in some], routes if any(routes) else None
            )
            pieces += shaped.pieces
            some, size = [], 0
    return Batch(pieces)


def _spread(answer: Answer, places: Sequence[int], batch: Batch, results: list[Result]) -> Result | None:
    """What the sink said goes to the messages that it was made of: of several the worst. Returns why the sink is down,
    if it is."""
    down = None
    for place, result in zip(places, each(answer, batch), strict=True):
        if _SEVERITY[result.outcome] >= _SEVERITY[results[place].outcome]:
            results[place] = result
        if result.outcome == "sink_down":
            down = result
    return down


_SEVERITY = {"ok": 0, "retry": 1, "reject": 2, "sink_down": 3}
