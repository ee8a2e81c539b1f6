"""What shapes the messages of a sink, built from its configuration (spillway.flow.shaping)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from spillway.chunk import Message
from spillway.clock import SystemClock
from spillway.config import Config, Database, Function, Search, Sink, Sqlite
from spillway.errors import Finding, SpillwayError
from spillway.flow.budget import REREAD_EIGHTHS, SHAPING_EIGHTHS, Budget
from spillway.flow.inflow import Process
from spillway.flow.lending import Lending
from spillway.flow.outgoing import Steps
from spillway.flow.shaping import Shaping
from spillway.functions.base import Functions
from spillway.functions.build import build
from spillway.functions.envelope import envelope
from spillway.functions.outbox import OutboxFunctions
from spillway.functions.spec import (
    MIB,
    FieldOperation,
    FieldOperations,
    FunctionSpec,
    PathExpression,
    PythonFunction,
)
from spillway.functions.timestamps import as_numbers, columns_of
from spillway.functions.transaction import tx
from spillway.pgoutput import DatabaseMeta
from spillway.sinks.base import Sink as BuiltSink
from spillway.sinks.routing import checked
from spillway.source.enrich import Enricher
from spillway.source.origin import Expected
from spillway.source.reselect import Reselect
from spillway.source.timestamps import TimestampColumns

LEAST_MEMORY_MB, MOST_MEMORY_MB = 16, 64  # of a worker, where the file does not say: an eighth of the limit
RESULT_PART = 4  # what may come of one message is at most this part of the memory for shaping

_PYTHON = ("filter", "routing", "transform")


def is_shaped(sink: Sink) -> bool:
    """Something is done to every message."""
    functions = (sink.filter, sink.transform, sink.routing, sink.enrichment, sink.outbox)
    plain = sink.format == "sequin" and sink.timestamp_format == "iso8601" and not sink.tx
    return not plain or any(one is not None for one in functions)


def is_routed(sink: Sink) -> bool:
    """Where a row's document is, and what it is, is not to be told by the row's key."""
    updates = isinstance(sink.destination, Search) and sink.destination.op == "update"
    return sink.routing is not None or updates or routing_column(sink) is not None


def routing_column(sink: Sink) -> str | None:
    """Whose value says the shard of a row's document. An update that changes it deletes the document in the old shard,
    which no later message of the row would do in its place."""
    return sink.destination.routing_column if isinstance(sink.destination, Search) else None


def new_budget(config: Config, sinks: Iterable[Sink]) -> Budget:
    """For these sinks, shadows of re-indexes among them. Workers of Python functions have their part of the limit."""
    sinks = list(sinks)
    shaped = sum(is_shaped(sink) or sink.toast == "reselect" for sink in sinks)
    eighths = SHAPING_EIGHTHS if any(map(is_shaped, sinks)) else REREAD_EIGHTHS
    workers_bytes = sum(worker_bytes(config, sink) for sink in sinks)
    limit_bytes = config.memory.limit_bytes - workers_bytes
    if limit_bytes < config.memory.limit_bytes // 2:
        raise SpillwayError(
            "functions_memory",
            f"Python functions may take {workers_bytes // MIB} MB in the workers of their sinks, more than half"
            f" of memory.limit_mb ({config.memory.limit_mb})",
            f"set memory.limit_mb to at least {2 * workers_bytes // MIB}, or function_limits.memory_mb lower",
        )
    companions = sum(bool(sink.related) for sink in sinks)
    return Budget(
        limit_bytes, len(sinks) + companions, shaped, eighths if shaped else 0, whole_bytes=config.memory.limit_bytes
    )


def room_findings(config: Config, sinks: Iterable[Sink]) -> list[Finding]:
    """Sinks for which rows are read, and the memory limit is too small for one of `max_message_bytes`."""
    sinks = list(sinks)
    budget = new_budget(config, sinks)
    found: list[Finding] = []
    for sink in sinks:
        if sink.enrichment is None and sink.toast != "reselect":
            continue
        share = budget.shaping_share()
        lending = Lending(
            share,
            SystemClock(),
            0,
            sink.max_message_bytes if _has_functions(sink) else None,
            rereads=sink.toast == "reselect",
            enriches=sink.enrichment is not None,
            whole=True,
        )
        needed = lending.needed(0, sink.max_message_bytes)
        if needed > share.most_alone_bytes:
            largest = lending.largest_row(0, share.most_alone_bytes)
            found.append(
                Finding(
                    "large_rows",
                    f"a row that is read for a message may have {largest // MIB} MB here, less than max_message_bytes:"
                    " a larger one fails its message",
                    f"memory.limit_mb: {share.limit_mb_for(needed)}, or max_message_bytes"
                    f" {max(1, largest // MIB)}MB for this sink",
                    "warning",
                    sink=sink.name,
                )
            )
    return found


def worker_bytes(config: Config, sink: Sink) -> int:
    """What the sink's worker may take: none without a Python function."""
    spec = _spec(config, sink, 0)
    return spec.memory_bytes if spec.python else 0


