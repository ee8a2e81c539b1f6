"""Pages come from a standby of the slot's own system, or not at all."""

from __future__ import annotations

from pathlib import Path

from backfill.site import Site, sqlite_sink
from oracle.rules import judge_rows
from servers.postgres import Postgres, Standby

T = "public.t"


def with_replica(site: Site, url: str, *sinks: dict[str, object]) -> None:
    config = site._config(sinks)
    config["databases"] = [{**config["databases"][0], "replica_url": url}]  # type: ignore[index]
    site.product.configure(config)


def test_a_foreign_replica_is_not_read(tmp_path: Path) -> None:
    mirror = sqlite_sink("mirror", [T], initial_backfill=True)
    with Postgres("15") as primary, Postgres("18") as foreign, Standby(primary) as standby:
        conninfo = primary.create_database("app")
        standby.wait_replayed()
        other = foreign.create_database("app")
        with Site(conninfo, tmp_path, [mirror]) as site:
            site.sql(
                "create table t (id int primary key, v text)",
                "insert into t select n, 'here' from generate_series(1, 300) n",
                "create publication spillway for all tables",
            )
            with_replica(site, other, mirror)
            site.begin()
            site.wait(
                lambda: any("the server of replica_url belongs to" in item["waiting"] for item in items(site)),
                "the backfill to say why it waits",
            )
            assert items(site)[0]["rows_processed_count"] == 0
            with_replica(site, standby.dsn("app"), mirror)
            site.again()
            site.ended("mirror", [items(site)[0]["id"]])
            site.drained("mirror")
            assert not judge_rows(site.source_rows(T), site.sqlite_rows("mirror", T))


def items(site: Site) -> list[dict]:
    return site.product.backfills("mirror")
