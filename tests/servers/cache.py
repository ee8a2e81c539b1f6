"""Where servers are kept: one folder outside the working tree, filled once, shared by every run and checkout.

The folder is ``$SPILLWAY_TEST_CACHE``; without it ``~/.cache/spillway-tests``, and for root
``/var/cache/spillway-tests``: PostgreSQL runs as another user there, to whom root's home is closed.

An entry is built in a folder of its own and renamed into place, so an entry that exists is whole. Builders hold the
entry's lock file: two runs at once do not download twice or collide, and the lock of one that died is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

INSTALL_COMMAND = "make servers"


class MissingServer(Exception):
    """A server that a test needs is not in the cache; the text holds the command that gets it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not in {cache_folder()}: get it with `{INSTALL_COMMAND}`")


class InstallFailed(Exception):
    """A server could not be downloaded or prepared."""


def cache_folder() -> Path:
    configured = os.environ.get("SPILLWAY_TEST_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/spillway-tests")
    return Path.home() / ".cache" / "spillway-tests"


def installed(name: str) -> Path:
    """The folder of an entry, or ``MissingServer``."""
    entry = cache_folder() / name
    if not entry.is_dir():
        raise MissingServer(name)
    return entry


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the lock of an entry; says so when another process has it."""
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another process is at it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry, built by ``build(folder)`` if it is not there yet."""
    entry = cache_folder() / name
    if entry.is_dir():
        return entry
    with locked(name):
        if entry.is_dir():
            return entry
        unfinished = cache_folder() / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        began = time.monotonic()
        say(f"{name}: installing into {entry}")
        build(unfinished)
        unfinished.rename(entry)
        say(f"{name}: ready after {time.monotonic() - began:.1f} s")
    return entry


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, user: str | None = None) -> str:
    """Runs one step of an installation, and shows its output if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise InstallFailed(f"`{command[0]}` is not on this machine ({error})") from error
    if done.returncode != 0:
        shown = " ".join(str(word) for word in command)
        raise InstallFailed(f"`{shown}` ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
