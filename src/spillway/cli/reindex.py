"""``reindex``: a new index beside the one that a search sink fills, and the switch to it."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.cli import UsageError, options, output, progress
from spillway.cli.backfill import Parallel
from spillway.cli.piles import confirm

if TYPE_CHECKING:
    from spillway.cli.client import Client

COLUMNS = ("SINK", "ALIAS", "INTO", "STATE", "SINCE", "DOCUMENTS", "DIFFERING", "OLD", "REASON")


def reindex(
    sink: Annotated[str | None, typer.Argument(metavar="SINK", help="The name of a search sink.")] = None,
    into: Annotated[str | None, typer.Option("--into", metavar="NAME", help="The new index, which is created.")] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(
            "--mapping", metavar="FILE", help='What to create it with: JSON, {"mappings": {...}, "settings": {...}}.'
        ),
    ] = None,
    derive_mapping: Annotated[
        bool, typer.Option("--derive-mapping", help="Make the mapping from the table's columns.")
    ] = False,
    replace_index: Annotated[
        bool,
        typer.Option("--replace-index", help="Delete the index that has the alias's name when the alias takes it."),
    ] = False,
    parallel: Parallel = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show progress until the switch; status 1 if it failed.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="List re-indexes, of SINK or all.")] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="End it before the switch: the sink stays as it is.")
    ] = False,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="After the switch, delete the old indexes.")] = False,
    yes: options.Yes = False,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Fill a new index from the table, compare, then move the alias to it. The old index is kept until --drop-old.

    The live changes go to both indexes meanwhile. Survives restarts.
    """
    if (into is not None) + status + cancel + drop_old != 1:
        raise UsageError("what to do is not clear", "give one of --into NAME, --status, --cancel, --drop-old")
    if into is None and (mapping is not None or derive_mapping or replace_index or wait or parallel is not None):
        raise UsageError("what says how to make the new index goes with --into", "give --into NAME, or leave it out")
    if sink is None and not status:
        raise UsageError("the sink is missing", "give SINK; see `spillway sinks list`")
    order: output.Row = {"into": into, "derive_mapping": derive_mapping or None, "parallel": parallel}
    if replace_index:
        confirm(f"Delete the index whose name becomes the alias of {into}, once that is filled?", yes)
        order["replace_index"] = True
    if mapping is not None:
        order["mapping"] = _read(mapping)
    with options.client(url, config) as client:
        if sink is None or status:
            _list(client, sink, json)
        elif into is not None:
            _start(client, sink, {name: value for name, value in order.items() if value is not None}, wait, json)
        elif cancel:
            _show(client.post("sinks", sink, "reindex", "cancel"), json)
        else:
            _drop_old(client, sink, yes, json)


def _read(file: Path) -> object:
    try:
        return json_format.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}", "correct --mapping") from None
    except ValueError:
        raise UsageError(f"{file} is no JSON", 'give a file with {"mappings": {...}, "settings": {...}}') from None


def _list(client: Client, sink: str | None, json: bool) -> None:
    path = ("reindexes",) if sink is None else ("sinks", sink, "reindex")
    found = output.rows(client.get(*path), "data")
    if json:
        output.emit_array(found)
    elif found:
        output.table(COLUMNS, map(_cells, found))
    else:
        output.emit("nothing")


def _start(client: Client, sink: str, order: output.Row, wait: bool, json: bool) -> None:
    item = client.post("sinks", sink, "reindex", body=order)
    into = item.get("into")
    if not json:
        output.emit(f"{sink}: re-index into {into} started")
    if wait:

        def look() -> list[output.Row]:
            nonlocal item
            found = output.rows(client.get("sinks", sink, "reindex"), "data")
            item = [one for one in found if one.get("into") == into][-1]
            return [*output.rows(item, "backfills"), _as_row(item)]

        progress.follow(look, quiet=json)
    if json:
        output.emit_json(item)


def _drop_old(client: Client, sink: str, yes: bool, json: bool) -> None:
    """All that is there of this re-index and of earlier ones, named before and after."""
    old = [name for item in output.rows(client.get("sinks", sink, "reindex"), "data") for name in _names(item, "old")]
    if old:
        confirm(output.printable(f"Delete what {sink} filled before: {', '.join(old)}?"), yes)
    item = client.post("sinks", sink, "reindex", "drop-old")
    if json:
        output.emit_json(item)
    else:
        output.emit(output.printable(f"{sink}: deleted {', '.join(_names(item, 'deleted')) or 'nothing'}"))


def _names(item: output.Row, key: str) -> list[str]:
    found = item.get(key)
    return list(map(str, found)) if isinstance(found, list) else []


def _as_row(item: output.Row) -> output.Row:
    """The re-index as a line below its backfills."""
    state = item.get("state")
    return {
        "id": "reindex",
        "table": f"{item.get('alias')} -> {item.get('into')}",
        "state": state,
        "error": item.get("reason") if state == "failed" else None,
        "waiting": item.get("reason"),
        "rows_processed_count": item.get("documents"),
    }


def _show(item: output.Row, json: bool) -> None:
    if json:
        output.emit_json(item)
    else:
        output.emit(output.printable(f"{item.get('sink')}: re-index into {item.get('into')}: {item.get('state')}"))


def _cells(item: output.Row) -> list[str]:
    return [
        output.text(item.get("sink")),
        output.text(item.get("alias")),
        output.text(item.get("into")),
        output.text(item.get("state")),
        output.ago(item.get("ended_at") or item.get("started_at")),
        output.text(item.get("documents")),
        output.text(item.get("differing")),
        output.text(" ".join(_names(item, "old"))),
        output.text(item.get("reason")),
    ]
