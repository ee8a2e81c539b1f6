"""`functions`: what is a function, what is wrong with it, and Sequin's ways to write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spillway.config import Config, ConfigErrors, FieldOperation, load

BEGIN = """\
databases:
- {name: app, url: 'postgresql://u:p@h/d', slot: {name: s}, publication: {name: p}}
http_endpoints: [{name: hook, url: 'http://h'}]
memory: {limit_mb: 512}
"""
TRANSFORM = "def transform(action, record, changes, metadata): return record"
FILTER = "def filter(action, record, changes, metadata): return True"
HEAD = "def {}(action, record, changes, metadata) do\n  "
ROUTE = "def route(action, record, changes, metadata): return {}"


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "spillway.yml"
    file.write_text(BEGIN + text)
    return load(file, {})


def errors(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, text)
    prefix = f"{tmp_path}/spillway.yml:"
    return [str(problem).removeprefix(prefix).partition(": ")[2] for problem in caught.value.problems]


def one(tmp_path: Path, body: str) -> str:
    """What is wrong with the only function, by key."""
    (error,) = errors(tmp_path, f"functions:\n- name: f\n  {body}\n")
    return error.removeprefix("functions[0].")


def test_every_type(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(TRANSFORM)
    config = read(
        tmp_path,
        f"""\
function_limits: {{timeout_ms: 200, memory_mb: 128}}
functions:
- {{name: code, description: what it is for, type: transform, code: '{TRANSFORM}'}}
- {{name: file, type: transform, file: t.py}}
- {{name: module, type: filter, module: 'shop.rules:wanted'}}
- {{name: route, type: routing, sink_type: http_push, code: '{ROUTE}'}}
- {{name: row, type: path, path: record}}
- {{name: sql, type: enrichment, code: 'SELECT id FROM t WHERE id = ANY($1)'}}
- name: fields
  type: fields
  fields:
  - select: [a, b, c]
  - rename: {{a: x}}
  - drop: c
  - mask: [b]
  - hash: [x]
  - flatten: [b]
  - set: {{source: shop, tags: [1, two]}}
