"""Lines of COPY in, changes of action read out: the same as an insert of the row, but for where it comes from."""

from __future__ import annotations

import base64
import tracemalloc
from collections.abc import Sequence

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgoutput import frames
from pgoutput.frames import (
    FRAME_OVERHEAD_BYTES,
    INT8,
    JSON,
    SUFFIX,
    TEXT,
    TIMESTAMPTZ,
    Stream,
    changes_of,
    copy_line,
    groups_of,
)
from pgoutput.twins import TWINS
from spillway.change import Change
from spillway.chunk import FLAGS, HASH, LARGE, LSN, TIME, TOO_LARGE, WHOLE, Chunk, key_hash
from spillway.pgoutput import Committed, Ended, Full, ProtocolError, Renew
from spillway.pgoutput.decoder import Decoder

PAGE_LSN = 0x2_0000_0100
PAGE_MICROSECONDS = 1_735_689_600_000_001
PAGE_ID = b"8a4bc2d0-0f0e"
THREE = (("id", INT8), ("name", TEXT), ("note", TEXT))
ESCAPES = b"\b\f\n\r\t\v\\"


@pytest.fixture(params=TWINS, scope="module")
def decoder_class(request: pytest.FixtureRequest) -> type[Decoder]:
    assert isinstance(request.param, type)
    return request.param


class Pages(Stream):
    """A decoder that has learned one table and is inside of a page."""

    def __init__(
        self,
        decoder_class: type[Decoder],
        columns: Sequence[tuple[str, int]] = THREE,
        key: Sequence[str] = ("id",),
        *,
        groups: tuple[tuple[str, ...] | None, ...] = (),
        max_message_bytes: int = 1 << 20,
        page_id: bytes = PAGE_ID,
    ) -> None:
        super().__init__(
            decoder_class, columns, key, groups=groups, max_message_bytes=max_message_bytes, wanted=("insert",)
        )
        self.feed(frames.commit())
        self.decoder.take()
        self.decoder.begin_page(page_id, PAGE_LSN, PAGE_MICROSECONDS)

    def page(self, *rows: Sequence[bytes | None]) -> Chunk:
        assert self.fill_page(*[copy_line(*row) for row in rows]) is None
        return self.decoder.take()

    def row(self, *values: bytes | None) -> Change:
        (change,) = changes_of(self.page(values))
        return change


def message_of(change: Change) -> dict[str, dict[str, object]]:
    body = change.body + SUFFIX
    assert b"\n" not in body
    message = orjson.loads(body)
    assert orjson.loads(change.record) == message["record"]
    return message


def identity_of(change: Change) -> bytes:
    return base64.b64decode(str(message_of(change)["metadata"]["idempotency_key"]), validate=True)


def inserted(decoder_class: type[Decoder], columns: Sequence[tuple[str, int]], *values: bytes | None) -> Change:
    return Stream(decoder_class, columns).change(frames.insert(*values))


# The message.


