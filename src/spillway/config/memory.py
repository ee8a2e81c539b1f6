"""How much memory this process may count on, when the file does not say: half of what the container or machine has.

Sources: Linux' cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`) documentation. A limit anywhere on the way
from the process's cgroup to the root binds, so the smallest counts. In a container without a cgroup namespace the path
in `/proc/self/cgroup` does not exist below the mount; the root of the mount is then the container's own. "No limit" is
`max` in v2 and a number above any machine's memory in v1, which the machine's own memory undercuts.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

DEFAULT_MB = 512  # where nothing is known
MB = 1024 * 1024


def default_limit_mb(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup"), physical_bytes: int | None = None
) -> int:
    """Half of the container's limit, else of the machine's memory; 512 where neither is known. In MiB, at least 16."""
    limits = _cgroup_limits(proc, cgroup)
    physical = _physical_bytes() if physical_bytes is None else physical_bytes
    if physical > 0:
        limits.append(physical)
    return max(16, min(limits) // 2 // MB) if limits else DEFAULT_MB


def _cgroup_limits(proc: Path, cgroup: Path) -> list[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    limits: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _limits_up(cgroup, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_up(cgroup / "memory", path, "memory.limit_in_bytes")
    return limits


def _limits_up(mount: Path, path: str, name: str) -> list[int]:
    inside = PurePosixPath(path.lstrip("/"))
    limits = []
    for folder in (inside, *inside.parents):
        try:
            text = (mount / folder / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            limits.append(int(text))
    return limits


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
