"""`spillway state adopt`: go on although the state and the slot do not belong together (I9).

First, for every sink, a gap is recorded: from where the old history was confirmed up to where
the slot stands now. Then the identity of the server as it is now, with the epoch raised, so that positions and versions
of the other history count for nothing; a crash in between only leaves a gap that is reported and none that is not. What
waits in the store and the dead letters stay, and are delivered. The slot is made if it is gone and the configuration
says so.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from spillway.config import Config, Database
from spillway.errors import Finding, SpillwayError
from spillway.flow.identity import MARK_RESERVE_BYTES, judge
from spillway.position import format_lsn
from spillway.source.session import observe, open_session
from spillway.store.base import Gap, Identity, Store, Write
from spillway.store.sqlite import open_store


def adopt(config: Config) -> list[str]:
    """What was done, a line per database. The process that runs on this state must be stopped."""
    store = open_store(config.state_path)
    try:
        return [asyncio.run(_adopt(config, database, store)) for database in config.databases]
    finally:
        store.close()


async def _adopt(config: Config, database: Database, store: Store) -> str:
    slot = database.slot.name
    sinks = [s for s in config.sinks if s.database == database.name]
    identity = store.identity(slot)
    session = await open_session(
        database, [s.source for s in sinks], identity.timeline if identity else None, create_slot=True
    )
    await session.close()
    server = session.server
    finding = judge(slot, identity, server)
    if finding is None:
        return f"{database.name}: state and slot belong together, nothing to adopt"
    if not server.slot_exists and not server.slot_created:
        raise SpillwayError.of(finding)
    # Without a state the epoch of the lost one is not known: the first has number 1, so this is at least one above it.
    epoch = identity.epoch + 1 if identity else 2
    if epoch > MAX_EPOCH:
        raise SpillwayError("epochs_used_up", "this state has been adopted 31 times", "start with a new state file")
    gaps = 0
    for sink in sinks:
        state = store.open_sink(sink.name, slot)
        known = max(0, identity.mark - MARK_RESERVE_BYTES) if identity is not None else 0
        first = state.gap.first_lsn if state.gap is not None else known
        gap = Gap(first, server.confirmed_lsn, time.time(), finding.what)
        await asyncio.wrap_future(store.write(Write(sink.name, gap=gap)))
        gaps += 1
    mark = server.confirmed_lsn + MARK_RESERVE_BYTES
    await asyncio.wrap_future(store.write_identity(Identity(server.system_id, server.timeline, slot, epoch, mark)))
    return (
        f"{database.name}: {finding.what}; adopted as epoch {epoch} from {format_lsn(server.confirmed_lsn)} on;"
        f" {gaps} sinks have a recorded gap: for each, spillway backfill start SINK --gap"
    )


async def identity_findings(config: Config) -> list[Finding]:
    """For `spillway check`: what would keep `run` from starting on this state. Nothing if it is running."""
    store: Store | None = None
    if config.state_path.exists():
        try:
            store = open_store(config.state_path)
        except SpillwayError as error:
            return [] if error.code == "state_locked" else [Finding(error.code, error.what, error.remedy)]
    try:
        found = []
        for database in config.databases:
            identity = store.identity(database.slot.name) if store is not None else None
            server = await observe(database, identity.timeline if identity is not None else None)
            finding = judge(database.slot.name, identity, server)
            if finding is not None:
                found.append(replace(finding, database=database.name))
        return found
    finally:
        if store is not None:
            store.close()


MAX_EPOCH = 31  # five bits of a version
