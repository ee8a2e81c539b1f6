"""An outbox on a real server: events that an application writes beside its data."""

from __future__ import annotations

from pathlib import Path

from shape.place import Shaped, file_sink

SCHEMA = "create table outbox (id bigserial primary key, kind text not null, owner text not null, payload jsonb)"


def test_rows_of_a_table_are_events_whatever_becomes_of_them(database: str, tmp_path: Path) -> None:
    """Written and deleted in one transaction, as many do; ordered by a column that is no key."""
    sink = file_sink("out", ["public.outbox"], outbox={"table": "public.outbox", "payload": "payload", "key": "owner"})
    with Shaped(database, tmp_path, [sink], schema=SCHEMA) as place:
        place.begin()
        place.sql(
            "with event as (insert into outbox (kind, owner, payload)"
            " select 'k', n % 3, jsonb_build_object('n', n) from generate_series(1, 30) n returning id)"
            " select count(*) from event"
        )
        place.sql("delete from outbox")
        place.sql("insert into outbox (kind, owner, payload) values ('k', 'z', '{\"n\": 31}')")
        lines = place.came("out", 31)
        assert [line["n"] for line in lines] == list(range(1, 32))
        assert place.status("out")["parked_keys"] == 0


def test_a_row_without_its_payload_waits_alone(database: str, tmp_path: Path) -> None:
    sink = file_sink("out", ["public.outbox"], outbox={"table": "public.outbox", "payload": "payload", "key": "owner"})
    with Shaped(database, tmp_path, [sink], schema=SCHEMA) as place:
        place.begin()
        place.sql("insert into outbox (kind, owner, payload) values ('k', 'a', null), ('k', 'b', '1')")
        (parked,) = place.parked("out", 1)
        assert parked["key"].endswith("a")
        assert "payload" in parked["detail"]
        place.wait(lambda: place.lines("out") == [1], "the other event")


def test_a_payload_that_no_parser_takes_is_sent_as_it_is(database: str, tmp_path: Path) -> None:
    sink = file_sink("out", ["public.outbox"], outbox={"table": "public.outbox", "payload": "payload", "key": "owner"})
    with Shaped(database, tmp_path, [sink], schema=SCHEMA.replace("jsonb", "json")) as place:
        place.begin()
        place.sql("""insert into outbox (kind, owner, payload) values ('k', 'a', '"\\ud800"'), ('k', 'b', '1')""")
        assert place.came("out", 2) == ["\ud800", 1]
        assert place.status("out")["parked_keys"] == 0
