"""Frames in, changes out: the form of a message, keys, TOAST, positions, what is too large."""

from __future__ import annotations

import base64
import tracemalloc
from contextlib import suppress
from zlib import crc32

import orjson
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgoutput import frames
from pgoutput.frames import (
    FINAL_LSN,
    FRAME_OVERHEAD_BYTES,
    INT8,
    JSON,
    SUFFIX,
    TEXT,
    TIMESTAMPTZ,
    UNCHANGED,
    Connection,
    Stream,
    changes_of,
    groups_before,
    groups_of,
    xlog,
)
from pgoutput.twins import TWINS
from spillway.change import ACTIONS, Change, make_key
from spillway.chunk import FLAGS, HASH, LARGE, LOW, MOVED, OLD, SUB, TOO_LARGE, WAS, WHOLE, WORDS, key_hash
from spillway.pgoutput import Ended, Full, Keepalive, ProtocolError, Relation, Renew, TableInfo, TypeInfo
from spillway.pgoutput.decoder import Decoder

THREE = (("id", INT8), ("name", TEXT), ("note", TEXT))


@pytest.fixture(params=TWINS, scope="module")
def decoder_class(request: pytest.FixtureRequest) -> type[Decoder]:
    assert isinstance(request.param, type)
    return request.param


def message_of(change: Change) -> dict[str, dict[str, object]]:
    body = change.body + SUFFIX
    assert b"\n" not in body
    message = orjson.loads(body)
    assert orjson.loads(change.record) == message["record"]
    return message


def record_of(change: Change) -> dict[str, object]:
    return message_of(change)["record"]


# The message.


def test_the_body_is_sequins_message_up_to_the_sinks_part(decoder_class: type[Decoder]) -> None:
    change = Stream(decoder_class).change(frames.insert(b"1234", b"shipped"))
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
    assert (change.n, change.whole, change.was, change.too_large_bytes) == (1, True, None, 0)
    assert change.commit_time == frames.COMMITTED.timestamp()


def test_names_may_hold_anything(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, [("100%b", INT8), ('"', TEXT)], ["100%b"], schema="a.b", table="50%s:\n")
    change = stream.change(frames.insert(b"1", b"x"))
    assert message_of(change)["metadata"]["table_name"] == "50%s:\n"
    assert record_of(change) == {"100%b": 1, '"': "x"}
    assert change.key == make_key("a.b", "50%s:\n", ("1",))


def test_actions_and_changes(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    inserted = stream.change(frames.insert(b"1", b"a"))
    updated = stream.change(frames.update(b"1", b"b"))
    deleted = stream.change(frames.delete(key=[b"1", None]))
    messages = [message_of(change) for change in (inserted, updated, deleted)]
    assert [m["action"] for m in messages] == ["insert", "update", "delete"]
    assert [m["changes"] for m in messages] == [None, {}, None]
    assert [m["record"] for m in messages] == [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}, {"id": 1, "name": None}]
    assert [change.n for change in (inserted, updated, deleted)] == [1, 2, 3]
    assert deleted.whole


def test_with_identity_full_changes_hold_the_old_values_that_differ(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, [*THREE, ("price", frames.NUMERIC)], identity="f")
    change = stream.change(frames.update(b"1", b"b", b"x", b"1.00", old=[b"1", b"a", None, b"1.0"]))
    assert b'"changes":{"name":"a","note":null,"price":1.0}' in change.body
    assert change.was is None
    assert (
        message_of(stream.change(frames.update(b"1", b"b", b"x", b"1", old=[b"1", b"b", b"x", b"1"])))["changes"] == {}
    )
    assert record_of(stream.change(frames.delete(old=[b"1", b"b", b"x", b"1"]))) == {
        "id": 1,
        "name": "b",
        "note": "x",
        "price": 1,
    }


def test_json_is_embedded_on_one_line_and_digits_stay(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, [("id", INT8), ("doc", JSON)])
    change = stream.change(frames.insert(b"1", b'{"n":\n 123456789012345678901234567890.10}'))
    assert change.record == b'{"id":1,"doc":{"n":  123456789012345678901234567890.10}}'


# Keys.


