"""The commands that talk to a running process: real arguments, real HTTP, an engine without a database behind it."""

from __future__ import annotations

import asyncio
import json
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from fake_engine import EMPTY, SINK, FakeEngine
from pydantic import SecretStr

from spillway import __version__
from spillway.api.app import create_app
from spillway.api.serve import bind, serve
from spillway.cli import load, main, output
from spillway.cli.app import SINK_COLUMNS
from spillway.store.base import Select

TOKEN = "wagon-of-salt"
KEYS = 1203  # three pages of a list


class Running:
    """A process that answers: uvicorn in a thread."""

    def __init__(self) -> None:
        self.engine = FakeEngine(KEYS)
        self.url = ""
        self.port = 0

    def serve(self, started: Future[None]) -> None:
        asyncio.run(self._serve(started))

    async def _serve(self, started: Future[None]) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        listening = bind("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        async with serve(create_app(self.engine, self.engine.metrics, TOKEN), listening):
            self.url = f"http://127.0.0.1:{self.port}"
            started.set_result(None)
            await self.stop.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running, started = Running(), Future[None]()
    thread = threading.Thread(target=running.serve, args=(started,))
    thread.start()
    started.result(30)
    yield running
    running.loop.call_soon_threadsafe(running.stop.set)
    thread.join(30)


@pytest.fixture
def running(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setenv("SPILLWAY_URL", server.url)
    monkeypatch.setenv("SPILLWAY_TOKEN", TOKEN)
    server.engine.calls.clear()
    server.engine.paused.clear()
    server.engine.pages = 0
    server.engine.export_fails = False
    return server


class Shell:
    """Runs commands in this process and keeps what they wrote."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        try:
            status = main(argv)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        out, err = self._capfd.readouterr()
        return status, out, err


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


# -- reading -------------------------------------------------------------------------------------------------------


def test_status(running: Running, shell: Shell) -> None:
    status, out, err = shell("status")
    assert (status, err) == (0, "")
    assert "memory 1.0 kB held of 536.9 MB" in out
    assert "16/B374D848" in out
    assert f"{SINK}: strict_dynamic_mapping_exception; mend the mapping of the index" in out
    assert f"{EMPTY}:" not in out


def test_status_as_json(running: Running, shell: Shell) -> None:
    status, out, _ = shell("status", "--json")
    assert (status, json.loads(out)) == (0, running.engine.status())


def test_sinks_list(running: Running, shell: Shell) -> None:
    status, out, _ = shell("sinks", "list")
    assert status == 0
    assert out.splitlines()[0].split() == list(SINK_COLUMNS)
    _, out, _ = shell("sinks", "list", "--json")
    assert [sink["name"] for sink in json.loads(out)] == [SINK, EMPTY]


@pytest.mark.parametrize("pile", ["backlog", "dead-letters"])
def test_list_streams_pages(running: Running, shell: Shell, pile: str) -> None:
    status, out, err = shell(pile, "list", SINK, "--json")
    assert (status, err) == (0, "")
    items = json.loads(out)
    assert [item["key"] for item in items] == [f"public.jobs:{n:05d}" for n in range(KEYS)]
    assert {"sink", "key", "reason", "attempts", "first_seen", "bytes"} <= items[0].keys()
    assert running.engine.pages == 3


def test_list_for_people_is_not_cut_in_a_pipe(running: Running, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    status, out, _ = shell("backlog", "list", SINK)
    assert status == 0
    assert sum("public.jobs:" in line for line in out.splitlines()) == KEYS
    assert "backlog [detail]" in out, "brackets are no markup"
    assert "…" not in out


def test_list_by_reason_and_of_nothing(running: Running, shell: Shell) -> None:
    _, out, _ = shell("backlog", "list", SINK, "--reason", "http_422", "--json")
    assert {item["reason"] for item in json.loads(out)} == {"http_422"}
    assert shell("backlog", "list", EMPTY, "--json")[:2] == (0, "[]\n")
    assert shell("dead-letters", "list", EMPTY)[:2] == (0, "nothing\n")


@pytest.mark.parametrize("pile", ["backlog", "dead-letters"])
def test_show(running: Running, shell: Shell, pile: str) -> None:
    status, out, _ = shell(pile, "show", SINK, "--key", "public.jobs:00001", "--json")
    assert (status, json.loads(out)["record"]) == (0, {"id": "public.jobs:00001", "n": 0})
    assert len(shell(pile, "show", SINK, "--key", "public.jobs:00001", "--limit", "5")[1].splitlines()) == 2
    status, out, err = shell(pile, "show", SINK, "--key", "a/b?c=d&e#\x1b[31m")
    assert (status, out) == (1, "")
    assert err == (f"error: nothing of key a/b?c=d&e#\\x1b[31m; see `spillway {pile} list {SINK}` [unknown_key]\n")


# -- changing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "call", "count"),
    [
        (["backlog", "retry", SINK, "--all"], ("retry", SINK, Select(all=True)), KEYS),
        (["backlog", "retry", SINK, "--key", "k:1"], ("retry", SINK, Select(key="k:1")), 0),
        (["backlog", "retry", "--reason", "mapping", SINK], ("retry", SINK, Select(reason="mapping")), 602),
        (["backlog", "discard", SINK, "--all", "--yes"], ("discard", SINK, Select(all=True)), KEYS),
        (["dead-letters", "retry", SINK, "--all"], ("retry_dead", SINK, Select(all=True)), KEYS),
        (["dead-letters", "discard", SINK, "-y", "--all"], ("discard_dead", SINK, Select(all=True)), KEYS),
    ],
)
def test_retry_and_discard(
    running: Running, shell: Shell, argv: list[str], call: tuple[str, str, Select], count: int
) -> None:
    status, out, err = shell(*argv, "--json")
    assert (status, json.loads(out), err) == (0, {"sink": SINK, "count": count}, "")
    assert running.engine.calls == [call]
    assert f"{SINK}: {count} " in shell(*argv)[1]


@pytest.mark.parametrize("given", [[], ["--all", "--key", "k"], ["--key", "k", "--reason", "r"]])
@pytest.mark.parametrize("verb", ["retry", "discard"])
def test_an_unclear_selection_is_a_usage_error(running: Running, shell: Shell, verb: str, given: list[str]) -> None:
    status, out, err = shell("backlog", verb, SINK, *given)
    assert (status, out) == (2, "")
    assert err == "error: what is meant is not clear; give exactly one of --key KEY, --reason REASON, --all\n"
    assert not running.engine.calls


@pytest.mark.parametrize("pile", ["backlog", "dead-letters"])
def test_discard_refuses_when_nobody_can_be_asked(
    running: Running, shell: Shell, pile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    status, out, err = shell(pile, "discard", SINK, "--all")
    assert (status, out) == (2, "")
    assert err.endswith("add --yes\n")
    assert not running.engine.calls


@pytest.mark.parametrize(("answer", "calls"), [("y\n", 1), ("n\n", 0), ("\n", 0)])
def test_discard_asks_on_a_terminal(running: Running, answer: str, calls: int) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "r+b", buffering=0) as terminal, open(theirs, "rb", buffering=0) as stdin:
        terminal.write(answer.encode())
        command = [sys.executable, "-m", "spillway.cli", "backlog", "discard", SINK, "--reason", "mapping"]
        done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=60, check=False, text=True)
    assert f"Discard for good, from the backlog of {SINK}: reason mapping?" in done.stderr
    assert "Discard" not in done.stdout
    assert (done.returncode == 0) == bool(calls)
    assert len(running.engine.calls) == calls


def test_pause_and_resume(running: Running, shell: Shell) -> None:
    assert shell("sinks", "pause", SINK) == (0, f"{SINK}: paused\n", "")
    assert running.engine.paused[SINK]
    assert shell("sinks", "resume", SINK) == (0, f"{SINK}: resumed\n", "")
    assert not running.engine.paused[SINK]
    assert json.loads(shell("sinks", "pause", SINK, "--json")[1]) == {"sink": SINK, "paused": True}


def test_export(running: Running, shell: Shell) -> None:
    status, out, err = shell("dead-letters", "export", SINK)
    assert (status, err) == (0, "")
    assert [json.loads(line)["record"]["id"] for line in out.splitlines()] == [
        f"public.jobs:{n:05d}" for n in range(KEYS)
    ]
    assert len(shell("dead-letters", "export", SINK, "--key", "public.jobs:00007")[1].splitlines()) == 1
    assert shell("dead-letters", "export", EMPTY) == (0, "", "")


def test_an_export_that_breaks_is_told(running: Running, shell: Shell) -> None:
    running.engine.export_fails = True
    status, _, err = shell("dead-letters", "export", SINK)
    assert status == 1
    assert err.startswith(f"error: the connection to {running.url} was cut;")


# -- when it goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["sinks", "pause", "nobody"], ["backlog", "list", "nobody"], ["dead-letters", "export", "nobody"]]
)
def test_an_unknown_sink(running: Running, shell: Shell, argv: list[str]) -> None:
    status, out, err = shell(*argv)
    assert (status, out) == (1, "")
    assert err == f"error: there is no sink nobody; choose {SINK} or {EMPTY} [unknown_sink]\n"


@pytest.mark.parametrize("name", ["..", "a/b", "a?b", "%2e%2e"])
def test_a_sink_is_always_one_part_of_the_path(running: Running, shell: Shell, name: str) -> None:
    assert shell("backlog", "retry", name, "--all")[0] == 1
    assert all(call == ("retry", name, Select(all=True)) for call in running.engine.calls)


@pytest.mark.parametrize("token", ["", "wrong", "wr\u00f6ng"])
def test_a_wrong_token(running: Running, shell: Shell, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("SPILLWAY_TOKEN", token)
    status, out, err = shell("status", "--json")
    assert (status, out) == (1, "")
    assert err.startswith("error: the token is missing or wrong; set SPILLWAY_TOKEN")
    assert "wrong" not in err.removeprefix("error: the token is missing or wrong")


def test_nobody_listens(shell: Shell) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = held.getsockname()[1]
        status, out, err = shell("status", "--url", f"127.0.0.1:{port}")
    assert (status, out) == (1, "")
    assert err == (
        f"error: nothing answers at http://127.0.0.1:{port}; "
        "start it with `spillway run FILE`, or say where it listens with --url or -c FILE [unreachable]\n"
    )


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://[::", "http://127.0.0.1:x", "http://127.0.0.1:99999"])
def test_an_address_that_is_none(shell: Shell, url: str) -> None:
    status, _, err = shell("status", "--url", url)
    assert status == 2
    assert "is no address of a spillway; give --url http://HOST:PORT" in err


def test_something_else_listens(shell: Shell) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:  # it answers 501 to everything
        url = f"http://127.0.0.1:{other.server_port}"
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        status, _, err = shell("status", "--url", url)
        thread.join(30)
    assert status == 1
    assert f"error: what answers at {url} is not spillway; correct --url [not_spillway]" in err


def test_the_address_of_the_configuration(running: Running, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """-c goes before SPILLWAY_URL, --url before -c; listening everywhere is asked through loopback."""
    server = SimpleNamespace(host="0.0.0.0", port=running.port, token=SecretStr(TOKEN))
    config = SimpleNamespace(server=server, warnings=[])
    monkeypatch.setattr(load.configuration, "load", lambda path, env: config, raising=False)
    monkeypatch.setenv("SPILLWAY_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("SPILLWAY_TOKEN")
    assert shell("sinks", "list", "--json", "-c", "spillway.yml")[0] == 0
    assert "127.0.0.1:1;" in shell("sinks", "list", "-c", "spillway.yml", "--url", "http://127.0.0.1:1")[2]


@pytest.mark.parametrize(
    "argv",
    [
        *(["nonsense"], ["run"], ["state", "adopt"], ["sinks", "pause"], ["status", "--nonsense"]),
        *(["backlog", "show", SINK], ["backlog", "show", SINK, "--key", "k", "--limit", "11"]),
    ],
)
def test_usage_errors_are_2(shell: Shell, argv: list[str]) -> None:
    status, out, err = shell(*argv)
    assert (status, out) == (2, "")
    assert "Usage: spillway" in err


def test_version(shell: Shell) -> None:
    assert shell("version") == (0, f"spillway {__version__}\n", "")
    assert shell("--version") == (0, f"spillway {__version__}\n", "")
    assert json.loads(shell("version", "--json")[1]) == {"version": __version__}


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from spillway.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'httpx', 'pydantic', 'psycopg', 'starlette', 'uvicorn', 'uvloop', 'rich', 'structlog', 'asyncio'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dead-letters" in done.stdout


# -- output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0 s"), (-4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h")),
        *((200_000, "2 d"), (None, "-"), ("x", "-")),
    ],
)
def test_seconds(value: object, shown: str) -> None:
    assert output.seconds(value) == shown


def test_ago_and_size() -> None:
    assert output.ago("1970-01-01T00:00:00Z", now=61.0) == "61 s ago"
    assert output.ago(None) == "-"
    assert [output.size(n) for n in (0, 999, 18_300, 5e9, None)] == ["0 B", "999 B", "18.3 kB", "5.0 GB", "-"]


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert output.printable("a\x1b[2J\nb\x9bc\u202ed é") == "a\\x1b[2J\\nb\\x9bc\\u202ed é"
