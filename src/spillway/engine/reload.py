"""SIGHUP: the configuration is read again while the process runs.

Sinks that are new join at a commit: they get what is committed from there on, and their initial backfill begins behind
it. Of a sink that is known the tables may change (``source``; with them those of the new index while it is re-indexed),
and so may ``initial_backfill`` and ``backfill``. Whatever else differs waits for a restart, and is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spillway.config import Config, Sink

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
    """Raises SpillwayError for a new sink that cannot be built; those before it have joined."""
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
        if known is None:
            await engine.enlist(pipeline, sink, told_as=sink)
            done.joined.append(sink.name)
        elif known != sink:
            await _change(pipeline, known, sink, done)
    named = {sink.name for sink in config.sinks if sink.status != "disabled"}
    named |= {f"{reindex['sink']}@{reindex['into']}" for reindex in await engine.reindexes()}
    gone = [s.name for p in engine.pipelines for s in p.sinks if s.name not in named]
    done.waits += [f"sink {name}, which is to leave" for name in gone]
    return done


async def _change(pipeline: Pipeline, known: Sink, sink: Sink, done: Reloaded) -> None:
    fields = [name for name in type(sink).model_fields if getattr(known, name) != getattr(sink, name)]
    late = [name for name in fields if name not in _AT_ONCE]
    if late:
        done.waits.append(f"sink {sink.name}: {', '.join(late)}")
    if len(late) < len(fields):
        await pipeline.change(known.model_copy(update={name: getattr(sink, name) for name in _AT_ONCE}))
        done.changed.append(sink.name)
