"""YAML 1.2-like reading with lines, and interpolation after it."""

from __future__ import annotations

import pytest

from spillway.config.document import Block, DocumentError, Items, read
from spillway.config.interpolate import interpolate
from spillway.config.values import plain


def value(text: str) -> object:
    return plain(read(f"a: {text}\n"))["a"]  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "NO",
        "no",
        "on",
        "off",
        "yes",
        "y",
        "12:30:45",
        "2024-01-01",
        "2024-01-01 10:00:00+02",
        "1_000",
        "0b11",
        "0o8",
        ".inf",
        ".NaN",
        "=",
        "tRUE",
        "nULL",
        "1.2.3",
        "+",
        ".",
        "1e",
        "0x",
        "5 MB",
    ],
)
def test_what_yaml_1_2_calls_text_stays_text(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("true", True),
        ("False", False),
        ("5", 5),
        ("-5", -5),
        ("+5", 5),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("'5'", "5"),
        ('"true"', "true"),
        ("''", ""),
        ("'~'", "~"),
        ("!!str 5", "5"),
        ("!!int 5", 5),
        ("&x 5", 5),
        ("!!null ''", None),
        ("!!float 1.5", 1.5),
        ("!!bool true", True),
        ("'<<'", "<<"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_the_core_schema(text: str, expected: object) -> None:
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


def test_keys_are_text_as_written() -> None:
    assert plain(read("on: 1\n5: 2\nnull: 3\n~: 4\n012: 5\n")) == {"on": 1, "5": 2, "null": 3, "~": 4, "012": 5}


def test_empty_documents() -> None:
    assert plain(read("")) == {}
    assert plain(read("# nothing\n")) == {}
    assert plain(read("---\n{}\n")) == {}


MERGING = """\
base: &base
  batch_size: 5
  source: {include_tables: [a]}
more: &more {batch_size: 7, status: paused}
one:
  <<: *base
  name: x
two:
  status: active
  <<: [*base, *more]
three: *more
"""


def test_anchors_and_merge_keys() -> None:
    root = read(MERGING)
    assert plain(root["one"]) == {"batch_size": 5, "source": {"include_tables": ["a"]}, "name": "x"}
    assert plain(root["two"]) == {"status": "active", "batch_size": 5, "source": {"include_tables": ["a"]}}
    assert plain(root["three"]) == {"batch_size": 7, "status": "paused"}
    assert root.anchored == {"base", "more"}


def test_each_alias_is_a_value_of_its_own_with_its_own_path_and_the_lines_of_the_original() -> None:
    root = read(MERGING)
    one, two = root["one"], root["two"]
    assert isinstance(one, Block)
    assert isinstance(two, Block)
    assert one["source"] is not two["source"]
    assert isinstance(one["source"], Block)
    assert one["source"].path == "one.source"
    assert one.line_of("batch_size") == 2
    assert two.line_of("status") == 9


def test_lines_and_paths() -> None:
    root = read("a:\n  - b: 1\n    c:\n      - x\n      - y\n\n# comment\nd: 2\n")
    assert (root.line_of("a"), root.line_of("d")) == (1, 8)
    items = root["a"]
    assert isinstance(items, Items)
    first = items[0]
    assert isinstance(first, Block)
    assert first.path == "a[0]"
    assert (first.line, first.line_of("b"), first.line_of("c")) == (2, 2, 3)
    assert first.key_path("c") == "a[0].c"
    inner = first["c"]
    assert isinstance(inner, Items)
    assert (inner.path, inner.lines) == ("a[0].c", [4, 5])


@pytest.mark.parametrize(
    ("text", "line", "key", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a", "is given twice; line 1 has it already"),
        ("s:\n- x: 1\n  x: 2\n", 3, "s[0].x", "is given twice; line 2 has it already"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", 4, "c.<<", "is given twice; line 3 has it already"),
        ("a: {'b': 1, b: 2}\n", 1, "a.b", "is given twice; line 1 has it already"),
        ("- a\n", 1, "file", "must be a mapping of keys such as databases and sinks"),
        ("text\n", 1, "file", "must be a mapping of keys such as databases and sinks"),
        ("\n\na: [1\n", 4, "YAML", "while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        (
            "a: 1\n\tb: 2\n",
            2,
            "YAML",
            "while scanning for the next token, found character '\\t' that cannot start any token",
        ),
        ("a: *nowhere\n", 1, "YAML", "found undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2\n", 2, "YAML", "expected a single document in the stream, but found another document"),
        ("a: 1\nb: \x07\n", 2, "YAML", "holds a control character"),
        ("[a]: 1\n", 1, "file", "a key must be text"),
        ("a: !secret x\n", 1, "a", "the tag !secret is not understood"),
        ("a: !!timestamp 2024-01-01\n", 1, "a", "the tag !!timestamp is not understood"),
        ("a: !!set {x}\n", 1, "a", "the tag !!set is not understood"),
        ("a: !!int hello\n", 1, "a", "is no !!int"),
        ("a: " + "9" * 5000 + "\n", 1, "a", "is no !!int"),
        ("x: 1\na: &a [*a]\n", 2, "a[0]", "an alias may not stand inside of what it stands for"),
        ("a: &a {b: *a}\n", 1, "a.b", "an alias may not stand inside of what it stands for"),
        ("a:\n  <<: 5\n", 2, "<<", "must be an alias of a mapping, or a list of such"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", 1, "YAML", "is nested too deeply"),
    ],
)
def test_what_is_no_document(text: str, line: int, key: str, what: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(text)
    assert (caught.value.line, caught.value.key, caught.value.what) == (line, key, what)


def test_a_few_lines_do_not_stand_for_a_billion_values() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    with pytest.raises(DocumentError, match="its aliases stand for more than 100,000 values"):
        read(text)


ENV = {"HOST": "db", "EMPTY": "", "ODD": "a: b #'\"${HOST}", "PORT": "5432"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${HOST}", "db"),
        ("x-${HOST}-${PORT}-y", "x-db-5432-y"),
        ("${EMPTY}", ""),
        ("${EMPTY:-d}", "d"),
        ("${UNSET:-d}", "d"),
        ("${UNSET:-}", ""),
        ("${HOST:-d}", "db"),
        ("${UNSET:-a:-b/c?d=e}", "a:-b/c?d=e"),
        ("${ODD}", "a: b #'\"${HOST}"),
        ("$HOST", "$HOST"),
        ("pa$$word$", "pa$$word$"),
        ("$${HOST}", "${HOST}"),
        ("$${HOST}${HOST}", "${HOST}db"),
        ("{HOST}", "{HOST}"),
    ],
)
def test_interpolation(text: str, expected: str) -> None:
    root = Block("", 1)
    root["a"] = text
    problems: list[tuple[int, str, str]] = []
    interpolate(root, ENV, lambda *problem: problems.append(problem))
    assert problems == []
    assert root["a"] == expected


def test_interpolation_is_for_text_anywhere_except_under_code() -> None:
    root = read("a: [x, '${HOST}', {b: '${PORT}'}]\ncode: '${HOST}'\nf: {code: 'x ${NOPE}', n: 5}\n'${HOST}': 1\n")
    interpolate(root, ENV, lambda *problem: pytest.fail(str(problem)))
    assert plain(root) == {
        "a": ["x", "db", {"b": "5432"}],
        "code": "${HOST}",
        "f": {"code": "x ${NOPE}", "n": 5},
        "${HOST}": 1,
    }


NEITHER = "holds a ${ that is neither ${VAR} nor ${VAR:-default}; write $${ for a literal ${"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("${NOPE}", "the environment variable NOPE is not set; set it, or write ${NOPE:-default}"),
        ("${HOST", NEITHER),
        ("${1A}", NEITHER),
        ("${}", NEITHER),
        ("${HOST:=x}", NEITHER),
        ("${HOST-x}", NEITHER),
        ("${A:-${HOST}}", "the default of ${A} may not hold another variable"),
    ],
)
def test_interpolation_that_cannot_be_done(text: str, what: str) -> None:
    root = read(f"a:\n- b: '{text}'\n- ['{text}']\n")
    problems: list[tuple[int, str, str]] = []
    interpolate(root, ENV, lambda *problem: problems.append(problem))
    assert problems == [(2, "a[0].b", what), (3, "a[1][0]", what)]
