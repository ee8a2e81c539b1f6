"""The contract of a store: where messages wait that memory does not hold.

Per sink: waiting messages in position order; the parked keys, with attempts, due time and last reason of their head;
dead letters; the position; counters. Plus, per slot, the identity of the history all this belongs to (I9).

**Two homes, one truth.** A message is *waiting* in the store from the commit of its ``Write`` until the commit that
resolves it. Waiting messages are in one of two places:

- the *queue*: spans (spillway.chunk), each a row of its own with the columns of its chunk, in position order, read in
  pages from a cursor. What of a span is gone is a bit per message; a span of which all is gone is removed. Nothing is
  looked up, indexed or moved per message of the queue.
- the *lane* of a parked key: single messages, held. Only the head of a lane may be sent, when it is due, and only if it
  is the head of every lane it is in (an event that changes its key is in two). The others follow one at a time, in
  position order.

Rows. A message's row is ``base | number`` (`spillway.chunk.Span`): ``base`` is that of its span in the queue, and the
row stays the same when the message goes to a lane. Row numbers rise with position within a sink (those of revived dead
letters aside, which are never in the queue). A row never goes from a lane back to the queue.

**Who holds.** What is parked is decided by the caller, never by the store: a `Park` takes its message out of the queue
into the lanes of its keys, and ``hold`` names the messages of parked keys that must follow. What of a parked key is in
the queue, unread, stays there: the caller holds it when it reads it (`parked` tells it which keys are), and reads the
queue in order, so that of any key a lane gets its rows in position order. When the head of a lane is resolved, the next
row becomes the head, due at once, with no attempts; an empty lane is no longer parked. What is held for a key that is
not parked (any more) parks it, due at once.

The head of a lane has earlier rows of its keys in the queue only if it is in two lanes or was revived; such a head is
``waits_for`` its own row: it is due only when the caller says that it has read the queue beyond that
(``read_up_to``), or nothing of the queue before it is unread. What the caller has read and not sent it knows by itself:
it keeps the keys of what it has in memory busy until the removal has committed. So nothing of a key is ever sent past
an earlier row, whatever home that has.

A message without keys is its own lane when it is parked: under a private key, ``public.jobs:\\#17``, that begins with
its table's prefix. It is read back without keys.

**The position of a sink covers its rows.** Every ``Write`` that puts spans for a sink puts *every* unresolved message
of that sink up to ``position`` that is not in the store yet, in position order. So rows are only ever appended, rows
above the position do not exist, and a restart that reads the slot again skips what is at or below it: nothing is stored
twice, nothing that was resolved from the store is sent again by the slot.

**Commits.** ``write`` may be called many times without waiting; writes commit in the order of the calls (group
commit: all that is queued goes into one transaction), each whole or not at all. A future resolves after the commit is
on disk (fsync returned). Therefore what is on disk is always a prefix of what was asked. A write that fails for any
reason but a full disk ends the process (`StoreFailed` through ``failed``): after a failed fsync nothing is known.

**Reads** never see uncommitted rows, run beside writes, and read at most the rows they return plus a constant number
(I5). No read of the stream loads a body that does not fit ``max_bytes``: the caller asks `bytes_at_head` or `bytes_due`
first, and takes its credit by that. What people ask for, and `newest`, is read on a connection of its own; what is
asked by key may scan the key texts of the queue, never its bodies. It may take long, and one such read waits for
another: a caller on an event loop has it done by `ask`, so that no thread that the stream's reads need stands there.

**Backfills.** What is to be known of a backfill (where it stands, among others) is a document of a few kilobytes that
the store does not look into, by sink and id; a `Write` replaces it. Of those that have ended the last hundred of a sink
stay.

**Refreshes.** Rows whose documents are to be made anew are kept by sink, table and key until somebody says that it is
done (spillway.store.refreshes): each once, however often it is asked for.

**Start.** ``open_sink`` reads one row. Due times are void after a restart: all parked keys are due at once, without
touching them (a row's due time carries the number of the run that wrote it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from spillway.chunk import Message, Piece, Span
from spillway.position import Position

if TYPE_CHECKING:
    from spillway.store.compact import Compaction

P = ParamSpec("P")
T = TypeVar("T")

EVERYTHING = ""  # the key of a due refresh of all rows of its table


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose history the state belongs to (I9). ``mark``: no position above it was ever confirmed."""

    system_id: str
    timeline: int
    slot: str
    epoch: int
    mark: int


