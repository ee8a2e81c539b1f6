"""Ids of documents, and the keys that they were made of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.sinks.document import ID_BYTES, document_id, key_of_message, key_of_record, parsed

TABLE = ("public", "jobs")
COLUMNS = ("a", "b", "c")


def source_of(key: tuple[str, ...]) -> dict[str, object]:
    return dict(zip(COLUMNS, key, strict=False))


def message(key: tuple[str, ...], table: tuple[str, str] = TABLE) -> dict[str, Any]:
    return {"metadata": {"table_schema": table[0], "table_name": table[1], "record_pks": list(key)}}


def test_ids_within_the_limit_and_unlike_each_other() -> None:
    keys = [("a-b", "c"), ("a", "b-c"), ("a\\", "b-c"), ("a\\-b", "c"), ("a", "b", "c"), ("",), ("", ""), ("x" * 513,)]
    keys += [("x" * 600 + str(i),) for i in range(3)] + [("ü" * 257,), ("x" * 511, "y")]
    ids = [document_id(key) for key in keys]
    assert len(set(ids)) == len(keys)
    assert all(0 < len(one.encode()) <= ID_BYTES for one in ids)
    assert document_id(("x" * 512,)) == "x" * 512
    assert document_id(("ü" * 256,)) == "ü" * 256
    assert document_id(("ü" * 300,)).startswith("ü" * 200 + "-")


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["-", "\\", "\\-", "-1", "a-b", "x" * 600, "ü" * 257, "-" * 300, "\\" * 256]
)


@given(st.lists(_text, min_size=1, max_size=3).map(tuple))
def test_a_key_comes_back_from_its_document(key: tuple[str, ...]) -> None:
    columns = COLUMNS[: len(key)]
    assert key_of_record(document_id(key), source_of(key), columns) == key
    assert key_of_message(document_id(key), message(key), TABLE) == key


@given(_text, st.lists(_text, min_size=1, max_size=3).map(tuple))
def test_no_document_has_the_key_of_another(identity: str, key: tuple[str, ...]) -> None:
    for found in (
        key_of_record(identity, source_of(key), COLUMNS[: len(key)]),
        key_of_message(identity, message(key), TABLE),
    ):
        assert found is None or document_id(found) == identity


@pytest.mark.parametrize(
    ("key", "held"),
    [
        (("12345678901234567890.50",), {"a": 1.2345678901234567e19}),
        (("2024-10-28 21:39:21.12747+00",), {"a": "2024-10-28T21:39:21.127470Z"}),
        (("t", "-1"), {"a": True, "b": -1}),
        (("\\xdead", "0044-03-15 BC"), {"a": "\\xdead", "b": "-0043-03-15"}),
        (("1 mon", "1.50"), {"a": {"months": 1}, "b": 1.5}),
    ],
)
def test_the_key_is_the_text_of_postgres_whatever_the_document_holds(
    key: tuple[str, ...], held: dict[str, object]
) -> None:
    assert key_of_record(document_id(key), held, COLUMNS[: len(key)]) == key
    assert key_of_record(document_id(key), None, COLUMNS[: len(key)]) == key


def test_documents_that_no_row_has_made() -> None:
    assert key_of_record("x", {"b": 1}, ("a",)) is None
    assert key_of_record("x", {"a": None}, ("a",)) is None
    assert key_of_record("x", {"a": 1, "b": 2}, ("a", "b")) is None, "one part of two"
    assert key_of_record("1-2-3", {"a": 1, "b": 2}, ("a", "b")) is None
    assert key_of_record("1-\\2", {"a": 1, "b": 2}, ("a", "b")) is None, "nobody escapes a digit"
    assert key_of_message("1", {"metadata": {}}, TABLE) is None
    assert key_of_message("1", {}, TABLE) is None
    assert key_of_message("1", None, TABLE) is None
    assert key_of_message("1", message(("1",), ("public", "users")), TABLE) is None
    assert key_of_message("2", message(("1",)), TABLE) is None


def test_a_hashed_key_that_the_document_does_not_say_is_unknown() -> None:
    key = ("x" * 600, "2024-01-01 00:00:00")
    assert key_of_record(document_id(key), {"a": key[0], "b": "2024-01-01T00:00:00.000000"}, ("a", "b")) is None
    assert key_of_record(document_id(key), None, ("a", "b")) is None


def test_numbers_stay_text() -> None:
    assert parsed(b'{"a":[1.50,12345678901234567890]}') == {"a": ["1.50", "12345678901234567890"]}
