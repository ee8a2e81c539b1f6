"""Random changes in all twelve tables (`shape.load`): plain, with commits that are seen 200 ms late, with documents
that are enriched on a replica that is 300 ms behind, and with the process killed every few seconds. Each time every
document of the index is compared with a fresh build at the end."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import stage
from servers.opensearch import OpenSearch
from servers.postgres import Postgres, Standby
from shape import load

SECONDS = 120.0
KILL_EVERY_SECONDS = 6.0


def run(options: Namespace, report: stage.Report) -> None:
    with OpenSearch() as search:
        with Postgres(options.postgres) as server:
            _run(options, report, "8 clients", server, search.url)
        with Postgres(options.postgres) as server, Standby(server, settings={"recovery_min_apply_delay": "200ms"}):
            _run(options, report, "commits are seen 200 ms late", server, search.url, late=True)
        with (
            Postgres(options.postgres) as server,
            Standby(server, settings={"recovery_min_apply_delay": "300ms"}) as standby,
        ):
            what = "enriched on a replica, 300 ms behind"
            _run(options, report, what, server, search.url, replica_url=standby.dsn("app"))
        with Postgres(options.postgres) as server:
            kills = max(1, round(SECONDS * options.scale / KILL_EVERY_SECONDS) - 1)
            _run(options, report, f"kill -9, {kills} times", server, search.url, kills=kills)


def _run(
    options: Namespace, report: stage.Report, what: str, server: Postgres, url: str, **more: bool | int | str
) -> None:
    with tempfile.TemporaryDirectory(prefix="spillway-shape-") as folder:
        verdict = load.run(
            server.create_database("app"), Path(folder), url,
            seed=options.seed, seconds=SECONDS * options.scale, say=report.say, **more,  # type: ignore[arg-type]
        )  # fmt: skip
    report.inform(f"{what}: transactions", verdict.transactions, "transactions")
    report.inform(f"{what}: from the last commit to rest", verdict.seconds_to_quiet, "s")
    report.inform(f"{what}: documents at the end", verdict.documents, "documents")
    report.equal(f"{what}: documents that differ from a fresh build", len(verdict.violations), 0, "documents")
