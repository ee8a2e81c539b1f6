"""The fixtures of ``conftest`` hold what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from servers.postgres import Postgres
from servers.process import wait_until
from servers.reaper import started_at


def test_a_database_is_dropped_with_a_slot_that_is_being_read(postgres: Postgres) -> None:
    name = "torn_down"
    dsn = postgres.create_database(name)
    with postgres.connect() as connection:

        def slots(condition: str = "true") -> int:
            query = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = 'read_slot' AND {condition}"
            return len(connection.execute(query).fetchall())

        # Not `with`: leaving that would send a COMMIT into the replication stream.
        with closing(psycopg.connect(f"{dsn}?replication=database", autocommit=True)) as walsender:
            walsender.execute("CREATE_REPLICATION_SLOT read_slot LOGICAL test_decoding")
            walsender.pgconn.send_query(b"START_REPLICATION SLOT read_slot LOGICAL 0/0")
            wait_until(lambda: slots("active") == 1, "start of replication", seconds=10)
            postgres.drop_database(name)
        assert slots() == 0
        assert connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None


def test_each_version_gives_a_database(any_pg: Postgres, any_database: str) -> None:
    with psycopg.connect(any_database) as connection:
        assert connection.info.server_version // 10_000 == int(any_pg.version)


@pytest.mark.parametrize("postgres", ["15"], indirect=True)
def test_the_version_can_be_chosen(database: str, pg15: Postgres) -> None:
    assert f":{pg15.port}/" in database


def test_ports_differ(unused_port: int, unused_ports: Callable[[], int]) -> None:
    assert len({unused_port, unused_ports(), unused_ports()}) == 3


def test_the_environment_of_the_caller_is_left_out() -> None:
    assert not [name for name in os.environ if name.startswith(("SPILLWAY_", "PG")) and name != "SPILLWAY_TEST_CACHE"]


def test_servers_of_a_killed_run_are_ended_and_removed() -> None:
    script = """
import os, signal
from servers.postgres import Postgres
running, suspended = Postgres("18").start(), Postgres("15").start()
suspended.suspend()
print(running.pid, suspended.pid, running.folder, suspended.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    tests = Path(__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    *pids, one, other = killed.stdout.split()

    def gone() -> bool:
        return not any(started_at(int(pid)) for pid in pids) and not Path(one).exists() and not Path(other).exists()

    wait_until(gone, "end of what a killed run has started", seconds=30)
