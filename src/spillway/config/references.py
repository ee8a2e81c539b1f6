"""What one part of the file says about another: whether there is a database, endpoint or function of that name, and of
the type that is wanted. Looked at in the file's tree, so that it is told also where something else is wrong.
"""

from __future__ import annotations

from spillway.config.destination import NOT_YET, OLD_SPELLINGS, TYPES
from spillway.config.document import Block, Items
from spillway.config.functions import SOURCES
from spillway.config.section import Reading, nearest
from spillway.config.sink import FUNCTION_KEYS

# By the key of a sink: the types of functions that it may name.
_TYPES: dict[str, tuple[str, ...]] = {
    "filter": ("filter",),
    "routing": ("routing",),
    "enrichment": ("enrichment",),
    "transform": ("transform", "path", "fields"),
}


def sections(root: Block, key: str) -> list[Block]:
    value = root.get(key)
    return [item for item in value if isinstance(item, Block)] if isinstance(value, Items) else []


def references(root: Block, reading: Reading) -> None:
    for sink in sections(root, "sinks"):
        database = _named(sink, "database", root, "databases", reading)
        destination = sink.get("destination")
        if isinstance(destination, Block) and destination.get("type") == "webhook":
            _named(destination, "http_endpoint", root, "http_endpoints", reading)
        for key in FUNCTION_KEYS:
            if sink.get(key) not in ("none", "null", "nil"):
                function = _named(sink, key, root, "functions", reading)
                if function is not None:
                    _fits(sink, key, function, reading)
                if function is not None and key == "transform":
                    _one_to_one(sink, function, reading)
        if sink.get("enrichment_from") == "replica" and database is not None and database.get("replica_url") is None:
            key = "enrichment_from"
            what = "needs a replica: set replica_url of the database"
            reading.problem(sink.line_of(key), sink.key_path(key), what)


def _one_to_one(sink: Block, function: Block, reading: Reading) -> None:
    """Of a transform that says what it likes of each message, older messages are not told by the newest."""
    backlog = sink.get("backlog")
    if isinstance(backlog, Block) and backlog.get("on_full") == "compact" and function.get("type") != "fields":
        what = "compact does not go together with a transform, which may make something else of each message"
        reading.problem(backlog.line_of("on_full"), backlog.key_path("on_full"), what)


def _named(section: Block, key: str, root: Block, kind: str, reading: Reading) -> Block | None:
    name = section.get(key)
    named = {str(item["name"]): item for item in sections(root, kind) if isinstance(item.get("name"), str)}
    if isinstance(name, str) and name not in named:
        what = f"none of {kind} has this name"
        reading.problem(section.line_of(key), section.key_path(key), what + nearest(name, named))
    return named.get(name) if isinstance(name, str) else None


def _fits(sink: Block, key: str, function: Block, reading: Reading) -> None:
    line, path, kind = sink.line_of(key), sink.key_path(key), function.get("type")
    if isinstance(kind, str) and kind in SOURCES and kind not in _TYPES[key]:
        reading.problem(line, path, f"is a function of type: {kind}; wanted is {' or '.join(_TYPES[key])}")
        return
    destination, wanted = sink.get("destination"), function.get("sink_type")
    to = destination.get("type") if isinstance(destination, Block) else None
    wanted = OLD_SPELLINGS.get(wanted, wanted) if isinstance(wanted, str) else wanted
    if key == "routing" and to in TYPES and wanted in (*TYPES, *NOT_YET) and wanted != to:
        reading.problem(line, path, f"routes messages of {wanted} sinks; this one is {to}")
