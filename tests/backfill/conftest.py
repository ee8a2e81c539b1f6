"""A primary with a hot standby, once for each version and module: their settings are the tests' to change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from psycopg.conninfo import conninfo_to_dict

from servers.postgres import VERSIONS, Postgres, Standby

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Pair:
    primary: Postgres
    standby: Standby

    def set(self, name: str, value: str) -> None:
        """A setting of the primary, from now on."""
        with self.primary.connect() as connection:
            connection.execute(f"alter system set {name} = '{value}'".encode())
            connection.execute("select pg_reload_conf()")


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Postgres(request.param) as primary, Standby(primary) as standby:
        yield Pair(primary, standby)


@pytest.fixture
def conninfo(pair: Pair) -> Iterator[str]:
    """An empty database of the primary, which the standby knows, too."""
    name = f"schedule_{next(_numbers)}"
    dsn = pair.primary.create_database(name)
    pair.standby.wait_replayed()
    yield dsn
    pair.primary.drop_database(name)


@pytest.fixture
def replica(pair: Pair, conninfo: str) -> str:
    """The same database on the standby."""
    return pair.standby.dsn(str(conninfo_to_dict(conninfo)["dbname"]))
