"""Frames in, changes out: the form of a message, keys, TOAST, positions, what is too large."""

from __future__ import annotations

import base64
import tracemalloc
from contextlib import suppress
from zlib import crc32

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgoutput import frames
from pgoutput.frames import FINAL_LSN, INT8, JSON, SUFFIX, TEXT, TIMESTAMPTZ, UNCHANGED, Stream
from spillway.change import Change, make_key
from spillway.pgoutput import Begin, Commit, Decoder, ProtocolError, Relation, Truncation, TypeInfo

THREE = (("id", INT8), ("name", TEXT), ("note", TEXT))


def message_of(change: Change) -> dict[str, dict[str, object]]:
    body = change.body + SUFFIX
    assert b"\n" not in body
    message = orjson.loads(body)
    assert orjson.loads(change.record) == message["record"]
    return message


def record_of(change: Change) -> dict[str, object]:
    return message_of(change)["record"]


# The message.


def test_the_body_is_sequins_message_up_to_the_sinks_part() -> None:
    change = Stream().change(frames.insert(b"1234", b"shipped"))
    key = base64.b64encode(f"{FINAL_LSN}:0".encode()).decode()
    assert change.body.decode() == (
        '{"record":{"id":1234,"name":"shipped"},"changes":null,"action":"insert","metadata":{"table_schema":"public",'
        f'"table_name":"jobs","idempotency_key":"{key}","commit_timestamp":"2024-10-28T21:39:21.127470Z",'
        f'"commit_lsn":{FINAL_LSN},"commit_idx":0,"database_name":"app","transaction_annotations":null,'
        '"database":{"id":"00-11","name":"app","annotations":{"team":"a"},"database":"app_production",'
        '"hostname":"db.example.com"},"record_pks":["1234"]'
    )
    assert change.record == b'{"id":1234,"name":"shipped"}'
    assert (change.commit_lsn, change.commit_idx, change.action) == (FINAL_LSN, 0, "insert")
    assert (change.schema, change.table, change.key, change.pks) == ("public", "jobs", "public.jobs:1234", ("1234",))
    assert (change.n, change.whole, change.groups, change.old, change.too_large_bytes) == (1, True, (), None, 0)
    assert change.commit_time == frames.COMMITTED.timestamp()


def test_names_may_hold_anything() -> None:
    stream = Stream([("100%b", INT8), ('"', TEXT)], ["100%b"], schema="a.b", table="50%s:\n")
    change = stream.change(frames.insert(b"1", b"x"))
    assert message_of(change)["metadata"]["table_name"] == "50%s:\n"
    assert record_of(change) == {"100%b": 1, '"': "x"}
    assert change.key == make_key("a.b", "50%s:\n", ("1",))


def test_actions_and_changes() -> None:
    stream = Stream()
    inserted = stream.change(frames.insert(b"1", b"a"))
    updated = stream.change(frames.update(b"1", b"b"))
    deleted = stream.change(frames.delete(key=[b"1", None]))
    messages = [message_of(change) for change in (inserted, updated, deleted)]
    assert [m["action"] for m in messages] == ["insert", "update", "delete"]
    assert [m["changes"] for m in messages] == [None, {}, None]
    assert [m["record"] for m in messages] == [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}, {"id": 1, "name": None}]
    assert [change.n for change in (inserted, updated, deleted)] == [1, 2, 3]
    assert deleted.whole


def test_with_identity_full_changes_hold_the_old_values_that_differ() -> None:
    stream = Stream([*THREE, ("price", frames.NUMERIC)], identity="f")
    change = stream.change(frames.update(b"1", b"b", b"x", b"1.00", old=[b"1", b"a", None, b"1.0"]))
    assert b'"changes":{"name":"a","note":null,"price":1.0}' in change.body
    assert change.old is None
    assert (
        message_of(stream.change(frames.update(b"1", b"b", b"x", b"1", old=[b"1", b"b", b"x", b"1"])))["changes"] == {}
    )
    assert record_of(stream.change(frames.delete(old=[b"1", b"b", b"x", b"1"]))) == {
        "id": 1,
        "name": "b",
        "note": "x",
        "price": 1,
    }


def test_json_is_embedded_on_one_line_and_digits_stay() -> None:
    stream = Stream([("id", INT8), ("doc", JSON)])
    change = stream.change(frames.insert(b"1", b'{"n":\n 123456789012345678901234567890.10}'))
    assert change.record == b'{"id":1,"doc":{"n":  123456789012345678901234567890.10}}'


# Keys.


