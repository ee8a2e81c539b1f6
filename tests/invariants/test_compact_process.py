"""An outage under `backlog.on_full: compact`, from outside: 100,000 updates over 1,000 keys while the file of the sink
cannot be opened, SIGKILL in the middle of it again and again, and the table ends equal."""

from __future__ import annotations

import random
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from oracle.product import Product
from servers.postgres import Postgres

KEYS = 1_000
UPDATES = 100_000
IN_ONE = 100
KILLS = 6


def config(conninfo: str) -> dict[str, object]:
    slot = {"name": "spillway", "create_if_not_exists": True}
    return {
        "memory": {"limit_mb": 64},
        "state": {"url": "sqlite:///state.db"},
        "databases": [{"name": "app", "url": conninfo, "slot": slot, "publication": {"name": "spillway"}}],
        "sinks": [
            {
                "name": "mirror",
                "database": "app",
                "destination": {"type": "sqlite", "path": "mirror.db"},
                "backlog": {"on_full": "compact"},
            }
        ],
    }


def update(conninfo: str) -> None:
    dice = random.Random(1)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for _ in range(UPDATES // IN_ONE):
            ids = dice.sample(range(KEYS), IN_ONE)
            connection.execute("update t set n = n + 1 where id = any(%s)", [ids])
            if dice.random() < 0.1:
                one = dice.randrange(KEYS)
                connection.execute("delete from t where id = %s", [one])
                connection.execute("insert into t values (%s, 0)", [one])


@pytest.mark.timeout(300)
def test_killed_in_an_outage_the_table_ends_equal(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror.db"
    mirror.mkdir()  # so that it cannot be opened
    with Postgres("18") as server:
        conninfo = server.create_database("app")
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("create table t (id int primary key, n int not null)")
            connection.execute("create publication spillway for table t")
        with Product(tmp_path, config(conninfo)) as product:
            product.start()
            product.wait_streaming(conninfo)
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("insert into t select i, 0 from generate_series(0, %s::int - 1) i", [KEYS])
            load = threading.Thread(target=update, args=[conninfo], daemon=True)
            load.start()
            dice = random.Random(2)
            for _ in range(KILLS):
                least = dice.randrange(2 * KEYS)
                product.wait(lambda n=least: waiting(product) >= n or not load.is_alive(), "a backlog", seconds=60)
                product.kill()
                product.start()
                product.wait_streaming(conninfo)
            load.join()
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute("update t set n = n + 1 where id = 7")  # something to compact after the last start
            product.wait(lambda: waiting(product) == KEYS, "one message of each key", seconds=60)
            assert product.sink("mirror")["state"] == "down"
            assert product.metric('spillway_messages_compacted_total{sink="mirror"}') > 0
            mirror.rmdir()
            product.wait(lambda: waiting(product) == 0, "the drain", seconds=90)
            assert product.terminate() == 0
        with psycopg.connect(conninfo) as source, closing(sqlite3.connect(mirror)) as found:
            expected = source.execute("select id, n from t order by id").fetchall()
            assert found.execute("select id, n from t order by id").fetchall() == expected


def waiting(product: Product) -> int:
    return int(product.sink("mirror")["backlog_messages"])