@pytest.mark.parametrize("values", [("a", "b"), ("a:b", "c"), ("a", "b:c"), ("\\N", "x.y"), ("", "")])
def test_a_key_is_that_of_make_key(decoder_class: type[Decoder], values: tuple[str, str]) -> None:
    stream = Stream(decoder_class, [("x", TEXT), ("y", TEXT), ("z", TEXT)], ["x", "z"])
    change = stream.change(frames.insert(values[0].encode(), b"no", values[1].encode()))
    assert change.pks == values
    assert change.key == make_key("public", "jobs", values)
    assert message_of(change)["metadata"]["record_pks"] == list(values)


def test_primary_key_values_are_postgres_text(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, [("at", TIMESTAMPTZ), ("ok", 16)], ["at", "ok"])
    change = stream.change(frames.insert(b"2024-01-02 03:04:05+00", b"t"))
    assert message_of(change)["metadata"]["record_pks"] == ["2024-01-02 03:04:05+00", "t"]
    assert record_of(change) == {"at": "2024-01-02T03:04:05.000000Z", "ok": True}


def test_without_a_primary_key(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, key=[], groups=(("name",),))
    chunk = stream.chunk(frames.insert(b"1", b"a"))
    change = chunk.change(0)
    assert (change.key, change.pks, groups_of(chunk), change.n) == (None, (), ["public.jobs:a"], 1)
    assert chunk.word(0, HASH) == 0
    assert message_of(change)["metadata"]["record_pks"] == []


def test_groups_are_in_the_order_given_and_long_values_are_digests(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE, groups=(("note", "name"), ("name",), ("gone",)))
    long, null, gone = groups_of(stream.chunk(frames.insert(b"1", None, b"x" * 2000)))
    assert long.startswith("public.jobs:sha256-")
    assert long.endswith(":\\N")
    assert (null, gone) == ("public.jobs:\\N", "public.jobs:\\N")


def test_a_changed_primary_key_brings_the_delete_of_the_old_one(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE)
    chunk = stream.chunk(frames.update(b"2", b"a", b"n", key=[b"1", None, None]))
    old, change = changes_of(chunk)
    assert (old.key, old.was) == ("public.jobs:1", None)
    assert (change.key, change.was) == ("public.jobs:2", "public.jobs:1")
    assert list(chunk.byte_column(FLAGS)) == [WHOLE | OLD, WHOLE | MOVED]
    assert chunk.column(HASH) == [key_hash(b"public.jobs:1"), key_hash(b"public.jobs:2")]
    assert chunk.column(WAS) == [0, key_hash(b"public.jobs:1")]
    assert (old.action, old.commit_lsn, old.commit_idx, old.pks) == ("delete", FINAL_LSN, 0, ("1",))
    message = message_of(old)
    assert (message["record"], message["changes"]) == ({"id": 1, "name": None, "note": None}, None)
    assert message["metadata"]["record_pks"] == ["1"]
    assert (old.n, change.n, old.whole) == (1, 1, True)
    assert stream.change(frames.update(b"1", b"a", b"n")).n == 2


def test_an_old_key_that_is_the_same_is_no_change_of_the_key(decoder_class: type[Decoder]) -> None:
    """PostgreSQL sends it also when a key's value is stored out of line."""
    change = Stream(decoder_class, [("id", TEXT), ("name", TEXT)]).change(
        frames.update(UNCHANGED, b"a", key=[b"long", None])
    )
    assert change.was is None
    assert change.pks == ("long",)
    assert record_of(change) == {"id": "long", "name": "a"}
    assert change.whole


def test_a_changed_primary_key_under_identity_full(decoder_class: type[Decoder]) -> None:
    old, change = Stream(decoder_class, identity="f").changes(frames.update(b"2", b"b", old=[b"1", b"a"]))
    assert change.was == old.key == "public.jobs:1"
    assert record_of(old) == {"id": 1, "name": "a"}
    assert message_of(change)["changes"] == {"id": 1, "name": "a"}


