"""Whose rows a server has (I9): pages take their place among the positions of the slot, so that a server with another
history must not be read, however well it answers.

A server is known by its system identifier, which a physical standby shares with its primary and a restored copy with
nobody that it should be mixed with but its original. A replica must be in recovery besides: one that was promoted has a
history of its own from then on, under the same identifier.

Both are `SourceUnavailable`: nothing is read until somebody has mended it, and what was begun goes on then.
"""

from __future__ import annotations

from dataclasses import dataclass

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.source.connect import Connection, connect_replication
from spillway.source.queries import fetch_one
from spillway.source.slot import system


@dataclass(frozen=True, slots=True)
class Expected:
    """What the server must be."""

    system_id: str
    replica: bool = False  # it is that of ``replica_url``


async def system_id(connection: Connection, conninfo: str, slot: str) -> str:
    """Of the server that both lead to. Where the function is kept from the role, a walsender says it."""
    try:
        row = await fetch_one(connection, "system_id")
    except SpillwayError as error:
        if error.code != "permission":
            raise
    else:
        assert row is not None  # one row, always
        return str(row["system_identifier"])
    replication = await connect_replication(conninfo, slot)
    try:
        return (await system(replication)).system_id
    finally:
        await replication.close()


async def check_origin(connection: Connection, conninfo: str, slot: str, expected: Expected, *, standby: bool) -> None:
    """Raises SourceUnavailable ``replica_foreign`` or, for a server that is no replica, ``other_system``; and as
    `check_standby` does."""
    found = await system_id(connection, conninfo, slot)
    if found != expected.system_id:
        what = f"belongs to the database system {found}, the slot to {expected.system_id}"
        if expected.replica:
            raise SourceUnavailable(
                "replica_foreign",
                f"the server of replica_url {what}",
                "replica_url must name a physical standby of the slot's own server; or leave it out",
            )
        raise SourceUnavailable("other_system", f"the server of url {what}", "check the url")
    check_standby(expected, standby=standby)


def check_standby(expected: Expected, *, standby: bool) -> None:
    """Raises SourceUnavailable ``replica_promoted``."""
    if expected.replica and not standby:
        raise SourceUnavailable(
            "replica_promoted",
            "the server of replica_url is not in recovery: it is no standby, or was promoted and has a history of its"
            " own",
            "let replica_url name a standby, or leave it out: pages then come from the server of the slot",
        )
