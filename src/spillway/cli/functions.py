"""`spillway functions`: which there are, and what one of them makes of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.cli import UsageError, messages, options, output
from spillway.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.cli.trial import Row, Trial
    from spillway.config import Config, Function, Sink, TableName

MAX_ROWS = 1000
COLUMNS = ("FUNCTION", "TYPE", "FROM", "SINKS", "DESCRIPTION")

app = typer.Typer(no_args_is_help=True, help="The functions of the configuration: list them, try one.")


@app.command("list")
def list_functions(config: options.RequiredConfig, json: options.Json = False) -> None:
    """List the functions, and the sinks that use them."""
    from spillway.cli.load import load  # noqa: PLC0415
    from spillway.cli.trial import sinks_of  # noqa: PLC0415 - heavy

    loaded = load(config)
    found: list[output.Row] = [
        {
            "name": function.name,
            "type": function.type,
            "from": _from(function),
            "sinks": [sink.name for sink in sinks_of(loaded, function)],
            "description": function.description,
        }
        for function in loaded.functions
    ]
    if json:
        output.emit_json(found)
        return
    output.table(
        COLUMNS,
        (
            [
                output.text(row["name"]),
                output.text(row["type"]),
                output.text(row["from"]),
                ", ".join(map(str, sinks)) or "-",
                output.text(row["description"]),
            ]
            for row in found
            if isinstance(sinks := row["sinks"], list)
        ),
    )


@app.command()
def test(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a function.")],
    config: options.RequiredConfig,
    from_table: Annotated[
        str | None, typer.Option("--from-table", metavar="TABLE", help="Try it with rows of this table, the last ones.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=MAX_ROWS, help="How many rows.")] = 10,
    message: Annotated[
        Path | None, typer.Option("--message", metavar="FILE", help="Try it with the messages of a file; - is stdin.")
    ] = None,
    sink: Annotated[
        str | None, typer.Option("--sink", metavar="SINK", help="As this sink uses it, where several do.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Print what goes in and what comes out. Nothing is sent, nothing is kept.

    Without --from-table and --message: the last rows of its sink's table, or an insert, an update and a delete that are
    made up, where there is no row or no database. The status is 1 if the function fails for one of the messages.
    """
    import asyncio  # noqa: PLC0415 - heavy, as what follows

    from spillway.cli import trial  # noqa: PLC0415
    from spillway.cli.load import load  # noqa: PLC0415

    loaded = load(config)
    function = _function(loaded, name)
    used_by = _sink(loaded, function, trial.sinks_of(loaded, function), sink) or trial.no_sink(loaded)
    if from_table is not None and message is not None:
        raise UsageError("--from-table and --message do not go together")
    trials = asyncio.run(_tried(loaded, function, used_by, from_table, limit, message))
    if json:
        _emit_json(trials)
    else:
        for number, one in enumerate(trials, 1):
            for line in _shown(function, number, one):
                output.emit(line)
        if not trials:
            output.emit("the table has no row")
    if any(one.failure is not None for one in trials):
        raise typer.Exit(1)


async def _tried(
    config: Config, function: Function, sink: Sink, table: str | None, limit: int, file: Path | None
) -> Sequence[Trial]:
    from spillway.cli import trial  # noqa: PLC0415 - heavy

    own = sink.source.include_tables or ()
    rows: Sequence[Row]
    if file is not None:
        rows = trial.of_messages(messages.from_file(file))
    elif table is not None or (function.type == "enrichment" and own):
        rows = await trial.of_table(config, function, sink, own[0] if table is None else _table(table), limit)
    elif function.type == "enrichment":
        raise UsageError(f"no sink uses {function.name}", "say whose rows it is for with --from-table")
    else:
        rows = await _of_sink(config, function, sink, limit)
    return await trial.tried(config, function, sink, rows)


async def _of_sink(config: Config, function: Function, sink: Sink, limit: int) -> Sequence[Row]:
    """Of its table, if there is one that can be asked."""
    from spillway.cli import trial  # noqa: PLC0415 - heavy

    own = sink.source.include_tables or ()
    why = "its sink names no table"
    if own:
        try:
            return await trial.of_sink(config, function, sink, own[0], limit)
        except SpillwayError as error:
            why = f"{own[0]} cannot be read: {error.what}"
    output.note(
        f"the messages are made up, with columns of no table, since {why}; try it with rows: --from-table TABLE"
    )
    return trial.of_messages(messages.made_up(str(own[0]) if own else "public.example", trial.suffix_of(sink)))


def _function(config: Config, name: str) -> Function:
    from spillway.config.section import nearest  # noqa: PLC0415

    for function in config.functions:
        if function.name == name:
            return function
    near = nearest(name, [function.name for function in config.functions])
    raise UsageError(f"there is no function {name}{near}", "spillway functions list shows those that there are")


def _sink(config: Config, function: Function, users: Sequence[Sink], name: str | None) -> Sink | None:
    """None: no sink uses it, and none was named."""
    names = [sink.name for sink in users]
    if name is not None:
        if name not in names:
            raise UsageError(
                f"sink {name} does not use {function.name}", f"those that do: {', '.join(names) or 'none'}"
            )
        return config.sink(name)
    if len(users) > 1:
        raise UsageError(f"{function.name} is used by several sinks", f"name one with --sink: {', '.join(names)}")
    return users[0] if users else None


def _table(text: str) -> TableName:
    from spillway.config import parse_table  # noqa: PLC0415

    try:
        return parse_table(text)
    except ValueError as error:
        raise UsageError(f"--from-table {error}") from None


def _from(function: Function) -> str:
    if function.file is not None:
        return function.file.name
    return function.module or function.path or ("configuration" if function.code is not None else "fields")


def _shown(function: Function, number: int, trial: Trial) -> Iterator[str]:
    """For people."""
    yield f"{number}. in"
    yield f"   {messages.laid_out(trial.message, '   ')}"
    if trial.failure is not None:
        first, *more = trial.failure.detail.splitlines() or [""]
        yield f"   failed: {trial.failure.reason}: {output.printable(first)}"
        yield from (f"     {output.printable(line)}" for line in more)
    elif function.type == "filter":
        yield f"   out: {'passes' if trial.outputs else 'left out'}"
    elif not trial.outputs:
        yield "   out: nothing is sent"
    for one in trial.outputs if function.type != "filter" else ():
        if one.route is not None:
            yield f"   route {messages.laid_out(one.route, '   ')}"
        elif function.type == "routing":
            yield "   route: as the destination says"
        if one.body is not None:
            yield f"   {'enrichment' if function.type == 'enrichment' else 'out'}"
            yield f"   {messages.laid_out(one.body, '   ')}"
        elif function.type not in ("routing", "filter"):
            yield "   out: as it came"
    yield ""


def _emit_json(trials: Sequence[Trial]) -> None:
    """As they are, byte for byte: the bodies are JSON already."""
    lines = []
    for trial in trials:
        parts = [b'"in":' + trial.message]
        if trial.failure is not None:
            failed = messages.compact({"reason": trial.failure.reason, "detail": trial.failure.detail})
            parts.append(b'"failed":' + failed.encode())
        else:
            outs = (
                b'{"body":' + (one.body or b"null") + b',"route":' + (one.route or b"null") + b"}"
                for one in trial.outputs
            )
            parts.append(b'"out":[' + b",".join(outs) + b"]")
        lines.append("{" + b",".join(parts).decode(errors="replace") + "}")
    output.emit("[" + ",\n".join(lines) + "]")
