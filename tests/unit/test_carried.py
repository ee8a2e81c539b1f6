"""What the stream has carried, and what of a page is stale by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from spillway.change import ACTIONS, Action
from spillway.chunk import MOVED, OLD, TOO_LARGE, WHOLE, Chunk, ChunkBuilder
from spillway.flow.budget import Pool
from spillway.flow.carried import Carried, Sees, Stale
from spillway.source.snapshot import Snapshot

T, U = ("public", "t"), ("public", "u")
LIMIT_BYTES = 100_000


class Stream:
    """Makes chunks of what transactions changed; a transaction's LSN is ten times its id."""

    def __init__(self) -> None:
        self._builder = ChunkBuilder()
        self._truncates = 0

    def add(
        self, xid: int, action: Action, key: str, *, was: str = "", flags: int = WHOLE, table: tuple[str, str] = T
    ) -> Stream:
        self._truncates += action == "truncate"
        self._builder.add(
            table, ACTIONS.index(action), xid * 10, self._builder.count, 0, b"{}", 0, (key.encode(), was.encode()),
            flags=flags, xid=xid & 0xFFFFFFFF,
        )  # fmt: skip
        return self

    def move(self, xid: int, was: str, key: str, flags: int = WHOLE) -> Stream:
        return self.add(xid, "delete", was, flags=WHOLE | OLD).add(xid, "update", key, was=was, flags=flags | MOVED)

    def chunk(self) -> Chunk:
        truncates, self._truncates = self._truncates, 0
        return self._builder.take(truncates=truncates)


def page(*keys: str, table: tuple[str, str] = T) -> Chunk:
    builder = ChunkBuilder()
    for idx, key in enumerate(keys):
        builder.add(table, ACTIONS.index("read"), 0, idx, 0, b"{}", 0, (key.encode(), b""), n=0)
    return builder.take()


def seeing(*xids: int) -> Sees:
    """A snapshot that sees these alone."""
    return lambda xid, _: xid in xids


def nothing(_xid: int, _lsn: int) -> bool:
    return False


def everything(_xid: int, _lsn: int) -> bool:
    return True


def taking(*actions: Action) -> Callable[[int], bool]:
    return lambda action: ACTIONS[action] in actions


ALL = taking("insert", "update", "delete")


@pytest.fixture
def pool() -> Pool:
    return Pool("capture", 1 << 20)


@pytest.fixture
def carried(pool: Pool) -> Carried:
    one = Carried(pool, LIMIT_BYTES)
    one.watch(T)
    one.begin()
    return one


def stale(carried: Carried, rows: Chunk, sees: Sees, takes: Callable[[int], bool] = ALL) -> tuple[set[int], set[int]]:
    found = carried.stale(rows, sees, takes)
    assert isinstance(found, Stale)
    return found.dropped, found.again


# -- which rows --------------------------------------------------------------------------------------------------------
def test_a_row_whose_key_was_changed_by_a_transaction_that_is_not_seen_is_dropped(carried: Carried) -> None:
    carried.add(Stream().add(1, "update", "a").add(2, "delete", "b").add(3, "insert", "c").chunk())
    assert stale(carried, page("a", "b", "c", "d"), seeing(1)) == ({1, 2}, set())
    assert stale(carried, page("a", "b", "c", "d"), everything) == (set(), set())


def test_it_is_judged_by_transaction_whatever_the_order_of_commits(carried: Carried) -> None:
    """One that was carried first may be visible last."""
    carried.add(Stream().add(7, "update", "a").chunk())
    carried.add(Stream().add(5, "update", "b").chunk())
    assert stale(carried, page("a", "b"), seeing(5)) == ({0}, set())


def test_on_a_standby_it_is_judged_by_how_far_that_has_replayed(carried: Carried) -> None:
    carried.add(Stream().add(3, "update", "a").add(4, "update", "b").chunk())
    standby = Snapshot(40, 100, 100, frozenset(), 0, replayed_lsn=40)
    assert stale(carried, page("a", "b"), standby.sees) == ({1}, set())


