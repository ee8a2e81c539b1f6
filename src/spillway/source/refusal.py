"""What PostgreSQL's refusals mean for us, and what mends each.

Two kinds come out: `SourceUnavailable` when a later attempt may succeed by itself (server down, restarting, full of
connections, slot still held by the connection that was just lost), `SpillwayError` when somebody has to do something.
What is not recognised is `SourceUnavailable` with the server's own words: retried, and shown.

Refusals are told apart by SQLSTATE and by what was being done, since the server may speak another language. The
exception is connecting, where libpq passes on no SQLSTATE: there the English text decides, and any other language is
retried and shown as it is. Within one SQLSTATE only names that are never translated (``wal_level``) and English texts
that refine the remedy are looked at.

Sources: src/backend/replication/{slot.c,walsender.c,logical/logical.c,pgoutput/pgoutput.c} of PostgreSQL 12 to 18.
"""

from __future__ import annotations

import re

import psycopg
from psycopg.sql import Identifier

from spillway.errors import SourceUnavailable, SpillwayError

CREATE_SLOT = "SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput');"

_REPLICATION_ROLE = (
    "ALTER ROLE <user> REPLICATION; as an administrator (Amazon RDS and Aurora: GRANT rds_replication TO <user>;)"
)

# English text of a failed connection -> (code, remedy). The first that matches decides.
_CONNECT: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), code, remedy)
    for pattern, code, remedy in (
        (
            r"password authentication failed|no password supplied|authentication failed",
            "authentication",
            "check the user name and the password",
        ),
        (
            r"no pg_hba\.conf entry|pg_hba\.conf rejects",
            "pg_hba",
            "allow this host, user and database in pg_hba.conf (a replication connection of a database is"
            " matched by the database's name), or turn TLS on with sslmode=require",
        ),
        (
            r"replication role to start|permission denied to start WAL sender|must be superuser or replication",
            "no_replication_attribute",
            _REPLICATION_ROLE,
        ),
        (r'role "[^"]*" does not exist', "no_role", "create the role, see docs/postgres.md"),
        (r'database "[^"]*" does not exist', "no_database", "check the name of the database"),
        (r"permission denied for database", "no_connect", "GRANT CONNECT ON DATABASE <database> TO <user>;"),
        (
            r"unsupported startup parameter.*replication|no such database: replication",
            "pooler",
            "connect to PostgreSQL itself: a connection pooler cannot carry replication",
        ),
        (
            r"certificate|sslmode|root\.crt|server does not support SSL",
            "tls",
            "check sslmode, sslrootcert, sslcert and sslkey",
        ),
    )
)
_CONNECT_RETRIED: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), code, remedy)
    for pattern, code, remedy in (
        (r"max_wal_senders", "max_wal_senders", "raise max_wal_senders (needs a restart) or stop another reader"),
        (
            r"too many (clients|connections)|remaining connection slots",
            "too_many_connections",
            "raise max_connections or close idle connections",
        ),
        (r"the database system is", "starting", ""),
    )
)


def connect_refusal(error: psycopg.Error, target: str) -> SpillwayError:
    """What a failed connection means. ``target`` names the server without its password."""
    text = _one_line(error)
    if isinstance(error, psycopg.ProgrammingError):
        return SpillwayError("conninfo", f"the settings for {target} are not understood by libpq", "check the URL")
    for pattern, code, remedy in _CONNECT_RETRIED:
        if pattern.search(text):
            return SourceUnavailable(code, f"{target}: {text}", remedy)
    for pattern, code, remedy in _CONNECT:
        if pattern.search(text):
            return SpillwayError(code, f"{target}: {text}", remedy)
    return SourceUnavailable("unreachable", f"{target}: {text}")


def query_refusal(error: psycopg.Error) -> SpillwayError:
    """What a failed statement on a standing connection means."""
    text, state = _one_line(error), error.sqlstate or ""
    if state == "42501":
        return SpillwayError("permission", text, "see the grants in docs/postgres.md")
    if state == "55P03":
        return SourceUnavailable("table_locked", "a published table is locked in ACCESS EXCLUSIVE mode", "see pg_locks")
    return SourceUnavailable("source_query", text)


