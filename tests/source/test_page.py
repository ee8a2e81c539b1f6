"""Pages of existing rows on real servers: every row exactly once, in whatever order its key has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from pgoutput.frames import META
from pgoutput.twins import TWINS
from source.conftest import MANY, SourceDatabase
from spillway.change import Change
from spillway.errors import SpillwayError
from spillway.pgoutput.decoder import Decoder
from spillway.source.page import Cursor, Page, PageReader, Range, Selection, before_header

SECONDS = 20.0
T = Selection("public", "t")

Open = Callable[..., Awaitable[PageReader]]


@pytest.fixture
async def open_reader() -> AsyncIterator[Open]:
    opened: list[PageReader] = []

    async def open_(source: SourceDatabase, publication: str = "p", twin: type[Decoder] = TWINS[-1]) -> PageReader:
        reader = await PageReader.open(
            source.dsn, "s", publication, lambda: twin(META, lambda *_: (), 0, 1 << 20, 0, 1 << 23), b"backfill"
        )
        opened.append(reader)
        return reader

    yield open_
    for reader in opened:
        await reader.close()


def changes(page: Page) -> list[Change]:
    return [page.chunk.change(i) for i in range(page.chunk.count)]


async def pages(
    reader: PageReader, selection: Selection = T, size: int = MANY, within: Range | None = None, credit: int = MANY
) -> list[Page]:
    read: list[Page] = []
    cursor: Cursor | None = None
    while True:
        page = await reader.read(selection, within or Range(), cursor, size, credit, SECONDS)
        read.append(page)
        cursor = page.cursor
        if cursor is None:
            return read


async def records(
    reader: PageReader, selection: Selection = T, size: int = MANY, within: Range | None = None, credit: int = MANY
) -> list[bytes]:
    return [c.record for page in await pages(reader, selection, size, within, credit) for c in changes(page)]


KEYS: dict[str, tuple[str, ...]] = {
    "int": ("-5", "-1", "0", "7", "2147483647"),
    "uuid": (
        "00000000-0000-0000-0000-000000000000",
        "123e4567-e89b-12d3-a456-426614174000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ),
    "text": ("", "a b", "it's", "back\\slash", "tab\there", "new\nline", "ünï", "a:b.c", "%s", "Z", "{}"),
    'text COLLATE "en-x-icu"': ("a", "A", "b", "B", "ä", "z", "-a", ""),
    "public.mood": ("sad", "ok", "happy"),
    "bytea": (r"\x", r"\x00", r"\x00ff", r"\x5c", r"\xff"),
    "numeric": ("-1e30", "-0.10", "0", "1.00", "1.01", "NaN", "12345678901234567890.123456789"),
    "float8": ("-Infinity", "-1.5", "0.1", "3.0000000000000004", "1e300", "Infinity", "NaN"),
    "float4": ("-Infinity", "0.1", "16777217", "NaN"),
    "timestamptz": ("-infinity", "0044-03-15 00:00:00+00 BC", "2024-02-29 12:00:00.123456+00", "infinity"),
    "timestamp": ("-infinity", "4713-01-01 00:00:00 BC", "2024-02-29 12:00:00.000001", "infinity"),
    "date": ("-infinity", "0001-01-01 BC", "2024-02-29", "infinity"),
    "time": ("00:00:00", "24:00:00", "12:30:00.5"),
    "interval": ("-1 mons +2 days", "1 year", "12:00:00", "00:00:00"),
    "char(4)": ("a", "ab", "", "zz"),
    "varchar(8)": ("", "a", "'quoted'"),
    '"char"': ("a", "b", ""),
    "name": ("a", "b"),
    "bool": ("f", "t"),
    "bit varying(5)": ("", "1", "10101"),
    "inet": ("10.0.0.1", "10.0.0.0/8", "::1"),
    "int[]": ("{}", "{1}", "{1,2}", "{NULL,1}"),
    "int4range": ("empty", "[1,3)", "(,)", "[1,)"),
    "public.positive": ("1", "2", "30"),
    "public.folded": ("a", "B", "c"),
    "public.pair": ('(1,"a b")', "(1,)", "(2,x)"),
    "jsonb": ('{"a": 1}', "[]", "null", '"x"'),
    "oid": ("0", "4294967295"),
}

OTHERWISE_AS_TEXT = {"bool", "char(4)", "inet"}  # the cast gives another text than the output function


async def _types(source: SourceDatabase) -> None:
    await source.execute(
        "CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'happy')",
        "CREATE TYPE public.pair AS (n int, t text)",
        "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
        'CREATE DOMAIN public.folded AS text COLLATE "en-x-icu"',
    )


async def test_every_type_of_key_pages_through_all_rows_once(source: SourceDatabase, open_reader: Open) -> None:
    await _types(source)
    await source.execute("CREATE TABLE public.t (id int)", "CREATE PUBLICATION p FOR ALL TABLES")
    reader = await open_reader(source)
    for number, (type_, values) in enumerate(KEYS.items()):
        table = f"t{number}"
        await source.execute(f"CREATE TABLE public.{table} (body text, k {type_} PRIMARY KEY)")
        for value in values:
            await source.query.execute(f"INSERT INTO public.{table} VALUES ('x', %s)".encode(), [value])
        ordered = await source.query.execute(f"SELECT k::text FROM public.{table} o ORDER BY o.k".encode())
        selection = Selection("public", table)
        everything = await records(reader, selection)
        assert len(everything) == len(values), type_
        for size in (1, 3):
            assert await records(reader, selection, size) == everything, (type_, size)
        keys = [c.pks for page in await pages(reader, selection) for c in changes(page)]
        if type_ not in OTHERWISE_AS_TEXT:
            assert keys == await ordered.fetchall(), type_
        page = await reader.read_keys(selection, [*keys, keys[0]], MANY, SECONDS)
        assert sorted(c.pks for c in changes(page)) == sorted(keys), type_
        assert page.missing == [], type_


@pytest.mark.parametrize("lsn", [0x1000028, 0x1000018, 0x1002018])
def test_a_position_behind_a_page_header_is_before_it(lsn: int) -> None:
    assert before_header(lsn) == lsn // 8192 * 8192


@pytest.mark.parametrize("lsn", [0x1000000, 0x1000030, 0x1000020, 0x1001FF8])
def test_any_other_position_stays(lsn: int) -> None:
    assert before_header(lsn) == lsn


async def test_a_page_knows_what_it_sees(source: SourceDatabase, open_reader: Open) -> None:
    await source.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY)", "CREATE PUBLICATION p FOR TABLE public.t",
        "INSERT INTO public.t SELECT generate_series(1, 10)",
    )  # fmt: skip
    reader = await open_reader(source)
    assert (reader.standby, reader.wal_writer_delay_seconds) == (False, 0.2)
    page = await reader.read(T, Range(), None, 4, MANY, SECONDS)
    assert [c.pks for c in changes(page)] == [("1",), ("2",), ("3",), ("4",)]
    assert {c.action for c in changes(page)} == {"read"}
    assert page.cursor == ("1", "4")
    assert page.snapshot.replayed_lsn is None
    assert page.snapshot.lsn <= await reader.flushed_lsn() + 8192
    assert await reader.relations("public", "t") == [("public", "t")]
    with pytest.raises(SpillwayError, match="not in publication"):
        await reader.relations("public", "other")