def test_a_changed_group_is_one_record_that_names_the_old_group(decoder_class: type[Decoder]) -> None:
    chunk = Stream(decoder_class, THREE, identity="f", groups=(("name",), ("note",))).chunk(
        frames.update(b"1", b"b", b"n", old=[b"1", b"a", b"n"])
    )
    (change,) = changes_of(chunk)
    assert (change.was, change.n) == (None, 1)
    assert (groups_of(chunk), groups_before(chunk)) == (["public.jobs:b", "public.jobs:n"], ["public.jobs:a", ""])
    assert chunk.byte(0, FLAGS) == WHOLE
    assert chunk.word(0, WAS) == 0
    assert [chunk.word(0, WORDS + i) for i in range(4)] == [
        key_hash(b"public.jobs:b"),
        key_hash(b"public.jobs:a"),
        key_hash(b"public.jobs:n"),
        0,
    ]


def test_groups_outside_of_the_replica_identity_are_taken_as_unchanged(decoder_class: type[Decoder]) -> None:
    chunk = Stream(decoder_class, THREE, groups=(("name",),)).chunk(
        frames.update(b"2", b"b", b"n", key=[b"1", None, None])
    )
    assert chunk.count == 2
    assert groups_of(chunk, 0) == groups_of(chunk, 1) == ["public.jobs:b"]
    assert groups_before(chunk, 0) == groups_before(chunk, 1) == [""]


def test_a_group_without_columns_is_the_primary_key(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE, groups=(("name",), None))
    chunk = stream.chunk(frames.update(b"2", b"b", b"n", key=[b"1", None, None]), frames.insert(b"3", b"b", b"n"))
    assert [groups_of(chunk, i)[1] for i in range(3)] == ["public.jobs:1", "public.jobs:2", "public.jobs:3"]
    assert [groups_before(chunk, i)[1] for i in range(3)] == ["", "public.jobs:1", ""]
    assert chunk.column(WORDS + 2) == chunk.column(HASH)
    assert chunk.column(WORDS + 3) == chunk.column(WAS)
    keyless = Stream(decoder_class, key=[], groups=(None,)).chunk(frames.insert(b"1", b"a"))
    assert keyless.key_texts(0) == [b""] * 4
    assert [keyless.word(0, word) for word in (HASH, WAS, WORDS, WORDS + 1)] == [0] * 4


def test_a_key_whose_old_value_is_not_known_has_not_moved(decoder_class: type[Decoder]) -> None:
    """The table got its primary key after this change: the row had none then."""
    stream = Stream(decoder_class, identity="f")
    changed = stream.change(frames.update(b"1", b"a", old=[None, b"a"]))
    assert (changed.key, changed.was, changed.whole) == ("public.jobs:1", None, True)
    old, lost = stream.changes(frames.update(None, b"a", old=[b"1", b"a"]))
    assert (old.key, old.action, lost.key, lost.was) == ("public.jobs:1", "delete", None, "public.jobs:1")


def test_replica_identity_index_beside_the_primary_key(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE)
    stream.learn(frames.relation(THREE, ["name"], identity="i"), ["id"])
    assert stream.change(frames.insert(b"1", b"a", b"n")).key == "public.jobs:1"
    updated = stream.change(frames.update(b"1", b"b", b"n", key=[None, b"a", None]))
    assert (updated.key, updated.was) == ("public.jobs:1", None)
    deleted = stream.change(frames.delete(key=[None, b"a", None]))
    assert (deleted.key, deleted.pks) == (None, ())


def test_under_identity_default_the_relation_knows_the_key_better_than_the_catalogue(
    decoder_class: type[Decoder],
) -> None:
    stream = Stream(decoder_class, THREE)
    stream.learn(frames.relation(THREE, ["name"]), ["renamed"])
    assert stream.change(frames.insert(b"1", b"a", b"n")).pks == ("a",)


def test_a_partition_has_the_identity_of_its_root(decoder_class: type[Decoder]) -> None:
    stream = Stream(
        decoder_class,
        table="jobs_2024",
        root=("app", "jobs"),
        groups=(("name",),),
        group_columns=lambda s, t: (("name",) if (s, t) == ("app", "jobs") else None,),
    )
    chunk = stream.chunk(frames.insert(b"1", b"a"), frames.truncate(16_400))
    change, truncated = changes_of(chunk)
    assert (change.schema, change.table, change.key, groups_of(chunk)) == ("app", "jobs", "app.jobs:1", ["app.jobs:a"])
    assert message_of(change)["metadata"]["table_name"] == "jobs"
    assert (truncated.schema, truncated.table) == ("public", "jobs_2024")
    assert message_of(truncated)["metadata"]["table_name"] == "jobs_2024"


