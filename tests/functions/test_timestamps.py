"""Timestamps as microseconds, against PostgreSQL's own count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servers.postgres import Postgres
from sinks.messages import SUFFIX, batch_of, change
from spillway.functions.timestamps import as_numbers
from spillway.members import joined, members
from spillway.pgoutput.scalars import timestamp, timestamptz

TEXTS = (
    "2024-10-28 21:39:21.12747+00",
    "1970-01-01 00:00:00+00",
    "1969-12-31 23:59:59.999999+00",
    "2000-02-29 12:00:00.5+00",
    "1900-03-01 00:00:00+00",
    "0001-01-01 00:00:00+00",
    "0001-12-31 23:59:59.000001+00 BC",
    "0044-03-15 12:00:00+00 BC",
    "4713-11-24 00:00:00+00 BC",
    "9999-12-31 23:59:59.999999+00",
    "10000-01-01 00:00:00+00",
    "294246-12-31 23:59:59.999999+00",
)


def converted(record: Mapping[str, Any] | str, *columns: str, changes: Any = None) -> dict[str, Any]:
    one = change(record if isinstance(record, str) else dict(record), action="update", changes=changes)
    (message,) = batch_of([one])
    made = as_numbers(message, frozenset(columns)).change
    found: dict[str, Any] = json.loads(made.body + SUFFIX)
    assert json.loads(made.record) == found["record"]
    before = json.loads(one.body + SUFFIX)
    assert found["metadata"] == before["metadata"]
    assert found["action"] == before["action"]
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_as_postgres_counts(pg18: Postgres, text: str) -> None:
    rendered, plain = timestamptz(text.encode()), timestamp(text.replace("+00", "").encode())
    made = converted('{"z":%b,"p":%b}'.replace("%b", "%s") % (rendered.decode(), plain.decode()), "z", "p")["record"]
    with pg18.connect() as connection:
        count = "(extract(epoch FROM %s::{}) * 1000000)::int8"
        query = f"SELECT {count.format('timestamptz')}, {count.format('timestamp')}"
        row = connection.execute(query, (text, text.replace("+00", ""))).fetchone()
    assert row == (made["z"], made["p"])


def test_only_the_columns_that_are_named() -> None:
    text = "2024-10-28T21:39:21.127470Z"
    record = {"at": text, "note": text, "day": "2024-10-28", "none": None, "nested": {"at": text}}
    found = converted(record, "at", "none", "absent", changes={"at": text, "note": text})
    assert found["record"] == {**record, "at": 1730151561127470}
    assert found["changes"] == {"at": 1730151561127470, "note": text}


@pytest.mark.parametrize("changes", [None, {}])
def test_changes_that_hold_nothing(changes: Any) -> None:
    assert converted({"at": "1970-01-01T00:00:01.000000"}, "at", changes=changes)["changes"] == changes


def test_infinity_stays_and_arrays_are_taken_one_by_one() -> None:
    record = {
        "a": "infinity",
        "b": "-infinity",
        "c": ["1970-01-01T00:00:00.000001Z", None, "infinity", ["1970-01-01T00:00:00.000002Z"]],
    }
    assert converted(record, "a", "b", "c")["record"] == {**record, "c": [1, None, "infinity", [2]]}


def test_names_of_every_kind() -> None:
    text = "1970-01-01T00:00:00.000007Z"
    assert converted({'a "b"\n': text, "ü": text}, 'a "b"\n')["record"] == {'a "b"\n': 7, "ü": text}


def test_without_columns_nothing_is_done() -> None:
    (message,) = batch_of([change({"at": "1970-01-01T00:00:00.000007Z"})])
    assert as_numbers(message, frozenset()) is message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_members_are_slices(value: dict[str, Any], spaced: bool) -> None:
    text = json.dumps(value, indent=1 if spaced else None, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = list(members(text))
    assert [json.loads(name) for name, _ in found] == list(value)
    assert [json.loads(one) for _, one in found] == list(value.values())
    assert json.loads(joined(found)) == value
