"""Whose history the state belongs to (I9).

State is worth something only together with the slot it was made from. Before anything is read, `judge` compares what
the store remembers with what the server says. Whatever does not fit stops the sinks of that slot with a finding that
says what happened; going on is an explicit command (`spillway state adopt`), which raises the epoch and records the
gap. Nothing is skipped or called stale because of a position from another history.

The *mark*: before a position is confirmed to Postgres, the store durably holds a mark at or above it, reserved
``MARK_RESERVE_BYTES`` ahead so that a healthy sink costs no write per message. A slot that stands beyond the mark was
moved by somebody else, or this state file is an old copy.
"""

from __future__ import annotations

from spillway.errors import Finding
from spillway.position import format_lsn
from spillway.source.session import SourceState
from spillway.store.base import Identity

MARK_RESERVE_BYTES = 16 << 20


def judge(slot: str, identity: Identity | None, server: SourceState, reached_lsn: int = 0) -> Finding | None:
    """Why the state and the slot do not belong together; None: they do. ``reached_lsn``: how far this process has read,
    0 at its start, when the mark is all that is known of it."""
    if identity is None:
        if server.slot_reader:
            return Finding(
                "slot_active",
                f"slot {slot} is being read by {server.slot_reader} now, and it is not this state that it belongs to",
                "stop that process, or give this one a slot of its own",
            )
        if server.slot_exists and not server.slot_created and server.slot_used:
            return _finding(
                "state_missing",
                f"slot {slot} has been read before, up to {format_lsn(server.confirmed_lsn)}, but the state file is"
                " new: what was waiting in the old state is not here",
                "point state.url at the old file; or, if the slot comes from another tool,",
            )
        return None
    if identity.system_id != server.system_id:
        return _finding(
            "other_system",
            f"the state belongs to the database system {identity.system_id}, this is {server.system_id}",
            "check the url; if the database was restored or replaced on purpose,",
        )
    if identity.timeline != server.timeline and (
        server.forked_lsn is None or server.forked_lsn < (reached_lsn or identity.mark)
    ):
        where = f" at {format_lsn(server.forked_lsn)}" if server.forked_lsn is not None else "; where is not known"
        return _finding(
            "timeline_forked",
            f"the server is on timeline {server.timeline}, which left timeline {identity.timeline}{where}:"
            " changes that were delivered after it may not exist any more",
            "compare sink and source;",
        )
    if server.slot_created or not server.slot_exists:
        return _finding(
            "slot_lost",
            f"slot {slot} was there before and is gone: changes after the last confirmed position were not kept",
            "",
        )
    if server.confirmed_lsn > identity.mark:
        return _finding(
            "slot_beyond_mark",
            f"slot {slot} stands at {format_lsn(server.confirmed_lsn)}, beyond anything confirmed from this state"
            f" ({format_lsn(identity.mark)}): somebody else has read from it, or the state file is an old copy",
            "",
        )
    return None


def _finding(code: str, what: str, remedy: str) -> Finding:
    adopt = "to go on from where the slot stands, with a recorded gap: spillway state adopt -c FILE"
    return Finding(code, what, f"{remedy} {adopt}".strip())
