"""A memory cgroup to run the product in, as a container's limit would hold it: over the limit it is killed.

Version 1 and 2 are detected; where neither can be written `CgroupUnavailable` says so and what to do.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path("/sys/fs/cgroup")


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here."""


@dataclass(frozen=True, slots=True)
class _Files:
    version: int
    parent: Path
    limit: str
    peak: str
    events: str  # holds a line "oom_kill N"


_V1 = _Files(1, ROOT / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_V2 = _Files(2, ROOT, "memory.max", "memory.peak", "memory.events")


def _detect() -> _Files:
    if (_V1.parent / _V1.limit).exists():
        return _V1
    controllers = ROOT / "cgroup.subtree_control"
    if controllers.exists():
        if "memory" not in controllers.read_text().split():
            with suppress(OSError):
                controllers.write_text("+memory")
        if "memory" in controllers.read_text().split():
            return _V2
    raise CgroupUnavailable(
        f"no memory controller below {ROOT} (neither v1 nor v2): run this as root on a machine, or in a container "
        "started with --privileged, where memory cgroups can be made"
    )


class MemoryCgroup:
    """``with MemoryCgroup(limit_bytes) as group``; processes enter through `command`."""

    def __init__(self, limit_bytes: int) -> None:
        self._files = _detect()
        self.version = self._files.version
        self.limit_bytes = limit_bytes
        self.folder = self._files.parent / f"spillway-bench-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir()
            (self.folder / self._files.limit).write_text(str(self.limit_bytes))
            if self.version == 2:
                with suppress(OSError):  # a kernel without swap accounting has no such file
                    (self.folder / "memory.swap.max").write_text("0")
        except OSError as error:
            raise CgroupUnavailable(f"{self.folder}: {error.strerror}: memory cgroups need root") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a process of ours that has not ended keeps it; the reaper ends that
            self.folder.rmdir()

    def command(self, command: list[str]) -> list[str]:
        """The same command, run inside. The process is the one that is spawned: the shell replaces itself."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int:
        """The most that was charged, page cache included; it never exceeds the limit, by the kernel's doing."""
        with suppress(OSError):
            return int((self.folder / self._files.peak).read_text())
        return -1  # v2 before Linux 5.19

    @property
    def oom_kills(self) -> int:
        for line in (self.folder / self._files.events).read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0
