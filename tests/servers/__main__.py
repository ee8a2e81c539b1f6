"""``scripts/servers``: gets the servers of the tests, says which are there.

scripts/servers install [NAME ...]    downloads what is missing (all of them without a name)
scripts/servers list                  each server's name, and where it is or that it is missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from servers import opensearch, postgres
from servers.cache import InstallFailed, cache_folder
from servers.process import ServerFailed

INSTALLERS: dict[str, Callable[[], Path]] = {
    **{f"postgres-{version}": partial(postgres.install, version) for version in postgres.VERSIONS},
    opensearch.NAME: opensearch.install,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/servers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install")
    install.add_argument("names", nargs="*", metavar="NAME", help=", ".join(INSTALLERS))
    commands.add_parser("list")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name in INSTALLERS:
            entry = cache_folder() / name
            print(f"{name:24} {entry if entry.is_dir() else 'missing'}")
        return 0
    unknown = [name for name in arguments.names if name not in INSTALLERS]
    if unknown:
        parser.error(f"no such server: {', '.join(unknown)}; there are {', '.join(INSTALLERS)}")
    for name in arguments.names or INSTALLERS:
        try:
            INSTALLERS[name]()
        except (InstallFailed, ServerFailed) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
