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
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import EMPTY, SINK, FakeEngine, backfill
from pydantic import SecretStr

from spillway import __version__
from spillway.api.app import create_app
from spillway.api.serve import bind, serve
from spillway.cli import load, main, output, progress
from spillway.cli.app import SINK_COLUMNS
from spillway.config import BackfillOrder, ReindexOrder, TableName
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), ("Traceback:\n  line 1\n", "Traceback: line 1"), ("x" * 20, "x" * 20), ("x" * 21, "x" * 19 + "…")],
)
def test_a_long_detail_is_one_line_and_cut(value: str | None, shown: str) -> None:
    assert output.line(value, 20) == shown


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


# -- backfills -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(running: Running, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Without what earlier tests started, and without waiting between two looks."""
    engine = running.engine
    engine.started, engine.progress, engine.reindexed = [backfill("b1", state="completed", rows=10_000)], [], []
    engine.orders.clear()
    engine.changes.clear()
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0)
    return engine


STEPS = [
    {"rows_processed_count": 7500, "waiting": "the sink is full"},
    {"state": "paused", "waiting": ""},
    {"state": "active", "waiting": "the sink is full"},
    {"state": "completed", "rows_processed_count": 10_000, "waiting": ""},
]


def test_start_a_backfill(fresh: FakeEngine, shell: Shell) -> None:
    assert shell("backfill", "start", SINK) == (0, f"{SINK}: backfill b2 of public.jobs started\n", "")
    options = ["--where", "state = 'x'", "--parallel", "4", "--max-rows-per-second", "100"]
    options += ["--sort-column", "id", "--start", "-5"]
    status, out, _ = shell("backfill", "start", SINK, "jobs", "shop.users", *options, "--json")
    assert status == 0
    assert [item["table"] for item in json.loads(out)] == ["public.jobs", "shop.users"]
    assert shell("backfill", "start", SINK, "--gap")[0] == 0
    assert [order for _, order in fresh.orders] == [
        BackfillOrder(),
        BackfillOrder(
            tables=(TableName("public", "jobs"), TableName("shop", "users")),
            where="state = 'x'",
            sort_column="id",
            start_position="-5",
            parallel=4,
            max_rows_per_second=100,
        ),
        BackfillOrder(gap=True),
    ]


def test_start_and_wait_tells_what_changes(fresh: FakeEngine, shell: Shell) -> None:
    fresh.progress = list(STEPS)
    status, out, err = shell("backfill", "start", SINK, "--wait")
    assert (status, err) == (0, "")
    active = "public.jobs: active, 7500 rows of about 10000 (75 %), 500 rows/s, 15 s left; the sink is full"
    assert out.splitlines() == [
        f"{SINK}: backfill b2 of public.jobs started",
        active,
        "public.jobs: paused, 7500 rows of about 10000 (75 %)",
        active,
        "public.jobs: completed, 10000 rows",
    ]
    fresh.progress = list(STEPS)
    _, out, _ = shell("backfill", "start", SINK, "--wait", "--json")
    assert [item["state"] for item in json.loads(out)] == ["completed"]


@pytest.mark.parametrize(("state", "error"), [("failed", "permission denied"), ("cancelled", None)])
def test_waiting_for_one_that_fails(fresh: FakeEngine, shell: Shell, state: str, error: str | None) -> None:
    fresh.progress = [{"state": state, "error": error, "waiting": "", "seconds_left": None}]
    status, out, err = shell("backfill", "start", SINK, "--wait")
    assert status == 1
    assert err == f"error: public.jobs: {error or state} [backfill_failed]\n"
    assert out.splitlines()[-1].startswith(f"public.jobs: {state}, 2500 rows")


def test_watch(fresh: FakeEngine, shell: Shell) -> None:
    assert shell("backfill", "watch", SINK) == (0, "nothing under way\n", "")
    assert shell("backfill", "watch", SINK, "b1")[1].startswith("public.jobs: completed, 10000 rows")
    shell("backfill", "start", SINK, "jobs", "users")
    fresh.progress = [{}, {}, {"state": "completed"}]
    status, out, _ = shell("backfill", "watch", SINK)
    assert (status, out.count(": active, "), out.count(": completed, ")) == (0, 2, 2)
    shell("backfill", "start", SINK, "jobs")
    fresh.progress = [{}, {"state": "failed", "error": "no"}]
    assert shell("backfill", "watch", SINK, "jobs")[0] == 1


