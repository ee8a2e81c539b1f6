"""``scripts/servers``: gets the servers of the tests, says which are there.

scripts/servers install [NAME ...]    downloads what is missing (without a name, all that the tests need)
scripts/servers install bench         downloads the tools that bench/peers/ compares with
scripts/servers list                  each server's name, and where it is or that it is missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from servers import debezium, opensearch, pgsync, postgres
from servers.cache import InstallFailed, cache_folder
from servers.process import ServerFailed

INSTALLERS: dict[str, Callable[[], Path]] = {
    **{f"postgres-{version}": partial(postgres.install, version) for version in postgres.VERSIONS},
    opensearch.NAME: opensearch.install,
}
BENCH_INSTALLERS: dict[str, Callable[[], Path]] = {
    debezium.NAME: debezium.install,
    pgsync.NAME: pgsync.install,
}
BENCH = "bench"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/servers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    all_installers = INSTALLERS | BENCH_INSTALLERS
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install")
    install.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*all_installers, BENCH]))
    commands.add_parser("list")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name in all_installers:
            entry = cache_folder() / name
            print(f"{name:24} {entry if entry.is_dir() else 'missing'}")
        return 0
    names = [name for word in arguments.names or INSTALLERS for name in (BENCH_INSTALLERS if word == BENCH else [word])]
    unknown = [name for name in names if name not in all_installers]
    if unknown:
        parser.error(f"no such server: {', '.join(unknown)}; there are {', '.join([*all_installers, BENCH])}")
    for name in names:
        try:
            all_installers[name]()
        except (InstallFailed, ServerFailed) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
