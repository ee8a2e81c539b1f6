"""SIGHUP: the configuration is read again while the process runs.

Sinks that are new join at a commit: they get what is committed from there on, and their initial backfill begins behind
it. Of a sink that is known the tables may change (``source``; with them those of the new index while it is re-indexed),
and so may ``initial_backfill`` and ``backfill``. Whatever else differs waits for a restart, and is named.

**No mixture of two files runs.** Filters, functions, keys of order and the endpoint of a sink were written for its
tables; only the file as a whole was validated. So where any of these differs, ``source`` waits as well, with the
backfills that belong to it; and a new sink waits whose functions or endpoint are not what the process started with, or
while ``memory`` is not, which says how large its messages may be. So does one that cannot be built beside the others;
those that stand behind it in the file are looked at all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spillway.config import Config, Sink, Webhook
from spillway.config.sink import FUNCTION_KEYS
from spillway.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.engine.engine import Engine
    from spillway.engine.pipeline import Pipeline

_AT_ONCE = ("source", "initial_backfill", "backfill")


@dataclass(slots=True)
class Reloaded:
    """Names of sinks, but for ``waits``: what needs a restart, for people."""

    joined: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


async def reload(engine: Engine, config: Config) -> Reloaded:
    done = Reloaded()
    pipelines = {pipeline.database.name: pipeline for pipeline in engine.pipelines}
    for name in ("memory", "state", "server", "databases", "http_endpoints", "functions", "function_limits"):
        if getattr(config, name) != getattr(engine.config, name):
            done.waits.append(name)
    for sink in config.sinks:
        pipeline = pipelines.get(sink.database)
        if pipeline is None or sink.status == "disabled":
            continue
        known = next((s for s in pipeline.sinks if s.name == sink.name), None)
        others = _others(engine.config, config, sink)
        if known is not None:
            await _change(pipeline, known, sink, others, done)
        else:
            await _join(engine, pipeline, sink, ["memory", *others] if "memory" in done.waits else others, done)
    named = {sink.name for sink in config.sinks if sink.status != "disabled"}
    named |= {f"{reindex['sink']}@{reindex['into']}" for reindex in await engine.reindexes()}
    gone = [s.name for p in engine.pipelines for s in p.sinks if s.name not in named]
    done.waits += [f"sink {name}, which is to leave" for name in gone]
    return done


def _others(before: Config, now: Config, sink: Sink) -> list[str]:
    """What the sink names and the process does not have as the file has it, for people."""
    names = [name for key in FUNCTION_KEYS if (name := getattr(sink, key)) is not None]
    were = {one.name: one for one in before.functions}
    found = [f"function {name}" for name in dict.fromkeys(names) if were.get(name) != now.function(name)]
    if isinstance(sink.destination, Webhook):
        endpoint = sink.destination.http_endpoint
        if now.http_endpoint(endpoint) not in before.http_endpoints:
            found.append(f"http_endpoint {endpoint}")
    return found


async def _join(engine: Engine, pipeline: Pipeline, sink: Sink, others: list[str], done: Reloaded) -> None:
    if others:
        done.waits.append(f"sink {sink.name}, which is new, for {', '.join(others)}")
        return
    try:
        await engine.enlist(pipeline, sink, told_as=sink)
    except SpillwayError as error:
        done.waits.append(f"sink {sink.name}, which is new: {error}")
    else:
        done.joined.append(sink.name)


async def _change(pipeline: Pipeline, known: Sink, sink: Sink, others: list[str], done: Reloaded) -> None:
    fields = [name for name in type(sink).model_fields if getattr(known, name) != getattr(sink, name)]
    late = [name for name in fields if name not in _AT_ONCE]
    if "source" in fields and (late or others):
        late = [*fields, *others]
    if late:
        done.waits.append(f"sink {sink.name}: {', '.join(late)}")
    if not set(fields) <= set(late):
        await pipeline.change(known.model_copy(update={name: getattr(sink, name) for name in _AT_ONCE}))
        done.changed.append(sink.name)
