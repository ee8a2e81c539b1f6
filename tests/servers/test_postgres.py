"""The PostgreSQL of the tests does what the other tests take for granted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from servers.postgres import VERSIONS, Postgres, Standby
from servers.process import wait_until
from servers.reaper import started_at


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    with Postgres(request.param) as server:
        yield server


def test_all_versions_at_once_decode_with_pgoutput() -> None:
    with Postgres("12") as old, Postgres("15") as middle, Postgres("18") as new:
        for server in (old, middle, new):
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                assert connection.info.server_version // 10_000 == int(server.version)
                connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
                connection.execute("CREATE PUBLICATION p FOR TABLE t")
                connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
                connection.execute("SELECT pg_create_logical_replication_slot('oracle', 'test_decoding')")
                connection.execute("INSERT INTO t VALUES (1)")
                frames = connection.execute(
                    "SELECT data FROM pg_logical_slot_get_binary_changes('s', NULL, NULL,"
                    " 'proto_version', '1', 'publication_names', 'p')"
                ).fetchall()
                assert [bytes(frame[0])[:1] for frame in frames] == [b"B", b"R", b"I", b"C"]
                stamp = connection.execute("SELECT pg_xact_commit_timestamp(xmin) FROM t").fetchone()
                assert stamp is not None and stamp[0] is not None


def test_survives_a_kill_with_its_port_and_what_was_committed(server: Postgres) -> None:
    with server.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS id")
        connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        backend = connection.info.backend_pid
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert started_at(backend) is None
    server.start()
    with psycopg.connect(server.dsn()) as connection:
        assert connection.execute("SELECT id FROM t").fetchall() == [(1,)]
        assert connection.execute("SELECT slot_name FROM pg_replication_slots").fetchall() == [("s",)]


def test_drops_a_database_whose_slot_is_in_use(server: Postgres) -> None:
    dsn = server.create_database("busy", encoding="LATIN1")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('s', 'test_decoding')")
        assert connection.execute("SHOW server_encoding").fetchone() == ("LATIN1",)
        server.drop_database("busy")
    with server.connect() as connection:
        assert connection.execute("SELECT count(*) FROM pg_replication_slots").fetchone() == (0,)


def test_password_auth_lets_in_only_with_the_password() -> None:
    with Postgres("12", auth="password", settings={"work_mem": "5MB"}) as server:
        with psycopg.connect(server.dsn()) as connection:
            assert connection.execute("SHOW work_mem").fetchone() == ("5MB",)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.dsn(password="wrong"))


def test_a_fresh_cluster_has_an_identity_of_its_own() -> None:
    query = "SELECT system_identifier FROM pg_control_system()"
    with Postgres("18") as one, Postgres("18") as copy, Postgres("18", fresh=True) as fresh:
        identifiers = []
        for server in (one, copy, fresh):
            with server.connect() as connection:
                identifiers.append(connection.execute(query).fetchone())
    assert identifiers[0] == identifiers[1] != identifiers[2]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_standby_follows_and_can_hold_back_what_is_visible(version: str) -> None:
    with Postgres(version) as primary, Standby(primary, settings={"recovery_min_apply_delay": "200ms"}) as standby:
        dsn = primary.create_database("app")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE t (id int)")
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            connection.execute("ALTER SYSTEM SET synchronous_commit = 'remote_apply'")
            connection.execute("SELECT pg_reload_conf()")
            wait_until(lambda: _is_synchronous(connection), "the synchronous standby", seconds=30)
        with psycopg.connect(dsn, autocommit=True) as connection:
            began = time.monotonic()
            connection.execute("INSERT INTO t VALUES (1)")
            assert time.monotonic() - began >= 0.19
        standby.wait_replayed()
        with standby.connect("app") as connection:
            assert connection.execute("SELECT id, pg_is_in_recovery() FROM t").fetchall() == [(1, True)]


def _is_synchronous(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    return connection.execute("SELECT FROM pg_stat_replication WHERE sync_state = 'sync'").fetchone() is not None
