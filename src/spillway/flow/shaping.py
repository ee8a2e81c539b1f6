"""What a sink's messages become between the window and the sink: whole rows, enrichment, functions, envelopes.

A batch is shaped right before it is sent, once per attempt, and what comes of it is never stored: a restart shapes
again. In this order:

1. *Reselect* (`spillway.flow.rows`): an update that came without its TOAST columns gets the row as it is now. A row
   that is gone leaves nothing to send: its delete follows in the stream. Of a row that the sink's filters leave out,
   which the stream could not tell, there is the delete to send. Only sinks that keep rows reselect.
2. *Timestamps* as numbers, where the sink wants them so (`spillway.flow.outgoing`, as all that follows but 3).
3. *Enrichment* (`spillway.flow.rows`): one query per table and part of a batch, by primary keys; its row becomes
   ``metadata.enrichment``, and of a sink that keeps rows also part of the row. A snapshot that does not see the change
   is waited out by whoever queries (design: a commit is streamed before it is visible).
4. *Functions*: filter, routing, transform (`spillway.functions.base`). One message becomes none, one or several.
5. *Envelope*, where there is no transform.

Failures. What user code or data does costs that message alone: it is rejected with its reason, and parked like any
other. What concerns source or worker as a whole opens the sink's breaker, and no attempt is counted.

Credit (I4). Everything made here is covered by the shaping pool, which is taken after all others and held by nobody
who waits for another: so whoever waits here waits for requests in flight, which end by their deadline. A batch is
shaped and sent in *parts* that the credit allows for, by an estimate that follows what was seen
(`spillway.flow.lending`). The source never sends more than the credit: rows that it did not allow for stay there, and
come with the next part, alone if they must.

Order. Parts are sent one after the other in the order of the batch. Of sinks that apply their batches in order, what
follows a failed message under one of its keys is `BLOCKED`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spillway.chunk import Batch, Message
from spillway.clock import Clock
from spillway.errors import SpillwayError
from spillway.flow.attempt import BLOCKED, Answer, Send, each
from spillway.flow.budget import ShapingShare
from spillway.flow.lending import Lending, NoRoomError
from spillway.flow.outgoing import Making, Steps
from spillway.flow.rows import Enriched, Part, Reselected
from spillway.sinks.base import OK, Result, reject, retry, sink_down

MIB = 1 << 20
LIMIT_PART = 8  # of memory.limit_mb is the most that max_message_bytes may be (spillway.config)
_SEVERITY = {"ok": 0, "retry": 1, "reject": 2, "sink_down": 3}


@dataclass(slots=True)
class _Work:
    """A batch on its way."""

    messages: Sequence[Message]
    results: list[Result] = field(init=False)
    left: Sequence[int] = field(init=False)  # places that are not decided
    known: dict[int, int] = field(default_factory=dict)  # bytes of rows by place, where the source has said so
    blocked: set[str] = field(default_factory=set)  # keys that wait for a failed message

    def __post_init__(self) -> None:
        self.results = [OK] * len(self.messages)
        self.left = range(len(self.messages))

    @property
    def progress(self) -> tuple[int, int]:
        """Differs after a part, or there is no end."""
        return len(self.left), sum(self.known.values())

    def end(self, down: Result) -> None:
        for place in self.left:
            self.results[place] = down
        self.left = ()


class Shaping:
    """Of one sink. ``in_order``: the sink applies its batches in order."""

    def __init__(
        self, steps: Steps, share: ShapingShare, clock: Clock, max_message_bytes: int, *, in_order: bool
    ) -> None:
        self.share = share
        self._steps = steps
        self._max_message_bytes = max_message_bytes
        self._in_order = in_order
        self._lending = Lending(
            share,
            clock,
            len(steps.suffix),
            None if steps.functions is None else steps.result_bytes,
            rereads=steps.reread is not None,
            enriches=steps.enrich is not None,
            whole=in_order,
        )
        self._reread = self._enrich = None
        if steps.reread is not None:
            self._reread = Reselected(steps.reread, self._lending.reread, clock, in_order=in_order)
        if steps.enrich is not None:
            self._enrich = Enriched(
                steps.enrich, self._lending.enriched, clock, in_order=in_order, keeps_rows=steps.keeps_rows
            )
        self._making = Making(steps, in_order=in_order)

    @property
    def queries(self) -> int:
        """For enrichment."""
        return 0 if self._enrich is None else self._enrich.queries

    @property
    def repeated(self) -> int:
        """Of these, because a snapshot did not see the change yet."""
        return 0 if self._enrich is None else self._enrich.repeated

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
        work = _Work(batch.messages)
        while work.left:
            before = work.progress
            try:
                try:
                    await self._next_part(work, send)
                except NoRoomError:
                    self._no_room(work)
                if work.progress == before:
                    raise SpillwayError(
                        "shaping_stuck", "what was read did not come within its credit, twice", "report it"
                    )
            except SpillwayError as error:
                down = sink_down(error.code, str(error))
                if len(work.left) == len(work.messages):
                    return down
                work.end(down)
        return OK if all(result is OK for result in work.results) else work.results

    async def _next_part(self, work: _Work, send: Send) -> None:
        """The first of what is left, as much as there is credit for."""
        messages, results = work.messages, work.results
        async with self._lending.lent(messages, work.left, work.known, self._making.growth) as credit:
            taken = work.left[: credit.count]
            part = Part({place: messages[place] for place in taken})
            if self._reread is not None:
                await self._reread(part, credit)
            await self._making.convert(part)
            if self._enrich is not None:
                await self._enrich(part, credit)
            self._note_sizes(part, work)
            outgoing = await self._making.outgoing(part)
            if self._in_order:
                _block(work, [place for place in taken if place not in part.later], part.results)
                outgoing = [one for one in outgoing if one.place not in part.results]
            for place, result in part.results.items():
                results[place] = result
            work.left = [*(place for place in taken if place in part.later), *work.left[credit.count :]]
            if not outgoing:
                return
            places = [one.place for one in outgoing]
            batch = self._making.batch(outgoing)
            part.messages.clear()  # the batch has what is needed of them
            down = await _sent(credit.portions(batch), places, results, send)
        if down is not None:
            work.end(down)
        elif self._in_order:  # what follows in other parts waits, too
            work.blocked.update(key for p in places if results[p].outcome != "ok" for key in messages[p].keys)

    def _no_room(self, work: _Work) -> None:
        """For the row of the first message: it comes again, and the others go on."""
        first, *work.left = work.left
        what = "its row is large, and what memory it lacks was not free for a while"
        work.results[first] = retry("no_memory", what)
        if self._in_order:
            work.blocked.update(work.messages[first].keys)

    def _note_sizes(self, part: Part, work: _Work) -> None:
        """Of what comes later; what can never come is decided."""
        for place, size in list(part.later.items()):
            if size:
                work.known[place] = max(size, work.known.get(place, 0))
            why = self._why_never(work.messages[place].body_bytes, size)
            if why:
                del part.later[place]
                part.results[place] = reject("row_too_large", f"what is read for it has {size} bytes, {why}")

    def _why_never(self, body_bytes: int, size: int) -> str:
        if size > self._max_message_bytes:
            least_mb = -(-size // MIB)
            return (
                f"more than the sink's max_message_bytes; {least_mb}MB would do, with memory.limit_mb at least"
                f" {LIMIT_PART * least_mb}"
            )
        needed = self._lending.needed(body_bytes, size)
        if needed <= self.share.most_alone_bytes:
            return ""
        return (
            f"which takes {needed // MIB} MB of the {self.share.most_alone_bytes // MIB} MB that memory.limit_mb"
            f" leaves; {self.share.limit_mb_for(needed)} would do"
        )


def _block(work: _Work, places: Iterable[int], results: dict[int, Result]) -> None:
    """What stands behind a failed message under one of its keys waits for it."""
    for place in places:
        keys = work.messages[place].keys
        if place not in results and not work.blocked.isdisjoint(keys):
            results[place] = BLOCKED
        if results.get(place, OK).outcome != "ok":
            work.blocked.update(keys)


async def _sent(portions: Iterable[Batch], places: Sequence[int], results: list[Result], send: Send) -> Result | None:
    """``places``: of all that is sent. Returns why the sink is down, if it is."""
    done = 0
    for batch in portions:
        down = _spread(await send(batch), places[done : done + len(batch)], batch, results)
        done += len(batch)
        if down is not None:
            for place in places[done:]:
                results[place] = down
            return down
    return None


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