def test_watch_on_a_terminal(fresh: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.started.append(backfill("b2"))
    fresh.progress = [{}, {}, {"state": "completed", "waiting": ""}]
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", "200")
    command = [sys.executable, "-m", "spillway.cli", "backfill", "watch", SINK]
    with open(ours, "rb", buffering=0) as terminal:
        with open(theirs, "wb", buffering=0) as stdout:
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False, text=True)
        shown = terminal.read(100_000).decode()
    assert (done.returncode, done.stderr) == (0, "")
    assert "public.jobs" in shown
    assert "active, 2500 rows of about 10000 (25 %), 500 rows/s, 15 s left" in shown.replace("\r\n", "")
    assert "completed, 2500 rows" in shown


def test_list_backfills(fresh: FakeEngine, shell: Shell) -> None:
    assert shell("backfill", "list") == (0, "nothing under way; --all lists what has ended\n", "")
    assert shell("backfill", "list", EMPTY, "--all") == (0, "nothing\n", "")
    shell("backfill", "start", SINK)
    _, out, _ = shell("backfill", "list", SINK)
    assert out.splitlines()[1].split() == [
        *(SINK, "public.jobs", "b2", "command", "active", "2500", "10000", "25", "%", "500", "15", "s"),
        *("the", "sink", "is", "10000", "messages", "behind"),
    ]
    assert len(shell("backfill", "list", "--all")[1].splitlines()) == 3
    assert [item["id"] for item in json.loads(shell("backfill", "list", "--all", "--json")[1])] == ["b1", "b2"]


@pytest.mark.parametrize(("verb", "state"), [("pause", "paused"), ("resume", "active"), ("cancel", "cancelled")])
def test_change_a_backfill(fresh: FakeEngine, shell: Shell, verb: str, state: str) -> None:
    shell("backfill", "start", SINK)
    for name in ("b2", "jobs", "public.jobs"):
        expected = f"{SINK}: backfill b2 of public.jobs is {state}\n"
        assert shell("backfill", verb, SINK, name) == (0, expected, "")
    assert fresh.changes == [(SINK, "b2", verb)] * 3
    assert json.loads(shell("backfill", verb, SINK, "b2", "--json")[1])["state"] == state
    status, _, err = shell("backfill", verb, SINK, "a/b")
    assert (status, err) == (1, "error: there is no backfill a/b; see the list [unknown_backfill]\n")


@pytest.mark.parametrize(
    ("argv", "order"),
    [
        (["--key", "1", "--key", "public.jobs:2"], {"keys": (("1",), ("2",))}),
        (["--key", "a\\:b:c"], {"keys": (("a:b", "c"),)}),
        (["--from", "1:a", "--to", "9:z"], {"from_key": ("1", "a"), "to_key": ("9", "z")}),
        (["--from", "-5"], {"from_key": ("-5",)}),
        (["--where", "id > 5", "--parallel", "2"], {"where": "id > 5", "parallel": 2}),
        (
            ["--since", "2026-01-02T03:04+01:00", "--column", "updated_at"],
            {"since": datetime(2026, 1, 2, 2, 4, tzinfo=UTC), "sort_column": "updated_at"},
        ),
    ],
)
def test_replay(fresh: FakeEngine, shell: Shell, argv: list[str], order: dict[str, object]) -> None:
    expected = f"{SINK}: backfill b2 of public.jobs started\n"
    assert shell("replay", SINK, "jobs", *argv) == (0, expected, "")
    assert fresh.orders == [(SINK, BackfillOrder(tables=(TableName("public", "jobs"),), replay=True, **order))]


