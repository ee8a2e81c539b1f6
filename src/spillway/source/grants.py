"""Which grants somebody's SQL lacks, all at once: PostgreSQL names one table at a time, and without its schema.

The names in the SQL are not parsed: every word of it that is the name of a table or view which may not be read, in a
schema that is named as well or searched, counts. What is said is a proposal of grants, not a judgement."""

from __future__ import annotations

import re
from collections.abc import Iterable

from spillway.source.connect import Connection
from spillway.source.queries import fetch
from spillway.source.refusal import quoted

_NAME = re.compile(r'"((?:[^"]|"")+)"|([^\W\d][\w$]*)')


async def missing_grants(query: Connection, code: str, role: str) -> str:
    """The SQL that grants what ``code`` seems to lack; empty if nothing is found."""
    names = {found[1].replace('""', '"') if found[1] else found[2].lower() for found in _NAME.finditer(code)}
    rows = await fetch(query, "unreadable", names=sorted(names))
    return grants(((row["schema"], row["table"]) for row in rows), role)


def grants(tables: Iterable[tuple[str, str]], role: str) -> str:
    tables = list(tables)
    schemas = [
        f"GRANT USAGE ON SCHEMA {quoted(schema)} TO {quoted(role)};" for schema in sorted({t[0] for t in tables})
    ]
    return " ".join([*schemas, *(f"GRANT SELECT ON {quoted(*table)} TO {quoted(role)};" for table in tables)])
