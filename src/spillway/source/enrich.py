"""Enrichment: what a user's SQL says of the rows that have changed, for `metadata.enrichment`.

The SQL has arrays of the primary key's columns as ``$1`` ... ``$n``, in alphabetical order of the columns' names and
each of its column's own type, and gives rows that hold the key's columns under their own names::

    SELECT u.id, a.name AS account FROM users u JOIN accounts a ON a.id = u.account_id WHERE u.id = ANY($1)
    SELECT p.a, p.b, ... FROM unnest($1, $2) AS r (a, b) JOIN pairs p ON (p.a, p.b) = (r.a, r.b)

Rows belong to keys by the text of the key: a key without a row has no enrichment, one with two rows is that message's
error, one that is asked for twice has its row twice. A row of another key is nobody's. Values are rendered as the
stream renders a column of that type; json and jsonb are embedded as they are, on one line.

The SQL is run under the role's own ``search_path`` and row security, read only. What it may cost, when it is asked
again and what an error means is said in `spillway.source.bykeys`.
"""

from __future__ import annotations

from collections.abc import Callable

from spillway.errors import SpillwayError
from spillway.source.bykeys import VISIBLE_SECONDS, BatchFailed, ByKeys
from spillway.source.connect import Connection
from spillway.source.origin import Expected
from spillway.source.queries import fetch
from spillway.source.refusal import quoted
from spillway.source.sessions import Sessions
from spillway.source.wrapped import Parameter, Question

__all__ = ["BatchFailed", "Enricher"]


class Enricher(ByKeys):
    """One enrichment function on one server. `fetch` raises ``enrichment_failed``, ``enrichment_key``,
    ``enrichment_columns``, ``enrichment_parameters``, ``enrichment_timeout``."""

    def __init__(
        self,
        conninfo: str,
        slot: str,
        expected: Callable[[], Expected],
        name: str,
        sql: str,
        *,
        timeout_seconds: float = 15.0,
        connections: int = 2,
        visible_seconds: float = VISIBLE_SECONDS,
    ) -> None:
        self._name = name
        self._sql = sql
        sessions = Sessions(
            conninfo,
            slot,
            "enrichment",
            expected,
            timeout_seconds,
            connections,
            own_search_path=True,
            settings={},
        )
        remedy = f"correct the SQL of function {name}; spillway functions test {name} runs it"
        super().__init__(sessions, "enrichment", f"enrichment {name}", remedy, visible_seconds)

    async def _question(self, connection: Connection, table: tuple[str, str]) -> Question:
        schema, name = table
        key = await fetch(connection, "key_arrays", schema=schema, table=name)
        if not key:
            raise SpillwayError(
                "enrichment_key",
                f"enrichment {self._name}: table {schema}.{name} has no primary key to ask for its rows by",
                f"ALTER TABLE {quoted(schema, name)} ADD PRIMARY KEY (...);",
            )
        arrays = [row["name"] for row in key if not row["array_oid"]]
        if arrays:
            raise SpillwayError(
                "enrichment_key",
                f"enrichment {self._name}: PostgreSQL has no arrays of the type of {', '.join(arrays)}, a column of the"
                f" primary key of {schema}.{name}",
                "use no enrichment for this table",
            )
        places = sorted(range(len(key)), key=lambda place: str(key[place]["name"]))
        parameters = tuple(Parameter(place, key[place]["array_oid"], key[place]["delimiter"]) for place in places)
        return Question(self._sql, tuple(row["name"] for row in key), parameters)
