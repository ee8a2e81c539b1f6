"""`spillway demo`, as its audience runs it: it ends well, within its two minutes, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "spillway", "demo"]


@contextmanager
def _demo(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        COMMAND,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_interruptible,  # noqa: PLW1509 - it does nothing but this one call
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # it ends what it started
                process.wait(30)


def _interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A short path that another user may enter: PostgreSQL runs there as nobody when the test runs as root."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def _processes_in(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_it_ends_well_within_two_minutes() -> None:
    with _temporary_folder() as folder, _demo(folder) as process:
        began = time.monotonic()
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
        assert time.monotonic() - began < 120, output
        assert "FAILED" not in output
        assert not _processes_in(folder)
        assert not list(folder.iterdir())


def test_interrupted_it_leaves_nothing_behind() -> None:
    with _temporary_folder() as folder, _demo(folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("1."):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130, output
        assert not _processes_in(folder)
        assert not list(folder.iterdir())
