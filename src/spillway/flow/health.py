"""Health follows progress, not connectivity (I8): what state a sink is in, why, since when, and what to do.

`judge` is a function of what the delivery knows; a change of state is logged. Exactly one state at a time, the first
that applies in this order:

========== ============================================================================================
paused     somebody paused it; it takes in, and delivers nothing
gap        it missed changes, knowingly and on record; nothing but a refill of its tables repairs that
full       its backlog is at its cap
down       the sink as a whole does not answer or refuses us; the breaker probes it
retrying   all that is sent fails; the stream is narrowed to probes
stalled    there is work, nothing forbids it, and nothing has moved for a minute; or the slot is not being read
parked     some keys wait for their retry, the others flow
behind     it works off a backlog, or its oldest open message is older than five seconds, or documents are due to be
           refreshed for so long
caught_up  everything is delivered, and every document is right
idle       everything is delivered, and nothing has come for a minute
========== ============================================================================================

Beside whatever the state is, reason and remedy name the tables that cannot be delivered, and those whose existing rows
were promised and did not all come. Of a sink that is well by itself the state is that of its companion, if that is not:
documents that stay stale are nothing less to be told of than changes that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from spillway.errors import Finding
from spillway.flow.delivery import Delivery
from spillway.position import format_lsn

STALLED_SECONDS = 60.0
IDLE_SECONDS = 60.0
FLOWS_SECONDS = 5.0  # something was delivered so recently: what is parked may fail again and again
BEHIND_SECONDS = 5.0
NAMED_TABLES = 10  # so many of a gap are named

_log = structlog.get_logger()

_TROUBLE = ("parked", "down", "full", "gap")  # states in which somebody is needed, or may be
_COMPANION = "~"  # in the name of a sink's companion, behind the name of the sink
_WELL = ("idle", "caught_up", "behind")
RELATED = "related_"  # the code of what a sink's companion suffers from: this, and the state that it is in


@dataclass(slots=True)
class Health:
    """The state of one sink, and since when (wall seconds)."""

    state: str = "idle"
    reason: str = ""
    remedy: str = ""
    since: float = 0.0
    refused: list[Finding] = field(default_factory=list)  # tables that cannot be delivered
    owed: list[Finding] = field(default_factory=list)  # backfills that have failed, and what its companion suffers from
    refreshing: str = ""  # documents that are not right yet, for longer than a moment
    not_read: str = ""  # why the slot is not read, which every sink of it says

    def update(self, delivery: Delivery, now: float, wall: float) -> None:
        state, self.reason, self.remedy = judge(delivery, now)
        if self.refreshing and state in _WELL:
            state, self.reason = "behind", "; ".join(filter(None, [self.reason, self.refreshing]))
        if self.not_read and not (delivery.blocks and state == "full"):
            state = "stalled" if state in _WELL else state
            self.reason = f"{self.reason}; the slot is not read: {self.not_read}".lstrip("; ")
            self.remedy = self.remedy or "mend what keeps the slot from being read"
        if self.refused and state in _WELL:
            state = "gap"  # acknowledged, but what comes of these tables passes by still
        for finding in self.owed:
            if state in _WELL and finding.code.startswith(RELATED):
                state = finding.code.removeprefix(RELATED)
        if beside := [*self.refused, *self.owed]:
            told = [f.what for f in beside if f.what not in self.reason]
            self.reason = "; ".join(filter(None, [self.reason, *told]))
            # What is refused is to be mended first.
            remedies = [*(f.remedy for f in self.refused), self.remedy, *(f.remedy for f in self.owed)]
            self.remedy = "; ".join(dict.fromkeys(filter(None, remedies)))
        if state != self.state or not self.since:
            if self.since:
                note_state(delivery.name, state, self.state, self.reason)
            self.state, self.since = state, wall


def note_state(name: str, state: str, was: str, reason: str) -> None:
    """``name``: of a delivery, which may be a sink's companion: people know the sink."""
    sink, companion, _ = name.partition(_COMPANION)
    more = {"of": "its related tables"} if companion else {}
    log = _log.warning if state in _TROUBLE else _log.info
    log("sink state", sink=sink, state=state, was=was, reason=reason, **more)