# TOAST.


def test_an_unchanged_toast_column_is_left_out_never_null(decoder_class: type[Decoder]) -> None:
    change = Stream(decoder_class, THREE).change(frames.update(b"1", UNCHANGED, None))
    assert change.record == b'{"id":1,"note":null}'
    assert not change.whole
    assert message_of(change)["changes"] == {}


def test_an_unchanged_toast_column_is_taken_from_the_old_row(decoder_class: type[Decoder]) -> None:
    change = Stream(decoder_class, THREE, identity="f").change(
        frames.update(b"1", UNCHANGED, b"y", old=[b"1", b"long", b"x"])
    )
    assert record_of(change) == {"id": 1, "name": "long", "note": "y"}
    assert message_of(change)["changes"] == {"note": "x"}
    assert change.whole


def test_the_old_key_does_not_fill_other_columns(decoder_class: type[Decoder]) -> None:
    old, change = Stream(decoder_class, THREE).changes(frames.update(b"2", UNCHANGED, b"y", key=[b"1", None, None]))
    assert record_of(change) == {"id": 2, "note": "y"}
    assert not change.whole
    assert old.whole


def test_a_value_that_reads_like_the_mark_of_unchanged_is_a_value(decoder_class: type[Decoder]) -> None:
    change = Stream(decoder_class).change(frames.insert(b"1", b"<unchanged toast>"))
    assert record_of(change) == {"id": 1, "name": "<unchanged toast>"}
    assert change.whole


# Transactions and positions.


