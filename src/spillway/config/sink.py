"""`sinks[]`: what goes where, in what batches, and what becomes of what fails.

Whatever a file leaves out and the destination's type decides (batch size, TOAST, TRUNCATE) is filled in here, so that
the fields of a `Sink` always hold what is in force. ``destination.batch_size`` and ``destination.timeout_seconds``
override the sink's; `Sink.batch_size` and `Sink.request_timeout_seconds` are the results.

How messages are shaped is said by the names of functions (`spillway.config.functions`; whether there are such is seen
when the file is whole, in `references`) and without code (`spillway.config.shape`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from spillway.config.backfill import BackfillLimits, InitialBackfill, InitialBackfills
from spillway.config.database import stable_id
from spillway.config.destination import OLD_SPELLINGS, Destination, OnTruncate, Search, Sqlite, Toast, Webhook
from spillway.config.document import Block
from spillway.config.memory import MB
from spillway.config.section import Reading, Section, nearest
from spillway.config.shape import Condition, Outbox, Related, fill_tables
from spillway.config.values import (
    Annotations,
    DurationSeconds,
    Flag,
    Name,
    SizeBytes,
    Table,
    TableName,
    Whole,
    Wrong,
)

Action = Literal["insert", "update", "delete"]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Tables = Annotated[tuple[Table, ...], Field(min_length=1)]

MAX_MESSAGE_BYTES = 16 * MB


class Source(Section):
    """Which tables of the publication. Nothing said: all of them."""

    include_schemas: Names | None = None
    exclude_schemas: Names | None = None
    include_tables: Tables | None = None
    exclude_tables: Tables | None = None

    @model_validator(mode="after")
    def _either(self) -> Source:
        for level in ("schemas", "tables"):
            if getattr(self, f"include_{level}") is not None and getattr(self, f"exclude_{level}") is not None:
                raise Wrong(f"exclude_{level}", f"give either include_{level} or exclude_{level}")
        return self

    def selects(self, schema: str, table: str) -> bool:
        name = TableName(schema, table)
        if self.include_schemas is not None and schema not in self.include_schemas:
            return False
        if self.exclude_schemas is not None and schema in self.exclude_schemas:
            return False
        if self.include_tables is not None and name not in self.include_tables:
            return False
        return self.exclude_tables is None or name not in self.exclude_tables


class GroupedTable(Section):
    name: Table
    group_column_names: Names | None = None


class Backlog(Section):
    """The limits of what waits on disk, besides the free space of the disk itself."""

    warn_messages: Annotated[Whole, Field(ge=1)] = 100_000
    max_messages: Annotated[Whole, Field(ge=1)] | None = None
    max_bytes: Annotated[SizeBytes, Field(ge=MB)] | None = None
    max_age_seconds: Annotated[DurationSeconds, Field(gt=0)] | None = Field(default=None, alias="max_age")
    on_full: Literal["block", "pause", "compact"] = "block"


_ELSEWHERE = "has no effect here"
_OF_STATE = "is for sinks that keep rows (search and sqlite): elsewhere every message counts"


def _no_function(value: object) -> object:
    """Sequin's way to say that there is none, where its file may not leave a key out."""
    return None if value in ("none", "null", "nil") else value


FunctionName = Annotated[Name | None, BeforeValidator(_no_function)]
FUNCTION_KEYS = ("filter", "routing", "transform", "enrichment")
_PLAIN = {"format": "sequin", "timestamp_format": "iso8601", "tx": False}  # messages as they come
Format = Literal["sequin", "debezium", "cloudevents", "record"]


