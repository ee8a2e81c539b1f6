"""What refusals become, and that nothing of a connection string leaks through them."""

from __future__ import annotations

import psycopg
import pytest

from spillway.errors import SourceUnavailable, SpillwayError
from spillway.source.connect import describe_target
from spillway.source.refusal import connect_refusal, query_refusal, slot_refusal, stream_refusal


@pytest.mark.parametrize(
    ("text", "code", "retried"),
    [
        ('FATAL:  password authentication failed for user "u"', "authentication", False),
        ("fe_sendauth: no password supplied", "authentication", False),
        ('FATAL:  no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", no encryption', "pg_hba", False),
        ("FATAL:  must be superuser or replication role to start walsender", "no_replication_attribute", False),
        ("FATAL:  permission denied to start WAL sender", "no_replication_attribute", False),
        ('FATAL:  database "d" does not exist', "no_database", False),
        ('FATAL:  role "u" does not exist', "no_role", False),
        ('FATAL:  permission denied for database "d"', "no_connect", False),
        ("FATAL:  unsupported startup parameter: replication", "pooler", False),
        ("SSL error: certificate verify failed", "tls", False),
        (
            "FATAL:  number of requested standby connections exceeds max_wal_senders (currently 10)",
            "max_wal_senders",
            True,
        ),
        ("FATAL:  sorry, too many clients already", "too_many_connections", True),
        ("FATAL:  the database system is starting up", "starting", True),
        ("connection refused", "unreachable", True),
        ("FATAL:  irgendetwas ist schiefgegangen", "unreachable", True),
    ],
)
def test_connecting(text: str, code: str, retried: bool) -> None:
    error = connect_refusal(psycopg.OperationalError(text), "u@h:5432/d")
    assert error.code == code
    assert isinstance(error, SourceUnavailable) is retried
    assert error.what.startswith("u@h:5432/d: ")
    assert retried or error.remedy


def _error(state: str, text: str) -> psycopg.Error:
    return psycopg.errors.lookup(state)(text)


@pytest.mark.parametrize(
    ("state", "text", "code", "retried"),
    [
        ("42704", "der Replikations-Slot existiert nicht", "slot_missing", False),
        ("55006", 'replication slot "s" is active for PID 7', "slot_active", True),
        ("58P01", "requested WAL segment 0000 has already been removed", "wal_removed", False),
        ("42501", "must be superuser or replication role", "no_replication_attribute", False),
        ("53400", "all replication slots are in use", "max_replication_slots", False),
        ("22023", 'option "proto_version" is unknown', "slot_plugin", False),
        ("55000", "logical decoding requires wal_level >= logical", "wal_level", False),
        ("55000", 'can no longer get changes from replication slot "s"', "slot_invalidated", False),
        ("55000", 'replication slot "s" was not created in this database', "slot_database", False),
        ("0A000", "logical decoding cannot be used while in recovery", "standby", False),
        ("XX000", "something internal", "replication", True),
    ],
)
def test_starting(state: str, text: str, code: str, retried: bool) -> None:
    error = slot_refusal(_error(state, text), "s", "d")
    assert error.code == code
    assert isinstance(error, SourceUnavailable) is retried


@pytest.mark.parametrize(
    ("state", "code", "retried"),
    [
        ("42704", "publication_missing", False),
        ("58P01", "wal_removed", False),
        ("55000", "slot_invalidated", False),
        ("57P01", "connection_lost", True),
    ],
)
def test_streaming(state: str, code: str, retried: bool) -> None:
    error = stream_refusal(_error(state, "text"), "s", ("p",))
    assert error.code == code
    assert isinstance(error, SourceUnavailable) is retried


def test_asking() -> None:
    assert query_refusal(_error("42501", "permission denied for table t")).code == "permission"
    assert isinstance(query_refusal(_error("57014", "canceling statement")), SourceUnavailable)


def test_a_target_is_named_without_its_password() -> None:
    assert describe_target("postgresql://u:geheim@h:5433/d?sslmode=require") == "u@h:5433/d"
    assert describe_target("host=/run/x user=u dbname=d password=geheim") == "u@/run/x:5432/d"
    with pytest.raises(SpillwayError) as caught:
        describe_target("postgresql://u:ge heim@h/d")
    assert "heim" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
