"""The kill test of ``tests/crash`` with as many kills as one likes, and a report.

python bench/kills.py --kills 200 [--seed N] [--search]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import stage
from crash.scenario import SINKS, Scenario
from servers.opensearch import OpenSearch
from servers.postgres import Postgres


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--search", action="store_true", help="a real OpenSearch among the sinks")
    parser.add_argument("--postgres", choices=("12", "15", "18"), default="18")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    report = stage.Report("kills", stage.parameters(options))
    with report.product_may_fail(), ExitStack() as stack:
        server = stack.enter_context(Postgres(options.postgres))
        search = stack.enter_context(OpenSearch()) if options.search else None
        verdict = Scenario(
            server.create_database("app"),
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-kills-"))),
            seed=options.seed,
            kills=options.kills,
            sinks=[*SINKS, "search"] if search is not None else SINKS,
            search_url=search.url if search is not None else None,
            say=report.say,
        ).run()
        report.inform("committed changes", verdict.committed, "changes")
        for sink, found in verdict.violations.items():
            if sink in verdict.received:
                report.inform(f"{sink}: messages received, repetitions included", verdict.received[sink], "messages")
            report.equal(f"{sink}: violations", len(found), 0)
    return report.finish(options.out)


if __name__ == "__main__":
    sys.exit(main())
