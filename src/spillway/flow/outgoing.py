"""What is sent of a part of a batch: what functions have made of its messages, envelopes, rows with their enrichment.

A body is put together once, of slices and of what was read: nothing of a value is parsed or changed. What it was made
of is let go of as soon as it is there, so that all of a part is in memory about once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import orjson

from spillway.change import RECORD_START
from spillway.chunk import Batch, Message, Piece, Route, reshaped
from spillway.errors import SpillwayError
from spillway.flow.lending import JOINED_BYTES
from spillway.flow.rows import ByKeys, Part
from spillway.functions.base import Failure, Functions, Outcome, Output
from spillway.impl import end_of_value, members
from spillway.sinks.base import Result, reject
from spillway.source.wrapped import Row, object_parts, parts

MADE_BYTES = 256 << 10  # then the loop has a turn

_NO_ENRICHMENT = b',"enrichment":null'
_AS_IT_IS = (Output(None),)


@dataclass(frozen=True, slots=True)
class Steps:
    """What is done with the messages of one sink; None: nothing."""

    suffix: bytes  # closes a body into this sink's message, see spillway.change
    keeps_rows: bool  # a sink of rows or documents: a delete is by key, and passes filter and transform
    as_record: bool  # what is sent is the row, not the message around it
    # What functions make of a message is one in Sequin's format, of which the row may be sent; else it may be anything.
    keeps_form: bool = True
    reread: ByKeys | None = None
    enrich: ByKeys | None = None
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


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One of what a message has become. An empty body: the message as it is, where nothing but rows is read."""

    place: int
    message: Message
    body: bytes
    route: Route | None


class Making:
    """Of one sink. ``growth``: bytes of what functions make, for each byte of what they see, as far as is known."""

    def __init__(self, steps: Steps, *, in_order: bool) -> None:
        self.growth = 1.0
        self._steps = steps
        self._in_order = in_order

    async def convert(self, part: Part) -> None:
        """Timestamps as the sink wants them."""
        convert = self._steps.timestamps
        if convert is None:
            return
        made = 0
        for place, message in list(part.messages.items()):
            if message.action == "truncate":
                continue
            made = await _turn(made + message.body_bytes)
            try:
                part.messages[place] = await convert(message)
            except SpillwayError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a message holds costs that message alone
                part.decide(place, _defect(error))

    async def outgoing(self, part: Part) -> list[Outgoing]:
        """Asks the functions; notes what failed. In the order of the batch."""
        places = sorted(part.messages)
        if self._steps.only_rereads:
            return [Outgoing(place, part.messages[place], b"", None) for place in places]
        outcomes = await self._ask(part, [place for place in places if part.messages[place].action != "truncate"])
        outgoing: list[Outgoing] = []
        made = 0
        for place in sorted(part.messages):
            outcome = outcomes.pop(place, _AS_IT_IS)
            some = self._made(part, place, outcome)
            if isinstance(some, Result):
                part.decide(place, some)
            else:
                outgoing += some
                made = await _turn(made + sum(len(one.body) for one in some))
            part.enrichment.pop(place, None)
            part.lacking.pop(place, None)
        return outgoing

    def batch(self, outgoing: list[Outgoing]) -> Batch:
        """Lets go of the bodies as it goes."""
        if self._steps.only_rereads:
            return Batch.of([one.message for one in outgoing])
        pieces: list[Piece] = []
        some: list[Outgoing] = []
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

    async def _ask(self, part: Part, places: Sequence[int]) -> dict[int, Outcome]:
        functions = self._steps.functions
        if functions is None or not places:
            return {}
        deletes = [self._steps.keeps_rows and part.messages[place].action == "delete" for place in places]
        messages = [self._message(part, place) for place in places]
        said = await functions(messages, deletes, int(self.growth * sum(map(len, messages))))
        made = [sum(len(one.body or b"") for one in outcome) for outcome in said if not isinstance(outcome, Failure)]
        ratio = 1.25 * sum(made) / max(1, sum(map(len, messages[: len(said)])))
        self.growth = max(1.0, ratio, 0.75 * self.growth + 0.25 * ratio)
        # What there was no room for comes with the next part.
        part.put_off(dict.fromkeys(places[len(said) :], 0), in_order=self._in_order)
        return dict(zip(places, said, strict=False))

    def _made(self, part: Part, place: int, outcome: Outcome) -> list[Outgoing] | Result:
        if isinstance(outcome, Failure):
            return reject(outcome.reason, outcome.detail)
        try:
            routes = [None if one.route is None else self._steps.checked(one.route) for one in outcome]
        except ValueError as error:
            return reject("routing_failed", str(error))
        try:
            bodies = [self._body(part, place, one) for one in outcome]
        except Exception as error:  # noqa: BLE001 - whatever a message holds costs that message alone
            return _defect(error)
        message = part.messages[place]
        return [Outgoing(place, message, *one) for one in zip(bodies, routes, strict=True)]

    def _message(self, part: Part, place: int) -> bytes:
        """As Sequin has it: what functions see."""
        message, row = part.messages[place], part.enrichment.get(place)
        more = b"" if self._steps.metadata is None else self._steps.metadata(message)
        suffix = self._steps.suffix
        if row is None:
            return message.body + more + suffix
        after = suffix[len(_NO_ENRICHMENT) :]
        return b"".join([message.body, more, b',"enrichment":', *object_parts(row), after])

    def _body(self, part: Part, place: int, output: Output) -> bytes:
        message, steps = part.messages[place], self._steps
        if output.body is not None and not (steps.as_record and steps.keeps_form):
            return output.body
        if steps.envelope is not None and message.action != "truncate":
            return steps.envelope(message, self._message(part, place))
        if not steps.as_record:
            return self._message(part, place)
        row = part.enrichment.get(place)
        if row is not None:
            return _merged(_record(message, output), row)
        if place in part.lacking:
            return _with_nulls(_record(message, output), part.lacking[place])
        return _record(message, output)


def _record(message: Message, output: Output) -> bytes:
    if output.body is None:
        return message.record
    return output.body[RECORD_START : end_of_value(output.body, RECORD_START)]


def _merged(record: bytes, row: Row) -> bytes:
    """The record's columns and those of the enrichment, which wins."""
    merged = dict(members(record))
    del record  # it may be large
    merged.update((orjson.dumps(name), value) for name, value in row.items())
    return b"".join(parts(merged.items()))


def _with_nulls(record: bytes, columns: Sequence[str]) -> bytes:
    """The record's columns, and these, as far as it has no value of its own for them."""
    merged = {orjson.dumps(name): b"null" for name in columns}
    merged.update(members(record))
    return b"".join(parts(merged.items()))


async def _turn(made: int) -> int:
    """Bytes that were made since others had a turn of the loop: they have one when it is much."""
    if made <= MADE_BYTES:
        return made
    await asyncio.sleep(0)
    return 0


def _defect(error: Exception) -> Result:
    return reject("shaping_failed", f"{type(error).__name__}: {error}")
