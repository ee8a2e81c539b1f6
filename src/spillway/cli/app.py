"""The commands and their options; what they do is in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from spillway import __version__
from spillway.cli import options, output
from spillway.cli.backfill import app as backfill
from spillway.cli.backfill import replay
from spillway.cli.functions import app as functions
from spillway.cli.piles import confirm, export, pile_app
from spillway.cli.reindex import reindex

if TYPE_CHECKING:
    from spillway.cli.client import Client

SINK_COLUMNS = ("SINK", "TYPE", "STATE", "SINCE", "BACKLOG", "BYTES", "OLDEST", "PARKED", "DEAD", "DELIVERED")
DATABASE_COLUMNS = ("DATABASE", "SLOT", "LAG", "CONFIRMED")
WELL = ("idle", "caught_up")
_FAILING = ("full", "down", "retrying", "stalled", "parked")  # of which the last error tells

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks show local variables
    rich_markup_mode=None,
    help="PostgreSQL change data capture whose memory is bounded by construction.",
)
sinks = typer.Typer(no_args_is_help=True, help="List, pause and resume sinks.")
state = typer.Typer(no_args_is_help=True, help="The state file: positions, backlog, dead letters.")
dead_letters = pile_app("dead-letters", "dead letters", ", by key")
dead_letters.command("export")(export)
app.add_typer(sinks, name="sinks")
app.add_typer(pile_app("backlog", "what waits on disk", ": what is held, by key, then the queue"), name="backlog")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(backfill, name="backfill")
app.command("replay")(replay)
app.command("reindex")(reindex)
app.add_typer(functions, name="functions")
app.add_typer(state, name="state")


def _print_version(wanted: bool) -> None:
    if wanted:
        output.emit(f"spillway {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command()
def run(file: options.File, json: Annotated[bool, typer.Option("--json", help="Log as JSON.")] = False) -> None:
    """Run in the foreground. SIGTERM or Ctrl-C stops cleanly, a second one at once."""
    from spillway.cli.run import run as run_engine  # noqa: PLC0415

    run_engine(file, json)


@app.command()
def check(file: options.File, json: options.Json = False) -> None:
    """Check the configuration and the database: prints findings with the SQL that mends them."""
    from spillway.cli.load import check as find  # noqa: PLC0415

    findings = [finding.as_json() for finding in find(file)]
    if json:
        output.emit_json(findings)
    else:
        for finding in findings:
            for line in output.finding_lines(finding):
                output.emit(line)
        output.emit(f"{len(findings)} finding{'' if len(findings) == 1 else 's'}" if findings else "no findings")
    raise typer.Exit(1 if findings else 0)


@app.command()
def status(json: options.Json = False, url: options.Url = None, config: options.Config = None) -> None:
    """Show memory, slots and sinks of the running process."""
    with options.client(url, config) as client:
        answer = client.get("status")
    if json:
        output.emit_json(answer)
        return
    output.emit(
        f"spillway {output.text(answer.get('version'))} ({output.text(answer.get('impl'))}), "
        f"started {output.ago(answer.get('started'))}"
    )
    memory = answer.get("memory")
    if isinstance(memory, dict):
        held, limit = output.size(memory.get("held_bytes")), output.size(memory.get("limit_bytes"))
        output.emit(f"memory {held} held of {limit}")
    output.emit("")
    _show_databases(output.rows(answer, "databases"))
    output.emit("")
    _show_sinks(output.rows(answer, "sinks"))


@sinks.command("list")
def list_sinks(json: options.Json = False, url: options.Url = None, config: options.Config = None) -> None:
    """List the sinks: state, reason, since when, and what to do."""
    with options.client(url, config) as client:
        found = output.rows(client.get("status"), "sinks")
    if json:
        output.emit_array(found)
    else:
        _show_sinks(found)


@sinks.command()
def pause(
    sink: options.Sink, json: options.Json = False, url: options.Url = None, config: options.Config = None
) -> None:
    """Stop delivering to a sink; its changes wait on disk. Holds over restarts."""
    with options.client(url, config) as client:
        _switch(client, sink, "pause", json)


@sinks.command()
def resume(
    sink: options.Sink, json: options.Json = False, url: options.Url = None, config: options.Config = None
) -> None:
    """Deliver to a sink again that was paused, or take note of its gap."""
    with options.client(url, config) as client:
        _switch(client, sink, "resume", json)


@state.command()
def adopt(config: options.RequiredConfig, yes: options.Yes = False, json: options.Json = False) -> None:
    """Go on although the state belongs to another history of the database, and record the gap.

    For a database that was restored or failed over, a slot that was used by another, or a lost state file: what
    `check` and `run` report. Stop the running process first.
    """
    from spillway.cli.load import adopt as adopt_state  # noqa: PLC0415

    confirm("Go on with this database and record what the sinks may have missed as a gap?", yes)
    done = adopt_state(config)
    if json:
        output.emit_json(done)
    else:
        for line in done or ["nothing to adopt"]:
            output.emit(line)


@app.command()
def demo() -> None:
    """See it work: a PostgreSQL of its own, a sink that breaks, a crash, and nothing lost. Takes two minutes."""
    from spillway.demo import main  # noqa: PLC0415

    raise typer.Exit(main())


@app.command()
def version(json: options.Json = False) -> None:
    """Print the version."""
    if json:
        output.emit_json({"version": __version__})
    else:
        output.emit(f"spillway {__version__}")


def _switch(client: Client, sink: str, verb: str, json: bool) -> None:
    answer = client.post("sinks", sink, verb)
    if json:
        output.emit_json(answer)
    else:
        output.emit(f"{sink}: {verb}d")


def _show_sinks(found: list[output.Row]) -> None:
    output.table(SINK_COLUMNS, map(_sink_cells, found))
    for sink in found:
        if sink.get("state") not in WELL or sink.get("reason"):
            reason = str(sink.get("reason") or "")
            last_error = str(sink.get("last_error") or "") if sink.get("state") in _FAILING else ""
            parts = [reason, "" if last_error in reason else last_error, str(sink.get("remedy") or "")]
            if any(parts):
                output.emit(output.printable(f"{sink.get('name')}: {'; '.join(filter(None, parts))}"))

        related = sink.get("related")
        if isinstance(related, dict) and (related.get("due") or related.get("backlog_messages")):
            output.emit(output.printable(f"{sink.get('name')}: {_due(related)}"))


def _due(related: output.Row) -> str:
    parts = [f"{related.get('due')} documents are to be refreshed"]
    if related.get("due_oldest_seconds"):
        parts.append(f"the first since {output.seconds(related.get('due_oldest_seconds'))}")
    if related.get("backlog_messages"):
        parts.append(f"{related.get('backlog_messages')} changes of related tables come first")
    return ", ".join(parts) + (f" ({related.get('waiting')})" if related.get("waiting") else "")


def _show_databases(found: list[output.Row]) -> None:
    output.table(DATABASE_COLUMNS, map(_database_cells, found))
    for database in found:
        if not database.get("connected"):
            why = database.get("last_error") or database.get("waiting")
            output.emit(output.printable(f"{database.get('name')}: not connected; {why}"))


def _sink_cells(sink: output.Row) -> list[str]:
    return [
        output.text(sink.get("name")),
        output.text(sink.get("type")),
        output.text(sink.get("state")),
        output.ago(sink.get("since")),
        output.text(sink.get("backlog_messages")),
        output.size(sink.get("backlog_bytes")),
        output.seconds(sink.get("backlog_oldest_seconds")),
        output.text(sink.get("parked_keys")),
        output.text(sink.get("dead_letters")),
        output.text(sink.get("delivered")),
    ]


def _database_cells(database: output.Row) -> list[str]:
    return [
        output.text(database.get("name")),
        output.text(database.get("slot")),
        output.size(database.get("slot_lag_bytes")),
        output.text(database.get("confirmed_lsn")),
    ]
