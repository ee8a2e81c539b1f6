"""What is asked of a running engine by command: a backfill, a replay, a re-index. Read from JSON by `read_order`.

A key is given as it is shown everywhere, its parts separated by ``:`` and escaped with a backslash (`spillway.change`),
with or without its table in front; or as a list of its parts. An order holds the parts.

**Which rows.** ``keys`` alone; or any of ``where``, ``start_position`` (rows from this value of ``sort_column`` on),
``from_key`` and ``to_key`` (inclusive bounds of the primary key) and ``since``: rows whose last change is younger, by
``sort_column`` if that is given, else by ``pg_xact_commit_timestamp(xmin)``. All that are given must hold; if none is
given, every row is meant.

``gap`` means whole tables, which the engine finds: those that missed changes. What the sink has and the source has not
is deleted afterwards, so it goes with no condition. ``replay`` sends again what was sent before, and must say which
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError, model_validator

from spillway.change import key_values, table_prefix
from spillway.config.backfill import Parallel, RowsPerSecond
from spillway.config.destination import IndexName
from spillway.config.section import Section, nearest
from spillway.config.values import Flag, Name, Table, TableName, Text, Wrong, parse_table
from spillway.config.wording import wording
from spillway.errors import SpillwayError

Key = tuple[Text, ...]

MAX_KEYS = 10_000

_CONDITIONS = ("where", "start_position", "from_key", "to_key", "since")


def _sql(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty")
    return value


class BackfillOrder(Section):
    """Existing rows of some tables (none named: of every table of the sink) for one sink."""

    tables: tuple[Table, ...] = ()
    where: Annotated[str, BeforeValidator(_sql)] | None = None  # SQL, the user's
    sort_column: Name | None = None
    start_position: Text | None = None
    keys: Annotated[tuple[Key, ...], Field(min_length=1, max_length=MAX_KEYS)] | None = None
    since: AwareDatetime | None = None
    from_key: Key | None = None
    to_key: Key | None = None
    parallel: Parallel | None = None  # None: as the sink's configuration says
    max_rows_per_second: RowsPerSecond | None = None  # None: the same
    gap: Flag = False
    replay: Flag = False

    @classmethod
    def known_keys(cls) -> list[str]:
        return ["table", *super().known_keys()]

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, given: Any) -> Any:  # pydantic's own signature
        """``table`` for one table, as Sequin has it, and keys as text."""
        if not isinstance(given, Mapping):
            return given
        order = {name: value for name, value in given.items() if value is not None}
        if "table" in order:
            if "tables" in order:
                raise Wrong("table", "give either table or tables")
            order["tables"] = [order.pop("table")]
        prefix = _prefix(order.get("tables"))
        if isinstance(order.get("keys"), list | tuple):
            order["keys"] = [_parts(key, prefix) for key in order["keys"]]
        for bound in ("from_key", "to_key"):
            if bound in order:
                order[bound] = _parts(order[bound], prefix)
        return order

    @model_validator(mode="after")
    def _agrees(self) -> BackfillOrder:
        said = [name for name in _CONDITIONS if getattr(self, name) is not None]
        if len(set(self.tables)) < len(self.tables):
            raise Wrong("tables", "names a table twice")
        if self.gap and (said or self.keys is not None or self.replay):
            raise Wrong("gap", "reads whole tables, and goes with no condition on rows")
        if self.gap and self.tables:
            raise Wrong("gap", "reads all tables that missed changes; name none, or leave gap out")
        if self.keys is not None and said:
            raise Wrong(said[0], "has no meaning beside keys, which say which rows")
        if self.start_position is not None and self.sort_column is None:
            raise Wrong("start_position", "needs a sort_column")
        if self.start_position is not None and self.since is not None:
            raise Wrong("since", "and start_position both bound sort_column; give one of the two")
        if len(self.tables) > 1 and (self.keys or self.from_key or self.to_key):
            raise Wrong("tables", "must be one table, for keys are those of a table")
        if self.replay and not said and self.keys is None:
            raise Wrong("replay", "say which rows, by keys, from_key and to_key, where or since; all: start a backfill")
        return self


class ReindexOrder(Section):
    """A new index beside the one that a search sink fills, and the switch to it."""

    into: IndexName
    mapping: dict[str, object] | None = None  # the body of the new index, ``{"mappings": ..., "settings": ...}``
    derive_mapping: Flag = False  # from the table's columns
    replace_index: Flag = False  # an index that has the alias's name may be deleted at the switch
    parallel: Parallel | None = None

    @model_validator(mode="after")
    def _either(self) -> ReindexOrder:
        if self.mapping is not None:
            unknown = self.mapping.keys() - {"mappings", "settings"}
            if unknown or not all(isinstance(part, dict) for part in self.mapping.values()):
                raise Wrong("mapping", 'must be {"mappings": {...}, "settings": {...}}')
        if self.mapping is not None and self.derive_mapping:
            raise Wrong("derive_mapping", "give either mapping or derive_mapping")
        return self


Order = TypeVar("Order", bound=Section)  # one of the two


def read_order(kind: type[Order], given: object) -> Order:
    """The order that this JSON value is. Raises SpillwayError ``bad_request``, with everything that is wrong."""
    if not isinstance(given, Mapping):
        raise SpillwayError("bad_request", "the body is no JSON object", f"send some of {', '.join(kind.known_keys())}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            if details["type"] == "too_short" and details["input"]:
                continue  # its items are wrong, which is told already
            cause = details.get("ctx", {}).get("error")
            place = [*details["loc"], *([cause.key] if isinstance(cause, Wrong) else [])]
            name = ".".join(map(str, place))
            near = nearest(name, kind.known_keys()) if details["type"] == "extra_forbidden" else ""
            problems.append(f"{name}: {wording(details)}{near}")
        raise SpillwayError("bad_request", "; ".join(problems), "correct the request") from None


def _prefix(tables: object) -> str | None:
    """What the keys of the one table begin with; None: there is not one table, or it is none."""
    if not isinstance(tables, list | tuple) or len(tables) != 1:
        return None
    try:
        table = tables[0] if isinstance(tables[0], TableName) else parse_table(tables[0])
    except (ValueError, TypeError):
        return None  # which is told by its own validator
    return table_prefix(*table)


def _parts(key: object, prefix: str | None) -> object:
    if isinstance(key, int) and not isinstance(key, bool):
        return (str(key),)
    if not isinstance(key, str):
        return key
    values = key.removeprefix(prefix) if prefix is not None else key
    return key_values("", "", table_prefix("", "") + values)