def test_the_32_bits_of_an_id_are_widened_by_the_snapshot(carried: Carried) -> None:
    base = 5 << 32
    carried.add(Stream().add(base - 1, "update", "a").add(base + 1, "update", "b").add(base + 3, "update", "c").chunk())
    snapshot = Snapshot(1, base + 1, base + 3, frozenset({base + 1}), 0)
    assert stale(carried, page("a", "b", "c"), snapshot.sees) == ({1, 2}, set())


def test_what_a_sink_does_not_take_leaves_the_row_in_force(carried: Carried) -> None:
    carried.add(Stream().add(1, "update", "a").add(2, "delete", "b").add(3, "insert", "c").chunk())
    rows = page("a", "b", "c")
    assert stale(carried, rows, nothing, taking("insert", "delete")) == ({1, 2}, set())
    assert stale(carried, rows, nothing, taking("insert")) == ({2}, set())


def test_a_change_that_is_not_whole_is_no_substitute_for_the_row(carried: Carried) -> None:
    carried.add(Stream().add(1, "update", "a", flags=0).add(2, "update", "b", flags=0).chunk())
    carried.add(Stream().add(3, "update", "b").add(4, "update", "c").add(5, "update", "c", flags=0).chunk())
    carried.add(Stream().add(6, "update", "d", flags=0).add(7, "delete", "d").chunk())
    carried.add(Stream().add(8, "update", "e", flags=TOO_LARGE).chunk())
    assert stale(carried, page(*"abcde"), nothing) == ({1, 3, 4}, {0, 2})
    assert stale(carried, page(*"abcde"), seeing(5, 7)) == ({1, 2, 4}, {0, 3})


def test_other_tables_do_not_matter_though_their_keys_read_alike(carried: Carried) -> None:
    carried.watch(U)
    carried.add(Stream().add(1, "update", "a", table=U).add(2, "update", "b").chunk())
    assert stale(carried, page("a", "b"), nothing) == ({1}, set())
    assert stale(carried, page("a", "b", table=U), nothing) == ({0}, set())


def test_rows_without_a_key_are_never_stale(carried: Carried) -> None:
    carried.add(Stream().add(1, "update", "").chunk())
    assert stale(carried, page("", ""), nothing) == (set(), set())


