"""One peer alone: ``python bench/peers/run.py PEER [--rows N] [--table NAME] ...`` prints a ``Measured`` as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers import Measured, bare, debezium, recvlogical
from peers.source import TABLES, Slot, Source

PEERS: dict[str, Callable[[Slot], Measured]] = {
    "recvlogical": recvlogical.drain,
    "recvlogical-unix": lambda slot: recvlogical.drain(slot, unix=True),
    "bare": bare.drain,
    "bare-unix": lambda slot: bare.drain(slot, unix=True),
    "limit": lambda slot: bare.drain(slot, pause_us=1000),
    "limit-unix": lambda slot: bare.drain(slot, pause_us=1000, unix=True),
    "debezium": debezium.drain,
    "debezium-schemas": lambda slot: debezium.drain(slot, schemas=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="+", metavar="PEER", choices=PEERS, help=", ".join(PEERS))
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=10_000, help="rows to a transaction")
    parser.add_argument("--table", choices=TABLES, default="rows_200")
    options = parser.parse_args()
    with Source() as source:
        waiting = source.fill([TABLES[options.table]], options.rows, batch=options.batch)
        for name in options.peers:
            with source.copy(waiting) as slot:
                measured = PEERS[name](slot)
            rate = round(measured.rows_per_second)
            print(json.dumps({"peer": name, "rows_per_second": rate, **asdict(measured)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
