"""``backfill`` and ``replay``: rows that exist already, sent to one sink by command."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.cli import UsageError, options, output, progress
from spillway.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.cli.client import Client

COLUMNS = ("SINK", "TABLE", "ID", "ORIGIN", "STATE", "ROWS", "ESTIMATE", "DONE", "ROWS/S", "LEFT", "REASON")
STATES = {"pause": "paused", "resume": "active", "cancel": "cancelled"}

app = typer.Typer(no_args_is_help=True, help="Send rows that exist already to a sink.")

Table = Annotated[str, typer.Argument(metavar="TABLE", help="SCHEMA.TABLE, or a table of the schema public.")]
IdOrTable = Annotated[str, typer.Argument(metavar="ID_OR_TABLE", help="As `backfill list` shows it.")]
Where = Annotated[
    str | None, typer.Option("--where", metavar="SQL", help="Only rows for which this holds: a condition in SQL.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Show progress until it has ended; status 1 if it failed.")]
MaxRowsPerSecond = Annotated[
    int | None, typer.Option("--max-rows-per-second", min=1, metavar="N", help="Read no faster than this.")
]
Parallel = Annotated[
    int | None, typer.Option("--parallel", min=1, max=16, metavar="N", help="Readers, each with a range of keys.")
]


@app.command()
def start(
    sink: options.Sink,
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLE", help="SCHEMA.TABLE, or tables of the schema public; none: all of the sink."),
    ] = None,
    where: Where = None,
    sort_column: Annotated[
        str | None,
        typer.Option(
            "--sort-column", metavar="COLUMN", help="Read in the order of this column, where an index begins with it."
        ),
    ] = None,
    start_position: Annotated[
        str | None, typer.Option("--start", metavar="VALUE", help="Only rows from this value of --sort-column on.")
    ] = None,
    parallel: Parallel = None,
    max_rows_per_second: MaxRowsPerSecond = None,
    gap: Annotated[
        bool,
        typer.Option("--gap", help="After a gap: the tables that missed changes, and delete what is gone from them."),
    ] = False,
    wait: Wait = False,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Read the rows of tables and send them, beside the live changes. Survives restarts."""
    order: output.Row = {
        "tables": tables or [],
        "where": where,
        "sort_column": sort_column,
        "start_position": start_position,
        "parallel": parallel,
        "max_rows_per_second": max_rows_per_second,
        "gap": gap,
    }
    with options.client(url, config) as client:
        _start(client, (sink, "backfills"), order, wait, json)