def test_keys_that_share_a_hash_are_told_apart(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spillway.chunk.crc32", lambda _: 7)
    carried.add(Stream().add(1, "update", "a").move(2, "b", "c").chunk())
    assert stale(carried, page(*"abcd"), nothing) == ({0, 1, 2}, set())


# -- rows that move ----------------------------------------------------------------------------------------------------
def test_a_row_that_moved_is_stale_under_both_keys(carried: Carried) -> None:
    carried.add(Stream().move(1, "a", "b").chunk())
    assert stale(carried, page(*"abc"), nothing) == ({0, 1}, set())
    assert stale(carried, page(*"abc"), nothing, taking("update")) == ({0, 1}, set())


def test_a_move_that_is_not_whole_leaves_the_new_key_to_be_read_again(carried: Carried) -> None:
    carried.add(Stream().move(1, "a", "b", flags=0).chunk())
    assert stale(carried, page(*"abc"), nothing) == ({0}, {1})


def test_who_takes_deletes_and_no_updates_is_not_told_of_a_move(carried: Carried) -> None:
    carried.add(Stream().move(1, "a", "b").chunk())
    assert stale(carried, page(*"abc"), nothing, taking("insert", "delete")) == (set(), set())


def test_two_rows_that_change_their_keys_one_into_the_other(carried: Carried) -> None:
    carried.add(Stream().move(1, "a", "x").move(1, "b", "a", flags=0).move(1, "x", "b").chunk())
    assert stale(carried, page(*"abx"), nothing) == ({1, 2}, {0})


# -- TRUNCATE ----------------------------------------------------------------------------------------------------------
def test_a_truncate_that_is_not_seen_makes_the_page_void(carried: Carried) -> None:
    carried.add(Stream().add(1, "update", "a").add(2, "truncate", "").chunk())
    assert carried.stale(page("a", "b"), seeing(1), ALL) is None
    assert carried.stale(page(), nothing, ALL) is None
    assert stale(carried, page("a", "b"), seeing(2)) == ({0}, set())


def test_a_truncate_is_remembered_whatever_its_table(carried: Carried) -> None:
    """That of a partition comes under the name of that."""
    carried.add(Stream().add(2, "truncate", "", table=("public", "t_2024")).chunk())
    assert carried.stale(page("a"), nothing, ALL) is None


# -- what is remembered ------------------------------------------------------------------------------------------------
def test_nothing_is_remembered_of_tables_that_nobody_watches(carried: Carried, pool: Pool) -> None:
    carried.add(Stream().add(1, "update", "a", table=U).chunk())
    assert pool.held_bytes == 0
    carried.watch(U)
    carried.add(Stream().add(2, "update", "a", table=U).chunk())
    assert pool.held_bytes > 0
    carried.unwatch(U)
    assert pool.held_bytes > 0, "the other table is still being read"
    carried.unwatch(T)
    assert pool.held_bytes == 0
    assert not carried.remembers


def test_watched_twice_it_is_kept_until_both_have_let_go(carried: Carried, pool: Pool) -> None:
    carried.watch(T)
    carried.add(Stream().add(1, "update", "a").chunk())
    carried.unwatch(T)
    assert pool.held_bytes > 0
    assert carried.remembers
    carried.unwatch(T)
    assert pool.held_bytes == 0


def test_before_it_has_begun_nothing_is_remembered(pool: Pool) -> None:
    one = Carried(pool, LIMIT_BYTES)
    one.watch(T)
    one.add(Stream().add(1, "update", "a").chunk())
    assert pool.held_bytes == 0
    one.begin()
    one.begin()
    assert one.began == 1


def test_what_every_open_page_sees_is_forgotten(carried: Carried, pool: Pool) -> None:
    first, second = carried.open(), carried.open()
    carried.add(Stream().add(1, "update", "a").chunk())
    one = pool.held_bytes
    carried.add(Stream().add(2, "update", "b").chunk())
    carried.saw(first, seeing(1, 2))
    assert pool.held_bytes == 2 * one, "the second page has no snapshot yet, and none was known before"
    carried.saw(second, seeing(1))
    assert pool.held_bytes == one
    assert stale(carried, page("a", "b"), seeing(1)) == ({1}, set())
    carried.close(second)
    third = carried.open()
    carried.saw(third, seeing(1, 2))
    assert pool.held_bytes == 0
    carried.close(first)
    carried.close(third)


def test_a_page_that_is_being_read_sees_at_least_what_the_newest_snapshot_saw(carried: Carried, pool: Pool) -> None:
    first = carried.open()
    carried.add(Stream().add(1, "update", "a").chunk())
    carried.saw(first, seeing(1))
    assert pool.held_bytes == 0
    carried.add(Stream().add(2, "update", "b").chunk())
    second, third = carried.open(), carried.open()
    carried.saw(second, seeing(1, 2))
    assert pool.held_bytes > 0, "the third, which is being read, may not see it"
    carried.saw(third, seeing(1, 2))
    carried.close(first)
    fourth = carried.open()
    carried.saw(fourth, seeing(1, 2))
    assert pool.held_bytes == 0


def test_a_chunk_is_kept_as_long_as_one_of_its_transactions_is_not_seen(carried: Carried, pool: Pool) -> None:
    view = carried.open()
    carried.add(Stream().add(1, "update", "a").add(2, "update", "b").chunk())
    carried.saw(view, seeing(1))
    assert stale(carried, page("a", "b"), seeing(1)) == ({1}, set())
    carried.saw(view, everything)
    assert pool.held_bytes == 0


# -- bounds ------------------------------------------------------------------------------------------------------------
def test_beyond_its_part_of_the_pool_everything_is_forgotten_and_it_must_begin_anew(pool: Pool) -> None:
    one = Carried(pool, 5_000)
    one.watch(T)
    one.begin()
    one.quiet = 1
    one.open()
    added = 0
    while one.remembers:
        one.add(Stream().add(added, "update", "a").chunk())
        added += 1
        assert pool.held_bytes <= 5_000
    assert added > 3
    assert pool.held_bytes == 0
    one.add(Stream().add(99, "update", "a").chunk())
    assert pool.held_bytes == 0
    one.begin()
    assert one.remembers
    assert one.began == 2 != one.quiet


def test_it_never_waits_for_credit_that_others_have(carried: Carried, pool: Pool) -> None:
    carried.open()
    carried.add(Stream().add(1, "update", "a").chunk())
    own = pool.held_bytes
    assert pool.try_take(pool.limit_bytes - own)
    carried.add(Stream().add(2, "update", "a").chunk())
    assert not carried.remembers
    assert pool.held_bytes == pool.limit_bytes - own


def test_bodies_are_not_kept(carried: Carried, pool: Pool) -> None:
    builder = ChunkBuilder()
    builder.add(T, ACTIONS.index("update"), 10, 0, 0, b"x" * 50_000, 0, (b"a", b""), xid=1)
    carried.add(builder.take())
    assert 0 < pool.held_bytes < 2_000


# -- against a model ---------------------------------------------------------------------------------------------------
changes = st.tuples(
    st.integers(1, 12),  # transaction
    st.sampled_from(["insert", "update", "partial", "delete", "move", "truncate"]),
    st.sampled_from("abcde"),
    st.sampled_from("fgh"),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(changes, min_size=1, max_size=4), max_size=8),
    st.sets(st.integers(1, 12)),
    st.sets(st.integers(1, 12)),
    st.sets(st.sampled_from(["insert", "update", "delete"])),
    st.integers(0, 8),
)
def test_stale_is_what_the_last_unseen_change_that_the_sink_took_says(
    chunks: Sequence[Sequence[tuple[int, str, str, str]]],
    earlier: set[int],
    more: set[int],
    actions: set[Action],
    at: int,
) -> None:
    """Over chunks, of which a page with an older snapshot has had some forgotten before."""
    pool = Pool("capture", 1 << 20)
    carried = Carried(pool, LIMIT_BYTES)
    carried.watch(T)
    carried.begin()
    sees = seeing(*earlier, *more)
    newest: dict[str, bool] = {}  # by key: whole
    void = False
    for number, rows in enumerate(chunks):
        stream = Stream()
        for xid, action, key, other in rows:
            unseen = xid not in earlier | more
            match action:
                case "truncate":
                    stream.add(xid, "truncate", "")
                    void = void or unseen
                case "move":
                    stream.move(xid, key, other)
                    if unseen and "update" in actions:
                        newest[key] = newest[other] = True
                case "partial":
                    stream.add(xid, "update", key, flags=0)
                    if unseen and "update" in actions:
                        newest[key] = False
                case _:
                    stream.add(xid, action, key)  # type: ignore[arg-type]
                    if unseen and action in actions:
                        newest[key] = True
        carried.add(stream.chunk())
        if number == at:
            view = carried.open()
            carried.saw(view, seeing(*earlier))
            carried.close(view)
    names = "abcdefgh"
    found = carried.stale(page(*names), sees, taking(*actions))
    assert (found is None) == void
    if found is not None:
        assert found.dropped == {names.index(key) for key, whole in newest.items() if whole}
        assert found.again == {names.index(key) for key, whole in newest.items() if not whole}
    carried.unwatch(T)
    assert pool.held_bytes == 0


def test_rows_that_a_page_has_not_and_the_stream_has_brought(carried: Carried) -> None:
    stream = Stream()
    stream.add(1, "insert", "seen").add(2, "insert", "new").add(2, "delete", "gone").add(2, "insert", "back")
    stream.add(3, "delete", "new again").move(3, "away", "here").add(4, "insert", "new again").add(4, "delete", "back")
    carried.add(stream.chunk())
    keys = [b"seen", b"new", b"gone", b"back", b"new again", b"away", b"here", b"never"]
    assert carried.brought(keys, seeing(1)) == {b"new", b"new again", b"here"}
    assert carried.brought(keys, seeing(1, 2, 3)) == {b"new again"}
    assert carried.brought(keys, seeing(1, 2, 4)) == {b"here"}
    assert carried.brought([b"gone"], nothing) == set()
