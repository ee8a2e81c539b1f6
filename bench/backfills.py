"""The tests of backfills in ``tests/backfill`` at their full size, and a report.

python bench/backfills.py [--backfills 50] [--kills 50] [--seed N] [--postgres 18] [--only load|late|filtered|kills ...]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import stage
from backfill import kills, load
from servers.postgres import Postgres, Standby

PARTS = ("load", "late", "filtered", "kills")


class Bench:
    def __init__(self, report: stage.Report, options: argparse.Namespace) -> None:
        self._report, self._options = report, options

    def load(self) -> None:
        with Postgres(self._options.postgres) as server:
            self._load("8 clients", server)

    def late(self) -> None:
        version = self._options.postgres
        with Postgres(version) as primary, Standby(primary, settings={"recovery_min_apply_delay": "200ms"}):
            self._load("commits are seen 200 ms late", primary, late=True)

    def filtered(self) -> None:
        with Postgres(self._options.postgres) as server:
            self._load("sinks without updates", server, actions=("insert", "delete"))

    def kills(self) -> None:
        for parallel in (1, 3):
            with Postgres(self._options.postgres) as server, _folder() as folder:
                verdict = kills.run(
                    server.create_database("app"),
                    Path(folder),
                    seed=self._options.seed,
                    kills=self._options.kills,
                    parallel=parallel,
                    say=self._report.say,
                )
            what = f"kill -9, {parallel} readers" if parallel > 1 else "kill -9, one reader"
            self._report.inform(f"{what}: backfills of 20,000 rows", verdict.backfills, "backfills")
            self._report.inform(f"{what}: rows read again", sum(verdict.again), "rows")
            self._report.inform(f"{what}: pages read again, all kills", sum(verdict.pages_again), "pages")
            self._report.at_most(f"{what}: pages read again, one kill", max(verdict.pages_again), parallel, "pages")
            self._report.equal(f"{what}: violations", len(verdict.violations), 0)

    def _load(self, what: str, server: Postgres, **more: object) -> None:
        with _folder() as folder:
            verdict = load.run(
                server.create_database("app"),
                Path(folder),
                seed=self._options.seed,
                backfills=self._options.backfills,
                say=self._report.say,
                **more,  # type: ignore[arg-type]
            )
        self._report.inform(f"{what}: backfills in a row, of each sink", verdict.backfills, "backfills")
        self._report.inform(f"{what}: committed changes", verdict.changes, "changes")
        self._report.inform(f"{what}: rows read", verdict.rows, "rows")
        self._report.inform(f"{what}: of these superseded by the stream", verdict.superseded, "rows")
        self._report.inform(f"{what}: a round, median", stage.percentile(verdict.seconds, 0.5), "s")
        for sink, found in verdict.violations.items():
            self._report.equal(f"{what}: {sink}: violations", len(found), 0)


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="spillway-backfills-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backfills", type=int, default=50)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--postgres", choices=("12", "15", "18"), default="18")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    report = stage.Report("backfills", stage.parameters(options, "only"))
    bench = Bench(report, options)
    parts: dict[str, Callable[[], None]] = {
        "load": bench.load, "late": bench.late, "filtered": bench.filtered, "kills": bench.kills,
    }  # fmt: skip
    for part in options.only:
        with report.product_may_fail(part):
            parts[part]()
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
