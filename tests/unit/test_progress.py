"""What is kept of a backfill comes back as it was."""

from __future__ import annotations

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from spillway.flow.progress import ENDED, BackfillState, Named, Part, Request, of_json
from spillway.source.page import Range

texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
cursors = st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple)
requests = st.builds(
    Request,
    schema=texts,
    table=texts,
    origin=st.sampled_from(["command", "initial", "gap", "reindex", "replay"]),
    where=st.none() | texts,
    sort_column=st.none() | texts,
    start=st.none() | texts,
    keys=st.none() | st.lists(st.lists(texts, min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
    named=st.none() | st.builds(Named, st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40)),
    parallel=st.integers(1, 64),
    max_rows_per_second=st.none() | st.integers(1, 1 << 40),
    sweep=st.booleans(),
)
parts = st.builds(
    Part,
    schema=texts,
    table=texts,
    low=cursors,
    high=cursors,
    cursor=cursors,
    done=st.booleans(),
    again=st.lists(st.lists(texts, min_size=1, max_size=2).map(tuple), max_size=3),
)
states = st.builds(
    BackfillState,
    id=texts,
    sink=texts,
    request=requests,
    state=st.sampled_from(["active", "paused", "completed", "failed", "cancelled"]),
    parts=st.none() | st.lists(parts, max_size=3),
    estimate_rows=st.none() | st.integers(0, 1 << 62),
    started_lsn=st.integers(0, (1 << 63) - 1),
    rows=st.integers(0, 1 << 62),
    sweep_after=st.none() | texts,
    block=st.integers(0, 1 << 20),
    placed=st.lists(st.integers(0, 500), max_size=3),
    unreadable=st.integers(0, 1 << 20),
    unreadable_named=st.lists(texts, max_size=3),
    ended=st.none() | st.floats(0, 4e9),
    error=st.none() | texts,
)


@settings(max_examples=200, deadline=None)
@given(states)
def test_a_document_comes_back_as_it_was(state: BackfillState) -> None:
    back = of_json(state.as_json())
    assert back == state
    assert back.as_json() == state.as_json()
    for part in back.parts or ():
        assert all(isinstance(key, tuple) for key in part.again)


def test_whether_it_has_ended_is_said_by_its_state() -> None:
    for state in ("active", "paused", "completed", "failed", "cancelled"):
        one = BackfillState("1", "sink", Request("public", "t"), state=state)
        assert one.has_ended == (state in ENDED)
        assert one.has_ended == (state not in ("active", "paused"))


def test_a_part_knows_what_to_read() -> None:
    request = Request("public", "t", where="a > 1", sort_column="a", start="5")
    part = Part("public", "t_2024", ("k", "a"), ("k", "m"))
    assert part.within == Range(("k", "a"), ("k", "m"))
    selection = part.selection(request)
    assert (selection.schema, selection.table) == ("public", "t_2024")
    assert (selection.where, selection.sort_column, selection.start) == ("a > 1", "a", "5")


def test_a_document_of_another_kind_is_not_taken_for_one() -> None:
    document = orjson.loads(BackfillState("1", "sink", Request("public", "t")).as_json())
    document["state"] = "asleep"
    with pytest.raises(ValidationError):
        of_json(orjson.dumps(document))
