"""The configuration file: `load(path, env)` -> a frozen, complete `Config`, or `ConfigErrors`.

In reading order: `document` (YAML with lines), `interpolate`, `values` (kinds of values), `section` (what all parts of
the file share), the parts themselves (`process`, `database`, `endpoint`, `destination`, `backfill`, `functions` with
`code` and `elixir`, `shape`, `sink`), `references` between them, `wording` and `load`. Beside the file, `orders` is
what is asked of a running engine by command; it has the same kinds of values.
Every key is described in docs/configuration.md.
"""

from spillway.config.backfill import BackfillLimits, InitialBackfill
from spillway.config.database import Database, Publication, Slot, Ssl, stable_id
from spillway.config.destination import (
    Blackhole,
    Destination,
    Elasticsearch,
    File,
    OpenSearch,
    Search,
    Sqlite,
    Stdout,
    Webhook,
)
from spillway.config.endpoint import HttpEndpoint
from spillway.config.functions import FieldOperation, Function, FunctionLimits
from spillway.config.load import Config, ConfigErrors, load
from spillway.config.memory import default_limit_mb
from spillway.config.orders import BackfillOrder, ReindexOrder, read_order
from spillway.config.process import Memory, Server, State
from spillway.config.shape import Condition, Outbox, Related
from spillway.config.sink import Backlog, GroupedTable, Sink, Source
from spillway.config.values import TableName, parse_table

__all__ = [
    "BackfillLimits",
    "BackfillOrder",
    "Backlog",
    "Blackhole",
    "Condition",
    "Config",
    "ConfigErrors",
    "Database",
    "Destination",
    "Elasticsearch",
    "FieldOperation",
    "File",
    "Function",
    "FunctionLimits",
    "GroupedTable",
    "HttpEndpoint",
    "InitialBackfill",
    "Memory",
    "OpenSearch",
    "Outbox",
    "Publication",
    "ReindexOrder",
    "Related",
    "Search",
    "Server",
    "Sink",
    "Slot",
    "Source",
    "Sqlite",
    "Ssl",
    "State",
    "Stdout",
    "TableName",
    "Webhook",
    "default_limit_mb",
    "load",
    "parse_table",
    "read_order",
    "stable_id",
]
