"""Tables that a sink took and that are not published any more, which the stream does not say.

A table that is taken out of the publication, or is called otherwise where its new name is not published, or whose name
was given to a table that nobody has published, sends nothing from then on. Whoever reads it asks the catalogue every
now and then. A table that was dropped, and is not there under its name, is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping

from spillway.errors import Finding
from spillway.source.connect import Connection
from spillway.source.queries import fetch
from spillway.source.refusal import quoted

Table = tuple[str, str]


async def unpublished(query: Connection, publication: str, taken: Mapping[int, Table]) -> dict[Table, Finding]:
    """``taken``: by OID the names by which they were taken. By name."""
    if not taken:
        return {}
    names = list(taken.values())
    rows = await fetch(
        query,
        "unpublished",
        publication=publication,
        oids=list(taken),
        schemas=[schema for schema, _ in names],
        tables=[table for _, table in names],
    )
    found: dict[Table, Finding] = {}
    for row in rows:
        was, now = (row["schema"], row["table"]), (row["now_schema"], row["now_table"])
        if now in (was, (None, None)):
            what = f"table {'.'.join(was)} is not in the publication {publication} any more: its changes do not come"
        else:
            what = f"table {'.'.join(was)} is called {'.'.join(now)} now, and nothing is published as {'.'.join(was)}"
        found[was] = Finding(
            "table_not_published",
            what,
            f"ALTER PUBLICATION {quoted(publication)} ADD TABLE {quoted(*was)}; or name another table in the sink's"
            " source; then refill it: spillway backfill start",
        )
    return found
