"""The contract of a sink's functions, and of what they make of messages.

A sink has at most one filter, one routing function and one transform. Each message of a batch passes them in the order
of Sequin: filter, routing, transform; each sees the message as it came. What came of a message is an `Outcome`:

- a tuple of `Output`: what is sent instead of it, in this order; empty: nothing is (it was filtered, or dropped);
- a `Failure`: this message alone has failed (an exception, a result that is none, the time limit, the worker's end).

``functions(messages, deletes)`` gives one outcome per message, in order, whatever user code does: an endless loop, a
huge result, a crash of the worker cost their message and nothing else. It raises `SpillwayError` only for what concerns
the functions as a whole (the worker cannot be started, user code cannot be loaded): the sink is down then.

**Bounded.** With ``answer_bytes`` the outcomes may be fewer than the messages: those of the first ones, at least one,
and no more once their bytes have reached that, or some seconds have passed. The caller asks for the rest when it can.
What may come of one message is limited by the sink's ``result_bytes``.

Of a state sink's delete (``deletes``) neither filter nor transform is asked: a document that may be there goes. Routing
is asked: it says where the document is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spillway.chunk import Route


@dataclass(frozen=True, slots=True)
class Output:
    body: bytes | None  # JSON on one line; None: the message as it came
    route: Mapping[str, object] | None = None  # as the routing function gave it, not yet checked


@dataclass(frozen=True, slots=True)
class Failure:
    reason: str  # short and stable: filter_failed, routing_failed, transform_failed, function_timeout, ...
    detail: str  # for people: the exception and where it was raised


Outcome = tuple[Output, ...] | Failure


class Functions(Protocol):
    async def __call__(
        self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
    ) -> Sequence[Outcome]: ...

    async def open(self) -> None:
        """Start what it needs, load user code: else the first call does. Raises `SpillwayError` as that would."""

    async def close(self) -> None: ...


__all__ = ["Failure", "Functions", "Outcome", "Output", "Route"]
