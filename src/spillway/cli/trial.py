"""What a function makes of messages, found by asking it as its sink would: in a worker process, with its limits.

Only the function in question is asked. What goes in is what its sink would have: rows of a table are enriched before
another function of the sink sees them. Nothing is sent, and nothing is written anywhere.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spillway.cli.messages import made_up
from spillway.config import Blackhole, Config, Database, Function, Sink, TableName
from spillway.engine.shaping import new_functions, room_findings
from spillway.errors import Finding, SpillwayError
from spillway.functions.base import Failure, Outcome
from spillway.sinks.base import message_suffix
from spillway.sinks.routing import checked
from spillway.source.connect import querying
from spillway.source.enrich import BatchFailed, Enricher
from spillway.source.origin import Expected, system_id
from spillway.source.sample import made_up_row, sample
from spillway.source.snapshot import Seen

CREDIT_BYTES = 64 << 20  # what enrichment may fetch at a time
_NO_ENRICHMENT = b',"enrichment":null'
_KEYS = {"path": "transform", "fields": "transform"}  # by a function's type: the sink's key that names it


@dataclass(frozen=True, slots=True)
class Row:
    """A message to try, and whose row it is, if that is known."""

    message: bytes
    table: TableName | None = None
    pks: tuple[str, ...] = ()
    failure: Failure | None = None  # its enrichment failed: no function gets to see it


@dataclass(frozen=True, slots=True)
class Output:
    body: bytes | None = None  # None: the message as it came
    route: bytes | None = None  # JSON; None: nothing was said


@dataclass(frozen=True, slots=True)
class Trial:
    message: bytes
    outputs: tuple[Output, ...] = ()  # none: it is left out
    failure: Failure | None = None


def key_of(function: Function) -> str:
    """The key of a sink that names such a function."""
    return _KEYS.get(function.type, function.type)


def sinks_of(config: Config, function: Function) -> list[Sink]:
    return [sink for sink in config.sinks if getattr(sink, key_of(function)) == function.name]


def no_sink(config: Config) -> Sink:
    """In place of one, for a function that none names."""
    return Sink(name="none", database=config.databases[0].name, destination=Blackhole(type="blackhole"))


def suffix_of(sink: Sink) -> bytes:
    return message_suffix(sink.id, sink.name, sink.annotations)


def of_messages(messages: Sequence[bytes]) -> list[Row]:
    return [_row(message) for message in messages]


def _row(message: bytes) -> Row:
    metadata = json.loads(message)["metadata"]
    schema, table, pks = (metadata.get(key) for key in ("table_schema", "table_name", "record_pks"))
    if isinstance(schema, str) and isinstance(table, str) and isinstance(pks, list):
        return Row(message, TableName(schema, table), tuple(map(str, pks)))
    return Row(message)


async def of_table(config: Config, function: Function, sink: Sink, table: TableName, limit: int) -> list[Row]:
    """Rows of a table as the sink's messages, enriched if the sink's messages are."""
    database, suffix = config.database(sink.database), suffix_of(sink)
    async with querying(database.conninfo(), database.slot.name) as query:
        changes = await sample(query, database, table, limit, sink.max_message_bytes)
    rows = [Row(change.body + suffix, table, change.pks) for change in changes]
    if function.type == "enrichment" or sink.enrichment is None:
        return rows
    found = await _enriched(database, sink, config.function(sink.enrichment), rows)
    after = suffix.removeprefix(_NO_ENRICHMENT)
    return [
        replace(row, failure=one)
        if isinstance(one, Failure)
        else replace(row, message=change.body + b',"enrichment":' + one + after)
        for row, change, one in zip(rows, changes, found, strict=True)
    ]


async def of_sink(config: Config, function: Function, sink: Sink, table: TableName, limit: int) -> list[Row]:
    """The last rows of the table; where it has none, a row that is made up of its columns."""
    rows = await of_table(config, function, sink, table, limit)
    if rows or function.type == "enrichment":
        return rows
    database = config.database(sink.database)
    async with querying(database.conninfo(), database.slot.name) as query:
        record = await made_up_row(query, database.publication.name, table)
    return of_messages(made_up(str(table), suffix_of(sink), record))


async def tried(config: Config, function: Function, sink: Sink, rows: Sequence[Row]) -> list[Trial]:
    """Raises SpillwayError for what concerns the function as a whole."""
    if function.type == "enrichment":
        found = await _enriched(config.database(sink.database), sink, function, rows)
        return [
            Trial(row.message, failure=one) if isinstance(one, Failure) else Trial(row.message, (Output(one),))
            for row, one in zip(rows, found, strict=True)
        ]
    only = dict.fromkeys(("filter", "routing", "transform", "outbox")) | {key_of(function): function.name}
    functions = new_functions(config, sink.model_copy(update=only), sink.max_message_bytes)
    assert functions is not None
    # What goes to a sink that keeps rows whatever filter and transform may say.
    deletes = [sink.destination.state and json.loads(row.message)["action"] == "delete" for row in rows]
    try:
        outcomes = await functions([row.message for row in rows], deletes)
    finally:
        await functions.close()
    outcomes = [row.failure or outcome for row, outcome in zip(rows, outcomes, strict=True)]
    kind = (function.type == "routing" and function.sink_type) or sink.destination.type
    return [_trial(row, outcome, kind) for row, outcome in zip(rows, outcomes, strict=True)]


def _trial(row: Row, outcome: Outcome, kind: str) -> Trial:
    if isinstance(outcome, Failure):
        return Trial(row.message, failure=outcome)
    try:
        routes = [None if one.route is None else json.dumps(dict(checked(kind, one.route))) for one in outcome]
    except ValueError as error:
        return Trial(row.message, failure=Failure("routing_failed", str(error)))
    return Trial(
        row.message,
        tuple(
            Output(one.body, None if route is None else route.encode())
            for one, route in zip(outcome, routes, strict=True)
        ),
    )


async def _enriched(database: Database, sink: Sink, function: Function, rows: Sequence[Row]) -> list[bytes | Failure]:
    """By row: the enrichment as JSON, null where there is none."""
    slot, replica = database.slot.name, sink.enrichment_from == "replica"
    async with querying(database.conninfo(), slot) as query:
        expected = Expected(await system_id(query, database.conninfo(), slot), replica)
    conninfo = database.page_conninfo() if replica else database.conninfo()
    enricher = Enricher(
        conninfo,
        slot,
        lambda: expected,
        function.name,
        function.code or "",
        timeout_seconds=sink.enrichment_timeout_ms / 1000,
        connections=1,
    )
    found: list[bytes | Failure] = [b"null"] * len(rows)
    tables = {row.table for row in rows if row.table is not None and row.pks}
    try:
        for table in sorted(tables):
            await _fetch(enricher, table, rows, [i for i, row in enumerate(rows) if row.table == table], found)
    finally:
        await enricher.close()
    return found


async def _fetch(
    enricher: Enricher, table: TableName, rows: Sequence[Row], places: Sequence[int], found: list[bytes | Failure]
) -> None:
    """One query, as for a batch; where a row's data makes it fail, one for each."""
    try:
        fetched = await enricher.fetch(table, [rows[i].pks for i in places], Seen((), 0), CREDIT_BYTES, CREDIT_BYTES)
    except BatchFailed as error:
        if len(places) == 1:
            found[places[0]] = Failure(error.code, str(error))
            return
        for place in places:
            await _fetch(enricher, table, rows, [place], found)
        return
    for at, place in enumerate(places):
        if at in fetched.several:
            found[place] = Failure(
                "enrichment_rows", "the enrichment has more than one row for the key of this message"
            )
        elif at in fetched.sizes:
            found[place] = Failure("row_too_large", f"the row has {fetched.sizes[at]} bytes, which is not fetched here")
        elif at in fetched.rows:
            columns = (json.dumps(name).encode() + b":" + value for name, value in fetched.rows[at].items())
            found[place] = b"{" + b",".join(columns) + b"}"


def findings(config: Config) -> list[Finding]:
    """What keeps functions from being loaded, by sink: found by loading them in a worker."""
    return asyncio.run(_findings(config))


async def _findings(config: Config) -> list[Finding]:
    sinks = [sink for sink in config.sinks if sink.status != "disabled"]
    found: list[Finding] = []
    try:
        found += room_findings(config, sinks)
    except SpillwayError as error:  # their workers take too much of the limit
        found.append(Finding(error.code, error.what, error.remedy))
    for sink in sinks:
        functions = new_functions(config, sink, sink.max_message_bytes)
        if functions is None:
            continue
        try:
            await functions.open()
        except SpillwayError as error:
            found.append(Finding(error.code, error.what, error.remedy, sink=sink.name))
        finally:
            await functions.close()
    return found