def test_the_body_is_sequins_message(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    pages.row(b"1", b"a", b"b")
    chunk = pages.page((b"1234", b"shipped", None))
    (change,) = changes_of(chunk)
    key = base64.b64encode(PAGE_ID + b":1234").decode()
    assert change.body.decode() == (
        '{"record":{"id":1234,"name":"shipped","note":null},"changes":null,"action":"read","metadata":{"table_schema":'
        f'"public","table_name":"jobs","idempotency_key":"{key}","commit_timestamp":"2025-01-01T00:00:00.000001Z",'
        f'"commit_lsn":{PAGE_LSN},"commit_idx":1,"database_name":"app","transaction_annotations":null,'
        '"database":{"id":"00-11","name":"app","annotations":{"team":"a"},"database":"app_production",'
        '"hostname":"db.example.com"},"record_pks":["1234"]'
    )
    assert (change.commit_lsn, change.commit_idx, change.action) == (PAGE_LSN, 1, "read")
    assert (change.key, change.pks, change.was) == ("public.jobs:1234", ("1234",), None)
    assert (change.n, change.whole, change.too_large_bytes) == (0, True, 0)
    assert (chunk.word(0, TIME), chunk.word(0, LARGE)) == (PAGE_MICROSECONDS, 0)
    assert (chunk.commit_lsn, chunk.end_lsn, chunk.truncates) == (0, 0, 0)
    assert chunk.byte(0, FLAGS) == WHOLE
    assert chunk.column(HASH) == [key_hash(b"public.jobs:1234")]
    assert not pages.decoder.in_transaction


@pytest.mark.parametrize(
    "values",
    [
        (b"1", b"", b""),
        (b"1", None, b"\\N"),
        (b"1", b"\\", b"\\\\"),
        (b"1", b"\\t\\", b"\t\\t"),
        (b"1", ESCAPES, b"x" + ESCAPES + b"y"),
        (b"1", bytes(range(1, 256)), "ünïcode \U0001f600 ſ\u2028".encode()),
        (b"1", b"a" * 200 + b"\n" + b"b" * 200, b"<unchanged toast>"),
    ],
)
def test_a_row_reads_as_its_insert(decoder_class: type[Decoder], values: tuple[bytes | None, ...]) -> None:
    change, insert = Pages(decoder_class).row(*values), inserted(decoder_class, THREE, *values)
    assert change.record == insert.record
    assert (change.key, change.pks, change.whole) == (insert.key, insert.pks, insert.whole)


@pytest.mark.parametrize("char", [bytes([code]) for code in ESCAPES])
def test_every_escape(decoder_class: type[Decoder], char: bytes) -> None:
    assert bytes(copy_line(char)) == b"\\%c\n" % b"bfnrtv\\"[ESCAPES.index(char)]
    for value in (char, char + b"a", b"a" + char, b"a" + char + char + b"b"):
        change = Pages(decoder_class).row(b"1", value, value)
        assert message_of(change)["record"] == {"id": 1, "name": value.decode(), "note": value.decode()}


def test_types_read_as_their_insert(decoder_class: type[Decoder]) -> None:
    columns = [("at", TIMESTAMPTZ), ("doc", JSON), ("tags", 1009), ("raw", 17), ("n", frames.NUMERIC)]
    row = (b"2024-01-02 03:04:05+00", b'{"a":\n"\\"\\\\\\n"}', b'{"a\\"b","\\\\"}', b"\\x00ff", b"NaN")
    assert Pages(decoder_class, columns, []).row(*row).record == inserted(decoder_class, columns, *row).record


def test_a_table_of_one_column_and_of_none(decoder_class: type[Decoder]) -> None:
    one = Pages(decoder_class, [("name", TEXT)], [])
    assert [message_of(c)["record"] for c in changes_of(one.page([b""], [None], [b"\\."]))] == [
        {"name": ""}, {"name": None}, {"name": "\\."}
    ]  # fmt: skip
    assert Pages(decoder_class, [], []).row().record == b"{}"


# Keys.


@pytest.mark.parametrize(
    ("key", "values", "identity"),
    [
        (["id"], (b"7", b"a", b"b"), b":7"),
        (["id", "note"], (b"7", b"a", b"b"), b":7:b"),
        (["name"], (b"7", b"a:b.c\\", b"b"), b":a\\:b\\.c\\\\"),
        (["name"], (b"7", b"tab\there", b"b"), b":tab\there"),
        (["name"], (b"7", b"", b"b"), b":"),
        ([], (b"7", b"a", b"b"), b":%d:0" % PAGE_LSN),
        (["name"], (b"7", None, b"b"), b":%d:0" % PAGE_LSN),
    ],
)
@pytest.mark.parametrize("page_id", [b"", b"a", b"ab", b"abc", PAGE_ID * 20])
def test_the_idempotency_key(
    decoder_class: type[Decoder], key: list[str], values: tuple[bytes | None, ...], identity: bytes, page_id: bytes
) -> None:
    change = Pages(decoder_class, key=key, page_id=page_id).row(*values)
    assert identity_of(change) == page_id + identity


def test_without_a_primary_key(decoder_class: type[Decoder]) -> None:
    chunk = Pages(decoder_class, key=[], groups=(("name",),)).page((b"1", b"a", None), (b"1", b"a", None))
    first, second = changes_of(chunk)
    assert (first.key, first.pks, groups_of(chunk), first.n) == (None, (), ["public.jobs:a"], 0)
    assert identity_of(first) != identity_of(second)


def test_groups(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class, groups=(("note", "name"), None, ("gone",)))
    chunk = pages.page((b"1", b"a\nb", None))
    assert groups_of(chunk) == ["public.jobs:\\N:a\nb", "public.jobs:1", "public.jobs:\\N"]
    assert chunk.key_texts(0)[1::2] == [b""] * 4


# Too large.


def test_a_line_that_is_too_large_keeps_its_key_and_is_not_copied(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class, groups=(("name",),), max_message_bytes=100_000)
    line = copy_line(b"7", b"g\t", b"x" * 5_000_000)
    tracemalloc.start()
    try:
        pages.fill_page(line)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    chunk = pages.decoder.take()
    (change,) = changes_of(chunk)
    assert change.too_large_bytes == len(frames.insert(b"7", b"g\t", b"x" * 5_000_000))
    assert chunk.byte(0, FLAGS) == TOO_LARGE
    assert message_of(change)["record"] == {"id": 7, "name": "g\t"}
    assert (change.key, groups_of(chunk), change.whole, change.n) == ("public.jobs:7", ["public.jobs:g\t"], False, 0)
    assert identity_of(change) == PAGE_ID + b":7"
    assert peak_bytes < 200_000 + len(line)  # room for its values, which nobody writes to
    after = pages.row(b"8", b"a", b"b")
    assert (after.commit_idx, after.whole) == (1, True)


@pytest.mark.parametrize("excess", [-1, 0, 1, 2000])
@pytest.mark.parametrize("char", [b"x", b"\n", b"\x01", b"\v", b'"', b"\\"])
def test_a_row_is_too_large_if_its_insert_is(decoder_class: type[Decoder], char: bytes, excess: int) -> None:
    """Around the limits of the frame and of the body."""
    most = 10_000
    largest = {b"x": most - 700, b"\x01": (most - 700) // 6, b"\v": (most - 700) // 6}.get(char, (most - 700) // 2)
    for length in (largest, most // len(char) - 30, most // 2, most // 6):
        values = (b"7", char * (length + excess), None)
        stream = Stream(decoder_class, THREE, max_message_bytes=most)
        read, insert = Pages(decoder_class, max_message_bytes=most).row(*values), stream.change(frames.insert(*values))
        assert read.record == insert.record
        assert read.whole == insert.whole
        assert abs(read.too_large_bytes - insert.too_large_bytes) < 100


# Errors of ours.


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"1\ta\n", b"1\ta\tb\tc\n", b"1\ta\tb", b"1\ta\tb\t\n", b"1\ta\t\\\n", b"1\ta\\\tb\n",
        b"1\ta\t\\Nx\n", b"1\t\\.\tb\n", b"1\t\\101\tb\n", b"1\t\\x41\tb\n", b"1\ta\\\n\tb\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_message_bytes", [1 << 20, 1])
def test_a_line_that_cannot_be(decoder_class: type[Decoder], line: bytes, max_message_bytes: int) -> None:
    pages = Pages(decoder_class, max_message_bytes=max_message_bytes)
    with pytest.raises(ProtocolError):
        pages.fill_page(memoryview(line))


def test_a_line_for_a_table_without_columns(decoder_class: type[Decoder]) -> None:
    for most in (1 << 20, 1):
        with pytest.raises(ProtocolError):
            Pages(decoder_class, [], [], max_message_bytes=most).fill_page(memoryview(b"abc\n"))


def test_a_value_that_its_type_cannot_have(decoder_class: type[Decoder]) -> None:
    with pytest.raises(ProtocolError, match="garbled"):
        Pages(decoder_class, [("id", INT8), ("at", 1186)]).fill_page(copy_line(b"1", b"1" * 5000 + b" days"))


def test_calls_out_of_order(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    with pytest.raises(ProtocolError, match="inside of a transaction"):
        stream.decoder.begin_page(PAGE_ID, PAGE_LSN, PAGE_MICROSECONDS)
    stream.feed(frames.commit())
    with pytest.raises(ProtocolError, match="outside of a page"):
        stream.fill_page(copy_line(b"1", b"a"))
    with pytest.raises(ProtocolError, match="1970"):
        stream.decoder.begin_page(PAGE_ID, PAGE_LSN, -1)
    stream.decoder.begin_page(PAGE_ID, PAGE_LSN, PAGE_MICROSECONDS)
    with pytest.raises(ProtocolError, match="before learn"):
        stream.decoder.fill_page(stream.connection, 99, 1, 1)
    stream.connection.frames.clear()
    with pytest.raises(ProtocolError, match="outside of a transaction"):
        stream.feed(frames.insert(b"1", b"a"))


def test_a_transaction_after_a_page(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    pages.row(b"1", b"a", b"b")
    pages.feed(frames.begin(xid=5))
    assert pages.decoder.in_transaction
    chunk = pages.chunk(frames.insert(b"1", b"a", b"b"))
    (change,) = changes_of(chunk)
    assert (change.action, change.n, change.commit_idx, chunk.word(0, LARGE) >> 32) == ("insert", 1, 0, 5)
    assert identity_of(change) == b"%d:0" % frames.FINAL_LSN


# Filling.


def cost(line: memoryview) -> int:
    return 3 * len(line) + FRAME_OVERHEAD_BYTES + sum(2 * len(name) + 8 for name, _ in THREE)


def test_a_line_beyond_the_credit_is_kept_and_comes_first(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    first, second, third = (copy_line(b"%d" % i, b"a" * i, b"\n") for i in (1, 20, 3))
    both = cost(first) + cost(second)
    assert pages.fill_page(first, second, third, credit_bytes=both - 1) == Full(cost(second))
    assert (pages.decoder.count, pages.decoder.used_bytes) == (1, cost(first))
    assert pages.fill_page(credit_bytes=both) == Full(cost(third))
    assert [c.key for c in changes_of(pages.decoder.take())] == ["public.jobs:1", "public.jobs:20"]
    assert pages.fill_page(credit_bytes=cost(third) - 1) == Full(cost(third))
    assert pages.fill_page(credit_bytes=cost(third)) is None
    assert [(c.key, c.commit_idx) for c in changes_of(pages.decoder.take())] == [("public.jobs:3", 2)]


def test_a_kept_line_is_a_copy(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    buffer = bytearray(copy_line(b"1", b"a", b"b"))
    assert isinstance(pages.fill_page(memoryview(buffer), credit_bytes=0), Full)
    buffer[:] = bytes(len(buffer))
    assert pages.page().change(0).key == "public.jobs:1"


def test_a_new_page_forgets_the_line_that_was_kept(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    lines = [copy_line(b"%d" % i, b"a", b"b") for i in range(3)]
    assert pages.fill_page(*lines, max_changes=1) == Full(cost(lines[1]))
    pages.connection.frames.clear()
    assert pages.decoder.take().count == 1
    pages.decoder.begin_page(b"other", PAGE_LSN + 8, PAGE_MICROSECONDS)
    change = pages.row(b"9", b"a", b"b")
    assert (change.key, change.commit_lsn, change.commit_idx) == ("public.jobs:9", PAGE_LSN + 8, 0)
    assert identity_of(change) == b"other:9"


def test_the_end_of_a_page(decoder_class: type[Decoder]) -> None:
    pages = Pages(decoder_class)
    pages.connection.ended = True
    line = copy_line(b"1", b"a", b"b")
    assert pages.fill_page(line) == Ended(-1)
    assert (pages.decoder.count, pages.decoder.taken_bytes > len(line)) == (1, True)


# What pages need of the stream.


def test_a_record_says_its_transaction(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class, max_message_bytes=3000)
    chunk = stream.chunk(
        frames.commit(),
        frames.begin(xid=0xFFFF_FFFE),
        frames.update(b"2", b"a", key=[b"1", None]),
        frames.insert(b"3", b"x" * 4000),
        frames.truncate(16_400),
    )
    assert [word >> 32 for word in chunk.column(LARGE)] == [0xFFFF_FFFE] * 4
    assert [change.too_large_bytes > 4000 for change in changes_of(chunk)] == [False, False, True, False]


def test_a_break_at_a_commit(decoder_class: type[Decoder]) -> None:
    stream = Stream(decoder_class)
    assert stream.decoder.break_at_lsn == 0
    stream.decoder.break_at_lsn = frames.FINAL_LSN + 10_000
    assert stream.feed(frames.begin(), frames.insert(b"1", b"a"), frames.commit(), frames.begin()) is None
    stream.decoder.break_at_lsn = 1
    row, following = frames.insert(b"1", b"a"), frames.begin(frames.FINAL_LSN + 100)
    assert stream.feed(row, frames.commit(), following) == Committed()
    assert not stream.decoder.in_transaction
    assert stream.decoder.take().commit_lsn == frames.FINAL_LSN
    assert stream.feed(frames.insert(b"1", b"a" * frames.RENEW_FRAME_BYTES), frames.commit()) == Renew()
    stream.decoder.break_at_lsn = 0


# Properties.

values = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).map(str.encode)


@given(st.lists(st.tuples(values, values), max_size=5))
def test_any_text_reads_as_its_insert(
    decoder_class: type[Decoder], rows: list[tuple[bytes | None, bytes | None]]
) -> None:
    whole = [(b"%d" % number, *row) for number, row in enumerate(rows)]
    page = Pages(decoder_class).page(*whole)
    stream = Stream(decoder_class, THREE).chunk(*[frames.insert(*row) for row in whole])
    assert [c.record for c in changes_of(page)] == [c.record for c in changes_of(stream)]
    assert page.keys == stream.keys
    assert page.column(LSN) == [PAGE_LSN] * len(rows)
