"""The command line. ``main`` is the entry point of the distribution.

Two kinds of commands: those that take a configuration FILE and do the work themselves (run, check, state), and those
that talk to a running process over HTTP (status, sinks, backlog, dead-letters, backfill, replay, reindex). Only the
command that is called imports what it needs: ``spillway --help`` starts at once.

Exit status: 0; 1 for findings and for what failed; 2 for configuration and usage errors. Errors are one line on
standard error, ``error: what; remedy [code]``, configuration errors ``FILE:LINE: KEY: what``. Nothing but the answer
goes to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spillway.errors import ConfigError, SpillwayError


class UsageError(SpillwayError):
    """The command was given something it cannot work with: exit status 2."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__("usage", what, remedy)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status, or raises SystemExit with it."""
    from spillway.cli.app import app  # noqa: PLC0415 - it imports this package

    try:
        app(args=argv, prog_name="spillway")
    except SpillwayError as error:
        print(_line(error), file=sys.stderr)
        return 2 if isinstance(error, ConfigError | UsageError) else 1
    return 0


def _line(error: SpillwayError) -> str:
    if isinstance(error, ConfigError):
        return str(error)  # a line for each problem, and never a value of the file

    from spillway.logs import conceal  # noqa: PLC0415 - structlog is not needed for what succeeds

    text = f"error: {conceal(' '.join(str(error).split()))}"
    return text if isinstance(error, UsageError) else f"{text} [{error.code}]"
