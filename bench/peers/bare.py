"""The bare socket reader: what a walsender can send to somebody who does nothing with it. See ``bare_reader.c``.

Eager, it reads whenever there is something. With ``pause_us=1000`` it sleeps a millisecond before each read, so that
it takes large bites and is not woken for every row: *the limit* of the benches. It is compiled once with gcc, into the
cache of the servers. Time is from START_REPLICATION to the end.

**Two regimes over TCP**, measured on two cores, 200 B rows, kernel's defaults otherwise. The walsender makes one send
for each row. While the window is open each becomes a segment of its own (500,000 to 900,000 of them for 1,000,000
rows), and the walsender pays for its whole way into the receiver's queue: 2.7 to 3.3 us a row, pauses or not. While the
window is closed a send only appends to what waits, and whoever reads pays for a few segments of 64 kB: 2.0 to 2.1 us,
4,000 to 17,000 segments. A window that is closed most of the time is had with a small buffer, set before connecting,
and a pause that empties it just slower than the walsender fills it: ``WINDOW_BYTES`` and ``WINDOW_PAUSE_US``. With the
buffer that the kernel sizes a run may fall into either regime, so the plain limit scatters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from peers import Measured, PeerFailed
from peers.source import Slot, lsn_number
from peers.watch import watched
from servers.cache import ensure, run

# The least CPU for the walsender of what was tried: 2.0 to 2.3 s for 1,000,000 rows.
WINDOW_PAUSE_US = 1000
WINDOW_BYTES = 128 << 10

_SOURCE = Path(__file__).with_name("bare_reader.c")


def program() -> Path:
    def build(folder: Path) -> None:
        shutil.copy(_SOURCE, folder)
        run("gcc", "-O2", "-Wall", "-o", "bare_reader", _SOURCE.name, cwd=folder)

    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    return ensure(f"bench-bare-reader-{digest}", build) / "bare_reader"


def drain(slot: Slot, *, pause_us: int = 0, receive_buffer_bytes: int = 0, unix: bool = False) -> Measured:
    host = slot.socket_dir if unix else slot.host
    to = (host, str(slot.port), slot.user, slot.database)
    what = (slot.name, slot.publication, str(lsn_number(slot.end_lsn)), str(pause_us), str(receive_buffer_bytes))
    with tempfile.TemporaryDirectory(prefix="spillway-bare-") as folder:
        done = watched([program(), *to, *what], slot, folder=Path(folder))
    told = json.loads(done.output)
    if told["rows"] != slot.rows:
        raise PeerFailed(f"the bare reader saw {told['rows']} rows of {slot.rows}")
    return Measured(
        told["rows"],
        told["seconds"],
        done.cpu_seconds,
        done.peak_rss_bytes,
        {
            "transport": "unix" if unix else "tcp",
            "pause_us": pause_us,
            "receive_buffer_bytes": receive_buffer_bytes,
            "bytes": told["bytes"],
            "reads": told["reads"],
            "walsender_cpu_seconds": done.walsender_cpu_seconds,
        },
    )