class Sink(Section):
    inert: ClassVar = {
        "load_shedding_policy": "has no effect (nor has it in Sequin); see backlog.on_full",
        "message_kind": "has no effect, as in Sequin",
        "max_ack_pending": "has no effect, as in Sequin; see max_messages and max_memory_mb",
        "max_waiting": "has no effect, as in Sequin",
        "max_deliver": "has no effect, as in Sequin; see max_retry_count",
        "partition_count": _ELSEWHERE,
        "consumer_start": "has no effect, as in Sequin",
        "active_backfill": "has no effect, as in Sequin",
        "active_backfills": "has no effect, as in Sequin",
        "id": "has no effect, as in Sequin: ids follow from names",
        "inserted_at": _ELSEWHERE,
        "updated_at": _ELSEWHERE,
    }
    name: Name
    database: Name
    destination: Destination
    source: Source = Field(default_factory=Source)
    actions: Annotated[tuple[Action, ...], Field(min_length=1)] = ("insert", "update", "delete")
    status: Literal["active", "paused", "disabled"] = "active"
    message_grouping: Flag = True
    tables: tuple[GroupedTable, ...] = ()
    batch_size: Annotated[Whole, Field(ge=1, le=10_000)] = Field(
        default_factory=lambda data: data["destination"].default_batch_size, validate_default=True
    )
    batch_timeout_ms: Annotated[Whole, Field(ge=1, le=600_000)] = 5
    ack_wait_ms: Annotated[Whole, Field(ge=500, le=3_600_000)] = 30_000
    max_memory_mb: Annotated[Whole, Field(ge=1)] = 128
    max_messages: Annotated[Whole, Field(ge=1)] = 50_000
    max_message_bytes: Annotated[SizeBytes, Field(ge=1024)] = MAX_MESSAGE_BYTES
    max_retry_count: Annotated[Whole, Field(ge=0)] | None = None
    on_reject: Literal["block", "dead_letter", "latest_wins"] = "block"
    backlog: Backlog = Field(default_factory=Backlog)
    filters: tuple[Condition, ...] = ()
    on_truncate: OnTruncate = Field(default_factory=lambda data: data["destination"].default_on_truncate)
    filter: FunctionName = None
    routing: FunctionName = None
    transform: FunctionName = None
    toast: Toast = Field(default_factory=lambda data: _default_toast(data["destination"], data))
    enrichment: FunctionName = None
    enrichment_timeout_ms: Annotated[Whole, Field(ge=1, le=3_600_000)] = 15_000  # of one query
    enrichment_from: Literal["primary", "replica"] = "primary"
    format: Format = "sequin"
    timestamp_format: Literal["iso8601", "unix_microsecond"] = "iso8601"
    tx: Flag = False
    related: tuple[Related, ...] = ()
    outbox: Outbox | None = None
    annotations: Annotations = Field(default_factory=dict)
    initial_backfill: InitialBackfills = ()
    backfill: BackfillLimits = Field(default_factory=BackfillLimits)

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        destination = block.get("destination")
        kind = destination.get("type") if isinstance(destination, Block) else None
        if isinstance(destination, Block) and kind is not None:
            if not isinstance(kind, str):
                reading.problem(destination.line_of("type"), destination.key_path("type"), "must be text")
            destination["type"] = OLD_SPELLINGS.get(str(kind), str(kind))
        _source_of_old(block, reading)
        _format_of_old(block, reading)
        fill_tables(block, reading)

    @field_validator("tables")
    @classmethod
    def _groups(cls, tables: tuple[GroupedTable, ...], info: ValidationInfo) -> tuple[GroupedTable, ...]:
        names = [table.name for table in tables]
        if len(set(names)) < len(names):
            raise ValueError("names a table twice")
        if info.data.get("message_grouping") is False and any(table.group_column_names for table in tables):
            raise ValueError("group_column_names has no meaning with message_grouping: false")
        return tables

    @field_validator("batch_size")
    @classmethod
    def _batch_size(cls, value: int, info: ValidationInfo) -> int:
        destination = info.data.get("destination")
        return destination.batch_size or value if isinstance(destination, Search) else value

    @field_validator("on_reject", "toast")
    @classmethod
    def _of_state(cls, value: str, info: ValidationInfo) -> str:
        destination = info.data.get("destination")
        if value in ("latest_wins", "reselect") and destination is not None and not destination.state:
            raise ValueError(f"{value} {_OF_STATE}")
        return value

    @field_validator("backlog")
    @classmethod
    def _compact(cls, value: Backlog, info: ValidationInfo) -> Backlog:
        destination = info.data.get("destination")
        if value.on_full == "compact" and destination is not None and not destination.state:
            raise Wrong("on_full", f"compact {_OF_STATE}")
        return value

    @field_validator("on_truncate")
    @classmethod
    def _truncate(cls, value: str, info: ValidationInfo) -> str:
        destination = info.data.get("destination")
        if value == "apply" and destination is not None and destination.default_on_truncate != "apply":
            raise ValueError(f"'apply' is not there yet in this version for {destination.type}")
        return value

    @field_validator("initial_backfill")
    @classmethod
    def _tables_of_its_own(
        cls, entries: tuple[InitialBackfill, ...], info: ValidationInfo
    ) -> tuple[InitialBackfill, ...]:
        for index, entry in enumerate(entries):
            if entry.table in [earlier.table for earlier in entries[:index]]:
                raise Wrong(f"{index}.table", "is in the list already")
            if entry.table is not None:
                _of_this_sink(entry.table, f"{index}.table", info)
        return entries

    @field_validator("routing")
    @classmethod
    def _routable(cls, value: str | None, info: ValidationInfo) -> str | None:
        destination = info.data.get("destination")
        if value is not None and destination is not None and not destination.routing_keys:
            raise ValueError(f"has no meaning for {destination.type}: there is one place to go")
        return value

    @field_validator("enrichment")
    @classmethod
    def _one_table(cls, value: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if value is not None and source is not None and len(source.include_tables or ()) != 1:
            raise ValueError(
                "needs a source with exactly one table in include_tables: its SQL is about that table's keys"
            )
        return value

    @field_validator("filters")
    @classmethod
    def _filtered_tables(cls, conditions: tuple[Condition, ...], info: ValidationInfo) -> tuple[Condition, ...]:
        for index, condition in enumerate(conditions):
            _of_this_sink(condition.table, f"{index}.table", info)
        return conditions

    @field_validator("format")
    @classmethod
    def _one_shape(cls, value: str, info: ValidationInfo) -> str:
        if value != "sequin" and info.data.get("transform") is not None:
            raise ValueError("does not go together with transform, which makes the whole message")
        if value != "sequin" and isinstance(info.data.get("destination"), Sqlite):
            raise ValueError("has no meaning for sqlite, which keeps rows")
        looks_at_it = any(info.data.get(key) is not None for key in ("filter", "routing"))
        if value in ("record", "debezium") and info.data.get("enrichment") is not None and not looks_at_it:
            raise ValueError(
                f"{value} has no place for the enrichment, and no filter or routing function looks at it; cloudevents "
                "and sequin have it"
            )
        return value

    @field_validator("tx")
    @classmethod
    def _said_somewhere(cls, value: bool, info: ValidationInfo) -> bool:
        form = info.data.get("format")
        if value and form == "debezium":
            raise ValueError(
                "does not go together with format: debezium, whose transaction block counts by table, which is not "
                "known here; cloudevents and sequin have it, and source.sequence orders Debezium's events"
            )
        if value and form == "record":
            raise ValueError("does not go together with format: record, which has no metadata")
        return value

    @field_validator("related")
    @classmethod
    def _refreshed_tables(cls, related: tuple[Related, ...], info: ValidationInfo) -> tuple[Related, ...]:
        destination = info.data.get("destination")
        if related and destination is not None and not destination.state:
            raise ValueError(_OF_STATE)
        for index, entry in enumerate(related):
            _of_this_sink(entry.refreshes, f"{index}.refreshes", info)
        return related

    @field_validator("outbox")
    @classmethod
    def _outbox(cls, outbox: Outbox | None, info: ValidationInfo) -> Outbox | None:
        destination = info.data.get("destination")
        if outbox is None or destination is None:
            return outbox
        if destination.state:
            raise ValueError(f"is for sinks of messages: {destination.type} keeps rows")
        others = [key for key in FUNCTION_KEYS if info.data.get(key) is not None]
        if others or info.data.get("format", "sequin") != "sequin":
            raise ValueError(f"does not go together with {[*others, 'format'][0]}: it makes the whole message")
        if outbox.table is not None:
            _of_this_sink(outbox.table, "table", info)
        for key in outbox.routing:
            if key not in destination.routing_keys:
                near = nearest(key, destination.routing_keys)
                raise Wrong(f"routing.{key}", f"is nothing that {destination.type} is routed by{near}")
        if outbox.headers and "headers" not in destination.routing_keys:
            raise Wrong("headers", f"has no meaning for {destination.type}")
        return outbox

    @model_validator(mode="after")
    def _compacts(self) -> Sink:
        named = [key for key in ("filter", "routing") if getattr(self, key) is not None]
        if self.backlog.on_full == "compact" and named:
            raise Wrong(
                "backlog.on_full",
                f"compact does not go together with {named[0]}: a function may make something else of each message",
            )
        moves = isinstance(self.destination, Search) and self.destination.routing_column is not None
        so = "does not go together with destination.routing_column: each change of a row's shard deletes a document"
        if self.backlog.on_full == "compact" and moves:
            raise Wrong("backlog.on_full", f"compact {so}")
        if self.on_reject == "latest_wins" and moves:
            raise Wrong("on_reject", f"latest_wins {so}")
        return self

    @model_validator(mode="after")
    def _finds_the_shard_before(self) -> Sink:
        """Where a row's shard changes, the document is deleted where it was: the old value is in ``changes``."""
        destination = self.destination
        if (
            not isinstance(destination, Search)
            or destination.routing_column is None
            or destination.document != "record"
        ):
            return self
        shaped = [key for key in FUNCTION_KEYS if getattr(self, key) is not None]
        shaped += [key for key in ("format", "timestamp_format", "tx") if getattr(self, key) != _PLAIN[key]]
        if shaped:
            raise Wrong(
                "destination.routing_column",
                f"does not go together with {shaped[0]} and document: record: the document of a row whose "
                f"{destination.routing_column} changes would be left in its old shard; give document: message, or "
                "leave one of the two out",
            )
        return self

    @property
    def id(self) -> str:
        return stable_id("sink", self.name)

    @property
    def request_timeout_seconds(self) -> float:
        own = self.destination.timeout_seconds if isinstance(self.destination, Search | Webhook) else None
        return self.ack_wait_ms / 1000 if own is None else own

    @property
    def group_columns(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """By table (schema, name): what its messages are grouped by, where that is not the primary key."""
        groups: dict[tuple[str, str], tuple[str, ...]] = {
            table.name: table.group_column_names for table in self.tables if table.group_column_names
        }
        if self.outbox is not None and self.outbox.table is not None and self.outbox.key is not None:
            groups[self.outbox.table] = (self.outbox.key,)
        return groups

    def selects(self, schema: str, table: str) -> bool:
        """Of an outbox its table alone, or none."""
        if self.outbox is not None:
            return self.outbox.table == (schema, table)
        return self.source.selects(schema, table)

    @property
    def taken_actions(self) -> tuple[Action, ...]:
        """Of an outbox only inserts are events."""
        return self.actions if self.outbox is None else ("insert",)


def _default_toast(destination: Destination, data: Mapping[str, object]) -> Toast:
    """A sink that keeps rows needs whole ones where something chooses among its rows, since what it hears first of a
    row may be an update; and where a function makes them, since of what such an update lacks nobody could tell whether
    the function has left it out."""
    needs_whole = any(data.get(key) for key in ("filters", "filter", "transform"))
    return "reselect" if destination.state and needs_whole else destination.default_toast


def _of_this_sink(table: TableName, key: str, info: ValidationInfo) -> None:
    source = info.data.get("source")
    if source is not None and not source.selects(*table):
        near = nearest(str(table), map(str, source.include_tables or ()))
        raise Wrong(key, f"is not a table of this sink: its source leaves it out{near}")


def _format_of_old(block: Block, reading: Reading) -> None:
    """``legacy_transform: record_only`` -> ``format: record``."""
    key = "legacy_transform"
    line, old = block.line_of(key), block.pop(key, None)
    if old in (None, "none"):
        return
    if old != "record_only":
        reading.problem(line, block.key_path(key), "must be none or record_only")
    elif any(block.get(other) not in (None, "none") for other in ("transform", "format")):
        reading.problem(line, block.key_path(key), "is an old spelling of format: record; give one of the two")
    else:
        block["format"], block.lines["format"] = "record", line


def _source_of_old(block: Block, reading: Reading) -> None:
    """``table: orders`` and ``schema: shop`` -> ``source: {include_tables: [shop.orders]}``."""
    old = {key: block.pop(key) for key in ("schema", "table") if key in block}
    if not old:
        return
    key = next(reversed(old))
    line = block.line_of(key)
    if block.get("source") is not None:
        reading.problem(line, block.key_path(key), "is an old spelling of source; give one of the two")
        return
    source = Block(block.key_path(key), line)
    schema, table = old.get("schema"), old.get("table")
    if table is None:
        source["include_schemas"] = [schema]
    elif isinstance(schema, str) and isinstance(table, str) and "." not in table:
        source["include_tables"] = [f"{schema}.{table}"]
    else:
        source["include_tables"] = [table]
    block["source"], block.lines["source"] = source, line