def test_a_transaction(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    assert stream.decoder.in_transaction
    chunk = stream.chunk(frames.commit())
    assert not stream.decoder.in_transaction
    assert (chunk.count, chunk.commit_lsn, chunk.end_lsn) == (0, FINAL_LSN, FINAL_LSN + 48)
    relation = stream.feed(frames.relation([("id", INT8)], identity="f", schema=""))
    assert isinstance(relation, Relation)
    assert (relation.schema, relation.replica_identity, relation.columns[0].in_identity) == ("pg_catalog", "f", True)
    ignored = stream.chunk(b"O" + bytes(8) + b"other\0", b"Y" + bytes(4) + b"\0t\0", b"A" + bytes(8))
    assert (ignored.count, ignored.commit_lsn, ignored.end_lsn, ignored.truncates) == (0, 0, 0, 0)


def test_commit_idx_counts_rows_truncates_once_and_transactional_messages(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.learn(frames.relation([("id", INT8)], oid=16_401, table="other"))
    assert stream.change(frames.insert(b"1", b"a")).commit_idx == 0
    chunk = stream.chunk(frames.truncate(16_400, 16_401))
    truncated = changes_of(chunk)
    assert [(c.table, c.commit_idx, c.key, c.action) for c in truncated] == [
        ("jobs", 1, None, "truncate"),
        ("other", 1, None, "truncate"),
    ]
    assert (list(chunk.byte_column(SUB)), chunk.truncates) == ([0, 1], 1)
    assert message_of(truncated[0])["record"] is None
    nothing = stream.chunk(
        frames.message("other", b"x"),
        frames.message("other", b"x", transactional=False),
        frames.message("sequin:transaction_annotations.set", b"{}"),
    )
    assert (nothing.count, nothing.truncates) == (0, 0)
    assert stream.change(frames.insert(b"2", b"a")).commit_idx == 4
    stream.feed(frames.commit(), frames.begin(FINAL_LSN + 100))
    change = stream.change(frames.insert(b"1", b"a"))
    assert (change.commit_lsn, change.commit_idx, change.n) == (FINAL_LSN + 100, 0, 1)


def test_a_truncate_of_more_tables_than_a_byte_counts(decoder_class: type[Decoder]) -> None:
    chunk = Stream(decoder_class).chunk(frames.truncate(*[16_400] * 300))
    assert list(chunk.byte_column(SUB)) == [*range(256)] + [255] * 44


def test_annotations_count_for_what_follows_in_their_transaction(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
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
        stream.feed(frames.message(f"sequin:transaction_annotations.{prefix}", content))
        seen.append(annotation())
    assert seen == [{"user": 1.1}, {"user": 2}, None, {"user": 3}, None, {"user": 4}]
    assert stream.warnings == ["invalid_transaction_annotation"]
    stream.feed(frames.message("sequin:transaction_annotations.set", b'{"user":5}', transactional=False))
    assert annotation() == {"user": 4}
    stream.feed(frames.commit())
    stream.feed(frames.begin())
    assert annotation() is None


def test_an_annotation_that_is_too_large_is_not_carried(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, max_message_bytes=10_000)
    stream.feed(frames.message("sequin:transaction_annotations.set", b'"' + b"a" * 3000 + b'"'))
    assert message_of(stream.change(frames.insert(b"1", b"a")))["metadata"]["transaction_annotations"] is None
    assert stream.warnings == ["invalid_transaction_annotation"]


def test_n_saturates_and_counts_buckets(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    assert [stream.change(frames.update(b"1", b"a")).n for _ in range(300)] == [*range(1, 256)] + [255] * 45
    buckets: dict[int, int] = {}
    for number in range(2, 1500):
        bucket = crc32(f"public.jobs:{number}".encode()) & 0xFFFF
        buckets[bucket] = buckets.get(bucket, 255 if bucket == crc32(b"public.jobs:1") & 0xFFFF else 0) + 1
        assert stream.change(frames.insert(str(number).encode(), b"a")).n == min(buckets[bucket], 255)


# Too large.


def test_a_frame_that_is_too_large_keeps_its_key_and_is_not_copied(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE, groups=(("name",), ("note",)), max_message_bytes=100_000)
    payload = frames.insert(b"7", b"g", b"x" * 5_000_000)
    frame = xlog(payload)
    tracemalloc.start()
    try:
        stream.fill(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    chunk = stream.decoder.take()
    (change,) = changes_of(chunk)
    assert change.too_large_bytes == chunk.word(0, LARGE) & LOW == len(payload)
    assert chunk.byte(0, FLAGS) == TOO_LARGE
    assert record_of(change) == {"id": 7, "name": "g"}
    assert (change.key, groups_of(chunk)[0], change.whole, change.n) == ("public.jobs:7", "public.jobs:g", False, 1)
    # The long group value has to be hashed; nothing else is copied.
    assert peak_bytes < 5_100_000


def test_a_frame_of_fifty_megabytes_costs_nothing(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE, max_message_bytes=100_000)
    frame = xlog(frames.update(b"8", UNCHANGED, b"x" * 50_000_000, key=[b"7", None, None]))
    tracemalloc.start()
    try:
        stream.fill(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000
    chunk = stream.decoder.take()
    old, change = changes_of(chunk)
    assert (change.key, old.key, old.too_large_bytes) == ("public.jobs:8", "public.jobs:7", 0)
    assert list(chunk.byte_column(FLAGS)) == [WHOLE | OLD, MOVED | TOO_LARGE]
    assert record_of(old) == {"id": 7, "name": None, "note": None}


def test_too_large_under_identity_full(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, THREE, identity="f", max_message_bytes=10_000)
    old, change = stream.changes(frames.update(b"2", UNCHANGED, b"x" * 9000, old=[b"1", b"n" * 9000, b"y"]))
    assert (change.key, change.action) == ("public.jobs:2", "update")
    assert record_of(old) == {"id": 1, "name": None, "note": None}
    deleted = stream.change(frames.delete(old=[b"2", b"n" * 20_000, None]))
    assert (deleted.key, deleted.action, deleted.too_large_bytes > 20_000) == ("public.jobs:2", "delete", True)


@pytest.mark.parametrize("value", [b'"' * 8_000, b"\x01" * 3_000, b"x" * 9_900])
def test_a_body_that_would_be_too_large_keeps_its_key(decoder_class: type[Decoder], value: bytes) -> None:
    stream = Stream(decoder_class, max_message_bytes=10_000)
    change = stream.change(frames.insert(b"7", value))
    assert change.too_large_bytes > 10_000
    assert record_of(change) == {"id": 7}
    assert change.n == 1
    after = stream.change(frames.update(b"7", b"small"))
    assert (after.n, after.commit_idx, after.too_large_bytes) == (2, 1, 0)


def test_a_large_frame_within_the_limit_is_whole(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, max_message_bytes=1_000_000)
    change = stream.change(frames.insert(b"7", b"x" * 900_000))
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
def test_a_frame_that_cannot_be(decoder_class: type[Decoder], frame: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        Stream(decoder_class).feed(frame)


def test_a_row_after_a_new_relation_message_waits_for_learn(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.feed(frames.relation(THREE))
    with pytest.raises(ProtocolError, match="before learn"):
        stream.feed(frames.insert(b"1", b"a", b"n"))


def test_a_row_outside_of_a_transaction(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.feed(frames.commit())
    with pytest.raises(ProtocolError, match="outside of a transaction"):
        stream.feed(frames.insert(b"1", b"a"))


# Properties.

values = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(values, min_size=2, max_size=2), st.lists(values, min_size=2, max_size=2), st.booleans())
def test_any_text_gives_one_line_that_reads_back(
    decoder_class: type[Decoder], old: list[str | None], new: list[str | None], full: bool
) -> None:
    stream = Stream(decoder_class, THREE, identity="f" if full else "d", groups=(("name",),))
    before = [b"1", *(None if value is None else value.encode() for value in old)]
    after = [b"2", *(None if value is None else value.encode() for value in new)]
    frame = frames.update(*after, old=before) if full else frames.update(*after, key=[b"1", None, None])
    chunk = stream.chunk(frame)
    gone, change = changes_of(chunk)
    assert record_of(change) == {"id": 2, "name": new[0], "note": new[1]}
    assert record_of(gone) == {"id": 1, "name": old[0] if full else None, "note": old[1] if full else None}
    assert groups_of(chunk, 1) == [make_key("public", "jobs", (new[0],))]
    again = Stream(decoder_class, THREE, identity="f" if full else "d", groups=(("name",),)).chunk(frame)
    assert (again.data, again.meta, again.keys) == (chunk.data, chunk.meta, chunk.keys)


@given(st.binary(max_size=60), st.sampled_from([b"I", b"U", b"D", b"R", b"B", b"C", b"T", b"M", b"O", b""]))
def test_garbage_is_a_protocol_error_or_an_event(decoder_class: type[Decoder], garbage: bytes, kind: bytes) -> None:
    stream = Stream(decoder_class)
    frame = kind + b"\0\0\x40\x10" + garbage if kind in {b"I", b"U", b"D"} else (kind + garbage or b"?")
    with suppress(ProtocolError):
        stream.feed(frame)


def test_a_composite_and_its_catalogue_entry(decoder_class: type[Decoder]) -> None:
    types = {
        20_000: TypeInfo(20_000, "address", "composite", attributes=(("street", TEXT), ("tags", 1009))),
        20_001: TypeInfo(20_001, "_address", "array", element_oid=20_000),
    }
    stream = Stream(decoder_class, [("id", INT8), ("home", 20_000), ("all", 20_001)], types=types)
    change = stream.change(frames.insert(b"1", b'("Main St",{a})', b'{"(x,)"}'))
    assert record_of(change) == {
        "id": 1,
        "home": {"street": "Main St", "tags": ["a"]},
        "all": [{"street": "x", "tags": None}],
    }


def test_the_decoder_needs_no_callback(decoder_class: type[Decoder]) -> None:
    decoder = decoder_class(frames.META, lambda *_: (), 0, 1000, 0, 1 << 23)
    connection = Connection(xlog(frames.begin()), xlog(frames.message("sequin:transaction_annotations.set", b"{")))
    assert decoder.fill(connection, 1 << 20, 10) is None


# Filling.


def cost(payload: bytes, *columns: str) -> int:
    return 3 * len(payload) + FRAME_OVERHEAD_BYTES + sum(2 * len(name) + 8 for name in columns)


def test_every_frame_costs_credit(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    row, annotation, commit = frames.insert(b"1", b"a"), frames.message("other", b"x"), frames.commit()
    stream.feed(row, annotation, commit)
    assert stream.decoder.used_bytes == cost(row, "id", "name") + cost(annotation) + cost(commit)
    stream.fill(frames.keepalive(7))
    assert stream.decoder.used_bytes == cost(row, "id", "name") + cost(annotation) + cost(commit)
    stream.decoder.take()
    assert stream.decoder.used_bytes == 0


def test_annotations_cost_credit_in_each_change(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    row, content = frames.insert(b"1", b"a"), b'{"by":"%b"}' % (b"x" * 1000)
    stream.feed(frames.message("sequin:transaction_annotations.set", content))
    before = stream.decoder.used_bytes
    stream.feed(row, row)
    assert stream.decoder.used_bytes - before == 2 * (cost(row, "id", "name") + 2 * (len(content) - len("null")))


def test_a_frame_beyond_the_credit_is_kept_and_comes_first(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    first, second, third = (frames.insert(b"%d" % i, b"a" * i) for i in (1, 20, 3))
    needed = [cost(payload, "id", "name") for payload in (first, second, third)]
    both = needed[0] + needed[1]
    assert stream.fill(*map(xlog, (first, second, third)), credit_bytes=both - 1) == Full(needed[1])
    assert (stream.decoder.count, stream.decoder.used_bytes) == (1, needed[0])
    assert stream.fill(credit_bytes=both - 1) == Full(needed[1])
    # The credit is for the chunk as a whole, whatever was filled before.
    assert stream.fill(credit_bytes=both) == Full(needed[2])
    assert [c.key for c in changes_of(stream.decoder.take())] == ["public.jobs:1", "public.jobs:20"]
    assert stream.fill(credit_bytes=needed[2] - 1) == Full(needed[2])
    assert stream.fill(credit_bytes=needed[2]) is None
    assert [(c.key, c.commit_idx) for c in changes_of(stream.decoder.take())] == [("public.jobs:3", 2)]


def test_a_kept_frame_is_a_copy(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    buffer = bytearray(xlog(frames.insert(b"1", b"a")))
    assert isinstance(stream.fill(memoryview(buffer), credit_bytes=0), Full)
    buffer[:] = bytes(len(buffer))
    assert stream.chunk().change(0).key == "public.jobs:1"


def test_a_chunk_has_no_more_changes_than_asked_for(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    rows = [frames.insert(b"%d" % i, b"a") for i in range(5)]
    counts = []
    stop = stream.fill(*map(xlog, rows), max_changes=2)
    while stop is not None:
        assert stop == Full(cost(rows[0], "id", "name"))
        counts.append(stream.decoder.take().count)
        stop = stream.fill(max_changes=2)
    assert [*counts, stream.decoder.take().count] == [2, 2, 1]


def test_taken_and_largest_frames_are_counted_once(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.decoder.taken_bytes = 0
    large, small = frames.insert(b"1", b"a" * 1000), frames.insert(b"1", b"a")
    assert isinstance(stream.fill(xlog(large), xlog(small), credit_bytes=0), Full)
    assert stream.fill() is None
    assert stream.decoder.taken_bytes == 50 + len(large) + len(small)
    stream.fill(frames.keepalive(7))
    assert stream.decoder.taken_bytes == 68 + len(large) + len(small)
    assert stream.decoder.largest_frame_bytes == len(large)


def test_keepalives(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    row = xlog(frames.insert(b"1", b"a"))
    assert stream.fill(frames.keepalive(7), frames.keepalive(8, reply_requested=True), row) == Keepalive(8, True)
    assert stream.fill(xlog(frames.commit()), frames.keepalive(9)) == Keepalive(9, False)
    assert stream.fill(frames.keepalive(10), row) == Keepalive(10, False)
    assert stream.decoder.count == 1


def test_the_end_of_copy(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.connection.ended = True
    assert stream.fill(xlog(frames.insert(b"1", b"a"))) == Ended(-1)
    assert stream.decoder.count == 1


def test_an_error_of_libpq_passes_through(decoder_class: type[Decoder]) -> None:
    class Broken:
        def get_copy_data(self, async_: int) -> tuple[int, memoryview]:
            raise psycopg.OperationalError("server closed the connection")

    with pytest.raises(psycopg.OperationalError, match="closed the connection"):
        Stream(decoder_class).decoder.fill(Broken(), 1, 1)


def test_after_a_large_frame_the_connection_is_renewed_at_a_commit(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, wanted=[])
    assert stream.feed(frames.insert(b"1", b"a" * (frames.RENEW_FRAME_BYTES - 100))) is None
    assert stream.feed(frames.commit(), frames.begin()) is None
    assert stream.feed(frames.insert(b"1", b"a" * frames.RENEW_FRAME_BYTES), frames.insert(b"2", b"a")) is None
    stop = stream.feed(frames.commit(), frames.begin())
    assert isinstance(stop, Renew)
    assert (stream.decoder.take().commit_lsn, stream.decoder.in_transaction) == (FINAL_LSN, False)


def test_the_last_commit_counts(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    chunk = stream.chunk(
        frames.commit(), frames.begin(FINAL_LSN + 100), frames.commit(FINAL_LSN + 100, FINAL_LSN + 148)
    )
    assert (chunk.commit_lsn, chunk.end_lsn) == (FINAL_LSN + 100, FINAL_LSN + 148)
    chunk = stream.chunk(frames.begin(FINAL_LSN + 200))
    assert (chunk.commit_lsn, chunk.end_lsn) == (0, 0)


def test_a_row_that_nobody_wants_only_counts(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, wanted=["delete"])
    unwanted = frames.insert(b"1", b"a")
    chunk = stream.chunk(
        unwanted,
        unwanted[:10],  # not even looked at
        frames.update(b"2", b"a", key=[b"1", None]),
        frames.delete(key=[b"1", None]),
        frames.truncate(16_400),
    )
    assert [(c.action, c.commit_idx, c.n) for c in changes_of(chunk)] == [("delete", 3, 1), ("truncate", 4, 1)]
    assert isinstance(stream.fill(xlog(unwanted), credit_bytes=cost(unwanted, "id", "name") - 1), Full)


def test_what_is_wanted_is_learned_with_each_relation(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, wanted=[])
    assert stream.changes(frames.insert(b"1", b"a")) == []
    stream.learn(frames.relation(THREE), wanted=["insert"])
    assert stream.change(frames.insert(b"1", b"a", b"n")).commit_idx == 1


def test_a_relation_is_returned_before_its_rows(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    row = frames.insert(b"1", b"a", b"n")
    stop = stream.feed(frames.insert(b"1", b"a"), frames.relation(THREE), row)
    assert isinstance(stop, Relation)
    assert stream.decoder.count == 1
    stream.decoder.learn(stop, TableInfo(stop.oid, ("id",), {}), frozenset(ACTIONS))
    assert [record_of(change) for change in stream.changes()] == [
        {"id": 1, "name": "a"},
        {"id": 1, "name": "a", "note": "n"},
    ]


def test_a_chunk_knows_its_tables(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    stream.learn(frames.relation([("id", INT8)], oid=16_401, table="other"))
    rows = (frames.insert(b"1", oid=16_401), frames.insert(b"1", b"a"), frames.insert(b"2", oid=16_401))
    chunk = stream.chunk(*rows)
    assert chunk.tables == (("public", "other"), ("public", "jobs"))
    assert [chunk.table(i)[1] for i in range(3)] == ["other", "jobs", "other"]
    assert stream.chunk(rows[1]).tables == (("public", "jobs"),)


@pytest.mark.parametrize("frame", [b"x" + bytes(30), b"k\0", b"w" + bytes(24)])
def test_a_message_that_is_not_of_the_replication_protocol(decoder_class: type[Decoder], frame: bytes) -> None:
    stream = Stream(decoder_class)
    with pytest.raises(ProtocolError):
        stream.fill(memoryview(frame))


def test_the_sets_of_group_columns_are_as_many_as_promised(decoder_class: type[Decoder]) -> None:
    with pytest.raises(ProtocolError, match="2 sets of group columns"):
        Stream(decoder_class, groups=(None,), group_columns=lambda *_: (None, None))