def new_shaping(
    config: Config,
    database: Database,
    sink: Sink,
    built: BuiltSink,
    suffix: bytes,
    system_id: Callable[[], str],
    process: Process,
    timestamps: TimestampColumns,
) -> Shaping | None:
    """None: the sink takes its messages as they are. ``system_id`` raises SourceUnavailable as long as the source was
    not reached."""
    if not is_shaped(sink) and sink.toast != "reselect":
        return None
    slot, keeps_rows = database.slot.name, built.semantics in ("state", "atomic")
    replica = sink.enrichment_from == "replica"
    document = sink.destination.document if isinstance(sink.destination, Search) else None
    share = process.budget.shaping_share()
    timeout_seconds = sink.enrichment_timeout_ms / 1000
    reread = enrich = None
    if sink.toast == "reselect":
        reread = Reselect(
            database.conninfo(),
            slot,
            database.publication.name,
            lambda: Expected(system_id()),
            sink.filters,
            timeout_seconds=timeout_seconds,
        )
    if sink.enrichment is not None:
        enrich = Enricher(
            database.page_conninfo() if replica else database.conninfo(),
            slot,
            lambda: Expected(system_id(), replica),
            sink.enrichment,
            config.function(sink.enrichment).code or "",
            timeout_seconds=timeout_seconds,
        )
    result_bytes = min(sink.max_message_bytes, share.own.most_bytes // RESULT_PART)
    steps = Steps(
        suffix,
        keeps_rows=keeps_rows,
        as_record=document == "record" or isinstance(sink.destination, Sqlite),
        keeps_form=sink.outbox is None and (sink.transform is None or config.function(sink.transform).type == "fields"),
        reread=reread,
        enrich=enrich,
        functions=new_functions(config, sink, result_bytes),
        result_bytes=result_bytes,
        checked=partial(checked, sink.destination.type),
        envelope=None if sink.format == "sequin" else envelope(sink.format, meta_of(database), process.clock),
        metadata=_tx if sink.tx else None,
        timestamps=None if sink.timestamp_format == "iso8601" else _timestamps(timestamps),
    )
    return Shaping(
        steps, share, process.clock, sink.max_message_bytes, in_order=built.semantics in ("ordered", "atomic")
    )


def meta_of(database: Database) -> DatabaseMeta:
    return DatabaseMeta(database.id, database.name, database.annotations, database.database, database.hostname)


def _tx(message: Message) -> bytes:
    return tx(message, message.span.chunk.total(message.span.indices[message.place]))


def _timestamps(columns: TimestampColumns) -> Callable[[Message], Awaitable[Message]]:
    async def converted(message: Message) -> Message:
        table = message.span.chunk.table(message.span.indices[message.place])
        return as_numbers(message, await columns.of(*table, columns_of(message)))

    return converted


def new_functions(config: Config, sink: Sink, result_bytes: int) -> Functions | None:
    """None: the sink names none."""
    if sink.outbox is not None:
        outbox = sink.outbox
        return OutboxFunctions(
            outbox.payload, outbox.routing, outbox.headers, emitted=outbox.prefix is not None, key=outbox.key
        )
    if not _has_functions(sink):
        return None
    return build(_spec(config, sink, result_bytes))


def _has_functions(sink: Sink) -> bool:
    return sink.outbox is not None or any(getattr(sink, key) is not None for key in _PYTHON)


def _spec(config: Config, sink: Sink, result_bytes: int) -> FunctionSpec:
    limits = config.function_limits
    transform = None if sink.transform is None else config.function(sink.transform)
    return FunctionSpec(
        filter=None if sink.filter is None else _python(config.function(sink.filter)),
        routing=None if sink.routing is None else _python(config.function(sink.routing)),
        transform=None if transform is None else _transform(transform),
        timeout_seconds=limits.timeout_ms / 1000,
        memory_bytes=(limits.memory_mb or _default_memory_mb(config.memory.limit_mb)) * MIB,
        result_bytes=result_bytes,
        search_path=(str(config.base_dir),),
    )


def _default_memory_mb(limit_mb: int) -> int:
    return min(MOST_MEMORY_MB, max(LEAST_MEMORY_MB, limit_mb // 8))


def _transform(function: Function) -> PythonFunction | PathExpression | FieldOperations:
    if function.type == "path":
        return PathExpression(function.path or "")
    if function.type == "fields":
        operations = [FieldOperation(one.kind, one.columns, one.names, one.values) for one in function.fields]
        return FieldOperations(tuple(operations))
    return _python(function)


def _python(function: Function) -> PythonFunction:
    file = str(function.file) if function.file is not None else f"function {function.name}"
    return PythonFunction(function.name, file, function.code, function.module)
