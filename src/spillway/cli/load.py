"""The configuration for a command, and the commands that only ask: `check` and `adopt`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spillway import config as configuration
from spillway.errors import ConfigError, Finding, SpillwayError

if TYPE_CHECKING:
    from spillway.config import Config


def load(file: Path) -> Config:
    """The configuration, its warnings on standard error."""
    config = configuration.load(file, os.environ)
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return config


def check(file: Path) -> Sequence[Finding]:
    """What is wrong outside of the file. A database that cannot be asked is a finding too."""
    config = load(file)

    from spillway.source import preflight  # noqa: PLC0415 - psycopg is not needed to find the file wrong

    findings: list[Finding] = []
    if config.functions:
        from spillway.cli.trial import findings as of_functions  # noqa: PLC0415 - heavy

        findings += of_functions(config)
    try:
        findings += asyncio.run(preflight.check(config))
        if not any(finding.severity == "error" for finding in findings):
            from spillway.engine import identity_findings  # noqa: PLC0415 - heavy

            findings += asyncio.run(identity_findings(config))
        return findings
    except ConfigError:
        raise
    except SpillwayError as error:
        return [*findings, Finding(error.code, error.what, error.remedy)]


def adopt(file: Path) -> list[str]:
    """Go on with the state as it is, by command: what was done, in words."""
    from spillway import engine  # noqa: PLC0415 - heavy

    return engine.adopt(load(file))
