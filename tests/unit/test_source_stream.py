"""What `Stream.fill` says, and in which order, when libpq reports an end behind frames. libpq is a script."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import psycopg
import pytest

from pgoutput.frames import PLENTY_BYTES, commit, insert, keepalive, xlog
from pgoutput.frames import Stream as Feed
from pgoutput.twins import TWINS
from spillway.errors import SourceUnavailable, SpillwayError
from spillway.pgoutput.decoder import Decoder
from spillway.pgoutput.frames import Full, Keepalive
from spillway.source.stream import Stream

MOST = 1000
NOTICE = SimpleNamespace(sqlstate="55000", message_primary='skipped loading publication "p"')
ROW = xlog(insert(b"1", b"one"))


def says(size: int) -> Callable[[], int]:
    return lambda: size


def fails() -> int:
    raise psycopg.OperationalError("lost synchronization with server")


class Libpq:
    """Frames, and then what ``end`` says each time."""

    socket = -1
    ssl_in_use = used_gssapi = False

    def __init__(self, *frames: memoryview, end: Callable[[], int]) -> None:
        self.frames = deque(frames)
        self.end = end
        self.pgconn = self

    def add_notice_handler(self, notice: Callable[[object], None]) -> None:
        self.notice = notice

    def get_copy_data(self, _async: int) -> tuple[int, memoryview]:
        if self.frames:
            frame = self.frames.popleft()
            return len(frame), frame
        return self.end(), memoryview(b"")

    def is_busy(self) -> int:
        return 0

    def get_result(self) -> None:
        """No error of the server's: it has shut down."""
        self.end = says(-2)  # what libpq says ever after

    def get_error_message(self) -> str:
        return "no COPY in progress"

    def stream(self) -> Stream:
        return Stream(self, "s", ("p",), 0)  # type: ignore[arg-type]


@pytest.fixture(params=TWINS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """It has learned a table, and is inside of a transaction."""
    return Feed(request.param).decoder


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (says(-1), "the server ended the stream"),
        (says(-2), "no COPY in progress"),
        (fails, "lost synchronization with server"),
    ],
)
@pytest.mark.parametrize("last", [ROW, xlog(commit())])
def test_what_was_taken_is_handed_out_before_the_end(
    decoder: Decoder, end: Callable[[], int], text: str, last: memoryview
) -> None:
    stream = Libpq(ROW, last, end=end).stream()
    assert stream.fill(decoder, PLENTY_BYTES, MOST) is None
    chunk = decoder.take()
    assert (chunk.count, bool(chunk.commit_lsn)) == ((2, False) if last is ROW else (1, True))
    for _ in range(2):
        with pytest.raises(SourceUnavailable, match=text):
            stream.fill(decoder, PLENTY_BYTES, MOST)


def test_so_is_the_frame_that_was_kept_for_want_of_credit(decoder: Decoder) -> None:
    stream = Libpq(ROW, ROW, end=says(-1)).stream()
    assert isinstance(stream.fill(decoder, PLENTY_BYTES, 1), Full)
    assert decoder.take().count == 1
    assert stream.fill(decoder, PLENTY_BYTES, 1) is None
    assert decoder.take().count == 1
    with pytest.raises(SourceUnavailable, match="the server ended the stream"):
        stream.fill(decoder, PLENTY_BYTES, 1)


def test_an_end_behind_nothing_is_told_at_once(decoder: Decoder) -> None:
    with pytest.raises(SourceUnavailable, match="the server ended the stream"):
        Libpq(end=says(-1)).stream().fill(decoder, PLENTY_BYTES, MOST)


def test_a_keepalive_comes_before_the_end(decoder: Decoder) -> None:
    stream = Libpq(keepalive(7, reply_requested=True), end=says(-1)).stream()
    assert stream.fill(decoder, PLENTY_BYTES, MOST) == Keepalive(7, True)
    with pytest.raises(SourceUnavailable):
        stream.fill(decoder, PLENTY_BYTES, MOST)


def test_the_servers_last_words_replace_what_libpq_made_of_a_lost_connection(decoder: Decoder) -> None:
    libpq = Libpq(ROW, end=says(-1))
    stream = libpq.stream()

    def refused(_message: bytes) -> int:
        raise psycopg.OperationalError("SSL SYSCALL error: EOF detected")

    libpq.put_copy_data = refused  # type: ignore[attr-defined]
    with pytest.raises(SourceUnavailable, match="EOF detected"):
        stream.send_feedback(1, 1)
    assert stream.fill(decoder, PLENTY_BYTES, MOST) is None
    with pytest.raises(SourceUnavailable, match="the server ended the stream"):
        stream.fill(decoder, PLENTY_BYTES, MOST)


def test_a_lost_connection_is_told_when_nothing_is_left_to_take(decoder: Decoder) -> None:
    libpq = Libpq(ROW, end=says(0))
    stream = libpq.stream()
    libpq.put_copy_data = lambda _message: 0  # type: ignore[attr-defined]
    libpq.flush = lambda: 0  # type: ignore[attr-defined]
    with pytest.raises(SourceUnavailable, match="takes no more feedback"):
        stream.send_feedback(1, 1)
    assert stream.fill(decoder, PLENTY_BYTES, MOST) is None
    assert decoder.take().count == 1
    with pytest.raises(SourceUnavailable, match="takes no more feedback"):
        stream.fill(decoder, PLENTY_BYTES, MOST)


@pytest.mark.parametrize("frames", [(), (ROW,), (keepalive(9),), (ROW, keepalive(9, reply_requested=True))])
def test_nothing_is_handed_out_past_the_warning_that_the_publication_is_skipped(
    decoder: Decoder, frames: tuple[memoryview, ...]
) -> None:
    libpq = Libpq(*frames, end=says(0))
    stream = libpq.stream()
    libpq.notice(NOTICE)
    with pytest.raises(SpillwayError) as caught:
        stream.fill(decoder, PLENTY_BYTES, MOST)
    assert caught.value.code == "publication_missing"