def judge(delivery: Delivery, now: float) -> tuple[str, str, str]:
    """State, reason, remedy."""
    name, counters = delivery.name, delivery.counters
    if delivery.paused:
        return "paused", "paused by command or configuration", f"spillway sinks resume {name}"
    if delivery.gap is not None:
        return _gap(delivery)
    if delivery.full is not None and not delivery.may_be_compacted:
        block = delivery.blocks
        return (
            "full",
            delivery.full + _compacted(delivery) + ("; the slot is not read until there is room" if block else ""),
            f"mend the sink, raise backlog limits, or discard: spillway backlog discard {name}",
        )
    if delivery.breaker.open:
        reason = f"{delivery.breaker.reason}: {delivery.breaker.detail}".rstrip(": ")
        return (
            "down",
            reason + _compacted(delivery),
            "bring the sink back; it is probed at least every 30 s and catches up by itself",
        )
    flows = now - delivery.last_progress_at < FLOWS_SECONDS
    if delivery.queue_throttle.narrow or (delivery.lane_throttle.narrow and counters.queued and not flows):
        return (
            "retrying",
            f"every message is rejected, last: {delivery.last_error}",
            f"mend what the sink rejects, then: spillway backlog retry {name} --all",
        )
    waiting = counters.queued + delivery.memory_messages
    if waiting and now - max(delivery.last_progress_at, delivery.busy_since) > STALLED_SECONDS:
        return "stalled", f"{waiting} messages wait and none was delivered for a minute", "see the log of the process"
    if counters.parked_keys:
        return (
            "parked",
            f"{counters.parked_keys} keys wait for their retry, last: {delivery.last_error or 'before the restart'}",
            f"see: spillway backlog list {name}; then retry or discard",
        )
    return _progress(delivery, now)


def _gap(delivery: Delivery) -> tuple[str, str, str]:
    gap, name = delivery.gap, delivery.name
    assert gap is not None
    resume, refill = f"spillway sinks resume {name}", f"spillway backfill start {name} --gap"
    if gap.last_lsn is None:
        waiting = delivery.counters.messages
        reason = f"takes no part since {format_lsn(gap.first_lsn)}: {gap.reason}; what it misses is not kept"
        if waiting:
            reason += f"; {waiting} messages still wait"
        return "gap", reason, f"mend the sink; when its backlog has room: {resume}; for what it missed then: {refill}"
    missed = "changes" if not gap.tables else f"changes of {_listed(gap.tables)}"
    reason = f"missed {missed} from {format_lsn(gap.first_lsn)} to {format_lsn(gap.last_lsn)}: {gap.reason}"
    if gap.tables == ():  # nothing is left to read
        return "gap", reason, f"mend in the sink what is still wrong there, then acknowledge: {resume}"
    return "gap", reason, f"{refill}; or mend it in the sink, then acknowledge: {resume}"


def _listed(tables: Sequence[tuple[str, str]]) -> str:
    names = [".".join(table) for table in tables[:NAMED_TABLES]]
    more = len(tables) - len(names)
    return ", ".join([*names, f"{more} more tables"] if more else names)


def _compacted(delivery: Delivery) -> str:
    """What is to be said of a backlog that is less than what came."""
    waiting = delivery.counters.messages
    removed = delivery.passes.removed
    if not waiting or not removed:
        return ""
    return f"; compacted: newer ones of their keys have taken the place of {removed} messages since the start"


def _progress(delivery: Delivery, now: float) -> tuple[str, str, str]:
    counters = delivery.counters
    first = delivery.window.first_open()
    open_seconds = now - first.arrived if first is not None else 0.0
    if counters.messages or open_seconds > BEHIND_SECONDS:
        warning = delivery.spec.limits.warning(counters)
        oldest = max(delivery.oldest_seconds, open_seconds)
        reason = f"{counters.messages} messages wait on disk, the oldest for {oldest:.0f} s{_compacted(delivery)}"
        return "behind", f"{reason}; {warning}" if warning else reason, ""
    if now - delivery.last_intake_at > IDLE_SECONDS:
        return "idle", "", ""
    return "caught_up", "", ""
