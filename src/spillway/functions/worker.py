"""The process in which the Python functions of one sink run. It is started as a script (``python -I worker.py``) and
imports little of Spillway.

It reads requests from a socket and answers them (`spillway.functions.made`), one message after the other. What user
code does to it costs the message that was being worked on:

- An exception, `SystemExit` and `RecursionError` included, is a failure of the message. So is its time limit: a timer
  raises `Late` in user code, and again for as long as somebody catches it. Time in which this process stood still (a
  container that is paused) does not count: the timer came late, and no CPU was used. What does not come back at all
  the parent kills: ``status``, a page that both have mapped, says which message is running and since when.
- Its memory is limited (RLIMIT_AS). At the limit this process is replaced, since what is left of the memory may be in
  pieces, or leaked by others: a message fails if it was the first of its process, else it is run again by the next.
- Processes may not be started; a thread left behind is a failure, and this process is replaced.
- What is printed goes nowhere; of the message that fails the beginning is shown. The protocol has a socket of its own.
  Should user code close that, the parent finds the culprit by asking anew, *carefully*: each answer is sent at once.

It ends with its parent: by end of file when idle, by PR_SET_PDEATHSIG at any time (Linux). SIGTERM, SIGINT and SIGHUP
it ignores: who stops a service sends them to all of its processes, and the message that is running is to be finished.
"""

from __future__ import annotations

import _thread
import ctypes
import gc
import mmap
import os
import pickle
import resource
import signal
import sys
import time
from types import FrameType
from typing import Final, NoReturn

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 3)[0])  # where Spillway is; last, it hides nothing

from spillway.functions import made
from spillway.functions.made import DETAIL_CHARACTERS, DONE, FLUSH_BYTES, IDLE, LENGTH, MORE, RENEW, STATUS_BYTES, Made
from spillway.functions.spec import FunctionSpec
from spillway.functions.steps import Steps, described
from spillway.functions.usercode import NotLoaded, load