@pytest.mark.parametrize("values", [("a", "b"), ("a:b", "c"), ("a", "b:c"), ("\\N", "x.y"), ("", "")])
def test_a_key_is_that_of_make_key(values: tuple[str, str]) -> None:
    stream = Stream([("x", TEXT), ("y", TEXT), ("z", TEXT)], ["x", "z"])
    change = stream.change(frames.insert(values[0].encode(), b"no", values[1].encode()))
    assert change.pks == values
    assert change.key == make_key("public", "jobs", values)
    assert message_of(change)["metadata"]["record_pks"] == list(values)


def test_primary_key_values_are_postgres_text() -> None:
    stream = Stream([("at", TIMESTAMPTZ), ("ok", 16)], ["at", "ok"])
    change = stream.change(frames.insert(b"2024-01-02 03:04:05+00", b"t"))
    assert message_of(change)["metadata"]["record_pks"] == ["2024-01-02 03:04:05+00", "t"]
    assert record_of(change) == {"at": "2024-01-02T03:04:05.000000Z", "ok": True}


def test_without_a_primary_key() -> None:
    stream = Stream(key=[], groups=(("name",),))
    change = stream.change(frames.insert(b"1", b"a"))
    assert (change.key, change.pks, change.groups, change.n) == (None, (), ("public.jobs:a",), 1)
    assert message_of(change)["metadata"]["record_pks"] == []


def test_groups_are_in_the_order_given_and_long_values_are_digests() -> None:
    stream = Stream(THREE, groups=(("note", "name"), ("name",), ("gone",)))
    change = stream.change(frames.insert(b"1", None, b"x" * 2000))
    long, null, gone = change.groups
    assert long.startswith("public.jobs:sha256-")
    assert long.endswith(":\\N")
    assert (null, gone) == ("public.jobs:\\N", "public.jobs:\\N")


def test_a_changed_primary_key_brings_the_delete_of_the_old_one() -> None:
    stream = Stream(THREE)
    change = stream.change(frames.update(b"2", b"a", b"n", key=[b"1", None, None]))
    old = change.old
    assert old is not None
    assert (change.key, old.key) == ("public.jobs:2", "public.jobs:1")
    assert (old.action, old.commit_lsn, old.commit_idx, old.pks) == ("delete", FINAL_LSN, 0, ("1",))
    message = message_of(old)
    assert (message["record"], message["changes"]) == ({"id": 1, "name": None, "note": None}, None)
    assert message["metadata"]["record_pks"] == ["1"]
    assert (old.n, change.n, old.whole) == (1, 1, True)
    assert stream.change(frames.update(b"1", b"a", b"n")).n == 2


def test_an_old_key_that_is_the_same_is_no_change_of_the_key() -> None:
    """PostgreSQL sends it also when a key's value is stored out of line."""
    change = Stream([("id", TEXT), ("name", TEXT)]).change(frames.update(UNCHANGED, b"a", key=[b"long", None]))
    assert change.old is None
    assert change.pks == ("long",)
    assert record_of(change) == {"id": "long", "name": "a"}
    assert change.whole


def test_a_changed_primary_key_under_identity_full() -> None:
    change = Stream(identity="f").change(frames.update(b"2", b"b", old=[b"1", b"a"]))
    assert change.old is not None
    assert record_of(change.old) == {"id": 1, "name": "a"}
    assert message_of(change)["changes"] == {"id": 1, "name": "a"}


def test_a_changed_group_brings_the_old_groups() -> None:
    change = Stream(THREE, identity="f", groups=(("name",), ("note",))).change(
        frames.update(b"1", b"b", b"n", old=[b"1", b"a", b"n"])
    )
    assert change.old is not None
    assert change.old.key == change.key
    assert (change.groups, change.old.groups) == (
        ("public.jobs:b", "public.jobs:n"),
        ("public.jobs:a", "public.jobs:n"),
    )
    assert (change.old.n, change.n) == (1, 2)


def test_groups_outside_of_the_replica_identity_are_taken_as_unchanged() -> None:
    change = Stream(THREE, groups=(("name",),)).change(frames.update(b"2", b"b", b"n", key=[b"1", None, None]))
    assert change.old is not None
    assert change.old.groups == change.groups == ("public.jobs:b",)


def test_replica_identity_index_beside_the_primary_key() -> None:
    stream = Stream(THREE)
    stream.learn(frames.relation(THREE, ["name"], identity="i"), ["id"])
    assert stream.change(frames.insert(b"1", b"a", b"n")).key == "public.jobs:1"
    updated = stream.change(frames.update(b"1", b"b", b"n", key=[None, b"a", None]))
    assert (updated.key, updated.old) == ("public.jobs:1", None)
    deleted = stream.change(frames.delete(key=[None, b"a", None]))
    assert (deleted.key, deleted.pks) == (None, ())


