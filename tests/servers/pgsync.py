"""pgsync, in a virtual environment of its own. For the benches alone (``install bench``)."""

from __future__ import annotations

import sys
from pathlib import Path

from servers.cache import ensure, installed, run

VERSION = "7.3.0"
NAME = f"pgsync-{VERSION}"


def install() -> Path:
    """Installs pgsync; returns the cache's entry. Its program is started as ``bin/python bin/pgsync``."""

    def build(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder, cwd=folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", f"pgsync=={VERSION}", cwd=folder)

    return ensure(NAME, build)


def program() -> list[str | Path]:
    """What starts it. The folder was renamed since its scripts were written, so their first lines name a wrong one."""
    entry = installed(NAME)
    return [entry / "bin" / "python", entry / "bin" / "pgsync"]
