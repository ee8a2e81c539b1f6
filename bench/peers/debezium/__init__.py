"""Debezium's embedded engine, driven by ``Drain.java`` with ``engine.properties``: both lie beside this file.

The consumer counts the records, marks each and the batch, and does nothing else. The JVM has its defaults (a quarter of
the machine's memory at most, G1 or Serial as it sees fit); the records are JSON, and without schemas unless asked.

**Time** is from the first batch that the consumer gets to the last change: starting a JVM and a connector, some
seconds, is left out, which is in Debezium's favour. ``detail["second_half_rows_per_second"]`` is that of the second
half of the rows: with 2,000,000 of them the JVM is warm. CPU and peak memory are of the whole process.

``Callbacks`` is for latency: it runs the engine and tells when the consumer got each change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Self

from peers import Measured, PeerFailed
from peers.source import Slot
from peers.watch import Process, watched
from servers import debezium
from servers.cache import ensure, installed, run
from servers.process import wait_until

_MAIN = Path(__file__).with_name("Drain.java")
_PROPERTIES = Path(__file__).with_name("engine.properties")


def _classpath() -> str:
    libs = installed(debezium.NAME) / "libs"

    def build(folder: Path) -> None:
        shutil.copy(_MAIN, folder)
        run("javac", "-cp", f"{libs}/*", "-d", "classes", _MAIN.name, cwd=folder)

    digest = hashlib.sha256(_MAIN.read_bytes()).hexdigest()[:12]
    return f"{ensure(f'bench-debezium-{digest}', build) / 'classes'}:{libs}/*"


def _command(
    slot: Slot, rows: int, folder: Path, settings: Mapping[str, str], jvm_options: Sequence[str] = ()
) -> list[str | Path]:
    """Writes the run's properties: those of the repository, then what belongs to the run."""
    own = {
        "database.hostname": slot.host,
        "database.port": str(slot.port),
        "database.user": slot.user,
        "database.dbname": slot.database,
        "slot.name": slot.name,
        "publication.name": slot.publication,
        "offset.storage.file.filename": str(folder / "offsets"),
        **settings,
    }
    properties = folder / "run.properties"
    properties.write_text(_PROPERTIES.read_text() + "".join(f"{name}={value}\n" for name, value in own.items()))
    return ["java", *jvm_options, "-cp", _classpath(), "Drain", properties, str(rows)]


def _environment() -> dict[str, str]:
    """No JAVA_TOOL_OPTIONS or the like of the caller's."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def drain(
    slot: Slot,
    *,
    schemas: bool = False,
    settings: Mapping[str, str] | None = None,
    jvm_options: Sequence[str] = (),
) -> Measured:
    """``settings`` are further properties and ``jvm_options`` such as ``-Xmx512m``: to see what tuning gives."""
    switch = {f"{part}.converter.schemas.enable": str(schemas).lower() for part in ("key", "value")}
    with tempfile.TemporaryDirectory(prefix="spillway-debezium-") as name:
        folder = Path(name)
        command = _command(slot, slot.rows, folder, {**switch, **(settings or {})}, jvm_options)
        done = watched(command, slot, folder=folder, env=_environment())
    lines = [line for line in done.output.splitlines() if line.startswith('{"rows"')]
    if not lines:
        raise PeerFailed(f"the engine did not say what it saw:\n{done.output[-4000:]}")
    told = json.loads(lines[-1])
    if told["rows"] != slot.rows:
        raise PeerFailed(f"the engine handed over {told['rows']} changes of {slot.rows}")
    return Measured(
        told["rows"],
        (told["end"] - told["first"]) / 1e9,
        done.cpu_seconds,
        done.peak_rss_bytes,
        {
            "version": debezium.VERSION,
            "schemas": schemas,
            "settings": dict(settings or {}),
            "jvm_options": list(jvm_options),
            "second_half_rows_per_second": (told["rows"] - told["rows"] // 2) / ((told["end"] - told["half"]) / 1e9),
            "start_seconds": (told["first"] - told["started"]) / 1e9,
            "whole_process_seconds": done.seconds,
            "batches": told["batches"],
            "bytes": told["bytes"],
            "walsender_cpu_seconds": done.walsender_cpu_seconds,
        },
    )


class Callbacks:
    """The engine at work, with the time of each callback: ``with Callbacks(slot, rows) as engine``.

    It ends after ``rows`` changes, those that waited included. ``seen`` gives what came so far: (microseconds since
    1970, the key as JSON), in the order of the callbacks.
    """

    def __init__(self, slot: Slot, rows: int, *, poll_interval_ms: int | None = None) -> None:
        self._slot, self._rows = slot, rows
        self._settings = {} if poll_interval_ms is None else {"poll.interval.ms": str(poll_interval_ms)}
        self._folder = tempfile.TemporaryDirectory(prefix="spillway-debezium-")
        self._times = Path(self._folder.name) / "times"
        self._process: Process | None = None
        self._ended = False

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        command = [*_command(self._slot, self._rows, folder, self._settings), self._times]
        self._process = Process(command, folder=folder, env=_environment())
        return self

    def seen(self) -> list[tuple[int, str]]:
        if not self._times.exists():
            return []
        lines = self._times.read_text().split("\n")[:-1]
        return [(int(micros), key) for micros, key in (line.split(" ", 1) for line in lines)]

    def wait_seen(self, rows: int, *, seconds: float = 60.0) -> list[tuple[int, str]]:
        """Waits until the consumer got so many changes; the first ones show that the engine streams."""
        assert self._process is not None

        def there() -> bool:
            assert self._process is not None
            if not self._ended:
                self._ended = not self._process.sample(0)
            return self._ended or len(self.seen()) >= rows

        wait_until(there, f"{rows} changes at the consumer", seconds=seconds)
        got = self.seen()
        if len(got) < rows:
            raise PeerFailed(f"the engine ended after {len(got)} changes:\n{self._process.output[-4000:]}")
        return got

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.finish(SIGKILL)
        self._folder.cleanup()
