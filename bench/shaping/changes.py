"""Random changes in all twelve tables (`shape.load`), once plain and once with commits that are seen 200 ms late; then
every document of the index against a fresh build."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

import stage
from servers.opensearch import OpenSearch
from servers.postgres import Postgres, Standby
from shape import load

SECONDS = 120.0


def run(options: Namespace, report: stage.Report) -> None:
    with OpenSearch() as search:
        with Postgres(options.postgres) as server:
            _run(options, report, "8 clients", server, search.url, late=False)
        with (
            Postgres(options.postgres) as server,
            Standby(server, settings={"recovery_min_apply_delay": "200ms"}),
        ):
            _run(options, report, "commits are seen 200 ms late", server, search.url, late=True)


def _run(options: Namespace, report: stage.Report, what: str, server: Postgres, url: str, *, late: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="spillway-shape-") as folder:
        verdict = load.run(
            server.create_database("app"), Path(folder), url,
            seed=options.seed, seconds=SECONDS * options.scale, late=late, say=report.say,
        )  # fmt: skip
    report.inform(f"{what}: transactions", verdict.transactions, "transactions")
    report.inform(f"{what}: from the last commit to rest", verdict.seconds_to_quiet, "s")
    report.inform(f"{what}: documents at the end", verdict.documents, "documents")
    report.equal(f"{what}: documents that differ from a fresh build", len(verdict.violations), 0, "documents")