def slot_refusal(error: psycopg.Error, slot: str, database: str) -> SpillwayError:
    """What a failed START_REPLICATION or CREATE_REPLICATION_SLOT means."""
    text, state = _one_line(error), error.sqlstate or ""
    if state == "42704":
        return missing_slot(slot)
    if state == "55006":
        return SourceUnavailable(
            "slot_active", text, "stop the other reader: SELECT active_pid FROM pg_replication_slots; retried meanwhile"
        )
    if state == "58P01":
        return wal_removed(slot, text)
    if state == "42501":
        return SpillwayError("no_replication_attribute", text, _REPLICATION_ROLE)
    if state == "53400":
        return SpillwayError(
            "max_replication_slots", text, "raise max_replication_slots (needs a restart), or drop a slot nobody reads"
        )
    if state == "22023":  # the options are pgoutput's: another plugin does not know them
        return wrong_plugin(slot, text)
    if state in ("55000", "0A000"):
        return _not_in_state(text, slot, database)
    return SourceUnavailable("replication", text)


def _not_in_state(text: str, slot: str, database: str) -> SpillwayError:
    if "wal_level" in text:
        return SpillwayError(
            "wal_level", text, "ALTER SYSTEM SET wal_level = logical; and restart (on a standby: on its primary)"
        )
    if "in recovery" in text:
        return SpillwayError("standby", text, "read from the primary: a standby can be read from PostgreSQL 16 on")
    if "not created in this database" in text:
        return other_database(slot, "another database", database)
    if "physical replication slot" in text:
        return wrong_plugin(slot, text)
    return invalidated(slot, text)


def stream_refusal(error: psycopg.Error, slot: str, publications: tuple[str, ...]) -> SpillwayError:
    """What an error in the middle of the stream means."""
    text, state = _one_line(error), error.sqlstate or ""
    if state == "42704":
        return missing_publication(publications, slot, text)
    if state == "58P01":
        return wal_removed(slot, text)
    if state == "55000":
        return invalidated(slot, text)
    return SourceUnavailable("connection_lost", text)


def missing_publication(publications: tuple[str, ...], slot: str, text: str) -> SpillwayError:
    names = ", ".join(publications)
    return SpillwayError(
        "publication_missing",
        f"publication {names} does not exist at the slot's place in the WAL ({text})",
        "create it; if it exists by now, it is younger than the slot (PostgreSQL bug 18683): drop the slot with "
        f"SELECT pg_drop_replication_slot('{slot}'); and create it again",
    )


def missing_slot(slot: str) -> SpillwayError:
    return SpillwayError(
        "slot_missing",
        f"replication slot {slot} does not exist",
        f"{CREATE_SLOT.format(slot=slot)} or slot.create_if_not_exists: true",
    )


def wrong_plugin(slot: str, text: str) -> SpillwayError:
    return SpillwayError("slot_plugin", f"slot {slot} is not a pgoutput slot ({text})", "name another slot")


def other_database(slot: str, where: str, database: str) -> SpillwayError:
    return SpillwayError(
        "slot_database", f"slot {slot} belongs to {where}, not to {database}", "name another slot or database"
    )


def wal_removed(slot: str, text: str) -> SpillwayError:
    return SpillwayError(
        "wal_removed", f"the WAL that slot {slot} needs is gone: changes are lost ({text})", _new_slot(slot)
    )


def invalidated(slot: str, text: str) -> SpillwayError:
    return SpillwayError(
        "slot_invalidated", f"slot {slot} has been invalidated: changes are lost ({text})", _new_slot(slot)
    )


def _new_slot(slot: str) -> str:
    return (
        f"SELECT pg_drop_replication_slot('{slot}'); {CREATE_SLOT.format(slot=slot)} then fill the sinks anew, and "
        "raise max_slot_wal_keep_size"
    )


def quoted(*parts: str) -> str:
    """An SQL name of one or more parts, quoted only as far as it must be read back: ``"public"."jobs"``."""
    return Identifier(*parts).as_string()


def _one_line(error: psycopg.Error) -> str:
    text = error.diag.message_primary or str(error)
    if error.diag.message_detail:
        text += f" ({error.diag.message_detail})"
    return " ".join(text.split())
