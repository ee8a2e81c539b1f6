"""The window of a sink: what it holds in memory, in which order it may be sent, and how far its watermark is.

Pure: no clock, no store, no task. `spillway.flow.delivery` drives it and owns the credit.

Two orders meet here.

*The watermark* follows positions. ``_open`` holds, in position order, every message that is neither resolved nor
known to be durable; its first one is what keeps the slot from being confirmed (I1).

*Sending* follows keys (I3). For keyed sinks a key is **busy** from the moment a message of it is admitted until that
message is released; later ones of the key wait in its line. A message is **ready** when it is the head of all its
keys. A message with two keys (an event that changes its key) stands in both lines. Sinks that apply their batches in
order, one at a time, need no lines: for them all messages are ready in the order of arrival.

A message leaves by `release` (its successors become ready), or is evicted: dropped from memory because it is in the
store. Release comes only after the removal of its row has *committed*; until then its key stays busy, so that nothing
later of the key can be sent and confirmed while a crash would bring the earlier one back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from spillway.change import Message

_Line = deque[Message]

ENCODED_OVERHEAD_BYTES = 512


class Window:
    def __init__(self, *, keyed: bool, supersedes: bool, passed: Callable[[Message], None] = lambda _: None) -> None:
        self._passed = passed  # told of each message that the watermark passes
        self._keyed = keyed
        self._supersedes = supersedes
        self._open: deque[Message] = deque()
        self._ready: deque[Message] = deque()
        self._lines: dict[str, _Line | None] = {}  # busy keys -> who waits
        self._flying: dict[int, Message] = {}  # by identity
        self._two_keyed = 0  # messages with two keys in memory: while there are none, parking a key is cheap
        self.waiting = 0  # admitted, not in flight

    # -- the watermark ----------------------------------------------------------------------------------------------
    def track(self, messages: Iterable[Message]) -> None:
        """Messages in position order that are open from now on, whether admitted or on their way to the store."""
        self._open.extend(messages)

    def first_open(self) -> Message | None:
        """The oldest message that is neither resolved nor durable."""
        while self._open and self._open[0].done:
            message = self._open.popleft()
            message.passed = True
            self._passed(message)
        return self._open[0] if self._open else None

    def unwritten(self) -> list[Message]:
        """Everything open that is neither in the store nor on its way there, in position order."""
        return [m for m in self._open if not m.done and m.row == 0]

    # -- sending ----------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return bool(self._ready)

    @property
    def flying(self) -> int:
        return len(self._flying)

    def busy(self, keys: tuple[str, ...]) -> bool:
        return any(key in self._lines for key in keys)

    def admit(self, message: Message) -> None:
        """Take a message into memory, behind everything of its keys that is here already."""
        self.waiting += 1
        if self._keyed and message.keys:
            if len(message.keys) > 1:
                self._two_keyed += 1
            message.waits = 0
            for key in message.keys:
                line = self._lines.get(key, _FREE)
                if line is _FREE:
                    self._lines[key] = None
                    continue
                if line is None:
                    line = self._lines[key] = deque()
                line.append(message)
                message.waits += 1
            if message.waits:
                return
        self._ready.append(message)

    def take(self, max_messages: int, max_bytes: int, encode_bytes: int) -> list[Message]:
        """The next batch. They are in flight until `release` or `put_back`.

        ``max_bytes`` counts bodies; the first message is taken whatever its size. ``encode_bytes`` is the credit there
        is for encoding those that have none of their own (see `encoded_cost`): without it nothing of them is taken.
        """
        batch: list[Message] = []
        size = 0
        while self._ready and len(batch) < max_messages:
            message = self._ready[0]
            size += len(message.change.body)
            if batch and size > max_bytes:
                break
            if not message.credit:
                encode_bytes -= encoded_cost(message)
                if encode_bytes < 0:
                    break
            self._ready.popleft()
            if self._supersedes and len(message.keys) == 1:
                message = self._newest(message)
            batch.append(message)
            self._flying[id(message)] = message
        self.waiting -= len(batch)
        return batch

    @property
    def ready_count(self) -> int:
        return len(self._ready)

    def flying_rows(self) -> list[int]:
        """The rows of everything in flight, superseded ones included."""
        return [one.row for one in with_superseded(self._flying.values()) if one.row > 0]

    def fly(self, message: Message) -> None:
        """Admit a message that is sent at once (a probe, a retry); its keys are free."""
        self.admit(message)
        taken = self._ready.pop()
        assert taken is message, "a message that flies at once has no one before it"
        self.waiting -= 1
        self._flying[id(message)] = message

    def put_back(self, batch: Iterable[Message]) -> None:
        """The sink was down: these are ready again, before everything else, in their order."""
        back = list(batch)
        for message in back:
            self._flying.pop(id(message))
            self.waiting += 1
        self._ready.extendleft(reversed(back))

    def release(self, message: Message) -> None:
        """The message is resolved, or parked in the committed store; its keys go to their next."""
        self._flying.pop(id(message), None)
        if not (self._keyed and message.keys):
            return
        if len(message.keys) > 1:
            self._two_keyed -= 1
        for key in message.keys:
            line = self._lines[key]
            if not line:
                del self._lines[key]
                continue
            successor = line.popleft()
            successor.waits -= 1
            if not successor.waits:
                self._ready.appendleft(successor)

    def rows(self) -> list[int]:
        """The rows of everything in memory."""
        waiting = {m.row for m in self._ready if m.row > 0}
        for line in self._lines.values():
            waiting.update(m.row for m in line or () if m.row > 0)
        return [*waiting, *self.flying_rows()]

    # -- leaving memory ---------------------------------------------------------------------------------------------
    def evict(self) -> list[Message]:
        """Drop everything that is not in flight; all of it is in the store. Returns what was dropped."""
        dropped = with_superseded(self._ready)
        seen = {id(m) for m in dropped}
        for line in self._lines.values():
            for message in line or ():
                if id(message) not in seen:  # one with two keys stands in two lines
                    seen.add(id(message))
                    dropped.append(message)
        self._ready.clear()
        self._lines = {key: None for message in self._flying.values() for key in message.keys} if self._keyed else {}
        self._two_keyed = sum(len(m.keys) > 1 for m in self._flying.values())
        self.waiting = 0
        return dropped

    def behind(self, parked: Iterable[Message]) -> tuple[set[str], dict[int, Message]]:
        """If the keys of these messages, which are in flight, are parked: all keys that are then parked, and what is
        not in flight and has one of them. A message with two keys that stands behind one blocks the other, too."""
        keys = {key for message in parked for key in message.keys}
        dropped: dict[int, Message] = {}
        if self._keyed and not self._two_keyed:
            for key in keys:
                dropped.update((id(m), m) for m in self._lines.get(key) or ())
            return keys, dropped
        held = {id(m): m for m in self._ready}
        for line in self._lines.values():
            held.update((id(m), m) for m in line or ())
        for message in sorted(held.values(), key=lambda m: m.position):
            if not keys.isdisjoint(message.keys):
                keys.update(message.keys)
                dropped[id(message)] = message
        return keys, dropped

    def drop_behind(self, parked: Iterable[Message]) -> list[Message]:
        """The keys of these messages are parked: what is `behind` leaves memory. Returns what was dropped."""
        dropped = self.behind(parked)[1]
        if not dropped:
            return []
        self.waiting -= len(dropped)
        self._ready = deque(m for m in self._ready if id(m) not in dropped)
        for key, line in list(self._lines.items()):
            if line:
                self._lines[key] = deque(m for m in line if id(m) not in dropped)
        for message in dropped.values():
            if len(message.keys) > 1:
                self._two_keyed -= 1
            for key in message.keys:
                # It was the head of this key (it waited at the other one): the key has no head any more.
                if self._keyed and not self._lines.get(key) and not self._heads(key):
                    self._lines.pop(key, None)
        return with_superseded(dropped.values())

    def _heads(self, key: str) -> bool:
        """Whether anything in memory still has this key."""
        if any(key in m.keys for m in self._flying.values()) or any(key in m.keys for m in self._ready):
            return True
        return any(key in m.keys for line in self._lines.values() for m in line or ())

    def _newest(self, message: Message) -> Message:
        """Of a state: the last whole image or delete in the line of the key is sent in place of all before it."""
        line = self._lines[message.keys[0]]
        if not line:
            return message
        last = -1
        for index, later in enumerate(line):
            if len(later.keys) != 1:
                break
            if later.change.whole or later.change.action == "delete":
                last = index
        if last < 0:
            return message
        newest = line[last]
        newest.waits = 0
        before = [message, *(line.popleft() for _ in range(last + 1))][:-1]
        newest.superseded = with_superseded(before)
        self.waiting -= last + 1
        return newest


def with_superseded(messages: Iterable[Message]) -> list[Message]:
    """The messages, each behind those it supersedes."""
    return [one for m in messages for one in (*(m.superseded or ()), m)]


def encoded_cost(message: Message) -> int:
    """Credit for the place of a message in a request, and its answer."""
    return len(message.change.body) + ENCODED_OVERHEAD_BYTES


_FREE: _Line = deque()  # stands for "not busy" in look-ups
