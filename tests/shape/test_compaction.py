"""``on_full: compact`` end to end: an outage costs what its keys cost, and the mirror ends equal."""

from __future__ import annotations

import random
from pathlib import Path

from shape.place import Shaped, sqlite_sink

KEYS = 300


def test_an_outage_costs_by_keys_and_the_mirror_ends_equal(database: str, tmp_path: Path) -> None:
    sink = sqlite_sink("mirror", ["public.t"], backlog={"on_full": "compact"})
    rng = random.Random(11)
    with Shaped(
        database, tmp_path, [sink], schema="create table t (id int primary key, n int, v text)", memory={"limit_mb": 64}
    ) as place:
        place.begin()
        place.sql(f"insert into t select n, 0, repeat('x', 200) from generate_series(1, {KEYS}) n")
        place.drained("mirror")
        place.post("mirror/pause")
        for turn in range(60):
            place.sql(f"update t set n = {turn} * 1000 + id where id % 7 <> {turn % 7}")
            gone = rng.randrange(1, KEYS)
            place.sql(f"delete from t where id = {gone}")
            if turn % 2:
                place.sql(f"insert into t values ({gone}, {turn}, 'again') on conflict do nothing")
        place.read_by_the_stream()
        place.wait(lambda: place.status("mirror")["backlog_messages"] <= KEYS, "a compact backlog")
        assert place.status("mirror")["compacted"] > 50 * KEYS // 2
        place.again()
        assert place.status("mirror")["backlog_messages"] <= KEYS
        place.post("mirror/resume")
        place.drained("mirror")
        assert place.sqlite_rows("mirror", "t") == place.source_rows("t")
