"""The default of memory.limit_mb, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from spillway.config.memory import default_limit_mb

GB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"


def machine(tmp_path: Path, cgroup: str | None, files: dict[str, str], physical: int) -> int:
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    if cgroup is not None:
        (proc / "self").mkdir(parents=True)
        (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = mount / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return default_limit_mb(proc, mount, physical)


@pytest.mark.parametrize(
    ("cgroup", "files", "physical", "expected"),
    [
        pytest.param("0::/\n", {"memory.max": str(GB)}, 8 * GB, 512, id="v2 in a container"),
        pytest.param("0::/\n", {"memory.max": "max"}, 8 * GB, 4096, id="v2 without a limit"),
        pytest.param("0::/a/b\n", {"a/memory.max": str(GB), "a/b/memory.max": "max"}, 8 * GB, 512, id="v2 parent"),
        pytest.param(
            "0::/a/b\n", {"a/memory.max": str(2 * GB), "a/b/memory.max": str(GB)}, 8 * GB, 512, id="v2 the smallest"
        ),
        pytest.param(
            "5:cpu:/x\n3:memory:/docker/1\n0::/\n",
            {"memory/docker/1/memory.limit_in_bytes": str(GB)},
            8 * GB,
            512,
            id="v1 from outside",
        ),
        pytest.param(
            "3:memory:/docker/1\n", {"memory/memory.limit_in_bytes": str(GB)}, 8 * GB, 512, id="v1 in a container"
        ),
        pytest.param(
            "3:cpu,memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT_V1}, 8 * GB, 4096, id="v1 without a limit"
        ),
        pytest.param("0::/\n", {"memory.max": str(64 * GB)}, 8 * GB, 4096, id="limit above the machine"),
        pytest.param("0::/\n", {"memory.max": str(GB)}, 0, 512, id="machine unknown"),
        pytest.param(None, {}, 8 * GB, 4096, id="no /proc"),
        pytest.param(None, {}, 0, 512, id="nothing known"),
        pytest.param("0::/\n", {"memory.max": "1000000"}, 8 * GB, 16, id="at least 16"),
        pytest.param("0::/\n", {"memory.max": "junk"}, 0, 512, id="junk"),
    ],
)
def test_half_of_what_there_is(tmp_path: Path, cgroup: str | None, files: dict[str, str], physical: int, expected: int):
    assert machine(tmp_path, cgroup, files, physical) == expected


def test_this_machine() -> None:
    assert default_limit_mb() >= 16