@app.command("list")
def list_(
    sink: Annotated[str | None, typer.Argument(metavar="SINK", help="The name of a sink; none: all.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """List backfills: how far, how fast, how long still, and why one does not read just now."""
    path = ("backfills",) if sink is None else ("sinks", sink, "backfills")
    with options.client(url, config) as client:
        found = output.rows(client.get(*path, ended="true" if all_ else "false"), "data")
    if json:
        output.emit_array(found)
    elif found:
        output.table(COLUMNS, map(_cells, found))
    else:
        output.emit("nothing" if all_ else "nothing under way; --all lists what has ended")


@app.command()
def pause(
    sink: options.Sink,
    id_or_table: IdOrTable,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Stop reading; it keeps its place. Holds over restarts."""
    with options.client(url, config) as client:
        _change(client, sink, id_or_table, "pause", json)


@app.command()
def resume(
    sink: options.Sink,
    id_or_table: IdOrTable,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Go on where it was paused."""
    with options.client(url, config) as client:
        _change(client, sink, id_or_table, "resume", json)


@app.command()
def cancel(
    sink: options.Sink,
    id_or_table: IdOrTable,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """End it for good. What was sent stays sent."""
    with options.client(url, config) as client:
        _change(client, sink, id_or_table, "cancel", json)


@app.command()
def watch(
    sink: options.Sink,
    id_or_table: Annotated[
        str | None, typer.Argument(metavar="ID_OR_TABLE", help="One of them; none: all that are under way.")
    ] = None,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Show progress until all have ended; status 1 if one failed or was cancelled."""
    with options.client(url, config) as client:
        if id_or_table is None:
            under_way = output.rows(client.get("sinks", sink, "backfills", ended="false"), "data")
        else:
            under_way = [client.get("sinks", sink, "backfills", id_or_table)]
        if under_way:
            _follow(client, sink, under_way, quiet=False)
        else:
            output.emit("nothing under way")


def replay(
    sink: options.Sink,
    table: Table,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="KEY", help="This row, by its key as it is shown everywhere. May be repeated."),
    ] = None,
    from_key: Annotated[str | None, typer.Option("--from", metavar="KEY", help="From this key on, inclusive.")] = None,
    to_key: Annotated[str | None, typer.Option("--to", metavar="KEY", help="Up to this key, inclusive.")] = None,
    where: Where = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="Rows changed since then: 2026-01-02T03:04, local time or +00:00."
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", metavar="COLUMN", help="The column that says when a row was changed, for --since."),
    ] = None,
    parallel: Parallel = None,
    max_rows_per_second: MaxRowsPerSecond = None,
    wait: Wait = False,
    json: options.Json = False,
    url: options.Url = None,
    config: options.Config = None,
) -> None:
    """Send rows of a table again, as they are now.

    The parts of a composite key are separated by a colon; a colon or backslash inside of a part has a backslash before
    it.
    """
    ways = [bool(keys), from_key is not None or to_key is not None, where is not None, since is not None]
    if sum(ways) != 1:
        raise UsageError("which rows is not clear", "give one of --key (repeated), --from and --to, --where, --since")
    if column is not None and since is None:
        raise UsageError("--column has no meaning without --since", "give a time, or leave --column out")
    order: output.Row = {
        "tables": [table],
        "keys": keys or None,
        "from_key": from_key,
        "to_key": to_key,
        "where": where,
        "since": None if since is None else _time(since),
        "sort_column": column,
        "parallel": parallel,
        "max_rows_per_second": max_rows_per_second,
    }
    with options.client(url, config) as client:
        _start(client, (sink, "replay"), order, wait, json)


def _time(text: str) -> str:
    """With its zone; that of this machine where none is given."""
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except ValueError:
        raise UsageError(
            f"{text} is no time", "give one such as 2026-01-02T03:04 or 2026-01-02T03:04:05+00:00"
        ) from None


def _start(client: Client, path: tuple[str, str], order: output.Row, wait: bool, json: bool) -> None:
    sink = path[0]
    given = {name: value for name, value in order.items() if value is not None and value is not False}
    started = output.rows(client.post("sinks", *path, body=given), "data")
    if not json:
        for item in started:
            output.emit(f"{sink}: backfill {item['id']} of {output.printable(str(item['table']))} started")
        if not started:
            output.emit(f"{sink}: nothing to read")
    if wait and started:
        started = _follow(client, sink, started, quiet=json)
    if json:
        output.emit_array(started)


def _follow(client: Client, sink: str, started: list[output.Row], *, quiet: bool) -> list[output.Row]:
    ids = [item["id"] for item in started]

    def look() -> list[output.Row]:
        rows = {row["id"]: row for row in output.rows(client.get("sinks", sink, "backfills"), "data")}
        if gone := [id_ for id_ in ids if id_ not in rows]:
            remedy = f"see `spillway backfill list {sink} --all`"
            raise SpillwayError("unknown_backfill", f"backfill {gone[0]} is not kept any more", remedy)
        return [rows[id_] for id_ in ids]

    return progress.follow(look, quiet=quiet)


def _change(client: Client, sink: str, id_or_table: str, verb: str, json: bool) -> None:
    item = client.patch("sinks", sink, "backfills", id_or_table, body={"state": STATES[verb]})
    if json:
        output.emit_json(item)
    else:
        output.emit(
            output.printable(f"{sink}: backfill {item.get('id')} of {item.get('table')} is {item.get('state')}")
        )


def _cells(item: output.Row) -> list[str]:
    return [
        output.text(item.get("sink")),
        output.text(item.get("table")),
        output.text(item.get("id")),
        output.text(item.get("origin")),
        output.text(item.get("state")),
        output.text(item.get("rows_processed_count")),
        output.text(item.get("rows_initial_count")),
        progress.percent(item),
        output.text(progress.rate(item)),
        output.seconds(item.get("seconds_left")),
        output.text(progress.why(item)),
    ]
