"""Shaping against a source, functions and a sink that do as they are told: what is sent, what becomes of what failed,
and that the credit covers it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson
import pytest
from store_support import StillClock

from spillway.change import ACTIONS, make_key
from spillway.chunk import MOVED, WHOLE, Batch, ChunkBuilder, Keying, Message, Span
from spillway.errors import SourceUnavailable
from spillway.flow.attempt import BLOCKED, Answer
from spillway.flow.budget import SHAPING_EIGHTHS, Budget
from spillway.flow.outgoing import Steps
from spillway.flow.shaping import Shaping
from spillway.functions.base import Failure, Outcome, Output
from spillway.sinks.base import OK, Result, reject, sink_down
from spillway.source.bykeys import BatchFailed
from spillway.source.reading import Fetched
from spillway.source.snapshot import Seen
from spillway.source.wrapped import Row

SUFFIX = b',"enrichment":null,"consumer":{"name":"s"}}}'
LIMIT_BYTES = 64 << 20
NOW = int(StillClock().wall() * 1_000_000)


def a_batch(
    *keys: str,
    actions: Mapping[str, str] | None = None,
    not_whole: Sequence[str] = (),
    keying: int = Keying.STATE,
    first: int = 0,
    committed: int = NOW,
) -> Batch:
    builder = ChunkBuilder()
    for at, key in enumerate(keys, first):
        action = (actions or {}).get(key, "update")
        record = b'{"id":"%b"}' % key.encode()
        body = b'{"record":%b,"changes":{},"action":"%b","metadata":{"table_name":"t"' % (record, action.encode())
        builder.add(
            ("public", "t"), ACTIONS.index(action), 100 + at, at, committed, body, len(record),
            [make_key("public", "t", (key,)).encode(), b""], flags=0 if key in not_whole else WHOLE, xid=700 + at,
        )  # fmt: skip
    span = Span(builder.take(), keying)
    return Batch([(span, 0, len(span))])


@dataclass
class Source:
    """Rows by key; sizes are what the server would not send for the credit."""

    rows: dict[str, bytes] = field(default_factory=dict)
    several: tuple[str, ...] = ()
    poison: tuple[str, ...] = ()
    asked: list[tuple[list[str], int]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    down: bool = False

    async def fetch(
        self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
    ) -> Fetched:
        assert table == ("public", "t")
        texts = [key for (key,) in keys]
        self.asked.append((texts, credit_bytes))
        self.seen.append(seen)
        if self.down:
            raise SourceUnavailable("unreachable", "nobody there")
        if set(texts) & set(self.poison):
            raise BatchFailed("enrichment_failed", "division by zero")
        rows: dict[int, Row] = {}
        sizes: dict[int, int] = {}
        total = 0
        for place, key in enumerate(texts):
            if key in self.rows and key not in self.several:
                fits = len(self.rows[key]) <= row_bytes
                total += len(self.rows[key]) if fits else 0
                if fits and total <= credit_bytes:
                    rows[place] = {"id": orjson.dumps(key), "doc": self.rows[key]}
                else:
                    sizes[place] = len(self.rows[key])
        several = {place for place, key in enumerate(texts) if key in self.several}
        return Fetched(rows=rows, sizes=sizes, several=several, kept_bytes=total, seconds=0.0, queries=1)

    async def close(self) -> None:
        pass


@dataclass
class Reread:
    records: dict[str, Row]

    async def fetch(
        self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
    ) -> Fetched:
        return Fetched({place: self.records[key] for place, (key,) in enumerate(keys) if key in self.records})

    async def close(self) -> None:
        pass


@dataclass
class Scripted:
    """Functions: an outcome by id."""

    outcomes: dict[str, Outcome]
    asked: list[tuple[str, bool]] = field(default_factory=list)

    async def __call__(
        self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
    ) -> Sequence[Outcome]:
        ids = [orjson.loads(message)["record"]["id"] for message in messages]
        self.asked += zip(ids, deletes, strict=True)
        return [self.outcomes.get(one, (Output(None),)) for one in ids]

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class Sent:
    """A sink that keeps what it got and says what it is told."""

    answers: dict[bytes, Result] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    routes: list[Mapping[str, object]] = field(default_factory=list)
    batches: int = 0

    async def __call__(self, batch: Batch) -> Answer:
        self.batches += 1
        chunks = [(m.span.chunk, m.span.indices[m.place]) for m in batch]
        bodies = [chunk.body(index) for chunk, index in chunks]
        self.bodies += bodies
        self.routes += [chunk.route(index) for chunk, index in chunks]
        return [self.answers.get(body, OK) for body in bodies] if self.answers else OK


class Hasty(StillClock):
    """Whatever waits has waited for too long."""

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(0)


def a_shaping(steps: Steps, *, in_order: bool = False, limit_bytes: int = LIMIT_BYTES) -> tuple[Shaping, Budget]:
    budget = Budget(limit_bytes, 1, 1, SHAPING_EIGHTHS)
    return Shaping(steps, budget.shaping_share(), Hasty(), 16 << 20, in_order=in_order), budget


def shape(batch: Batch, steps: Steps, sent: Sent, *, in_order: bool = False, limit_bytes: int = LIMIT_BYTES) -> Answer:
    shaping, budget = a_shaping(steps, in_order=in_order, limit_bytes=limit_bytes)
    answer = asyncio.run(shaping(batch, sent))
    assert budget.held_bytes == 0
    return answer


def test_enrichment_is_one_query_and_stands_in_the_metadata() -> None:
    source, sent = Source({"1": b'"one"', "2": b'"two"'}), Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source)
    assert shape(a_batch("1", "2", "3", keying=Keying.EVENTS), steps, sent) is OK
    assert [asked for asked, _ in source.asked] == [["1", "2", "3"]]
    assert source.seen == [Seen(frozenset({700, 701, 702}), 103, frozenset({"id"}))]
    messages = [orjson.loads(body) for body in sent.bodies]
    assert [message["metadata"]["enrichment"] for message in messages] == [
        {"id": "1", "doc": "one"},
        {"id": "2", "doc": "two"},
        None,
    ]
    assert [message["record"]["id"] for message in messages] == ["1", "2", "3"]
    assert messages[0]["metadata"]["consumer"] == {"name": "s"}


def test_a_sink_of_rows_gets_the_row_with_its_enrichment_and_no_query_for_deletes() -> None:
    source, sent = Source({"1": b'"one"'}), Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, enrich=source)
    shape(a_batch("1", "2", actions={"2": "delete"}), steps, sent)
    assert [asked for asked, _ in source.asked] == [["1"]]
    assert sent.bodies[1] == b'{"id":"2"}'
    assert b'"doc":"one"' in sent.bodies[0]


def test_two_rows_are_that_messages_error() -> None:
    source, sent = Source({"1": b"1", "2": b"2"}, several=("2",)), Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source)
    answer = shape(a_batch("1", "2", "3"), steps, sent)
    assert not isinstance(answer, Result)
    assert [(r.outcome, r.reason) for r in answer] == [("ok", ""), ("reject", "enrichment_rows"), ("ok", "")]
    assert len(sent.bodies) == 2


def test_data_that_a_query_fails_for_costs_its_message_alone() -> None:
    source, sent = Source({}, poison=("5",)), Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source)
    answer = shape(a_batch(*map(str, range(8))), steps, sent)
    assert not isinstance(answer, Result)
    assert [at for at, r in enumerate(answer) if r.outcome == "reject"] == [5]
    assert len(sent.bodies) == 7


def test_a_source_that_is_down_takes_no_attempt() -> None:
    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=Source(down=True))
    answer = shape(a_batch("1", "2"), steps, sent)
    assert isinstance(answer, Result)
    assert (answer.outcome, answer.reason) == ("sink_down", "unreachable")
    assert not sent.bodies


@pytest.mark.parametrize("in_order", [False, True])
def test_large_rows_come_in_parts_and_never_exceed_the_credit(in_order: bool) -> None:
    rows = {str(i): b'"' + bytes([65 + i]) * 900_000 + b'"' for i in range(20)}
    source, sent = Source(rows), Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source)
    assert shape(a_batch(*rows), steps, sent, in_order=in_order) is OK
    assert len(sent.bodies) == 20
    assert sent.batches > 1
    assert all(credit <= LIMIT_BYTES * (SHAPING_EIGHTHS + 1) // 8 for _, credit in source.asked)
    if in_order:
        assert [int(body.split(b'"')[5]) for body in sent.bodies] == list(range(20))


def test_a_row_that_can_never_fit_is_that_messages_error() -> None:
    source, sent = Source({"1": b"1", "2": b"2" * 15_000_000}), Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source)
    answer = shape(a_batch("1", "2", "3"), steps, sent)
    assert not isinstance(answer, Result)
    assert [r.reason for r in answer] == ["", "row_too_large", ""]


def test_one_message_becomes_none_one_or_several() -> None:
    outcomes: dict[str, Outcome] = {
        "1": (),
        "2": (Output(b"2a", {"index_name": "x"}), Output(b"2b")),
        "3": Failure("transform_failed", "KeyError: 'x'"),
    }
    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, functions=Scripted(outcomes))
    answer = shape(a_batch("1", "2", "3", "4"), steps, sent)
    assert not isinstance(answer, Result)
    assert [r.outcome for r in answer] == ["ok", "ok", "reject", "ok"]
    assert "KeyError" in answer[2].detail
    assert sent.bodies[:2] == [b"2a", b"2b"]
    assert sent.routes == [{"index_name": "x"}, {}, {}]
    assert sent.bodies[2].endswith(SUFFIX)


@pytest.mark.parametrize("in_order", [False, True])
def test_functions_that_have_no_room_for_all_are_asked_again(in_order: bool) -> None:
    class Three(Scripted):
        async def __call__(
            self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
        ) -> Sequence[Outcome]:
            assert answer_bytes >= sum(map(len, messages))
            return await super().__call__(messages[:3], deletes[:3])

    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, functions=Three({}))
    assert shape(a_batch(*map(str, range(8))), steps, sent, in_order=in_order) is OK
    assert [orjson.loads(body)["record"]["id"] for body in sent.bodies] == list(map(str, range(8)))
    assert sent.batches == 3


def test_of_several_the_worst_answer_counts() -> None:
    sent = Sent(answers={b"a": OK, b"b": reject("mapping"), b"c": OK})
    functions = Scripted({"1": (Output(b"a"), Output(b"b")), "2": (Output(b"c"),)})
    answer = shape(a_batch("1", "2"), Steps(SUFFIX, keeps_rows=False, as_record=False, functions=functions), sent)
    assert not isinstance(answer, Result)
    assert [r.reason for r in answer] == ["mapping", ""]


def test_a_route_that_is_none_is_that_messages_error() -> None:
    def checked(route: Mapping[str, object]) -> Mapping[str, object]:
        if "index" in route:
            raise ValueError("unknown key index; did you mean index_name?")
        return route

    functions = Scripted({"1": (Output(None, {"index": "x"}),)})
    sent = Sent()
    answer = shape(
        a_batch("1", "2"), Steps(SUFFIX, keeps_rows=False, as_record=False, functions=functions, checked=checked), sent
    )
    assert not isinstance(answer, Result)
    assert (answer[0].reason, answer[1]) == ("routing_failed", OK)


def test_deletes_of_a_state_are_told_to_the_functions() -> None:
    functions, sent = Scripted({}), Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, functions=functions)
    shape(a_batch("1", "2", actions={"2": "delete"}), steps, sent)
    assert functions.asked == [("1", False), ("2", True)]


def test_in_order_what_stands_behind_a_failure_of_its_key_is_blocked() -> None:
    class FirstFails(Scripted):
        async def __call__(
            self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
        ) -> Sequence[Outcome]:
            rest = await super().__call__(messages[1:], deletes[1:])
            return [Failure("filter_failed", ""), *rest]

    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, functions=FirstFails({}))
    answer = shape(a_batch("1", "2", "1", keying=Keying.EVENTS), steps, sent, in_order=True)
    assert not isinstance(answer, Result)
    assert answer[0].reason == "filter_failed"
    assert answer[1] is OK
    assert answer[2] is BLOCKED
    assert len(sent.bodies) == 1


def test_rows_without_toast_columns_are_read_anew_and_nothing_else_is_touched() -> None:
    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, reread=Reread({"2": {"id": b'"2"', "big": b'"x"'}}))
    batch = a_batch("1", "2", "3", not_whole=("2", "3"))
    assert shape(batch, steps, sent) is OK
    assert sent.bodies == [batch[0].change.body, batch[1].change.body.replace(b'{"id":"2"}', b'{"id":"2","big":"x"}')]


def test_the_sink_being_down_takes_back_what_was_not_sent_yet() -> None:
    rows = {str(i): b'"' + b"x" * 900_000 + b'"' for i in range(20)}

    async def down(batch: Batch) -> Answer:
        return sink_down("timeout")

    shaping, budget = a_shaping(Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=Source(rows)))
    answer = asyncio.run(shaping(a_batch(*rows), down))
    assert not isinstance(answer, Result)
    assert {r.outcome for r in answer} == {"sink_down"}
    assert budget.held_bytes == 0


def test_what_was_committed_long_ago_is_not_waited_for() -> None:
    """An id of 32 bits may mean another transaction by now, and a position another history."""
    source, sent = Source({}), Sent()
    old, new = a_batch("1", committed=NOW - 2 * 86_400 * 1_000_000), a_batch("2", first=1)
    shape(Batch.of([*old, *new]), Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source), sent)
    assert source.seen == [Seen(frozenset({701}), 102, frozenset({"id"}))]


def test_a_key_that_cannot_be_asked_for_is_that_messages_error() -> None:
    class Picky(Reread):
        async def fetch(
            self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
        ) -> Fetched:
            if ("x",) in keys:
                raise BatchFailed("reselect_failed", "invalid input syntax for type integer")
            return await super().fetch(table, keys, seen, credit_bytes, row_bytes)

    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, reread=Picky({"1": {}, "2": {}}))
    answer = shape(a_batch("1", "x", "2", not_whole=("1", "x", "2")), steps, sent)
    assert not isinstance(answer, Result)
    assert [result.reason for result in answer] == ["", "reselect_failed", ""]
    assert len(sent.bodies) == 2


def test_in_order_what_the_sink_refuses_in_one_part_blocks_the_next() -> None:
    big = b'"' + b"x" * (3 << 20) + b'"'
    sent: list[list[str | None]] = []

    async def refuses_the_first(batch: Batch) -> Answer:
        sent.append([message.change.key for message in batch])
        return [reject("no")] + [OK] * (len(batch) - 1) if len(sent) == 1 else OK

    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=Source({"1": big, "2": big}))
    shaping, _ = a_shaping(steps, in_order=True, limit_bytes=48 << 20)
    answer = asyncio.run(shaping(a_batch("1", "2", "1", keying=Keying.EVENTS), refuses_the_first))
    assert not isinstance(answer, Result)
    assert len(sent) > 1
    assert answer[0].reason == "no"
    assert answer[2] is BLOCKED


@pytest.mark.parametrize("value", [b'"\\ud800"', b"[" * 2000 + b"]" * 2000, b"12345678901234567890123.10"])
def test_no_value_of_a_row_is_read_or_changed(value: bytes) -> None:
    """json may hold what no parser takes."""
    record = {"id": b'"1"', "j": value}
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, enrich=Source({"1": b'"one"'}), reread=Reread({"1": record}))
    sent = Sent()
    assert shape(a_batch("1", "2", not_whole=("1",)), steps, sent) is OK
    assert sent.bodies == [b'{"id":"1","j":' + value + b',"doc":"one"}', b'{"id":"2"}']


def test_what_an_envelope_cannot_take_costs_its_message() -> None:
    def picky(message: Message, whole: bytes) -> bytes:
        if message.change.pks == ("2",):
            raise KeyError("x")
        return whole

    sent = Sent()
    answer = shape(a_batch("1", "2", "3"), Steps(SUFFIX, keeps_rows=False, as_record=False, envelope=picky), sent)
    assert not isinstance(answer, Result)
    assert [result.reason for result in answer] == ["", "shaping_failed", ""]


def test_in_order_a_poisoned_row_and_a_large_one_do_not_meet() -> None:
    """What was put off behind the large one is not asked for in the half of the poisoned one."""
    rows = {str(i): b'"x"' for i in range(100)} | {"10": b'"' + b"x" * (2 << 20) + b'"'}
    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, enrich=Source(rows, poison=("70",)))
    answer = shape(a_batch(*rows, keying=Keying.EVENTS), steps, sent, in_order=True, limit_bytes=128 << 20)
    assert not isinstance(answer, Result)
    assert [at for at, result in enumerate(answer) if result is not OK] == [70]
    assert len(sent.bodies) == 99


def test_a_sink_whose_server_hangs_does_not_keep_the_others_waiting() -> None:
    keys = [str(i) for i in range(1000)]
    rows = dict.fromkeys(keys, b'"' + b"x" * 18000 + b'"')
    budget = Budget(128 << 20, 2, 2, SHAPING_EIGHTHS)

    def a_sink() -> Shaping:
        steps = Steps(SUFFIX, keeps_rows=True, as_record=False, enrich=Source(rows))
        return Shaping(steps, budget.shaping_share(), StillClock(), 16 << 20, in_order=False)

    async def both() -> None:
        hanging, fine = a_sink(), a_sink()
        started, never = asyncio.Event(), asyncio.Event()

        async def hangs(_: Batch) -> Answer:
            started.set()
            await never.wait()
            return OK

        async with asyncio.timeout(30):
            task = asyncio.create_task(hanging(a_batch(*keys), hangs))
            await started.wait()
            sent = Sent()
            assert await fine(a_batch(*keys), sent) is OK
            assert len(sent.bodies) == len(keys)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(both())
    assert budget.held_bytes == 0


def test_batches_of_one_sink_wait_for_each_other_and_are_whole() -> None:
    keys = [str(i) for i in range(400)]
    source = Source(dict.fromkeys(keys, b'"' + b"x" * 18000 + b'"'))
    shaping, budget = a_shaping(Steps(SUFFIX, keeps_rows=True, as_record=False, enrich=source), limit_bytes=128 << 20)

    async def slowly(_: Batch) -> Answer:
        await asyncio.sleep(0)
        return OK

    async def several() -> None:
        await asyncio.gather(*[shaping(a_batch(*keys), slowly) for _ in range(6)])

    asyncio.run(several())
    assert shaping.queries == 6
    assert budget.held_bytes == 0


def test_the_rows_of_one_batch_are_asked_for_while_another_is_sent() -> None:
    """Within the credit: each is held once, with a copy of what is being sent."""
    keys = [str(i) for i in range(500)]
    source = Source(dict.fromkeys(keys, b'"' + b"x" * 19_000 + b'"'))
    steps = Steps(SUFFIX, keeps_rows=True, as_record=False, enrich=source)
    shaping, budget = a_shaping(steps, limit_bytes=128 << 20)
    sent: list[int] = []

    async def until_the_other_has_asked(batch: Batch) -> Answer:
        async with asyncio.timeout(10):
            while len(source.asked) < 4:  # two of them for the first, which learns how large rows are
                await asyncio.sleep(0)
        sent.append(len(batch))
        assert 2 * batch.body_bytes <= budget.held_bytes <= budget.limit_bytes
        return OK

    async def several() -> None:
        await shaping(a_batch("1"), Sent())
        await asyncio.gather(*[shaping(a_batch(*keys), until_the_other_has_asked) for _ in range(2)])

    asyncio.run(several())
    assert sum(sent) == 2 * len(keys)
    assert shaping.queries == 4
    assert budget.held_bytes == 0


def test_without_credit_for_a_copy_of_all_it_is_sent_in_portions() -> None:
    rows = {str(i): b'"' + b"x" * 400_000 + b'"' for i in range(24)}
    sent = Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=False, enrich=Source(rows))
    shaping, budget = a_shaping(steps, limit_bytes=64 << 20)

    async def tight() -> None:
        assert budget.common.try_take(budget.common.limit_bytes)
        assert await shaping(a_batch(*rows), sent) is OK

    asyncio.run(tight())
    assert len(sent.bodies) == len(rows)
    assert sent.batches > shaping.queries


def test_a_large_row_borrows_of_the_delivery_pool_and_waits_not_for_long() -> None:
    size = 14 << 20
    source = Source({"1": b'"' + b"x" * size + b'"', "2": b'"y"'})
    steps = Steps(SUFFIX, keeps_rows=True, as_record=False, enrich=source)
    shaping, budget = a_shaping(steps, limit_bytes=96 << 20)
    sent = Sent()
    assert asyncio.run(shaping(a_batch("1", "2"), sent)) is OK
    assert len(sent.bodies) == 2

    async def busy() -> Answer:
        await budget.common.take(budget.common.limit_bytes)
        answer = await shaping(a_batch("1", "2"), sent)
        budget.common.give(budget.common.limit_bytes)
        return answer

    answer = asyncio.run(busy())
    assert not isinstance(answer, Result)
    assert [(result.outcome, result.reason) for result in answer] == [("retry", "no_memory"), ("ok", "")]
    assert budget.held_bytes == 0


def test_what_one_message_has_become_stays_together() -> None:
    """Outputs of one message are told apart within their chunk."""

    class Two(Scripted):
        async def __call__(
            self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
        ) -> Sequence[Outcome]:
            return [(Output(b'"' + b"a" * (1100 << 10) + b'"'), Output(b'"b"')) for _ in messages]

    chunks: list[int] = []

    async def keep(batch: Batch) -> Answer:
        chunks.extend(span.size for span, _, _ in batch.pieces)
        return OK

    shaping, _ = a_shaping(Steps(SUFFIX, keeps_rows=False, as_record=False, functions=Two({})), limit_bytes=256 << 20)
    asyncio.run(shaping(a_batch("1", "2", keying=Keying.EVENTS), keep))
    assert chunks == [2, 2]


def test_a_large_result_does_not_make_rows_too_large() -> None:
    class Grows(Scripted):
        async def __call__(
            self, messages: Sequence[bytes], deletes: Sequence[bool], answer_bytes: int = 0
        ) -> Sequence[Outcome]:
            return [(Output(b"x" * 60_000),) if len(message) < 1000 else (Output(None),) for message in messages]

    source = Source({"9": b'"' + b"x" * 60_000 + b'"'})
    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source, functions=Grows({}), result_bytes=1 << 20)
    shaping, _ = a_shaping(steps, limit_bytes=128 << 20)
    sent = Sent()

    async def both() -> None:
        assert await shaping(a_batch("1"), sent) is OK
        assert await shaping(a_batch("9"), sent) is OK

    asyncio.run(both())


@pytest.mark.parametrize("others_answer", [False, True])
def test_a_key_that_takes_too_long_is_to_blame_if_the_source_answers(others_answer: bool) -> None:
    class Slow(Source):
        async def fetch(
            self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
        ) -> Fetched:
            if ("slow",) in keys or not others_answer:
                raise SourceUnavailable("enrichment_timeout", "canceling statement due to statement timeout")
            return await super().fetch(table, keys, seen, credit_bytes, row_bytes)

    steps = Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=Slow({}))
    answer = shape(a_batch("slow", "1"), steps, Sent())
    if others_answer:
        assert not isinstance(answer, Result)
        assert [result.reason for result in answer] == ["enrichment_timeout", ""]
    else:
        assert isinstance(answer, Result)
        assert (answer.outcome, answer.reason) == ("sink_down", "enrichment_timeout")


def test_nobody_is_blamed_while_the_source_does_not_answer_for_no_key_either() -> None:
    """A table that is locked: the answer of a moment ago says nothing."""

    class Locked(Source):
        locked = False

        async def fetch(
            self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
        ) -> Fetched:
            if self.locked:
                raise SourceUnavailable("enrichment_timeout", "canceling statement due to statement timeout")
            return await super().fetch(table, keys, seen, credit_bytes, row_bytes)

    source = Locked({})
    shaping, _ = a_shaping(Steps(SUFFIX, keeps_rows=False, as_record=False, enrich=source))

    async def both() -> Answer:
        assert await shaping(a_batch("1"), Sent()) is OK
        source.locked = True
        return await shaping(a_batch("2"), Sent())

    answer = asyncio.run(both())
    assert isinstance(answer, Result)
    assert (answer.outcome, answer.reason) == ("sink_down", "enrichment_timeout")


def test_a_row_that_is_read_anew_and_enriched_has_credit_for_both() -> None:
    """The guess is too small for both; what one of them needs is not forgotten for the other."""

    class Counts(Source):
        async def fetch(
            self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
        ) -> Fetched:
            assert len(self.asked) < 20
            return await super().fetch(table, keys, seen, credit_bytes, row_bytes)

    class Counted(Reread):
        async def fetch(
            self, table: tuple[str, str], keys: Sequence[tuple[str, ...]], seen: Seen, credit_bytes: int, row_bytes: int
        ) -> Fetched:
            size = len(self.records["1"]["big"])
            if size > min(credit_bytes, row_bytes):
                return Fetched(sizes={0: size}, queries=1)
            return Fetched({0: self.records["1"]}, kept_bytes=size, queries=1)

    record = {"id": b'"1"', "big": b'"' + b"x" * 50_000 + b'"'}
    source, sent = Counts({"1": b'"' + b"y" * 30_000 + b'"'}), Sent()
    steps = Steps(SUFFIX, keeps_rows=True, as_record=True, reread=Counted({"1": record}), enrich=source)
    assert shape(a_batch("1", not_whole=("1",)), steps, sent) is OK
    assert len(sent.bodies) == 1
    assert len(sent.bodies[0]) > 80_000


def test_a_row_read_anew_that_the_filters_leave_out_is_deleted() -> None:
    """One that is gone as well, if its update would have moved it: its own delete is of the new key."""

    class Filtered(Reread):
        async def fetch(self, table, keys, seen, credit_bytes, row_bytes):  # type: ignore[no-untyped-def]
            return Fetched({0: {"id": b'"1"', "big": b'"x"'}}, left={1, 3})

    def fetched(keying: int) -> list[tuple[str, str | None, str | None]]:
        builder = ChunkBuilder()
        for at, key in enumerate("12345"):
            was = make_key("public", "t", (f"{key} before",)).encode() if key in "45" else b""
            body = b'{"record":{"id":"%b"},"changes":{},"action":"update","metadata":{"x":1' % key.encode()
            builder.add(
                ("public", "t"), ACTIONS.index("update"), 100, at, NOW, body, len(b'{"id":"1"}'),
                [make_key("public", "t", (key,)).encode(), was], flags=MOVED if was else 0, xid=700,
            )  # fmt: skip
        span = Span(builder.take(), keying)
        sent: list[tuple[str, str | None, str | None]] = []

        async def send(batch: Batch) -> Answer:
            for message in batch:
                change = message.change
                assert change.whole
                assert orjson.loads(change.body + b"}}")["action"] == change.action
                sent.append((change.action, change.key, change.was))
            return OK

        shaping, _ = a_shaping(Steps(SUFFIX, keeps_rows=True, as_record=True, reread=Filtered({})))
        assert asyncio.run(shaping(Batch([(span, 0, len(span))]), send)) is OK
        return sent

    row = ("update", "public.t:1", None)
    left = ("delete", "public.t:2", None)
    assert fetched(Keying.STATE) == [row, left, ("delete", "public.t:4", None)]
    before = [("delete", f"public.t:{key} before", None) for key in "45"]
    assert fetched(Keying.EVENTS) == [row, left, *before]