def test_under_identity_default_the_relation_knows_the_key_better_than_the_catalogue() -> None:
    stream = Stream(THREE)
    stream.learn(frames.relation(THREE, ["name"]), ["renamed"])
    assert stream.change(frames.insert(b"1", b"a", b"n")).pks == ("a",)


def test_a_partition_has_the_identity_of_its_root() -> None:
    stream = Stream(
        table="jobs_2024", root=("app", "jobs"), group_columns=lambda s, t: (("name",),) if t == "jobs" else ()
    )
    change = stream.change(frames.insert(b"1", b"a"))
    assert (change.schema, change.table, change.key, change.groups) == ("app", "jobs", "app.jobs:1", ("app.jobs:a",))
    assert message_of(change)["metadata"]["table_name"] == "jobs"
    event = stream.decoder.feed(frames.truncate(16_400))
    assert isinstance(event, Truncation)
    assert (event.changes[0].schema, event.changes[0].table) == ("public", "jobs_2024")
    assert message_of(event.changes[0])["metadata"]["table_name"] == "jobs_2024"


# TOAST.


def test_an_unchanged_toast_column_is_left_out_never_null() -> None:
    change = Stream(THREE).change(frames.update(b"1", UNCHANGED, None))
    assert change.record == b'{"id":1,"note":null}'
    assert not change.whole
    assert message_of(change)["changes"] == {}


def test_an_unchanged_toast_column_is_taken_from_the_old_row() -> None:
    change = Stream(THREE, identity="f").change(frames.update(b"1", UNCHANGED, b"y", old=[b"1", b"long", b"x"]))
    assert record_of(change) == {"id": 1, "name": "long", "note": "y"}
    assert message_of(change)["changes"] == {"note": "x"}
    assert change.whole


def test_the_old_key_does_not_fill_other_columns() -> None:
    change = Stream(THREE).change(frames.update(b"2", UNCHANGED, b"y", key=[b"1", None, None]))
    assert record_of(change) == {"id": 2, "note": "y"}
    assert not change.whole
    assert change.old is not None
    assert change.old.whole


def test_a_value_that_reads_like_the_mark_of_unchanged_is_a_value() -> None:
    change = Stream().change(frames.insert(b"1", b"<unchanged toast>"))
    assert record_of(change) == {"id": 1, "name": "<unchanged toast>"}
    assert change.whole


# Transactions and positions.


def test_events_of_a_transaction() -> None:
    stream = Stream()
    decoder = stream.decoder
    begun = decoder.feed(frames.begin(xid=7))
    assert isinstance(begun, Begin)
    assert (begun.xid, begun.final_lsn, begun.commit_time) == (7, FINAL_LSN, frames.COMMITTED.timestamp())
    ended = decoder.feed(frames.commit())
    assert ended == Commit(FINAL_LSN, FINAL_LSN + 48, frames.COMMITTED.timestamp())
    relation = decoder.feed(frames.relation([("id", INT8)], identity="f", schema=""))
    assert isinstance(relation, Relation)
    assert (relation.schema, relation.replica_identity, relation.columns[0].in_identity) == ("pg_catalog", "f", True)
    for ignored in (b"O" + bytes(8) + b"other\0", b"Y" + bytes(4) + b"\0t\0", b"A" + bytes(8)):
        assert decoder.feed(ignored) is None


def test_commit_idx_counts_rows_truncates_once_and_transactional_messages() -> None:
    stream = Stream()
    stream.learn(frames.relation([("id", INT8)], oid=16_401, table="other"))
    assert stream.change(frames.insert(b"1", b"a")).commit_idx == 0
    truncation = stream.decoder.feed(frames.truncate(16_400, 16_401))
    assert isinstance(truncation, Truncation)
    assert [(c.table, c.commit_idx, c.key, c.action) for c in truncation.changes] == [
        ("jobs", 1, None, "truncate"),
        ("other", 1, None, "truncate"),
    ]
    assert message_of(truncation.changes[0])["record"] is None
    assert stream.decoder.feed(frames.message("other", b"x")) is None
    assert stream.decoder.feed(frames.message("other", b"x", transactional=False)) is None
    assert stream.decoder.feed(frames.message("sequin:transaction_annotations.set", b"{}")) is None
    assert stream.change(frames.insert(b"2", b"a")).commit_idx == 4
    stream.decoder.feed(frames.commit())
    stream.decoder.feed(frames.begin(FINAL_LSN + 100))
    change = stream.change(frames.insert(b"1", b"a"))
    assert (change.commit_lsn, change.commit_idx, change.n) == (FINAL_LSN + 100, 0, 1)