@dataclass(frozen=True, slots=True)
class TakenTable:
    """The name by which changes of a table go; ``partition``: it is one, and that is the name of its root."""

    schema: str
    table: str
    partition: bool = False

    @property
    def name(self) -> tuple[str, str]:
        return self.schema, self.table


@dataclass(slots=True)
class Counters:
    """Of one sink, exact at every commit. Waiting: everything durable and unresolved, in the queue or in lanes."""

    messages: int = 0
    bytes: int = 0
    queued: int = 0  # of messages: in the queue, not in a lane
    parked_keys: int = 0
    dead_letters: int = 0
    refreshes: int = 0  # due


@dataclass(frozen=True, slots=True)
class SinkState:
    """What ``open_sink`` finds. ``position`` is None for a sink the store has never seen."""

    position: Position | None
    paused: bool | None  # what `sinks pause|resume` said last; None: nothing yet
    gap: Gap | None
    counters: Counters


@dataclass(frozen=True, slots=True)
class Gap:
    """What a sink missed: transactions from ``first_lsn`` (perhaps in part) to ``last_lsn``; None: it is growing."""

    first_lsn: int
    last_lsn: int | None
    since: float  # wall seconds
    reason: str
    tables: tuple[tuple[str, str], ...] | None = None  # those of which something was missed; None: not known


@dataclass(frozen=True, slots=True)
class Park:
    """The head of a key (of all its keys) failed: they are parked until ``due_seconds`` from now.

    ``message`` is in the queue, put by this or an earlier Write, committed or not, and goes to its lanes; or it is the
    head of its lanes already (a failed retry). If its row is gone (discarded meanwhile) nothing happens.
    """

    message: Message
    reason: str
    detail: str
    due_seconds: float
    counts_attempt: bool = True


@dataclass(frozen=True, slots=True)
class Write:
    """One atomic change of one sink's state. Applied in the order of the fields. An empty one asks for the counters.

    What is to be resolved, parked, held or buried may have been put by an earlier Write that has not committed yet;
    rows that are gone already are passed over.
    """

    sink: str
    # Of each span what is not resolved by the time of the call; it gets its ``base`` (and ``numbers``) on commit.
    put: Sequence[Span] = ()
    position: Position | None = None  # never below the stored one; required with put, whose messages are up to it
    resolved: Sequence[Piece] = ()  # of the queue, to remove
    resolved_held: Sequence[Message] = ()  # of lanes, to remove; lanes advance
    superseded_by: Sequence[Message] = ()  # of these lanes, with one key each, what waits before them goes, too
    park: Sequence[Park] = ()
    hold: Sequence[Message] = ()  # of the queue, to their lanes, in position order
    bury: Sequence[Park] = ()  # of the queue or the heads of lanes -> dead letters; lanes advance
    # dead letter (its row) -> the last of its lanes, as this message, with a row of its own; due at once when nothing
    # of its keys is before it
    revive: Sequence[tuple[int, Message]] = ()
    unbury: Sequence[int] = ()  # dead letters (their rows) that are no more
    drop_table_below: tuple[str, str, Position] | None = None  # TRUNCATE: schema, table, position: what waits below it
    paused: bool | None = None
    gap: Gap | None = None
    clear_gap: bool = False
    backfill: BackfillDocument | None = None
    ask: AskedRefreshes | None = None
    refreshed: Sequence[DueRefresh] = ()  # done; those that were asked for again since they were read stay due


