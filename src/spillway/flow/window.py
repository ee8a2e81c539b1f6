"""The window of a sink: what it holds in memory, in which order it may be sent, and how far its watermark is.

Pure: no clock, no store, no task. `spillway.flow.delivery` drives it and owns the credit.

It holds spans (spillway.chunk), and pieces of them. While nothing stands in the way a piece goes from the queue into a
batch and out again as a whole: what is done per message is what sets do with the hashes of its keys.

Two orders meet here.

*The watermark* follows positions. ``_open`` holds, in position order, every span of which something is neither resolved
nor known to be durable; its first one is what keeps the slot from being confirmed (I1).

*Sending* follows keys (I3). For keyed sinks a key is **busy** from the moment a message of it is taken, or waits in
line, until that message is released. ``_fresh`` is what nobody has looked at yet, in position order. `take` looks at
it: a message whose keys are free is taken; one that meets a busy key goes into the line of that key, and its successor
is ready when the key is released (``_claimed``: it owns its keys already). A message with two keys (an event that
changes its key) stands in both lines, and holds the key whose head it is while it waits at the other. Sinks that apply
their batches in order, one at a time, need no lines: for them all messages are ready in the order of arrival.

Keys are known here by their hashes: two that share one only wait for each other. Whether a message may stand for
another (`_supersede`) is judged by the texts.

A message leaves by `release` (its successors become ready), or is evicted: dropped from memory because it is in the
store. Release comes only after its removal from the store has *committed*; until then its key stays busy, so that
nothing later of the key can be sent and confirmed while a crash would bring the earlier one back.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from spillway.change import ACTIONS
from spillway.chunk import ACTION, FLAGS, NOT_STORED, WHOLE, Batch, Keying, Message, Piece, Span

Place = tuple[Span, int]

ENCODED_OVERHEAD_BYTES = 512

_TRUNCATE = ACTIONS.index("truncate")
SUPERSEDED_AT_ONCE = 512  # so far a line is looked at for a newer image, whatever its length


class Window:
    def __init__(self, *, keyed: bool, supersedes: bool) -> None:
        self._keyed = keyed
        self._supersedes = supersedes
        self._open: deque[Span] = deque()
        self._claimed: deque[Piece] = deque()
        self._fresh: deque[Piece] = deque()
        self._busy: set[int] = set()
        self._lines: dict[int, deque[Place]] = {}  # of busy keys: who waits
        self._waits: dict[Place, int] = {}  # of messages with two keys that wait: in how many lines
        self._flying: dict[int, Batch] = {}  # by identity
        self.waiting = 0  # admitted, not in flight
        self.ready_count = 0  # of these: not in a line

    # -- the watermark ----------------------------------------------------------------------------------------------
    def track(self, span: Span) -> None:
        """A span, in position order, that is open from now on, whether admitted or on its way to the store."""
        self._open.append(span)

    def first_open(self) -> Span | None:
        """The oldest span that has something neither resolved nor durable."""
        while self._open and (self._open[0].left == 0 or self._open[0].durable):
            self._open.popleft()
        return self._open[0] if self._open else None

    def unwritten(self) -> list[Span]:
        """Everything open that is neither in the store nor on its way there, in position order."""
        return [span for span in self._open if span.base == NOT_STORED and span.left]

    # -- sending ----------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return bool(self._claimed or self._fresh)

    @property
    def flying(self) -> int:
        return sum(len(batch) for batch in self._flying.values())

    def free(self, messages: Sequence[Message]) -> list[Message]:
        """Those of which no key is in memory, nor that of one before them."""
        taken = set(self._busy)
        for span, start, stop in chain(self._fresh, () if self._keyed else self._unlined()):
            taken.update(span.hashes[start:stop], span.moved.values())
        free: list[Message] = []
        for message in messages:
            keys = _hashes(message.span, message.place)
            if taken.isdisjoint(keys):
                free.append(message)
                taken.update(keys)
        return free

    def _unlined(self) -> Iterator[Piece]:
        """What is in memory of a sink without lines, which keeps no key busy, beside what is fresh."""
        yield from self._claimed
        for batch in self._flying.values():
            yield from batch.pieces

    def truncates(self) -> list[Message]:
        """Those in memory, waiting or in flight, of a sink without lines."""
        found: list[Message] = []
        for span, start, stop in chain(self._fresh, self._unlined()):
            actions = span.byte_column(ACTION, start, stop)
            if _TRUNCATE in actions:
                found += [Message(span, place) for place, action in enumerate(actions, start) if action == _TRUNCATE]
        return found

    def admit(self, span: Span, start: int, stop: int) -> None:
        """Take a piece into memory, behind everything that is here already."""
        self._fresh.append((span, start, stop))
        self.waiting += stop - start
        self.ready_count += stop - start
        span.held += stop - start

    def take(self, max_messages: int, max_bytes: int, encode_bytes: int) -> Batch | None:
        """The next batch, in flight until `release` or `put_back`.

        ``max_bytes`` counts bodies; the first message is taken whatever its size. ``encode_bytes`` is the credit there
        is for encoding those that have none of their own (see `encoded_cost`): without it nothing of them is taken.
        """
        room = _Room(max_messages, max_bytes, encode_bytes)
        pieces: list[Piece] = []
        while self._claimed and room.messages:
            span, start, stop = self._claimed.popleft()
            end = room.fit(span, start, stop)
            if end > start:
                pieces.append((span, start, end))
                self.ready_count -= end - start
            if end < stop:
                self._claimed.appendleft((span, end, stop))
                break
        else:
            while self._fresh and room.messages:
                if not self._take_fresh(room, pieces):
                    break
        if not pieces:
            return None
        self.waiting -= sum([stop - start for _, start, stop in pieces])
        batch = Batch(pieces)
        if self._supersedes and self._lines:
            batch = self._supersede(batch)
        self._flying[id(batch)] = batch
        return batch

    def _take_fresh(self, room: _Room, pieces: list[Piece]) -> bool:
        """From the first fresh piece into the batch; False: what is next does not fit it."""
        span, start, stop = self._fresh.popleft()
        end = room.fit(span, start, stop)
        if end == start:
            self._fresh.appendleft((span, start, stop))
            return False
        if end < stop:
            self._fresh.appendleft((span, end, stop))
        self.ready_count -= end - start
        if not self._keyed or span.keying == Keying.UNGROUPED:
            pieces.append((span, start, end))
            return True
        part = span.hashes[start:end]
        keys = set(part)
        if len(keys) == len(part) and 0 not in keys and not span.moved and self._busy.isdisjoint(keys):
            self._busy |= keys
            pieces.append((span, start, end))
            return True
        for place in range(start, end):
            if self._claim(span, place):
                _append(pieces, span, place)
            else:
                room.give(span, place)
        return True

    def _claim(self, span: Span, place: int) -> bool:
        """Whether all keys of a fresh message are free, and its own now; else it waits in line where they are not."""
        waits = 0
        for key in _hashes(span, place):
            if key in self._busy:
                self._lines.setdefault(key, deque()).append((span, place))
                waits += 1
            else:
                self._busy.add(key)
        if waits and place in span.moved:
            self._waits[span, place] = waits
        return not waits

    def fly(self, messages: Sequence[Message]) -> Batch:
        """Admit messages that are sent at once (a probe, retries), and what they supersede. Their keys are `free`."""
        for message in messages:
            for one in (*(message.superseded or ()), message):
                one.span.held += 1
            if self._keyed:
                self._busy.update(_hashes(message.span, message.place))
        batch = Batch.of(messages)
        self._flying[id(batch)] = batch
        return batch

    def divide(self, batch: Batch, parts: Iterable[Batch]) -> None:
        """What is in flight as one batch is settled in parts."""
        del self._flying[id(batch)]
        for part in parts:
            self._flying[id(part)] = part

    def put_back(self, batch: Batch) -> None:
        """The sink was down: these are ready again, before everything else, in their order."""
        del self._flying[id(batch)]
        pieces: list[Piece] = []
        superseded = batch.superseded
        if not superseded:
            pieces.extend(batch.pieces)
        for message in batch.messages if superseded else ():
            behind = [*(message.superseded or ()), message]
            first = behind.pop(0)
            if behind:  # they stand in line again, before those who came later
                (key,) = _hashes(first.span, first.place)
                self._lines.setdefault(key, deque()).extendleft((m.span, m.place) for m in reversed(behind))
            pieces.append((first.span, first.place, first.place + 1))
        self._claimed.extendleft(reversed(pieces))
        self.waiting += len(batch) + len(superseded)
        self.ready_count += len(batch)

    def release(self, batch: Batch) -> None:
        """They are resolved, or parked in the committed store; their keys go to the next."""
        del self._flying[id(batch)]
        if not self._keyed:
            return
        for span, start, stop in batch.pieces:
            if span.keying == Keying.UNGROUPED:
                continue
            if not self._lines and not span.moved:
                self._busy.difference_update(span.hashes[start:stop])
                continue
            for place in range(start, stop):
                for key in _hashes(span, place):
                    self._release(key)

    def _release(self, key: int) -> None:
        line = self._lines.get(key)
        if not line:
            self._busy.discard(key)
            return
        span, place = line.popleft()
        if not line:
            del self._lines[key]
        waits = self._waits.pop((span, place), 1) - 1
        if waits:
            self._waits[span, place] = waits
        else:
            self._claimed.appendleft((span, place, place + 1))
            self.ready_count += 1

    def flying_batches(self) -> list[Batch]:
        return list(self._flying.values())

    def flying_rows(self) -> set[int]:
        """The rows of everything in flight, superseded ones included."""
        rows: set[int] = set()
        for batch in self._flying.values():
            for span, start, stop in batch.pieces:
                rows.update(_rows(span, start, stop))
            rows.update(m.row for m in batch.superseded if m.row > 0)
        return rows

    def rows(self) -> set[int]:
        """The rows of everything in memory."""
        rows = self.flying_rows()
        for span, start, stop in self._waiting():
            rows.update(_rows(span, start, stop))
        return rows

    # -- leaving memory ---------------------------------------------------------------------------------------------
    def evict(self) -> list[Piece]:
        """Drop everything that is not in flight; all of it is in the store. Returns what was dropped."""
        dropped = list(self._waiting())
        self._claimed.clear()
        self._fresh.clear()
        self._lines.clear()
        self._waits.clear()
        self._busy.clear()
        if self._keyed:
            for batch in self._flying.values():
                for span, start, stop in batch.pieces:
                    self._busy.update(span.hashes[start:stop])
                    self._busy.update(was for place, was in span.moved.items() if start <= place < stop)
            self._busy.discard(0)
        self.waiting = self.ready_count = 0
        return dropped

    def drop_behind(self, parked: Iterable[Message]) -> tuple[set[str], list[Message]]:
        """The keys of these messages, which are in flight, are being parked: what else of them is here leaves memory,
        to be held. Returns all keys that are then parked, and what was dropped, in position order. A message with two
        keys that stands behind one of them blocks the other, too."""
        keys = {key for message in parked for key in message.keys}
        dropped: list[Message] = []
        hashes = self._linked({key for message in parked for key in _hashes(message.span, message.place)})
        for span, place in sorted(self._candidates(hashes), key=_position):
            own = span.keys(place)
            if not keys.isdisjoint(own):
                keys.update(own)
                dropped.append(Message(span, place))
        if dropped:
            self._remove([(m.span, m.place) for m in dropped])
        return keys, dropped

    def _linked(self, hashes: set[int]) -> set[int]:
        """These, and all that they may block: messages with two keys pass it on from one to the other."""
        pairs = [_hashes(*ref) for ref in self._waits]
        for span in {span for span, _, _ in chain(self._claimed, self._fresh)}:
            pairs += [_hashes(span, place) for place in span.moved]
        others: dict[int, list[int]] = {}
        for pair in pairs:
            for key in pair:
                others.setdefault(key, []).extend(pair)
        found = set(hashes)
        to_follow = list(hashes)
        while to_follow:
            new = set(others.get(to_follow.pop(), ())) - found
            found |= new
            to_follow += new
        return found

    def _candidates(self, hashes: set[int]) -> set[Place]:
        """What waits and has one of these hashes, which are `_linked`."""
        found = {ref for key in hashes for ref in self._lines.get(key, ())}
        # What is claimed, too: of a sink without lines, what was put back may be behind anything that is parked.
        for span, start, stop in chain(self._claimed, self._fresh):
            if not hashes.isdisjoint(span.hashes[start:stop]):
                found.update((span, place) for place in range(start, stop) if span.hashes[place] in hashes)
        return found

    def _remove(self, dropped: Sequence[Place]) -> None:
        """Of what waits; in position order. Who stands behind one of them, and is not dropped, has another key of the
        same hash: it goes on if that was the owner."""
        gone = set(dropped)
        places: dict[Span, list[int]] = {}
        in_line: dict[Place, set[int]] = {}  # in the lines of which hashes it was
        hashes: dict[int, None] = {}  # of all, in order
        for span, place in dropped:
            places.setdefault(span, []).append(place)
            hashes.update(dict.fromkeys(_hashes(span, place)))
        for key in hashes:
            line = self._lines.pop(key, ())
            left = deque(ref for ref in line if ref not in gone)
            if left:
                self._lines[key] = left
            if len(left) < len(line):
                for ref in gone.intersection(line):
                    in_line.setdefault(ref, set()).add(key)
        self.waiting -= len(dropped)
        self.ready_count -= len(dropped) - len(in_line)
        self._claimed = _without(self._claimed, places)
        self._fresh = _without(self._fresh, places)
        for ref in dropped:
            if self._waits.pop(ref, 0):
                for key in _hashes(*ref):
                    if key not in in_line[ref]:  # it was the head of that key while it waited at the other
                        self._release(key)

    def _waiting(self) -> Iterator[Piece]:
        """Everything that is not in flight."""
        yield from self._claimed
        yield from self._fresh
        seen: set[Place] = set()
        for line in self._lines.values():
            for span, place in line:
                if (span, place) not in seen:
                    if place in span.moved:
                        seen.add((span, place))
                    yield (span, place, place + 1)

    def _supersede(self, batch: Batch) -> Batch:
        """Of a state: the last whole image or delete in the line of a key is sent in place of all before it."""
        messages = batch.messages
        for at, message in enumerate(messages):
            for key in _hashes(message.span, message.place):
                line = self._lines.get(key)
                if line:
                    messages[at] = self._newest(message, key, line)
        if any(m.superseded for m in messages):
            return Batch.of(messages)
        return batch

    def _newest(self, message: Message, key: int, line: deque[Place]) -> Message:
        ahead = list(islice(line, SUPERSEDED_AT_ONCE))
        last = next((at for at in reversed(range(len(ahead))) if _stands_alone(*ahead[at])), -1)
        text = _key_text(message.span, message.place)
        if last < 0 or any(_key_text(*ref) != text for ref in ahead[: last + 1]):  # other keys may share the hash
            return message
        newest = Message(*ahead[last])
        newest.superseded = [message, *(Message(*ref) for ref in ahead[:last])]
        for _ in range(last + 1):
            line.popleft()
        if not line:
            del self._lines[key]
        self.waiting -= last + 1
        return newest


class _Room:
    """What a batch may still take."""

    def __init__(self, messages: int, max_bytes: int, encode_bytes: int) -> None:
        self.messages = messages
        self._bytes = max_bytes
        self._encode_bytes = encode_bytes
        self._taken = 0

    def fit(self, span: Span, start: int, stop: int) -> int:
        """Up to where a piece fits; that is taken."""
        end = min(stop, start + self.messages)
        before = span.ends[start - 1] if start else 0
        end = bisect_right(span.ends, before + self._bytes, start, end)
        if end == start and not self._taken:
            end = start + 1
        if not span.credit:
            while end > start and span.bytes_between(start, end) + ENCODED_OVERHEAD_BYTES * (end - start) > (
                self._encode_bytes
            ):
                end = start + (end - start) // 2
            self._encode_bytes -= span.bytes_between(start, end) + ENCODED_OVERHEAD_BYTES * (end - start)
        self.messages -= end - start
        self._bytes -= span.bytes_between(start, end)
        self._taken += end - start
        return end

    def give(self, span: Span, place: int) -> None:
        """A message that was taken room for waits in line instead."""
        size = span.bytes_between(place, place + 1)
        self.messages += 1
        self._taken -= 1
        self._bytes += size
        if not span.credit:
            self._encode_bytes += size + ENCODED_OVERHEAD_BYTES


def encoded_cost(batch: Batch) -> int:
    """Credit for the places of messages in a request, and their answers; what was read back has it already."""
    return sum(
        span.bytes_between(start, stop) + ENCODED_OVERHEAD_BYTES * (stop - start)
        for span, start, stop in batch.pieces
        if not span.credit
    )


def _hashes(span: Span, place: int) -> tuple[int, ...]:
    key = span.hashes[place]
    was = span.moved.get(place, 0)
    if was and was != key:
        return (was, key) if key else (was,)
    return (key,) if key else ()


def _rows(span: Span, start: int, stop: int) -> Iterable[int]:
    if span.base <= 0:
        return ()
    if span.numbers is None:
        return range(span.base | start, span.base | stop)
    return [span.base | number for number in span.numbers[start:stop] if number >= 0]


def _position(ref: Place) -> tuple[int, int, int]:
    return ref[0].position(ref[1])


def _append(pieces: list[Piece], span: Span, place: int) -> None:
    if pieces and pieces[-1][0] is span and pieces[-1][2] == place:
        pieces[-1] = (span, pieces[-1][1], place + 1)
    else:
        pieces.append((span, place, place + 1))


def _without(pieces: deque[Piece], places: Mapping[Span, Sequence[int]]) -> deque[Piece]:
    """The pieces, cut where these places are, which rise."""
    left: deque[Piece] = deque()
    for span, start, stop in pieces:
        out = places.get(span, ())
        for place in out[bisect_left(out, start) : bisect_left(out, stop)]:
            if place > start:
                left.append((span, start, place))
            start = place + 1  # noqa: PLW2901 - what is left of the piece
        if stop > start:
            left.append((span, start, stop))
    return left


def _key_text(span: Span, place: int) -> bytes:
    """Of a message of a state, which has no more than one key."""
    return span.chunk.key_texts(span.indices[place])[0]


def _stands_alone(span: Span, place: int) -> bool:
    """A whole image, or a delete, which is always whole."""
    return bool(span.chunk.byte(span.indices[place], FLAGS) & WHOLE)