def test_annotations_count_for_what_follows_in_their_transaction() -> None:
    stream = Stream()
    seen = []

    def annotation() -> object:
        return message_of(stream.change(frames.insert(b"1", b"a")))["metadata"]["transaction_annotations"]

    for prefix, content in [
        ("set", b'{"user":\n1.10}'),
        ("set", b'{"user":2}'),
        ("clear", b""),
        ("set", b'{"user":3}'),
        ("set", b"{user}"),
        ("set", b'{"user":4}'),
    ]:
        stream.decoder.feed(frames.message(f"sequin:transaction_annotations.{prefix}", content))
        seen.append(annotation())
    assert seen == [{"user": 1.1}, {"user": 2}, None, {"user": 3}, None, {"user": 4}]
    assert stream.warnings == ["invalid_transaction_annotation"]
    stream.decoder.feed(frames.message("sequin:transaction_annotations.set", b'{"user":5}', transactional=False))
    assert annotation() == {"user": 4}
    stream.decoder.feed(frames.commit())
    stream.decoder.feed(frames.begin())
    assert annotation() is None


def test_an_annotation_that_is_too_large_is_not_carried() -> None:
    stream = Stream(max_message_bytes=10_000)
    stream.decoder.feed(frames.message("sequin:transaction_annotations.set", b'"' + b"a" * 3000 + b'"'))
    assert message_of(stream.change(frames.insert(b"1", b"a")))["metadata"]["transaction_annotations"] is None
    assert stream.warnings == ["invalid_transaction_annotation"]


def test_n_saturates_and_counts_buckets() -> None:
    stream = Stream()
    assert [stream.change(frames.update(b"1", b"a")).n for _ in range(300)] == [*range(1, 256)] + [255] * 45
    buckets: dict[int, int] = {}
    for number in range(2, 1500):
        bucket = crc32(f"public.jobs:{number}".encode()) & 0xFFFF
        buckets[bucket] = buckets.get(bucket, 255 if bucket == crc32(b"public.jobs:1") & 0xFFFF else 0) + 1
        assert stream.change(frames.insert(str(number).encode(), b"a")).n == min(buckets[bucket], 255)


# Too large.


def test_a_frame_that_is_too_large_keeps_its_key_and_is_not_copied() -> None:
    stream = Stream(THREE, groups=(("name",), ("note",)), max_message_bytes=100_000)
    frame = frames.insert(b"7", b"g", b"x" * 5_000_000)
    view = memoryview(frame)
    tracemalloc.start()
    try:
        event = stream.decoder.feed(view)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(event, Change)
    assert event.too_large_bytes == len(frame)
    assert record_of(event) == {"id": 7, "name": "g"}
    assert (event.key, event.groups[0], event.whole, event.n) == ("public.jobs:7", "public.jobs:g", False, 1)
    # The long group value has to be hashed; nothing else is copied.
    assert peak_bytes < 5_100_000


def test_a_frame_of_fifty_megabytes_costs_nothing() -> None:
    stream = Stream(THREE, max_message_bytes=100_000)
    view = memoryview(frames.update(b"8", UNCHANGED, b"x" * 50_000_000, key=[b"7", None, None]))
    tracemalloc.start()
    try:
        event = stream.decoder.feed(view)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000
    assert isinstance(event, Change)
    assert event.old is not None
    assert (event.key, event.old.key, event.old.too_large_bytes) == ("public.jobs:8", "public.jobs:7", 0)
    assert record_of(event.old) == {"id": 7, "name": None, "note": None}


def test_too_large_under_identity_full() -> None:
    stream = Stream(THREE, identity="f", max_message_bytes=10_000)
    change = stream.change(frames.update(b"2", UNCHANGED, b"x" * 9000, old=[b"1", b"n" * 9000, b"y"]))
    assert (change.key, change.action) == ("public.jobs:2", "update")
    assert change.old is not None
    assert record_of(change.old) == {"id": 1, "name": None, "note": None}
    deleted = stream.change(frames.delete(old=[b"2", b"n" * 20_000, None]))
    assert (deleted.key, deleted.action, deleted.too_large_bytes > 20_000) == ("public.jobs:2", "delete", True)


