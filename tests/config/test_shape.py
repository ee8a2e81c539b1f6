"""What a sink says about its messages: functions by name, conditions, related tables, outbox, formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from spillway.config import Condition, Config, ConfigErrors, Related, Sink, TableName, load
from spillway.pgoutput.literals import UnfitError, numeric_of, text_of, uuid_of

FUNCTIONS = """\
databases:
- {name: app, url: 'postgresql://u:p@h/d', slot: {name: s}, publication: {name: p}}
http_endpoints: [{name: hook, url: 'http://h'}]
memory: {limit_mb: 512}
functions:
- {name: wanted, type: filter, module: 'a:b'}
- {name: where, type: routing, sink_type: http_push, module: 'a:b'}
- {name: shape, type: transform, module: 'a:b'}
- {name: row, type: path, path: record}
- {name: slim, type: fields, fields: [{drop: a}]}
- {name: joined, type: enrichment, code: 'SELECT id FROM t WHERE id = ANY($1)'}
"""
SEARCH = "{type: opensearch, endpoint_url: 'http://h', index_name: i}"
HOOK = "{type: webhook, http_endpoint: hook}"
SQL = "SELECT id FROM t WHERE c = ANY($1)"
T, U = TableName("public", "t"), TableName("public", "u")
OF_STATE = "is for sinks that keep rows (search and sqlite): elsewhere every message counts"


def read(tmp_path: Path, extra: str, destination: str) -> Config:
    file = tmp_path / "spillway.yml"
    source = "" if "source:" in extra else "source: {include_tables: [t]}"
    sink = f"sinks:\n- name: x\n  database: app\n  destination: {destination}\n  {source}\n  {extra}\n"
    file.write_text(FUNCTIONS + sink)
    return load(file, {})


def sink(tmp_path: Path, extra: str, destination: str = SEARCH) -> Sink:
    config = read(tmp_path, extra, destination)
    assert config.warnings == ()
    return config.sinks[0]


def errors(tmp_path: Path, extra: str, destination: str = SEARCH) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, extra, destination)
    prefix = f"{tmp_path}/spillway.yml:"
    lines = [str(problem).removeprefix(prefix).partition(": ")[2] for problem in caught.value.problems]
    return [line.removeprefix("sinks[0].") for line in lines]


def test_nothing_said(tmp_path: Path) -> None:
    plain = sink(tmp_path, "")
    assert (plain.filter, plain.routing, plain.transform, plain.enrichment) == (None, None, None, None)
    assert (plain.filters, plain.related, plain.outbox) == ((), (), None)
    assert (plain.format, plain.timestamp_format, plain.tx) == ("sequin", "iso8601", False)
    assert (plain.enrichment_timeout_ms, plain.enrichment_from) == (15_000, "primary")


def test_functions_by_name(tmp_path: Path) -> None:
    named = sink(
        tmp_path, "filter: wanted\n  routing: where\n  transform: shape\n  enrichment: joined\n  tx: true", HOOK
    )
    assert (named.filter, named.routing, named.transform, named.enrichment) == ("wanted", "where", "shape", "joined")
    assert named.tx
    for name in ("row", "slim"):
        assert sink(tmp_path, f"transform: {name}").transform == name


@pytest.mark.parametrize("none", ["none", "null", "'null'", "nil", "~"])
def test_no_function(tmp_path: Path, none: str) -> None:
    text = f"filter: {none}\n  routing: {none}\n  transform: {none}\n  enrichment: {none}\n  legacy_transform: none"
    plain = sink(tmp_path, text)
    assert (plain.filter, plain.routing, plain.transform, plain.enrichment) == (None, None, None, None)


@pytest.mark.parametrize(
    ("extra", "toast"),
    [
        ("", "omit"),
        ("enrichment: joined", "omit"),
        ("filters: [{column: a, operator: eq, value: 1}]", "reselect"),
        ("filter: wanted", "reselect"),
        ("transform: slim", "reselect"),
        ("transform: slim\n  toast: omit", "omit"),
    ],
)
def test_a_copy_has_whole_rows_of_what_is_chosen_or_made(tmp_path: Path, extra: str, toast: str) -> None:
    assert sink(tmp_path, extra, "{type: sqlite, path: x}").toast == toast


def test_the_legacy_transform_is_a_format(tmp_path: Path) -> None:
    assert sink(tmp_path, "legacy_transform: record_only\n  transform: none").format == "record"


@pytest.mark.parametrize(
    ("extra", "destination", "expected"),
    [
        ("filter: wnated", SEARCH, "filter: none of functions has this name; did you mean wanted?"),
        ("filter: shape", SEARCH, "filter: is a function of type: transform; wanted is filter"),
        (
            "transform: wanted",
            SEARCH,
            "transform: is a function of type: filter; wanted is transform or path or fields",
        ),
        ("enrichment: slim", SEARCH, "enrichment: is a function of type: fields; wanted is enrichment"),
        ("routing: where", SEARCH, "routing: routes messages of webhook sinks; this one is opensearch"),
        ("routing: where", "{type: stdout}", "routing: has no meaning for stdout: there is one place to go"),
        (
            "enrichment: joined\n  source: {include_tables: [t, u]}",
            SEARCH,
            "enrichment: needs a source with exactly one table in include_tables: its SQL is about that table's keys",
        ),
        ("enrichment_from: replica", SEARCH, "enrichment_from: needs a replica: set replica_url of the database"),
        ("enrichment_timeout_ms: 0", SEARCH, "enrichment_timeout_ms: must be at least 1"),
        ("format: debezum", SEARCH, "format: must be sequin, debezium, cloudevents or record; did you mean debezium?"),
        (
            "format: record\n  transform: row",
            SEARCH,
            "format: does not go together with transform, which makes the whole message",
        ),
        (
            "legacy_transform: record_only\n  transform: row",
            SEARCH,
            "legacy_transform: is an old spelling of format: record; give one of the two",
        ),
        ("tx: yes", SEARCH, "tx: must be true or false"),
        ("toast: reselect", HOOK, f"toast: reselect {OF_STATE}"),
        ("backlog: {on_full: compact}", HOOK, f"backlog.on_full: compact {OF_STATE}"),
        (
            "backlog: {on_full: compact}\n  transform: row",
            SEARCH,
            "backlog.on_full: compact does not go together with a transform, "
            "which may make something else of each message",
        ),
    ],
)
def test_what_does_not_fit(tmp_path: Path, extra: str, destination: str, expected: str) -> None:
    assert errors(tmp_path, extra, destination) == [expected]


def test_a_function_that_is_wrong_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "spillway.yml"
    text = FUNCTIONS + "- {name: bad, type: filtre, module: 'a:b'}\n"
    file.write_text(text + f"sinks:\n- {{name: x, database: app, filter: bad, destination: {SEARCH}}}\n")
    with pytest.raises(ConfigErrors) as caught:
        load(file, {})
    assert [problem.key for problem in caught.value.problems] == ["functions[6].type"]


def condition(tmp_path: Path, text: str) -> Condition:
    (found,) = sink(tmp_path, f"filters: [{{{text}}}]").filters
    return found


@pytest.mark.parametrize(
    ("spelling", "operator"),
    [
        ("eq", "eq"),
        ("'='", "eq"),
        ("'!='", "ne"),
        ("'>'", "gt"),
        ("'<'", "lt"),
        ("'>='", "gte"),
        ("lte", "lte"),
        ("LIKE", "like"),
    ],
)
def test_operators(tmp_path: Path, spelling: str, operator: str) -> None:
    assert condition(tmp_path, f"column: a, operator: {spelling}, value: x") == Condition(
        table=T, column="a", operator=operator, value="x"
    )


def test_operators_of_lists_and_of_null(tmp_path: Path) -> None:
    for spelling in ("not in", "NOT  IN", "not_in"):
        found = condition(tmp_path, f"column: a, operator: {spelling}, value: [1, x, true, 1.5]")
        assert (found.operator, found.value) == ("not_in", (1, "x", True, 1.5))
    for spelling in ("is not null", "is_not_null"):
        assert condition(tmp_path, f"column: a, operator: {spelling}").operator == "is_not_null"


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    for text, value in (
        ("'12345678901234567.891'", "12345678901234567.891"),
        ("12345678901234567891", 12345678901234567891),
        ("1234567890.12345", 1234567890.12345),
        ("1.5e300", 1.5e300),
        ("0.30000000000000004", 0.30000000000000004),
    ):
        assert condition(tmp_path, f"column: a, operator: eq, value: {text}").value == value
    for text in (
        "12345678901234567.891",
        "12345678901.00000001",
        "1e400",
        "1e-99999999999999999999",
        "[1.5, 0.1000000000000000055]",
    ):
        (error,) = errors(tmp_path, f"filters: [{{column: a, operator: in, value: {text}}}]")
        assert error.endswith("has more digits than a number with a fraction keeps: put it in quotes")


def test_a_value_that_does_not_fit_is_shown_as_it_is_written(tmp_path: Path) -> None:
    value = condition(tmp_path, "column: a, operator: eq, value: true").value
    for read, why in (
        (text_of, "the column is text, true is not; put it in quotes"),
        (numeric_of, "true is no number"),
        (uuid_of, "true is no UUID"),
    ):
        with pytest.raises(UnfitError) as caught:
            read(value)
        assert str(caught.value) == why


def test_paths(tmp_path: Path) -> None:
    for path in ("a.0.b", "[a, 0, b]"):
        assert condition(tmp_path, f"column: a, operator: eq, value: 1, path: {path}").path == ("a", "0", "b")


def test_sequins_keys_of_a_condition(tmp_path: Path) -> None:
    text = "filters: [{column_name: a, operator: '=', comparison_value: 5, field_path: b.c, field_type: number}]"
    config = read(tmp_path, text, SEARCH)
    assert config.sinks[0].filters == (Condition(table=T, column="a", operator="eq", value=5, path=("b", "c")),)
    assert [warning.partition(": ")[2] for warning in config.warnings] == [
        "sinks[0].filters[0].field_type: has no effect: values compare as the type of the column does"
    ]


def test_the_table_of_a_condition(tmp_path: Path) -> None:
    found = sink(
        tmp_path,
        "source: {include_tables: [t, u]}\n  filters: [{table: u, column: a, operator: eq, value: 1}]",
    )
    assert found.filters[0].table == U


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{operator: eq, value: 1}", "column: is required"),
        ("{column: a, value: 1}", "operator: is required"),
        (
            "{column: a, operator: equals, value: 1}",
            "operator: must be eq, ne, gt, lt, gte, lte, in, not_in, is_null, is_not_null or like",
        ),
        ("{column: a, operator: eq}", "value: is required; for null there are is_null and is_not_null"),
        ("{column: a, operator: eq, value: null}", "value: is required; for null there are is_null and is_not_null"),
        ("{column: a, operator: eq, value: [1]}", "value: may not be a list with eq"),
        (
            "{column: a, operator: eq, value: {b: 1}}",
            "value: must be a text, a number, true or false, or a list of them",
        ),
        ("{column: a, operator: in, value: 1}", "value: must be a list with in"),
        ("{column: a, operator: in, value: []}", "value: must be a list with in"),
        ("{column: a, operator: in, value: [null]}", "value: must be a list of texts, numbers, true or false"),
        ("{column: a, operator: is null, value: 1}", "value: has no meaning with is_null"),
        ("{column: a, operator: like, value: 1}", "value: must be text with like, such as 'abc%'"),
        ("{column: a, operator: gt, value: true}", "value: may not be true or false with gt"),
        ("{column: a, operator: eq, value: 1, path: a..b}", "path: must be a path inside of the column's JSON"),
        ("{column: a, column_name: b, operator: eq, value: 1}", "column_name: is an old spelling of column; give one"),
        (
            "{table: u, column: a, operator: eq, value: 1}",
            "table: is not a table of this sink: its source leaves it out",
        ),
    ],
)
def test_conditions_that_are_wrong(tmp_path: Path, entry: str, expected: str) -> None:
    (error,) = errors(tmp_path, f"filters: [{entry}]")
    assert error.removeprefix("filters[0].").startswith(expected)


@pytest.mark.parametrize("source", ["{include_tables: [t, u]}", "{include_schemas: [public]}", "{}"])
def test_the_table_must_be_said_where_there_is_not_one_alone(tmp_path: Path, source: str) -> None:
    what = "is required, since the source of the sink does not name exactly one table"
    filters = f"source: {source}\n  filters: [{{column: a, operator: eq, value: 1}}]"
    assert errors(tmp_path, filters) == [f"filters[0].table: {what}"]
    related = f"source: {source}\n  related: [{{table: c, sql: '{SQL}'}}]"
    assert errors(tmp_path, related) == [f"related[0].refreshes: {what}"]


def test_related(tmp_path: Path) -> None:
    (tmp_path / "c.sql").write_text(SQL)
    two = "SELECT id FROM t JOIN unnest($1, $2) AS k(a, b) USING (a, b)"
    found = sink(
        tmp_path,
        f"related:\n  - {{table: shop.c, sql: '{SQL}'}}\n"
        f"  - {{table: d, columns: [a, b], sql: '{two}', refreshes: t}}\n"
        "  - {table: e, file: c.sql}",
    )
    assert found.related == (
        Related(table=TableName("shop", "c"), sql=SQL, refreshes=T),
        Related(table=TableName("public", "d"), columns=("a", "b"), sql=two, refreshes=T),
        Related(table=TableName("public", "e"), sql=SQL, file=tmp_path / "c.sql", refreshes=T),
    )


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (f"{{sql: '{SQL}'}}", "table: is required"),
        ("{table: c}", "sql: is required"),
        ("{table: c, file: no.sql}", "file: cannot be read: No such file or directory"),
        ("{table: c, sql: SELECT 1}", "sql: must contain $1"),
        ("{table: c, columns: [a], sql: 'SELECT $1, $2'}", "sql: has $2, but there is 1 column"),
        (f"{{table: c, columns: [a, a], sql: '{SQL}'}}", "columns: names a column twice"),
        (f"{{table: c, columns: [], sql: '{SQL}'}}", "columns: may not be empty"),
        (f"{{table: c, sql: '{SQL}', refreshes: u}}", "refreshes: is not a table of this sink"),
    ],
)
def test_related_tables_that_are_wrong(tmp_path: Path, entry: str, expected: str) -> None:
    first = errors(tmp_path, f"related: [{entry}]")[0]
    assert first.removeprefix("related[0].").startswith(expected)


def test_related_tables_are_for_documents(tmp_path: Path) -> None:
    assert errors(tmp_path, f"related: [{{table: c, sql: '{SQL}'}}]", HOOK) == [f"related: {OF_STATE}"]


def test_outbox(tmp_path: Path) -> None:
    routing = 'routing: {endpoint_path: "/{kind}/{id}"}, headers: {X-Id: "{id}"}'
    text = f"outbox: {{table: t, payload: body, key: group, {routing}}}"
    outbox = sink(tmp_path, text, HOOK).outbox
    assert outbox is not None
    assert (outbox.table, outbox.prefix, outbox.payload, outbox.key) == (T, None, "body", "group")
    assert (outbox.routing, outbox.headers) == ({"endpoint_path": "/{kind}/{id}"}, {"X-Id": "{id}"})
    emitted = sink(tmp_path, "outbox: {prefix: events}", HOOK).outbox
    assert emitted is not None
    assert (emitted.table, emitted.prefix, emitted.payload) == (None, "events", None)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("payload: a", "table: give either table or prefix"),
        ("table: t, prefix: a, payload: b", "prefix: give either table or prefix"),
        ("table: t", "payload: is required: the column with the message"),
        ("table: u, payload: a", "table: is not a table of this sink"),
        (
            "prefix: a, routing: {endpoint_pth: x}",
            "routing.endpoint_pth: is nothing that webhook is routed by; did you ",
        ),
        ("prefix: a, routing: {method: '{b'}", "routing.method: must be text with columns in braces"),
        ("prefix: a, key: b", "key: has no meaning with prefix: emitted messages are not ordered"),
        ("prefix: a, routing: {endpoint_path: '{b}'}", "routing.endpoint_path: must begin with /, ? or #"),
        ("prefix: a, headers: {X: '{}'}", "headers.X: must be text with columns in braces"),
    ],
)
def test_outboxes_that_are_wrong(tmp_path: Path, body: str, expected: str) -> None:
    (error,) = errors(tmp_path, f"outbox: {{{body}}}", HOOK)
    assert error.removeprefix("outbox.").startswith(expected)


@pytest.mark.parametrize(
    ("extra", "destination", "expected"),
    [
        ("outbox: {prefix: a, headers: {X: y}}", "{type: stdout}", "outbox.headers: has no meaning for stdout"),
        ("outbox: {prefix: a}", SEARCH, "outbox: is for sinks of messages: opensearch keeps rows"),
        (
            "filter: wanted\n  outbox: {prefix: a}",
            HOOK,
            "outbox: does not go together with filter: it makes the whole message",
        ),
        (
            "format: record\n  outbox: {prefix: a}",
            HOOK,
            "outbox: does not go together with format: it makes the whole message",
        ),
        ("format: record", "{type: sqlite, path: x}", "format: has no meaning for sqlite, which keeps rows"),
    ],
)
def test_what_makes_messages_of_another_kind(tmp_path: Path, extra: str, destination: str, expected: str) -> None:
    assert errors(tmp_path, extra, destination) == [expected]


def test_updates_of_documents(tmp_path: Path) -> None:
    own = SEARCH.replace("}", ", op: update, doc_as_upsert: true, routing_column: tenant}")
    destination = sink(tmp_path, "", own).destination
    assert (destination.op, destination.doc_as_upsert, destination.pipeline) == ("update", True, None)  # type: ignore[union-attr]
    for keys, expected in (
        ("doc_as_upsert: true", "doc_as_upsert: has no meaning without op: update"),
        (
            "op: update, pipeline: p",
            "pipeline: has no meaning with op: update: the server runs pipelines for whole documents alone",
        ),
        ("op: upsert", "op: must be index or update"),
    ):
        (error,) = errors(tmp_path, "", SEARCH.replace("}", f", {keys}}}"))
        assert error.startswith(f"destination.{expected}")


@pytest.mark.parametrize("form", ["debezium", "record"])
def test_a_transaction_that_would_not_be_told_is_refused(tmp_path: Path, form: str) -> None:
    (error,) = errors(tmp_path, f"format: {form}\n  tx: true", HOOK)
    assert error.startswith(f"tx: does not go together with format: {form}")


@pytest.mark.parametrize("form", ["debezium", "record"])
def test_an_enrichment_that_nothing_would_show_is_refused(tmp_path: Path, form: str) -> None:
    for destination in (HOOK, SEARCH):
        (error,) = errors(tmp_path, f"format: {form}\n  enrichment: joined", destination)
        assert error.startswith(f"format: {form} has no place for the enrichment")
    for extra in (f"format: {form}\n  filter: wanted", f"format: {form}\n  routing: where", "format: cloudevents"):
        assert sink(tmp_path, f"{extra}\n  enrichment: joined", HOOK).enrichment == "joined"


@pytest.mark.parametrize(
    "extra", ["transform: shape", "filter: wanted", "timestamp_format: unix_microsecond", "tx: true"]
)
def test_the_shard_of_before_must_be_known(tmp_path: Path, extra: str) -> None:
    (error,) = errors(tmp_path, extra, SEARCH.replace("}", ", routing_column: tenant}"))
    assert error.startswith(f"destination.routing_column: does not go together with {extra.partition(':')[0]}")
    assert "document: message" in error
    sink(tmp_path, extra, SEARCH.replace("}", ", routing_column: tenant, document: message}"))


@pytest.mark.parametrize("extra", ["on_reject: latest_wins", "backlog: {on_full: compact}"])
def test_no_message_stands_for_another_where_a_column_says_the_shard(tmp_path: Path, extra: str) -> None:
    (error,) = errors(tmp_path, extra, SEARCH.replace("}", ", routing_column: tenant}"))
    assert "does not go together with destination.routing_column" in error
    sink(tmp_path, extra, SEARCH)