""",
    )
    assert (config.function_limits.timeout_ms, config.function_limits.memory_mb) == (200, 128)
    assert config.function("code").code == config.function("file").code == TRANSFORM
    assert config.function("file").file == tmp_path / "t.py"
    assert config.function("module").module == "shop.rules:wanted"
    assert config.function("route").sink_type == "webhook"
    assert config.function("row").path == "record"
    assert config.function("fields").fields == (
        FieldOperation("select", columns=("a", "b", "c")),
        FieldOperation("rename", names={"a": "x"}),
        FieldOperation("drop", columns=("c",)),
        FieldOperation("mask", columns=("b",)),
        FieldOperation("hash", columns=("x",)),
        FieldOperation("flatten", columns=("b",)),
        FieldOperation("set", values={"source": "shop", "tags": [1, "two"]}),
    )
    limits = read(tmp_path, "").function_limits
    assert (limits.timeout_ms, limits.memory_mb) == (1000, None)


@pytest.mark.parametrize(
    "text",
    [
        "transforms:\n- {name: f, type: path, path: record.a}",
        "functions:\n- {name: f, function: {type: path, path: record.a}}",
        "functions:\n- {name: f, transform: {type: path, path: record.a}}",
        "functions:\n- {name: f, type: path, transform: {path: record.a}}",
    ],
)
def test_old_spellings(tmp_path: Path, text: str) -> None:
    function = read(tmp_path, text).function("f")
    assert (function.type, function.path) == ("path", "record.a")


def test_the_old_name_of_a_transform(tmp_path: Path) -> None:
    assert (
        read(tmp_path, f"functions:\n- {{name: f, type: function, code: '{TRANSFORM}'}}").functions[0].type
        == "transform"
    )


def test_both_names_of_the_list(tmp_path: Path) -> None:
    text = "functions: []\ntransforms:\n- {name: f, type: path, path: record}"
    assert errors(tmp_path, text) == ["transforms: is an old spelling of functions; give one of the two"]


def test_code_is_not_interpolated(tmp_path: Path) -> None:
    code = TRANSFORM + " or '${NOT_THERE} $1'"
    assert read(tmp_path, f'functions:\n- {{name: f, type: transform, code: "{code}"}}').functions[0].code == code


@pytest.mark.parametrize("name", ["none", "nil", "'Null'", "'null'"])
def test_names_that_mean_no_function(tmp_path: Path, name: str) -> None:
    expected = "functions[0].name: may not be none, null or nil: they mean that there is no function"
    assert errors(tmp_path, f"functions:\n- {{name: {name}, type: path, path: record}}") == [expected]


def test_names_given_twice(tmp_path: Path) -> None:
    text = "functions:\n- {name: f, type: path, path: record}\n- {name: f, type: path, path: action}"
    assert errors(tmp_path, text) == ["functions[1].name: is the name of another one too, see line 6"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            f"type: javascript\n  code: '{TRANSFORM}'",
            "type: must be path, transform, filter, routing, enrichment or fields",
        ),
        ("type: path", "path: is required"),
        ("type: path\n  path: body.a", "path: must be a path such as record, record.address.city, changes, action or "),
        ("type: path\n  path: record.a[0]", "path: must be a path such as record"),
        ("type: path\n  path: record\n  code: x", "code: has no meaning with type: path, which has path"),
        ("type: transform", "code: is required, or file or module"),
        (f"type: transform\n  code: '{TRANSFORM}'\n  module: a:b", "module: give either code or module"),
        (f"type: transform\n  code: '{TRANSFORM}'\n  file: x.py", "code: give either code or file"),
        ("type: transform\n  file: x.py", "file: cannot be read: No such file or directory"),
        ("type: transform\n  file: 5", "file: must be the path of a file"),
        ("type: transform\n  module: shop", "module: must be PACKAGE.MODULE:FUNCTION"),
        ("type: enrichment\n  module: a:b", "module: has no meaning with type: enrichment, which has code or file"),
        ("type: enrichment\n  code: SELECT 1", "code: must contain $1, the array of the keys: ... WHERE id = ANY($1)"),
        ("type: enrichment\n  code: SELECT $10", "code: must contain $1"),
        (f"type: filter\n  sink_type: webhook\n  code: '{FILTER}'", "sink_type: is for functions of type: routing"),
        (
            f"type: routing\n  sink_type: kafak\n  code: '{ROUTE}'",
            "sink_type: is no type of a sink; did you mean kafka?",
        ),
        (f"type: filter\n  code: '{FILTER}'\n  sink: x", "sink: unknown key"),
        ("type: fields", "fields: is required"),
        (
            "type: fields\n  fields: {drop: a}",
            "fields: must be a list of select, rename, drop, mask, hash, flatten, set",
        ),
        ("type: fields\n  fields: []", "fields: may not be empty"),
        ("type: fields\n  fields: [drop]", "fields[0]: must be one of select, rename"),
        ("type: fields\n  fields: [{drop: a, mask: b}]", "fields[0]: must be one of select, rename"),
        ("type: fields\n  fields: [{drop: a}, {hsah: b}]", "fields[1].hsah: unknown operation; did you mean hash?"),
        ("type: fields\n  fields: [{drop: []}]", "fields[0].drop: must be a column or a list of columns"),
        ("type: fields\n  fields: [{drop: [a, a]}]", "fields[0].drop: names a column twice"),
        ("type: fields\n  fields: [{rename: a}]", "fields[0].rename: must be a mapping of old names to new ones"),
        ("type: fields\n  fields: [{rename: {a: 1}}]", "fields[0].rename: must be a mapping of old names to new ones"),
        ("type: fields\n  fields: [{rename: {a: x, b: x}}]", "fields[0].rename: gives two columns the same name"),
        ("type: fields\n  fields: [{set: a}]", "fields[0].set: must be a mapping of columns to their values"),
    ],
)
def test_what_is_wrong_with_a_function(tmp_path: Path, body: str, expected: str) -> None:
    assert one(tmp_path, body).startswith(expected)


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        (
            "transform",
            "def transform(action, record, changes, metadata):\n  return record[",
            "line 2: '[' was never closed",
        ),
        ("transform", "return record", "line 1: 'return' outside function"),
        ("transform", "x = 1", "must define def transform(action, record, changes, metadata)"),
        (
            "routing",
            "def router(a, b, c, d): return {}",
            "must define def route(action, record, changes, metadata); is that",
        ),
        (
            "filter",
            "async def filter(a, b, c, d): return True",
            "must define def filter(action, record, changes, metadata): ",
        ),
        (
            "filter",
            "\ndef filter(record): return True",
            "line 2: must be def filter(action, record, changes, metadata), with",
        ),
        ("filter", "def filter(a, b, c, d, e): return True", "line 1: must be def filter"),
        ("filter", "def filter(a, b, c, d, *, e): return True", "line 1: must be def filter"),
        ("filter", "def filter(a, b, c): return True", "line 1: must be def filter"),
        ("transform", "(" * 5000 + ")" * 5000, "line 1: too many nested parentheses"),
        ("transform", "x = " + "-" * 100_000 + "1", "is nested too deeply"),
        ("transform", "#" * 300_000, "is longer than 256 kB"),
    ],
)
def test_python_is_compiled(tmp_path: Path, kind: str, code: str, expected: str) -> None:
    (tmp_path / "f.py").write_text(code)
    assert one(tmp_path, f"type: {kind}\n  file: f.py").removeprefix("file: ").startswith(expected)


@pytest.mark.parametrize(
    "code",
    [
        "def filter(a, b, c, d): return True",
        "def filter(a, b, c, d=1): return True",
        "def filter(*all): return True",
        "def filter(a, /, b, c, d, **more): return True",
        "import re\nX = re.compile('\\d')\ndef helper(): ...\ndef filter(a, b, c, d): return '\\d' == a",
    ],
)
def test_signatures_that_take_four(tmp_path: Path, code: str) -> None:
    (tmp_path / "f.py").write_text(code)
    assert read(tmp_path, "functions:\n- {name: f, type: filter, file: f.py}").functions[0].code == code


def test_python_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n{FILTER}")
    read(tmp_path, "functions:\n- {name: f, type: filter, file: f.py}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("kind", "elixir", "python"),
    [
        (
            "transform",
            HEAD.format("transform") + '%{id: record["id"], "t" => metadata.table_name}\nend',
            'return {"id": record["id"], "t": metadata["table_name"]}',
        ),
        (
            "filter",
            "def filter(action, record, _changes, _metadata) do\n"
            '  # ours\n  record["a"] == "x" and action != "delete"\nend',
            'return record["a"] == "x" and action != "delete"',
        ),
        (
            "routing",
            HEAD.format("route") + '%{ endpoint_path: "/#{metadata.table_name}", method: "POST" }\nend',
            'return {"endpoint_path": f"/{metadata[\'table_name\']}", "method": "POST"}',
        ),
        (
            "filter",
            'def filter(action, record, changes, metadata), do: record["a"] in [1, nil]',
            'return record["a"] in [1, None]',
        ),
        ("filter", 'def filter(action, record, changes, metadata) do\n  record["a"] || true\nend', "..."),
        ("filter", "def filter(action, record, changes, metadata) do\n  x = 1\n  x == 1\nend", "..."),
        ("filter", 'def filter(action, record, changes, metadata) do\n  "#{record["a"]}" == "b"\nend', "..."),
        ("transform", "def transform(action, record, changes, metadata) do\n  Map.drop(record, [1])\nend", "..."),
    ],
)
def test_elixir_is_refused_with_the_python_that_stands_for_it(
    tmp_path: Path, kind: str, elixir: str, python: str
) -> None:
    (tmp_path / "f.ex").write_text(elixir)
    name = {"routing": "route"}.get(kind, kind)
    assert one(tmp_path, f"type: {kind}\n  file: f.ex") == (
        "file: is Elixir, as Sequin has it; here functions are Python (docs/functions.md#from-sequin):\n"
        f"def {name}(action, record, changes, metadata):\n    {python}"
    )