@pytest.mark.parametrize("value", [b'"' * 8_000, b"\x01" * 3_000, b"x" * 9_900])
def test_a_body_that_would_be_too_large_keeps_its_key(value: bytes) -> None:
    stream = Stream(max_message_bytes=10_000)
    change = stream.change(frames.insert(b"7", value))
    assert change.too_large_bytes > 10_000
    assert record_of(change) == {"id": 7}
    assert change.n == 1
    after = stream.change(frames.update(b"7", b"small"))
    assert (after.n, after.commit_idx, after.too_large_bytes) == (2, 1, 0)


def test_a_large_frame_within_the_limit_is_whole_also_from_a_memoryview() -> None:
    stream = Stream(max_message_bytes=1_000_000)
    change = stream.decoder.feed(memoryview(frames.insert(b"7", b"x" * 900_000)))
    assert isinstance(change, Change)
    assert change.whole
    assert len(record_of(change)["name"]) == 900_000  # type: ignore[arg-type]


# Errors of ours.


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (frames.insert(b"1", b"a", oid=99), "relation 99 before learn"),
        (frames.insert(b"1"), "a row of 1 columns"),
        (frames.insert(b"1", b"a")[:-1], "ends at byte"),
        (frames.insert(b"1", b"a") + b"x", "ends at byte"),
        (frames.insert(b"1", b"a")[:12], "ends too early"),
        (frames.insert(b"1", b"a")[:8] + b"b" + bytes(8), "kind 0x62"),
        (frames.delete(key=[b"1", None]).replace(b"D", b"U", 1) + b"K", "without a new row"),
        (b"S" + bytes(8), "kind 'S'"),
        (b"B\0", "ends too early"),
    ],
)
def test_a_frame_that_cannot_be(frame: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        Stream().decoder.feed(frame)


def test_a_row_after_a_new_relation_message_waits_for_learn() -> None:
    stream = Stream()
    stream.decoder.feed(frames.relation(THREE))
    with pytest.raises(ProtocolError, match="before learn"):
        stream.decoder.feed(frames.insert(b"1", b"a", b"n"))


def test_a_row_outside_of_a_transaction() -> None:
    stream = Stream()
    stream.decoder.feed(frames.commit())
    with pytest.raises(ProtocolError, match="outside of a transaction"):
        stream.decoder.feed(frames.insert(b"1", b"a"))


# Properties.

values = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(values, min_size=2, max_size=2), st.lists(values, min_size=2, max_size=2), st.booleans())
def test_any_text_gives_one_line_that_reads_back(old: list[str | None], new: list[str | None], full: bool) -> None:
    stream = Stream(THREE, identity="f" if full else "d", groups=(("name",),))
    before = [b"1", *(None if value is None else value.encode() for value in old)]
    after = [b"2", *(None if value is None else value.encode() for value in new)]
    frame = frames.update(*after, old=before) if full else frames.update(*after, key=[b"1", None, None])
    change = stream.change(frame)
    assert record_of(change) == {"id": 2, "name": new[0], "note": new[1]}
    assert change.old is not None
    assert record_of(change.old) == {"id": 1, "name": old[0] if full else None, "note": old[1] if full else None}
    assert change.groups == (make_key("public", "jobs", (new[0],)),)
    again = Stream(THREE, identity="f" if full else "d", groups=(("name",),)).change(frame)
    assert (again.body, again.old and again.old.body) == (change.body, change.old.body)


@given(st.binary(max_size=60), st.sampled_from([b"I", b"U", b"D", b"R", b"B", b"C", b"T", b"M", b"O", b""]))
def test_garbage_is_a_protocol_error_or_an_event(garbage: bytes, kind: bytes) -> None:
    stream = Stream()
    frame = kind + b"\0\0\x40\x10" + garbage if kind in {b"I", b"U", b"D"} else (kind + garbage or b"?")
    with suppress(ProtocolError):
        stream.decoder.feed(frame)


def test_a_composite_and_its_catalogue_entry() -> None:
    types = {
        20_000: TypeInfo(20_000, "address", "composite", attributes=(("street", TEXT), ("tags", 1009))),
        20_001: TypeInfo(20_001, "_address", "array", element_oid=20_000),
    }
    stream = Stream([("id", INT8), ("home", 20_000), ("all", 20_001)], types=types)
    change = stream.change(frames.insert(b"1", b'("Main St",{a})', b'{"(x,)"}'))
    assert record_of(change) == {
        "id": 1,
        "home": {"street": "Main St", "tags": ["a"]},
        "all": [{"street": "x", "tags": None}],
    }


def test_the_decoder_needs_no_callback() -> None:
    decoder = Decoder(frames.META, lambda *_: (), 1000)
    decoder.feed(frames.begin())
    assert decoder.feed(frames.message("sequin:transaction_annotations.set", b"{")) is None