@dataclass(frozen=True, slots=True)
class BackfillDocument:
    """What is to be known of a backfill from this commit on. ``forgotten``: it leaves no trace (``document`` counts for
    nothing)."""

    id: str
    document: bytes
    ended: bool
    forgotten: bool = False


@dataclass(frozen=True, slots=True)
class AskedRefreshes:
    """Rows of a table (schema, name) whose documents are to be made anew, by keys of `spillway.change.make_key`."""

    table: tuple[str, str]
    keys: Sequence[str]


@dataclass(frozen=True, slots=True)
class DueRefresh:
    """See spillway.store.refreshes."""

    table: tuple[str, str]
    key: str
    place: int
    number: int
    since: float  # wall seconds


@dataclass(frozen=True, slots=True)
class Written:
    """What a Write did, after its commit: the sink's counters as of the end of this Write."""

    counters: Counters


@dataclass(frozen=True, slots=True)
class LaneHead:
    """A parked key whose head may be sent: the message with its body, and how often it has been tried."""

    message: Message
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits under one key, for people."""

    key: str  # of a message without keys the private one
    reason: str  # of the head's last attempt; "" while it was never tried
    detail: str
    attempts: int
    first_seen: float  # wall seconds at which the oldest of it came into the store
    bytes: int
    messages: int


@dataclass(frozen=True, slots=True)
class Select:
    """Which keys (waiting) or letters (dead) a command means. Exactly one of the three."""

    key: str | None = None
    reason: str | None = None
    all: bool = False


class Store(Protocol):
    reads: int  # how many read queries were made, for I5
    failed: Future[None]  # gets StoreFailed when a commit failed
    disk_full_since: float | None  # wall seconds; writes wait, in order, and are tried again every second

    def close(self) -> None:
        """Commit what is queued, checkpoint, unlock; what was asked for by `ask` and has not begun is cancelled.
        Idempotent."""

    def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call this, which reads for people or is `newest`, in the one thread that there is for such reads, after what
        was asked before. Once the store is closed the future fails with StoreFailed."""

    # -- start ------------------------------------------------------------------------------------------------------
    def identity(self, slot: str) -> Identity | None: ...

    def write_identity(self, identity: Identity) -> Future[None]:
        """Durable when the future resolves. ``mark`` never goes back within an epoch. With another epoch the positions
        of the slot's sinks are forgotten in the same commit: nothing is skipped because of another history (I9). To be
        called before ``open_sink`` then. What tables were called is forgotten with them."""

    def taken_tables(self, slot: str) -> dict[int, TakenTable]:
        """By OID: what a sink of the slot takes, or took, and the name that it had."""

    def write_taken_table(self, slot: str, oid: int, table: TakenTable) -> Future[None]: ...

    def open_sink(self, sink: str, slot: str) -> SinkState:
        """Raises SpillwayError ``sink_moved`` if its state belongs to another slot."""

    # -- the stream -------------------------------------------------------------------------------------------------
    def write(self, write: Write) -> Future[Written]: ...

    def parked(self, sink: str, keys: Sequence[str]) -> set[str]:
        """Which of these keys are parked, by the committed state."""

    def page(self, sink: str, after_row: int, max_messages: int, max_bytes: int) -> list[Span]:
        """The next spans of the queue behind the cursor: whole ones, as many as fit both bounds. Of the span that
        the cursor is in, what is behind it. ``resolved`` marks what is gone."""

    def bytes_at_head(self, sink: str, after_row: int) -> tuple[int, int] | None:
        """Bytes of bodies and number of messages of the first span that `page` would bring; None: there is none."""

    def newest(self, sink: str, max_bytes: int) -> Message | None:
        """For probes: a message of the queue, alone in its span, that is the first of all its keys' rows, of a table of
        which no span of the queue has a TRUNCATE (all tables of such a span count); the newest such among the last few
        of the queue; None: there is none, or it does not fit. True of one committed state, which may be past when the
        caller gets the answer. May scan the key texts. To be asked through `ask`."""

    def due(
        self, sink: str, max_keys: int, max_bytes: int, read_up_to: int, regardless: bool = False
    ) -> list[LaneHead]:
        """Heads of lanes that may be sent now, the longest due first; ``regardless`` of their due times. The messages
        are alone in their spans. ``read_up_to``: the row up to which the caller has read the queue."""

    def bytes_due(self, sink: str, read_up_to: int, regardless: bool = False) -> int | None:
        """With so many bytes `due` brings something; None: there is nothing. For taking credit before reading."""

    def latest(self, sink: str, key: str, max_bytes: int, *, partial_images: bool) -> Message | None:
        """The newest whole image or delete in a key's lane, if it fits and no message with two keys is there; None
        otherwise. ``partial_images``: an update without its TOAST columns is one, too (it is read anew)."""

    def next_due_seconds(self, sink: str, read_up_to: int) -> float | None:
        """Seconds until the next head of a lane is due (<= 0: now); None: no lane has a head that may be sent, unless
        more of the queue is read."""

    def backfills(self, sink: str, *, ended: bool) -> list[tuple[str, bytes]]:
        """Ids and documents, in the order in which they were first written; without ``ended`` those alone that have not
        ended."""

    def refreshes(self, sink: str, table: tuple[str, str], after_place: int, limit: int) -> list[DueRefresh]:
        """Those that are due of a table, by their places."""

    def due_tables(self, sink: str) -> list[tuple[str, str]]:
        """Those of which something is due, by as many look-ups as there are."""

    def oldest(self, sink: str) -> float | None:
        """Commit time of the oldest waiting message, wall seconds."""

    def queued_from(self, sink: str) -> int | None:
        """No message of the queue has a commit LSN below this; None: it is empty."""

    # -- for people -------------------------------------------------------------------------------------------------
    def held(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]:
        """What is held, by key, in key order behind ``after_key``; with ``reason``: parked keys of that reason. A
        message with two keys counts under both."""

    def queued(self, sink: str, after_row: int, limit: int) -> list[tuple[int, Waiting]]:
        """What is in the queue, message by message with its row, in position order behind the cursor. Without keys:
        under the private key that it would have in a lane. Of two keys: the new one."""

    def show(self, sink: str, key: str, limit: int) -> list[Message]:
        """What waits under a key, its lane first, then the queue."""

    def dead(self, sink: str, after_key: str | None, limit: int, reason: str | None = None) -> list[Waiting]: ...

    def show_dead(self, sink: str, key: str, limit: int) -> list[Message]: ...

    def retry_now(self, sink: str, select: Select) -> Future[int]:
        """Make parked keys due at once, their attempts kept. Returns how many."""

    def compact(self, sink: str, work: Compaction, spare: frozenset[int]) -> Future[int]:
        """One step of a pass over the backlog (spillway.store.compact), which is over when ``work.done``. Never removes
        rows in ``spare``. Nobody else looks at ``work`` before the future resolves. Returns how many were removed."""

    def discard(self, sink: str, select: Select, limit: int, spare: frozenset[int]) -> Future[int]:
        """Remove waiting messages for good, at most ``limit`` of them a call (a bounded transaction), never those
        whose row is in ``spare`` (in memory or in flight). By reason: the whole lane of such keys. Returns how many."""

    def read_dead(self, sink: str, select: Select, after_row: int, limit: int) -> list[Message]:
        """Dead letters with their bodies, ``row`` being their number as `Write.revive` and exports want it. At most a
        few megabytes of them, but at least one; so do ``show`` and ``show_dead``."""

    def discard_dead(self, sink: str, select: Select, limit: int) -> Future[int]: ...

    def free_bytes(self) -> int:
        """Free space of the disk the state lives on."""
