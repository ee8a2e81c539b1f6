"""``python bench/speed [PART ...] [--rounds N] [--rows N] [--full] [--out FOLDER]``; see `speed`.

Without a part all of them are measured. ``--full`` adds the backlog of 10,000,000 rows. Every server and process is
started here, on loopback, and ended in the end, also when something fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stage
from oracle.product import ProductFailed
from peers import PeerFailed
from peers.source import Source
from servers.cache import MissingServer
from servers.process import ServerFailed
from speed import plots, report
from speed.bench import FULL_ROWS, Bench
from speed.parts import PARTS
from speed.results import Results

ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/speed", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="of a drain; other parts follow it")
    parser.add_argument("--full", action="store_true", help="also a backlog of 10,000,000 rows")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    results = Results()
    began = time.monotonic()
    seconds: dict[str, int] = {}
    # A round of 10,000,000 rows that wait while the product is suspended or starts takes longer than the server's
    # patience with a silent client.
    with Source(settings={"wal_sender_timeout": "0"}) as source:
        bench = Bench(source, results, options.rows, options.rounds, options.full)
        with source.connect() as connection:
            found = connection.execute("SHOW server_version").fetchone()
            bench.versions["PostgreSQL"] = str(found and found[0])
        for part in options.parts or PARTS:
            at = time.monotonic()
            try:
                PARTS[part](bench)
            except (ProductFailed, PeerFailed, MissingServer, ServerFailed, TimeoutError) as error:
                results.fail(str(error).splitlines()[0], part)
                bench.say(f"THE PART {part} FAILED: {error}")
            seconds[part] = round(time.monotonic() - at)
    parameters = {
        "commit": stage.commit(),
        "implementation": ", ".join(sorted(bench.impls)),
        "rows": options.rows,
        "rounds": options.rounds,
        "seconds of each part": seconds,
        "versions": {**report.versions(), **bench.versions},
    }
    good = report.write(options.out, results, parameters, time.monotonic() - began)
    plots.draw(options.out / "speed", results)
    print(f"{options.out / 'speed.md'}: {'holds' if good else 'DOES NOT HOLD'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
