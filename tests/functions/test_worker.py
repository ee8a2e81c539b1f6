"""The worker as a process: when it starts, what it may and sees, when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.messages import bodies, failure, message, python, running, transform
from spillway.errors import SpillwayError
from spillway.functions import made, process
from spillway.functions.base import Failure, Output
from spillway.functions.isolated import IsolatedFunctions
from spillway.functions.outcome import outcome
from spillway.functions.spec import MIB, FunctionSpec, PathExpression

PARENT = """
import asyncio, sys
from functions.messages import message, transform
from spillway.functions.isolated import IsolatedFunctions

async def main():
    functions = IsolatedFunctions(transform(sys.argv[1], timeout_seconds=600))
    await functions.open()
    print(functions.pid, flush=True)
    await functions([message()], [False])
    await asyncio.sleep(600)

asyncio.run(main())
"""


def gone(pid: int) -> bool:
    """Waits until the process has ended, for whoever is its parent now."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(handle, "rb", buffering=0) as ended:
        import select

        return bool(select.select([ended], [], [], 10)[0])


async def test_it_starts_quickly() -> None:
    fastest = 1.0
    for _ in range(5):
        async with running(transform("return record")) as functions:
            began = time.perf_counter()
            await functions.open()
            fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.15


async def test_one_worker_for_all_calls_and_none_without_python() -> None:
    functions = IsolatedFunctions(transform("import os\nreturn os.getpid()"))
    try:
        calls = await asyncio.gather(*(functions([message()], [False]) for _ in range(5)))
        assert {call[0] for call in calls} == {(Output(str(functions.pid).encode()),)}
    finally:
        await functions.close()
    children = psutil.Process().children()
    assert await bodies(FunctionSpec(transform=PathExpression("record")), message()) == [{"id": 1}]
    assert psutil.Process().children() == children


async def test_what_it_has_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("API_TOKEN", "secret")
    (seen,) = await bodies(
        transform(
            """
import os, resource, sys
def target(n):
    try: return os.readlink(f"/proc/self/fd/{n}").partition(":")[0]
    except OSError: return ""
files = {name: target(name) for name in os.listdir("/proc/self/fd")}
return {
    "env": sorted(os.environ), "cwd": os.getcwd(), "argv": sys.argv[1:], "files": files, "group": os.getpgid(0),
    "pid": os.getpid(), "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
}
"""
        ),
        message(),
    )
    assert isinstance(seen, dict)
    assert set(seen["env"]) <= set(process.ENVIRONMENT)
    assert (seen["cwd"], seen["argv"], seen["core"], seen["nofile"]) == ("/", [], 0, 64)
    assert seen["group"] == seen["pid"]
    opened = sorted(target for target in seen["files"].values() if target and "/proc/" not in target)
    assert opened == ["/dev/null", "/dev/null", "/dev/null", "/memfd", "socket"]


async def test_the_memory_limit_is_what_user_code_may_take() -> None:
    spec = transform("return len(bytearray(record['id'] * 1_000_000))", memory_bytes=100 * MIB, result_bytes=MIB)
    assert await bodies(spec, message(95)) == [95_000_000]
    found = await failure(spec, message(115))
    assert found.reason == "function_memory"
    assert "mine.py:2 in transform" in found.detail