LOADING_BYTES: Final = 2 << 30  # of address space, while user code is loaded
# Of address space, what is ours and not user code's: a request, its objects, results on their way. orjson takes twelve
# times a text to read it and eight times to write it, mostly without touching it, and breaks down if it cannot.
ROOM_BYTES: Final = 4 << 20
ROOM_FACTOR: Final = 16
OPEN_FILES: Final = 64
TICKS: Final = 10  # how often per time limit it is looked at
MOST_TICK_SECONDS: Final = 0.1
LATE_TICKS: Final = 3  # what of a longer pause between two looks counts at least
PRINTED_CHARACTERS: Final = 300
PR_SET_PDEATHSIG: Final = 1
STARTS: Final = frozenset(("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "subprocess.Popen"))


class Late(BaseException):
    """Raised in user code at its time limit. Not an `Exception`, so that ``except Exception`` does not stop it."""


class Printed:
    """``sys.stdout`` and ``sys.stderr`` of user code: keeps the first characters."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        room = PRINTED_CHARACTERS - len(self.text)
        if room > 0:
            self.text += text[:room]
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


class Worker:
    def __init__(self, connection: int, status: memoryview) -> None:
        self._connection = connection
        self._status = status  # IDLE or the place in the request that is running; since when, in nanoseconds
        self._pid = os.getpid()
        self._running = False
        self._since = 0
        self._limit = 0
        self._tick_seconds = 0.0
        self._looked = 0  # when `_tick` did, in nanoseconds; with how much CPU used until then
        self._looked_cpu = 0
        self._lived = 0  # how long the message has run by then, pauses of this process left out
        self._printed = Printed()
        self._messages_run = 0
        self._memory_bytes = 0  # of address space, in which user code must do; 0: it is not loaded yet
        self._threads = 0

    def serve(self) -> NoReturn:
        spec: FunctionSpec
        spec, path = pickle.loads(self._receive())  # noqa: S301 - the parent's own
        sys.path[0:0] = spec.search_path
        sys.path.extend(folder for folder in path if folder not in sys.path)
        steps = self._load(spec)
        self._limit = int(spec.timeout_seconds * 1e9)
        self._tick_seconds = min(spec.timeout_seconds / TICKS, MOST_TICK_SECONDS)
        signal.signal(signal.SIGALRM, self._tick)
        while True:
            self._answer(steps, self._receive())

    def _load(self, spec: FunctionSpec) -> Steps:
        """Answer with an empty frame once user code is there, else say why not and end."""
        sys.stdout = sys.stderr = self._printed
        _limit_address_space(LOADING_BYTES + spec.memory_bytes)
        functions = {}
        for step, function in spec.python.items():
            try:
                functions[step] = load(step, function)
            except NotLoaded as error:
                self._refuse(function.name, str(error))
            except BaseException as error:  # noqa: BLE001 - user code, SystemExit included
                self._refuse(function.name, described(error))
        sys.addaudithook(self._audit)
        gc.collect()
        gc.freeze()
        self._memory_bytes = _address_space_bytes() + spec.memory_bytes
        self._threads = _thread._count()
        self._printed.text = ""
        self._send([LENGTH.pack(0)])
        return Steps(spec, functions)

    def _refuse(self, name: str, detail: str) -> NoReturn:
        text = f"{name}\0{detail}".encode(errors="replace")
        self._send([LENGTH.pack(len(text)), text])
        os._exit(0)

    def _answer(self, steps: Steps, request: bytes) -> None:
        messages, deletes, careful, answer_bytes, answer_seconds = made.read_request(request)
        del request
        until = time.monotonic_ns() + int(answer_seconds * 1e9)
        flush_bytes = 0 if careful else FLUSH_BYTES
        kinds, payloads = bytearray(), []
        held_bytes = sent_bytes = 0
        signal.setitimer(signal.ITIMER_REAL, self._tick_seconds, self._tick_seconds)
        for place, message in enumerate(messages):
            kind, payload, usable = self._one(steps, place, message, deletes[place] == 1)
            if not usable and kind == made.NOTHING:  # it is run again by another process
                break
            kinds.append(kind)
            payloads.append(payload)
            held_bytes += len(payload)
            if not usable or (answer_bytes and sent_bytes + held_bytes >= answer_bytes) or self._since > until:
                break
            if held_bytes >= flush_bytes and place + 1 < len(messages):
                self._send(made.answer(kinds, payloads, MORE))
                kinds, payloads = bytearray(), []
                sent_bytes += held_bytes
                held_bytes = 0
        else:
            usable = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._send(made.answer(kinds, payloads, DONE if usable else RENEW))
        if not usable:
            os._exit(0)

    def _one(self, steps: Steps, place: int, message: bytes, is_delete: bool) -> tuple[int, bytes, bool]:
        """What came of it, and whether this process can go on. NOTHING and cannot: run it elsewhere."""
        status = self._status
        self._since = status[1] = time.monotonic_ns()
        status[0] = place
        usable = True
        try:
            self._running = True
            result = steps(message, is_delete)
            self._running = False
        except BaseException as error:  # noqa: BLE001 - user code may raise anything, and it is all the message's
            self._running = False
            usable = not isinstance(error, MemoryError)
            if not usable:
                _limit_address_space(sys.maxsize)  # so that it can be said
                if self._messages_run:
                    return made.NOTHING, b"", False
            result = self._failure(steps, error)
        if self._has_left_thread():
            usable = False
            result = made.failed(f"{steps.step}_failed", f"the {steps.step} function has left a thread behind")
        if os.getpid() != self._pid:  # a copy of this process, which user code has made behind our back
            os._exit(0)
        if self._printed.text:
            self._printed.text = ""
        status[0] = IDLE
        self._messages_run += 1
        return *result, usable

    def _has_left_thread(self) -> bool:
        patience = 20  # milliseconds: one that was joined may still be counted
        while patience and _thread._count() > self._threads:
            time.sleep(0.001)
            patience -= 1
        return not patience

    def _failure(self, steps: Steps, error: BaseException) -> Made:
        if isinstance(error, Late):
            where = described(error).partition("\n")[2]
            limit = f"the {steps.step} function has run for longer than {self._limit // 1_000_000} ms"
            return made.failed("function_timeout", f"{limit}\n{where}".rstrip())
        kind, payload = steps.failure(error)
        if self._printed.text:
            reason, detail = made.reason_and_detail(payload)
            return made.failed(
                reason, f"{detail[: DETAIL_CHARACTERS - PRINTED_CHARACTERS - 10]}\nprinted: {self._printed.text}"
            )
        return kind, payload

    def _tick(self, _signal: int, _frame: FrameType | None) -> None:
        now, cpu = time.monotonic_ns(), time.process_time_ns()
        if self._looked < self._since:  # it is another message
            self._looked, self._lived = self._since, 0
        worked = max(cpu - self._looked_cpu, int(LATE_TICKS * self._tick_seconds * 1e9))
        self._lived += min(now - self._looked, worked)
        self._looked, self._looked_cpu = now, cpu
        if self._running and self._lived >= self._limit:
            raise Late

    def _audit(self, event: str, _arguments: object) -> None:
        if event in STARTS and self._running:
            raise RuntimeError("a function cannot start processes")

    def _receive(self) -> bytes:
        (size,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if self._memory_bytes:
            _limit_address_space(self._memory_bytes + ROOM_BYTES + ROOM_FACTOR * size)
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        got = 0
        with memoryview(buffer) as view:
            while got < size:
                read = os.readv(self._connection, [view[got:]])
                if read == 0:
                    os._exit(0)
                got += read
        return bytes(buffer)

    def _send(self, parts: list[bytes]) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._connection, view) :]


def _limit_address_space(size_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        size_bytes = min(size_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, hard))


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - pathlib takes milliseconds to import
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return LOADING_BYTES  # no Linux, where this limit holds nothing anyway


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main() -> NoReturn:
    connection, status, parent = map(int, sys.argv[1:4])
    _end_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    try:
        with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
            score.write("1000")  # should the machine run out of memory, then rather this than the stream
    except OSError:
        pass  # no Linux, or not allowed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(connection, False)
    page = mmap.mmap(status, STATUS_BYTES)
    os.close(status)
    sys.argv[1:] = []
    Worker(connection, memoryview(page).cast("q")).serve()


if __name__ == "__main__":
    main()