def test_replay_since_a_time_of_this_machine_and_wait(fresh: FakeEngine, shell: Shell) -> None:
    fresh.progress = [{"state": "completed"}]
    status, out, _ = shell("replay", SINK, "jobs", "--since", "2026-01-02T03:04", "--wait")
    assert (status, out.splitlines()[-1].startswith("public.jobs: completed")) == (0, True)
    order = fresh.orders[0][1]
    assert isinstance(order, BackfillOrder)
    assert order.since == datetime.fromisoformat("2026-01-02T03:04").astimezone()


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "which rows is not clear; give one of --key (repeated), --from and --to, --where, --since"),
        (
            ["--key", "1", "--where", "x"],
            "which rows is not clear; give one of --key (repeated), --from and --to, --where",
        ),
        (
            ["--key", "1", "--column", "x"],
            "--column has no meaning without --since; give a time, or leave --column out",
        ),
        (["--since", "yesterday"], "yesterday is no time; give one such as 2026-01-02T03:04 or"),
    ],
)
def test_an_unclear_replay_is_a_usage_error(fresh: FakeEngine, shell: Shell, argv: list[str], error: str) -> None:
    status, out, err = shell("replay", SINK, "jobs", *argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {error}")
    assert not fresh.orders


def test_a_wrong_order_is_told_by_the_running_process(fresh: FakeEngine, shell: Shell) -> None:
    assert shell("backfill", "start", SINK, "a.b.c") == (
        *(1, ""),
        'error: tables.0: must be a table: schema.table, with "..." around a part that holds a dot; '
        "correct the request [bad_request]\n",
    )


def test_reindex(fresh: FakeEngine, shell: Shell, tmp_path: Path) -> None:
    assert shell("reindex", "--status") == (0, "nothing\n", "")
    file = tmp_path / "mapping.json"
    file.write_text('{"mappings": {"properties": {}}}')
    started = (0, f"{SINK}: re-index into jobs_v2 started\n", "")
    assert shell("reindex", SINK, "--into", "jobs_v2", "--mapping", str(file)) == started
    assert fresh.orders[0] == (SINK, ReindexOrder(into="jobs_v2", mapping={"mappings": {"properties": {}}}))
    assert shell("reindex", SINK, "--into", "jobs_v2", "--replace-index", "--yes") == started
    assert (SINK, ReindexOrder(into="jobs_v2", replace_index=True)) in fresh.orders
    for argv in (["--status"], [SINK, "--status"]):
        row = shell("reindex", *argv)[1].splitlines()[1].split()
        assert row[:4] == [SINK, "jobs", "jobs_v2", "backfilling"]
    assert json.loads(shell("reindex", SINK, "--status", "--json")[1])[0]["into"] == "jobs_v2"
    assert shell("reindex", SINK, "--cancel") == (0, f"{SINK}: re-index into jobs_v2: cancelled\n", "")
    fresh.reindexed[-1]["old"] = ["jobs_v0", "jobs_v1"]
    assert shell("reindex", SINK, "--drop-old", "--yes") == (0, f"{SINK}: deleted jobs_v0, jobs_v1\n", "")
    assert fresh.changes == [(SINK, "reindex", "cancel"), (SINK, "reindex", "drop_old")]


def test_drop_old_names_what_it_deletes(fresh: FakeEngine, shell: Shell) -> None:
    shell("reindex", SINK, "--into", "jobs_v3", "--derive-mapping")
    fresh.reindexed[-1]["old"] = ["jobs_v1", "jobs_v2"]
    ours, theirs = pty.openpty()
    with open(ours, "r+b", buffering=0) as terminal, open(theirs, "rb", buffering=0) as stdin:
        terminal.write(b"n\n")
        command = [sys.executable, "-m", "spillway.cli", "reindex", SINK, "--drop-old"]
        done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=60, check=False, text=True)
    assert f"Delete what {SINK} filled before: jobs_v1, jobs_v2?" in done.stderr
    assert done.returncode != 0
    assert fresh.changes == []


def test_reindex_and_wait(fresh: FakeEngine, shell: Shell) -> None:
    ended = backfill("b2", state="completed", rows=10_000)
    fresh.reindex_progress = [{}, {"state": "verifying", "backfills": [ended]}, {"state": "done", "documents": 9900}]
    status, out, _ = shell("reindex", SINK, "--into", "jobs_v2", "--derive-mapping", "--wait")
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("jobs -> jobs_v2")] == [
        "jobs -> jobs_v2: backfilling, 0 rows",
        "jobs -> jobs_v2: verifying, 0 rows",
        "jobs -> jobs_v2: done, 9900 rows",
    ]
    fresh.reindex_progress = [{"state": "failed", "reason": "12 documents differ", "backfills": [ended]}]
    status, _, err = shell("reindex", SINK, "--into", "jobs_v3", "--wait")
    assert (status, "jobs -> jobs_v3: 12 documents differ" in err) == (1, True)


@pytest.mark.parametrize(
    "argv",
    [
        *([], [SINK], [SINK, "--into", "x", "--cancel"], ["--into", "x"], ["--cancel"]),
        *([SINK, "--status", "--wait"], [SINK, "--drop-old", "--derive-mapping", "--yes"]),
        [SINK, "--cancel", "--replace-index"],
        *([SINK, "--into", "x", "--mapping", "/no/such/file"], [SINK, "--into", "x", "--mapping", __file__]),
    ],
)
def test_an_unclear_reindex_is_a_usage_error(fresh: FakeEngine, shell: Shell, argv: list[str]) -> None:
    status, out, err = shell("reindex", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert not fresh.orders


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
        *(["backfill", "start"], ["backfill", "start", SINK, "--parallel", "17"], ["replay", SINK]),
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