@pytest.mark.parametrize("code", ["return 1", "sum(range(10**15))"])
def test_it_never_outlives_its_parent(code: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        worker = int(said.readline())
    assert psutil.pid_exists(worker)
    parent.kill()
    parent.wait()
    assert gone(worker)


async def test_close_ends_it_with_all_that_it_has_started() -> None:
    functions = IsolatedFunctions(
        transform("import ctypes\npid = ctypes.CDLL(None).fork()\nif pid == 0:\n    while True: pass\nreturn pid")
    )
    ((output,),) = await functions([message()], [False])
    worker, child = functions.pid, int(output.body)
    assert worker is not None
    assert psutil.Process(child).status() != psutil.STATUS_ZOMBIE
    await functions.close()
    assert not psutil.pid_exists(worker)
    assert gone(child)
    with pytest.raises(SpillwayError, match="closed"):
        await functions([message()], [False])
    await functions.close()


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    functions = IsolatedFunctions(
        transform("if record['id'] == 0:\n    while True: pass\nreturn record", timeout_seconds=600)
    )
    await functions.open()
    worker = functions.pid
    assert worker is not None
    status = functions._worker._status  # type: ignore[union-attr]
    stuck = asyncio.create_task(functions([message(0)], [False]))
    waiting = asyncio.create_task(functions([message(7)], [False]))
    while status[0] != 0:  # until the function runs
        await asyncio.sleep(0)
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    assert not psutil.pid_exists(worker)
    assert await waiting == [(Output(b'{"id":7}'),)]
    assert functions.pid not in (None, worker)
    await functions.close()


async def test_close_while_a_call_runs() -> None:
    functions = IsolatedFunctions(transform("while True: pass", timeout_seconds=600))
    await functions.open()
    status = functions._worker._status  # type: ignore[union-attr]
    stuck = asyncio.create_task(functions([message(0)], [False]))
    while status[0] != 0:
        await asyncio.sleep(0)
    await functions.close()
    with pytest.raises(SpillwayError, match="closed"):
        await stuck


async def test_close_while_it_starts() -> None:
    functions = IsolatedFunctions(transform("return 1"))
    before = set(psutil.Process().children())
    starting = asyncio.create_task(functions.open())
    while set(psutil.Process().children()) == before:
        await asyncio.sleep(0)
    await functions.close()
    with pytest.raises(SpillwayError, match="closed"):
        await starting
    assert set(psutil.Process().children()) == before


async def test_a_start_that_is_cancelled_leaves_nothing_behind() -> None:
    functions = IsolatedFunctions(transform("return 1"))
    before = set(psutil.Process().children())
    starting = asyncio.create_task(functions.open())
    while set(psutil.Process().children()) == before:
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert set(psutil.Process().children()) == before


async def test_a_worker_that_dies_between_calls_costs_nothing() -> None:
    functions = IsolatedFunctions(transform("return record"))
    for _ in range(3):
        assert await functions([message(1), message(2)], [False] * 2) == [
            (Output(b'{"id":1}'),),
            (Output(b'{"id":2}'),),
        ]
        assert functions.pid is not None
        os.kill(functions.pid, signal.SIGKILL)
        os.waitid(os.P_PID, functions.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - it is killed already
    assert await functions([message(3)], [False]) == [(Output(b'{"id":3}'),)]
    await functions.close()


async def test_a_loop_that_stood_still_blames_nobody() -> None:
    functions = IsolatedFunctions(transform("return record", timeout_seconds=0.05))
    await functions.open()
    worker = functions.pid
    call = asyncio.create_task(functions([message(1)], [False]))
    status = functions._worker._status  # type: ignore[union-attr]
    while status[1] == 0:
        await asyncio.sleep(0)
    time.sleep(0.8)  # noqa: ASYNC251 - what is tested: this process sleeps beyond every limit
    assert await call == [(Output(b'{"id":1}'),)]
    assert functions.pid == worker
    await functions.close()


STANDS_ONCE = """
import os, time
if record['id'] == 5 and not os.path.exists({marker!r}):
    open({marker!r}, 'w').close()
    time.sleep(60)
return record
"""


async def until_it_runs(functions: IsolatedFunctions, place: int) -> None:
    while functions._worker is None or functions._worker._status[0] != place:
        await asyncio.sleep(0)


async def test_a_worker_that_somebody_kills_costs_no_message(tmp_path: Path) -> None:
    """The kernel's OOM killer, say; which message was running is no guilt of its own."""
    marker = tmp_path / "ran"
    functions = IsolatedFunctions(transform(STANDS_ONCE.format(marker=str(marker)), timeout_seconds=600))
    call = asyncio.create_task(functions([message(number) for number in range(10)], [False] * 10))
    while not marker.exists():  # it stands only once: killed before it has said so, it would stand again
        await asyncio.sleep(0)
    worker = functions.pid
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    assert await call == [(Output(orjson.dumps({"id": number})),) for number in range(10)]
    assert functions.pid != worker
    await functions.close()


async def test_whoever_stops_a_service_does_not_end_it() -> None:
    """systemd sends SIGTERM to all of a service's processes."""
    functions = IsolatedFunctions(transform("import time\ntime.sleep(0.2)\nreturn record"))
    await functions.open()
    worker = functions.pid
    assert worker is not None
    call = asyncio.create_task(functions([message(1)], [False]))
    await until_it_runs(functions, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker, number)
    assert await call == [(Output(b'{"id":1}'),)]
    assert functions.pid == worker
    await functions.close()
    assert not psutil.pid_exists(worker)


@pytest.mark.parametrize("patient", [True, False])
async def test_what_stands_still_is_not_late(monkeypatch: pytest.MonkeyPatch, patient: bool) -> None:
    """A container that is paused: both processes stand still beyond every limit. Patient: only the worker judges."""
    if patient:
        monkeypatch.setattr(process, "GRACE_SECONDS", 60.0)
    functions = IsolatedFunctions(transform("import time\ntime.sleep(0.2)\nreturn record", timeout_seconds=0.5))
    await functions.open()
    worker = functions.pid
    assert worker is not None
    call = asyncio.create_task(functions([message(1), message(2)], [False] * 2))
    await until_it_runs(functions, 0)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.5)  # noqa: ASYNC251 - what is tested: this process stands still
    os.kill(worker, signal.SIGCONT)
    assert await call == [(Output(b'{"id":1}'),), (Output(b'{"id":2}'),)]
    assert functions.pid == worker or not patient
    await functions.close()


async def test_it_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = IsolatedFunctions(transform("return record"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(SpillwayError, match="no process for the sink's functions can be started") as caught:
            await functions([message()], [False])
    assert caught.value.code == "functions_not_started"
    assert caught.value.remedy
    assert await functions([message()], [False]) == [(Output(b'{"id":1}'),)]  # once it can be
    await functions.close()


async def test_code_that_does_not_come_back_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOAD_SECONDS", 0.2)
    async with running(FunctionSpec(transform=python("while True: pass"))) as functions:
        with pytest.raises(SpillwayError, match="has not been loaded after"):
            await functions.open()


async def test_batches_of_many_bytes_go_in_parts() -> None:
    messages = [message(number, text="x" * 50_000) for number in range(100)]
    found = await bodies(transform("return [record['id'], len(record['text']), record['text']]"), *messages)
    assert found == [one for number in range(100) for one in (number, 50_000, "x" * 50_000)]


async def test_a_batch_of_many_small_messages() -> None:
    messages = [message(number) for number in range(20_000)]
    async with running(transform("return record['id'] if record['id'] % 3 else None")) as functions:
        found = await functions(messages, [False] * 20_000)
    assert found == [(Output(orjson.dumps(number)),) if number % 3 else () for number in range(20_000)]
    assert not any(isinstance(outcome, Failure) for outcome in found)


def pretended(kind: int, payload: bytes) -> bytes:
    """An answer of one message, without its length."""
    return b"".join(made.answer(bytes([kind]), [payload], made.DONE))[made.LENGTH.size :]


@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(pretended, st.integers(0, 7), st.binary(max_size=40)),
        st.builds(
            lambda head, rest: pretended(made.SEVERAL, made.LENGTH.pack(len(head)) + head + rest),
            st.recursive(
                st.one_of(st.none(), st.integers(-9, 9), st.booleans(), st.text(max_size=2)),
                lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=1), inner)),
            ).map(orjson.dumps),
            st.binary(max_size=10),
        ),
    )
)
def test_nothing_in_an_answer_is_believed(frame: bytes) -> None:
    try:
        answers, _ = made.read_answer(frame)
        found = [outcome(one) for one in answers]
    except made.Broken:
        return
    for one in found:
        if isinstance(one, Failure):
            assert isinstance(one.reason, str)
            assert isinstance(one.detail, str)
        else:
            assert all(output.body is None or isinstance(output.body, bytes) for output in one)
            assert all(output.route is None or isinstance(output.route, dict) for output in one)
