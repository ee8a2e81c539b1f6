"""Messages as they reach functions, and functions of a few lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import orjson

from spillway.functions.base import Failure, Functions, Outcome
from spillway.functions.build import build
from spillway.functions.spec import FunctionSpec, PythonFunction


def message(number: int = 1, *, action: str = "insert", changes: object = None, **columns: object) -> bytes:
    return orjson.dumps(
        {
            "record": {"id": number, **columns},
            "changes": changes,
            "action": action,
            "metadata": {
                "table_schema": "public",
                "table_name": "jobs",
                "commit_lsn": 5,
                "consumer": {"id": "c", "name": "search", "annotations": {"team": "x"}},
            },
        }
    )


def python(text: str, name: str = "mine") -> PythonFunction:
    return PythonFunction(name, f"{name}.py", text)


def transform(body: str, **limits: object) -> FunctionSpec:
    """With these lines in its transform."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    text = f"def transform(action, record, changes, metadata):\n{lines}\n"
    return replace(FunctionSpec(transform=python(text)), **limits)  # type: ignore[arg-type]


@asynccontextmanager
async def running(spec: FunctionSpec) -> AsyncIterator[Functions]:
    functions = build(spec)
    try:
        yield functions
    finally:
        await functions.close()


async def outcomes(spec: FunctionSpec, *messages: bytes, delete: bool = False) -> Sequence[Outcome]:
    async with running(spec) as functions:
        return await functions(messages, [delete] * len(messages))


async def bodies(spec: FunctionSpec, *messages: bytes) -> list[object]:
    """What is sent, message by message, as values."""
    found: list[object] = []
    for outcome in await outcomes(spec, *messages):
        assert not isinstance(outcome, Failure), outcome
        found += [None if one.body is None else orjson.loads(one.body) for one in outcome]
    return found


async def failure(spec: FunctionSpec, one: bytes | None = None) -> Failure:
    (outcome,) = await outcomes(spec, message() if one is None else one)
    assert isinstance(outcome, Failure), outcome
    return outcome
