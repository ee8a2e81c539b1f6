"""What every test may ask for: real servers (started when first asked for, one of each per run), databases, ports.

A test that only wants a table takes ``database``: a database of its own on PostgreSQL 18, dropped with its slots. One
that must hold on every version takes ``any_pg`` or ``any_database``. A test that kills, restarts or configures a server
makes one for itself (``with Postgres("18", settings={...}) as server``): the ones here are shared.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from servers.opensearch import OpenSearch
from servers.ports import free_port
from servers.postgres import VERSIONS, Postgres

# What the caller has set for a Spillway or a PostgreSQL of his own must not reach a test.
for _name in list(os.environ):
    if _name == "DATABASE_URL" or (_name.startswith(("SPILLWAY_", "PG")) and _name != "SPILLWAY_TEST_CACHE"):
        del os.environ[_name]

_UNIT_TESTS = Path(__file__).parent / "unit"
_database_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A broken unit is known before the first server starts."""
    items.sort(key=lambda item: not item.path.is_relative_to(_UNIT_TESTS))


@pytest.fixture(scope="session")
def _start_postgres() -> Iterator[Callable[[str], Postgres]]:
    """Starts a version when it is first asked for; the same server is behind all the fixtures that follow."""
    started: dict[str, Postgres] = {}
    with ExitStack() as running:

        def start(version: str) -> Postgres:
            if version not in started:
                started[version] = running.enter_context(Postgres(version))
            return started[version]

        yield start


@pytest.fixture(scope="session")
def pg12(_start_postgres: Callable[[str], Postgres]) -> Postgres:
    return _start_postgres("12")


@pytest.fixture(scope="session")
def pg15(_start_postgres: Callable[[str], Postgres]) -> Postgres:
    return _start_postgres("15")


@pytest.fixture(scope="session")
def pg18(_start_postgres: Callable[[str], Postgres]) -> Postgres:
    return _start_postgres("18")


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest, _start_postgres: Callable[[str], Postgres]) -> Postgres:
    """PostgreSQL 18, or ``@pytest.mark.parametrize("postgres", ["12", "15"], indirect=True)``."""
    return _start_postgres(getattr(request, "param", "18"))


@pytest.fixture(scope="session", params=VERSIONS)
def any_pg(request: pytest.FixtureRequest, _start_postgres: Callable[[str], Postgres]) -> Postgres:
    """The test runs once with each version."""
    return _start_postgres(request.param)


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The DSN of an empty database of ``postgres``, which goes with its slots and connections when the test ends."""
    yield from _fresh_database(postgres)


@pytest.fixture
def any_database(any_pg: Postgres) -> Iterator[str]:
    """As ``database``, once with each version."""
    yield from _fresh_database(any_pg)


def _fresh_database(server: Postgres) -> Iterator[str]:
    name = f"test_{next(_database_numbers)}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture(scope="session")
def opensearch() -> Iterator[OpenSearch]:
    """A shared node: a test uses index names of its own."""
    with OpenSearch() as server:
        yield server


@pytest.fixture
def unused_port() -> int:
    """A port of 127.0.0.1 on which nobody listens and which no other test gets."""
    return free_port()


@pytest.fixture
def unused_ports() -> Callable[[], int]:
    """For tests that need several: each call gives another."""
    return free_port
