"""What an index is created with: a definition of the user's, or one derived from a table's columns.

A definition is what the server's "create index" takes: ``{"mappings": {...}, "settings": {...}}``, of which either may
be left out. An index that we create remembers deletes for an hour (``index.gc_deletes``, see `spillway.sinks.search`)
unless the definition says something else.

**Derived** are fields that take every value that a column of the type can hold, as it is rendered
(`spillway.pgoutput.scalars`): a value that a server cannot index (a NaN, a date before Christ, a numeric beyond a
double) stays in the document and out of the index (``ignore_malformed``), and so does a keyword that is too long. The
field of a numeric is a double, for ranges and sums; all of its digits are in the document.

=============================================  =====================================================================
type                                           field
=============================================  =====================================================================
boolean; smallint, integer, bigint, oid        boolean; short, integer, long, long
real; double precision, numeric                float; double
text, varchar, char, citext, name, xml         text, with a subfield ``keyword``
uuid, inet and alike, time, ranges, ``enum``   keyword
date, timestamp, timestamptz                   date
json, jsonb                                    an object whose fields the server adds
interval                                       an object of three numbers
bytea, bit                                     in the document alone, not indexed
arrays                                         as their elements
any other                                      none: left to the server
=============================================  =====================================================================

A type's name is that of ``format_type`` or of ``pg_type``; that of any enum is ``enum``. A json column that holds
objects in some rows and plain values in others needs a definition of the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

import orjson

from spillway.errors import SpillwayError

Document = Literal["record", "message"]
Definition = Mapping[str, object]

GC_DELETES_SECONDS = 3600

_TERM_CHARACTERS = 8191  # four bytes each: the longest term that an index takes has 32,766 bytes
_BOOLEAN: Definition = {"type": "boolean"}
_SHORT: Definition = {"type": "short"}
_INTEGER: Definition = {"type": "integer"}
_LONG: Definition = {"type": "long"}
_FLOAT: Definition = {"type": "float", "ignore_malformed": True}
_DOUBLE: Definition = {"type": "double", "ignore_malformed": True}
_KEYWORD: Definition = {"type": "keyword", "ignore_above": _TERM_CHARACTERS}
_TEXT: Definition = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}
_DATE: Definition = {"type": "date", "ignore_malformed": True}
_HIDDEN: Definition = {"type": "keyword", "index": False, "doc_values": False}
_OBJECT: Definition = {"type": "object", "dynamic": True}
_INTERVAL: Definition = {"properties": {"months": _INTEGER, "days": _INTEGER, "microseconds": _LONG}}
_FIELDS: dict[str, Definition] = {
    name: field
    for names, field in (
        (("bool", "boolean"), _BOOLEAN),
        (("int2", "smallint"), _SHORT),
        (("int4", "integer"), _INTEGER),
        (("int8", "bigint", "oid"), _LONG),
        (("float4", "real"), _FLOAT),
        (("float8", "double precision", "numeric"), _DOUBLE),
        (("text", "varchar", "character varying", "citext", "name", "xml"), _TEXT),
        (("char", '"char"', "bpchar", "character"), _TEXT),
        (("uuid", "enum", "inet", "cidr", "macaddr", "macaddr8", "pg_lsn", "money"), _KEYWORD),
        (("time", "time without time zone", "timetz", "time with time zone"), _KEYWORD),
        (("int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange"), _KEYWORD),
        (("date", "timestamp", "timestamp without time zone"), _DATE),
        (("timestamptz", "timestamp with time zone"), _DATE),
        (("json", "jsonb"), _OBJECT),
        (("interval",), _INTERVAL),
        (("bytea", "bit", "varbit", "bit varying"), _HIDDEN),
    )
    for name in names
}
_MODIFIER = re.compile(r"\([^)]*\)")  # varchar(20), timestamp(3) with time zone
_FIELDS_OF_INTERVAL = re.compile(r"interval\b.*")  # interval day to second


def read_definition(path: Path) -> Definition:
    """A definition out of a file. Raises SpillwayError ``mapping_file``."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise _wrong(path, str(error)) from error
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise _wrong(path, "it is no object of objects")
    unknown = found.keys() - {"mappings", "settings"}
    if unknown:
        raise _wrong(path, f"it has {', '.join(sorted(unknown))}")
    return cast(Definition, found)


def _wrong(path: Path, why: str) -> SpillwayError:
    return SpillwayError(
        "mapping_file",
        f"{path} is no definition of an index: {why}",
        'destination.mapping names a JSON file: {"mappings": {...}, "settings": {...}}',
    )


def with_gc_deletes(definition: Definition) -> Definition:
    settings = cast("dict[str, object]", definition.get("settings", {}))
    nested = settings.get("index", {})
    if {"gc_deletes", "index.gc_deletes"} & settings.keys() or (isinstance(nested, dict) and "gc_deletes" in nested):
        return definition
    return {**definition, "settings": {**settings, "index.gc_deletes": f"{GC_DELETES_SECONDS}s"}}


def derived(columns: Iterable[tuple[str, str]], document: Document) -> Definition:
    """The definition of an index for documents of these columns (name, type), see the module's docstring."""
    fields = {name: field for name, type_name in columns if (field := _field(type_name)) is not None}
    if document == "record":
        return {"mappings": {"properties": fields}}
    both = {"properties": fields}
    return {"mappings": {"properties": {"record": both, "changes": both, "action": _KEYWORD}}}


def _field(type_name: str) -> Definition | None:
    name = _MODIFIER.sub("", type_name).replace("[]", "").strip()
    if name not in _FIELDS:
        name = _FIELDS_OF_INTERVAL.sub("interval", name.removeprefix("_"))
    return _FIELDS.get(name)
