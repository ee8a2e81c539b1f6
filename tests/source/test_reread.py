"""Rows read anew are what the stream would have carried."""

from __future__ import annotations

import orjson
import pytest

from pgoutput.frames import META, SUFFIX
from pgoutput.given import If
from pgoutput.twins import TWINS
from source.conftest import SourceDatabase
from spillway.errors import SpillwayError
from spillway.flow.route import filters_of_pages
from spillway.pgoutput.decoder import Decoder
from spillway.position import parse_lsn
from spillway.source.reread import Rereader


@pytest.mark.parametrize("twin", TWINS)
async def test_a_row_or_its_delete(source: SourceDatabase, twin: type[Decoder]) -> None:
    await source.execute(
        "CREATE TABLE public.t (note text, b int, a text, doc jsonb, PRIMARY KEY (a, b))",
        """INSERT INTO public.t VALUES (NULL, 1, 'x:y', '{"n": 1.10}')""",
    )
    rereader = Rereader(source.query, lambda: twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 23))
    before = parse_lsn(str(await source.value("SELECT pg_current_wal_insert_lsn()::text")))
    row = await rereader.read("public", "t", ("1", "x:y"))
    gone = await rereader.read("public", "t", ("2", "x"))
    assert (row.action, row.n, row.key, row.pks) == ("insert", 0, "public.t:1:x\\:y", ("1", "x:y"))
    assert row.record == b'{"note":null,"b":1,"a":"x:y","doc":{"n": 1.10}}'
    assert (gone.action, gone.n, gone.pks) == ("delete", 0, ("2", "x"))
    assert gone.record == b'{"note":null,"b":2,"a":"x","doc":null}'
    assert before <= row.commit_lsn <= gone.commit_lsn
    assert orjson.loads(row.body + SUFFIX)["metadata"]["commit_idx"] == 0


@pytest.mark.parametrize("twin", TWINS)
async def test_what_the_filter_of_the_sink_leaves_out_is_a_delete(source: SourceDatabase, twin: type[Decoder]) -> None:
    await source.execute("CREATE TABLE public.jobs (id int PRIMARY KEY, n int)")
    await source.execute("INSERT INTO public.jobs VALUES (1, 1), (2, 2), (3, NULL)")
    filters = filters_of_pages((If("n", "gt", 1),))
    rereader = Rereader(
        source.query, lambda: twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 23, lambda _: None, filters, 1)
    )
    actions = [(await rereader.read("public", "jobs", (key,))).action for key in "1234"]
    assert actions == ["delete", "insert", "delete", "delete"]


async def test_a_table_whose_key_is_another_one(source: SourceDatabase) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    rereader = Rereader(source.query, lambda: Decoder(META, lambda *_: (), 0, 1 << 20, 0, 1 << 23))
    with pytest.raises(SpillwayError, match=r"primary key of public\.t has changed"):
        await rereader.read("public", "t", ("1", "2"))
    with pytest.raises(SpillwayError, match="not there any more"):
        await rereader.read("public", "gone", ("1",))
