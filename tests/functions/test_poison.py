"""Poison in the middle of a batch costs its own message: the other 99 get their results."""

from __future__ import annotations

from textwrap import dedent, indent

import orjson
import pytest

from functions.messages import message, outcomes, python, running, transform
from spillway.functions.base import Failure, Outcome, Output
from spillway.functions.spec import FunctionSpec

COUNT = 100
CULPRIT = 50

# name: (code, reason, part of the detail)
POISONS = {
    "loop": ("while True: pass", "function_timeout", "mine.py:3 in transform"),
    "loop that catches everything": (
        """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
        "function_timeout",
        "has run for longer than 300 ms",
    ),
    "loop in C": ("sum(range(10**15))", "function_timeout", "did not let itself be stopped"),
    "catastrophic regex": ("re.match('(a+)+$', 'a' * 40 + 'b')", "function_timeout", "in transform"),
    "sleep": ("import time; time.sleep(60)", "function_timeout", "in transform"),
    "exception": ("raise ValueError('bad')", "transform_failed", "ValueError: bad\n  mine.py:3 in transform"),
    "SystemExit": ("raise SystemExit(1)", "transform_failed", "SystemExit: 1"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "transform_failed", "KeyboardInterrupt"),
    "1 GB result": ("return 'x' * 10**9", "function_memory", "the memory limit is reached"),
    "1 GB piece by piece": (
        """
        hoard = []
        while True: hoard.append('x' * 1_000_000)
        """,
        "function_memory",
        "the memory limit is reached",
    ),
    "deep recursion": (
        "return transform(action, record, changes, metadata)",
        "transform_failed",
        "RecursionError",
    ),
    "deep result": (
        """
        deep = []
        for _ in range(100_000): deep = [deep]
        return {'deep': deep}
        """,
        "transform_failed",
        "RecursionError",
    ),
    "endless result": ("loop = {}; loop['loop'] = loop; return loop", "transform_failed", "RecursionError"),
    "deep recursion in C": (
        """
        import sys; sys.setrecursionlimit(10**9)
        def f(n): return max([n], key=f)
        f(1)
        """,
        "function_crashed",
        "SIGSEGV",
    ),
    "os._exit": ("import os; os._exit(3)", "function_crashed", "with exit status 3"),
    "SIGSEGV": ("import ctypes; ctypes.string_at(1)", "function_crashed", "by SIGSEGV"),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", "function_crashed", "by SIGKILL"),
    "SIGSTOP": ("import os; os.kill(os.getpid(), 19)", "function_timeout", "did not let itself be stopped"),
    "files closed": ("import os; os.closerange(0, 1024)", "function_crashed", "the function has"),
    "garbage in every file": (
        """
        import os
        for n in range(3, 1024):
            try: os.write(n, b'\\xff' * 4 + b'garbage')
            except OSError: pass
        """,
        "function_crashed",
        "has disturbed its process",
    ),
    "files cut off": (
        """
        import os
        for n in range(1024):
            try: os.ftruncate(n, 0)
            except OSError: pass
        raise ValueError('bad')
        """,
        "transform_failed",
        "ValueError: bad",
    ),
    "print flood": (
        """
        for _ in range(100_000): print('flood' * 20)
        raise ValueError
        """,
        "transform_failed",
        "printed: flood",
    ),
    "thread left behind": (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "transform_failed",
        "has left a thread behind",
    ),
    "fork": ("import os; os.fork()", "transform_failed", "a function cannot start processes"),
    "subprocess": (
        "import subprocess; subprocess.run(['true'])",
        "transform_failed",
        "a function cannot start processes",
    ),
    "fork bomb behind Python's back": (
        """
        import ctypes
        for _ in range(4): ctypes.CDLL(None).fork()
        raise ValueError('bad')
        """,
        "transform_failed",
        "ValueError: bad",
    ),
    "exception with a text of 1 GB": (
        """
        class E(Exception):
            def __str__(self): return 'x' * 10**9
        raise E
        """,
        "transform_failed",
        "E (its text raised MemoryError)",
    ),
}


def check(found: list[Outcome], reason: str, detail: str) -> None:
    assert len(found) == COUNT
    for number, outcome in enumerate(found):
        if number == CULPRIT:
            assert isinstance(outcome, Failure), outcome
            assert (outcome.reason, detail in outcome.detail) == (reason, True), outcome
            assert len(outcome.detail) <= 1000
        else:
            assert outcome == (Output(orjson.dumps({"id": number})),)


@pytest.mark.parametrize("name", POISONS)
async def test_poison_costs_its_message(name: str) -> None:
    code, reason, detail = POISONS[name]
    poison = indent(dedent(code).strip("\n"), "    ")
    spec = transform(f"if record['id'] == {CULPRIT}:\n{poison}\nreturn record", timeout_seconds=0.3)
    async with running(spec) as functions:
        messages = [message(number) for number in range(COUNT)]
        check(list(await functions(messages, [False] * COUNT)), reason, detail)
        check(list(await functions(messages, [False] * COUNT)), reason, detail)  # and again: it stays usable


async def test_poison_everywhere() -> None:
    """Every second message kills the worker; results come in any number of parts."""
    spec = transform("import os\nif record['id'] % 2: os._exit(1)\nreturn 'x' * 60_000", timeout_seconds=0.3)
    found = await outcomes(spec, *(message(number) for number in range(40)))
    for number, outcome in enumerate(found):
        assert isinstance(outcome, Failure) == bool(number % 2), (number, outcome)


async def test_a_filter_and_a_route_may_be_poison_too() -> None:
    loop = python("def route(action, record, changes, metadata):\n    while True: pass\n", "route")
    dies = python("def filter(action, record, changes, metadata):\n    import os; os._exit(record['id'])\n", "filter")
    (late,) = await outcomes(FunctionSpec(routing=loop, timeout_seconds=0.2), message())
    assert late == Failure(
        "function_timeout",
        "the routing function has run for longer than 200 ms\n  route.py:2 in route: while True: pass",
    )
    (gone,) = await outcomes(FunctionSpec(filter=dies), message(4))
    assert gone == Failure("function_crashed", "the function has ended its process with exit status 4")


async def test_a_leak_costs_no_message() -> None:
    """At the memory limit the process is replaced, and the message that happened to reach it is run again."""
    spec = transform("json.hoard = [*getattr(json, 'hoard', ()), 'x' * 4_000_000]\nreturn record")
    found = await outcomes(spec, *(message(number) for number in range(60)))
    assert found == [(Output(orjson.dumps({"id": number})),) for number in range(60)]


async def test_a_large_message_leaves_the_memory_limit_to_user_code() -> None:
    size = 16_000_000
    spec = transform("return record", timeout_seconds=10.0)
    large = message(1, text="x" * (size - 300))
    (outcome,) = await outcomes(spec, large)
    assert isinstance(outcome, tuple), outcome
    (output,) = outcome
    assert output.body is not None
    assert len(output.body) > size - 1000
