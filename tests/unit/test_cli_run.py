"""The commands that work on a configuration file; for `run` a real process, real signals and a real port."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import httpx
import pytest

import spillway.engine
import spillway.source
from spillway.cli import main
from spillway.errors import Finding, SourceUnavailable

CONFIG = """\
server: {listen: "127.0.0.1:0", token: "wagon-of-salt"}
state: {url: "sqlite:///state.db"}
databases:
  - name: app
    url: "postgresql://postgres:hidden-password@127.0.0.1:1/app"
    slot: {name: spillway, create_if_not_exists: true}
    publication: {name: spillway, create_if_not_exists: true}
sinks:
  - name: copy
    database: app
    source: {include_tables: [public.jobs]}
    destination: {type: stdout}
"""

# A process of its own, with an engine that does what its file says.
PROCESS = """
import asyncio, sys, time, types
sys.path.insert(0, {tests!r})
from fake_engine import FakeEngine
from spillway.errors import SpillwayError

class Engine(FakeEngine):
    def __init__(self, config):
        super().__init__()

    async def run(self, stop):
        {body}

engine = types.ModuleType("spillway.engine")
engine.Engine = Engine
sys.modules["spillway.engine"] = engine
from spillway.cli import main
sys.exit(main(sys.argv[1:]))
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spillway.yml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def start(file: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def run(body: str, *options: str) -> subprocess.Popen[str]:
        script = PROCESS.format(tests=str(Path(__file__).parent), body=body)
        command = [sys.executable, "-c", script, "run", str(file), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def listening(process: subprocess.Popen[str]) -> dict[str, object]:
    """The log line that says where it listens."""
    assert process.stderr is not None
    line = process.stderr.readline()
    event: dict[str, object] = json.loads(line)
    assert event["event"] == "listening", line
    return event


def test_run_serves_and_stops_on_a_signal(start: Start) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start("await stop.wait()", "--json")
        url = f"http://127.0.0.1:{listening(process)['port']}"
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/api/status").status_code == 401
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "")
        assert json.loads(err)["event"] == "stopped"


@pytest.mark.parametrize("body", ["await asyncio.sleep(3600)", "time.sleep(3600)", "\n        while True: pass"])
def test_a_second_signal_ends_it_at_once(start: Start, body: str) -> None:
    """Also when the loop no longer turns."""
    process = start(f"print('up', flush=True); {body}" if "\n" not in body else f"print('up', flush=True){body}")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    # The first may still be pending when the second comes, and two of a kind merge into one: use both kinds.
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_what_cannot_go_on_is_one_line(start: Start) -> None:
    process = start("raise SpillwayError('slot_foreign', 'the slot is of\\nanother', 'run `spillway state adopt`')")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "error: the slot is of another; run `spillway state adopt` [slot_foreign]"
    assert "Traceback" not in err


def test_a_port_in_use(start: Start, file: Path) -> None:
    first = start("await stop.wait()", "--json")
    port = listening(first)["port"]
    file.write_text(CONFIG.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    second = start("await stop.wait()")
    _, err = second.communicate(timeout=30)
    assert second.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: it is in use;" in err


def test_run_prints_the_warnings_of_the_configuration(start: Start, file: Path) -> None:
    file.write_text(CONFIG + "users: []\n")
    process = start("return")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err.startswith(f"warning: {file}:13: users: ")


# -- check and adopt -----------------------------------------------------------------------------------------------


def use_preflight(monkeypatch: pytest.MonkeyPatch, found: Callable[[], list[Finding]]) -> None:
    async def check(config: object) -> list[Finding]:
        await asyncio.sleep(0)
        return found()

    monkeypatch.setattr(spillway.source, "preflight", SimpleNamespace(check=check), raising=False)
    monkeypatch.setitem(sys.modules, "spillway.source.preflight", ModuleType("preflight"))

    async def identity_findings(config: object) -> list[Finding]:
        await asyncio.sleep(0)
        return []

    monkeypatch.setattr(spillway.engine, "identity_findings", identity_findings)


def run_check(*argv: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["check", *argv])
    return int(leaving.value.code or 0)


FINDING = Finding(
    "wal_level", "wal_level is replica", "ALTER SYSTEM SET wal_level = logical;\n-- restart", database="app"
)


def test_check_clean(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_preflight(monkeypatch, list)
    assert run_check(str(file)) == 0
    assert capsys.readouterr() == ("no findings\n", "")
    assert run_check("--json", str(file)) == 0
    assert capsys.readouterr() == ("[]\n", "")


def test_check_with_findings(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_preflight(monkeypatch, lambda: [FINDING])
    assert run_check(str(file)) == 1
    assert capsys.readouterr().out == (
        "error: wal_level (database app)\n"
        "  wal_level is replica\n"
        "    ALTER SYSTEM SET wal_level = logical;\n"
        "    -- restart\n"
        "1 finding\n"
    )
    assert run_check(str(file), "--json") == 1
    assert json.loads(capsys.readouterr().out) == [FINDING.as_json()]


def test_a_database_that_cannot_be_asked_is_a_finding(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> NoReturn:
        raise SourceUnavailable("unreachable", "connection refused", "start it")

    use_preflight(monkeypatch, fail)
    assert run_check(str(file), "--json") == 1
    assert [finding["code"] for finding in json.loads(capsys.readouterr().out)] == ["unreachable"]


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_check_of_a_wrong_file(file: Path, capsys: pytest.CaptureFixture[str], json_too: list[str]) -> None:
    file.write_text(CONFIG.replace("database: app", "databse: app").replace("type: stdout", "type: nonsense"))
    assert main(["check", str(file), *json_too]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert any(line.startswith(f"{file}:10: ") and line.endswith("did you mean database?") for line in err.splitlines())
    assert len(err.splitlines()) > 1
    assert "hidden-password" not in err
    assert main(["check", str(file.with_name("absent.yml")), *json_too]) == 2
    assert "absent.yml" in capsys.readouterr().err


def test_adopt(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ModuleType("spillway.engine")
    monkeypatch.setattr(engine, "adopt", lambda config: ["copy: epoch 2, gap from 0/10"], raising=False)
    monkeypatch.setitem(sys.modules, "spillway.engine", engine)
    monkeypatch.setattr("spillway.engine", engine, raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["state", "adopt", "-c", str(file)]) == 2
    assert capsys.readouterr() == ("", "error: this cannot be undone, and nobody is there to ask; add --yes\n")
    for argv, out in ((["--yes"], "copy: epoch 2, gap from 0/10\n"), (["-y", "--json"], '[\n  "copy: epoch 2, gap')):
        with pytest.raises(SystemExit) as leaving:
            main(["state", "adopt", "--config", str(file), *argv])
        assert not leaving.value.code
        assert capsys.readouterr().out.startswith(out)
