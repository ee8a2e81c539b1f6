"""A process whose sinks have functions: what went in by SQL, what came out, and what was parked."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backfill.site import Site, file_sink, sink, sqlite_sink
from oracle.endpoint import json_lines
from oracle.product import Product, spillway_command
from servers.reaper import family

__all__ = ["Shaped", "file_sink", "python", "sink", "sqlite_sink"]

Json = dict[str, Any]


def python(name: str, kind: str, code: str, **more: object) -> Json:
    """``code`` is the body of the function."""
    entry = "route" if kind == "routing" else kind
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    return {
        "name": name, "type": kind, "code": f"def {entry}(action, record, changes, metadata):\n{body}\n", **more,
    }  # fmt: skip


class Shaped(Site):
    """``with Shaped(...) as place``; the tables of ``schema`` are all published."""

    def __init__(
        self,
        conninfo: str,
        folder: Path,
        sinks: Sequence[Mapping[str, object]],
        functions: Sequence[Mapping[str, object]] = (),
        *,
        schema: str = "",
        endpoint_url: str | None = None,
        **sections: object,
    ) -> None:
        """``sections``: more of the file's top level."""
        self._sections: Json = {"functions": list(functions), **sections}
        if endpoint_url is not None:
            self._sections["http_endpoints"] = [{"name": "recorder", "url": endpoint_url}]
        super().__init__(conninfo, folder, sinks)
        if schema:
            self.sql(schema)
        self.sql("create publication spillway for all tables")

    def _config(self, sinks: Sequence[Mapping[str, object]]) -> dict[str, object]:
        return {**super()._config(sinks), **self._sections}

    def came(self, name: str, count: int) -> list[Any]:
        """The lines of a file sink, once there are so many: no fewer, no more."""
        self.wait(lambda: len(self.lines(name)) >= count, f"{count} lines of {name}")
        self.drained(name)
        lines = self.lines(name)
        assert len(lines) == count, [str(line)[:100] for line in lines]
        return lines

    def parked(self, name: str, count: int) -> list[Json]:
        """As ``spillway backlog list`` shows them, once so many keys are parked."""
        self.wait(lambda: self.status(name)["parked_keys"] >= count, f"{count} parked keys of {name}")
        found = parked(self.product, name)
        assert len(found) == count, found
        return found

    def workers(self) -> list[int]:
        """The pids of what the process has started."""
        return [pid for pid in family(self.product.pid) if pid != self.product.pid]


def bodies(log: Path, path: str) -> list[Json]:
    """The requests that a recorder has written down below a path, their bodies parsed."""
    return [
        {**line, "body": json.loads(line["body"] or "null")}
        for line in json_lines(log)
        if "mark" not in line and str(line["path"]).startswith(path)
    ]


def parked(product: Product, sink: str) -> list[Json]:
    """The parked keys of a sink, as ``spillway backlog list`` shows them."""
    command = [*spillway_command(), "backlog", "list", sink, "--json", "--config", str(product.file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))
