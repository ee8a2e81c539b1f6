"""`${VAR}` and `${VAR:-default}`, after the YAML is parsed and on text only, so that no variable can break the file.

- The result is always text; whoever wants a number reads it from the text (`port: ${PGPORT:-5432}`).
- `:-` gives the default when the variable is unset or empty. A variable that is unset and has no default is an error.
- What a variable holds is taken as it is: a `${` in it means nothing.
- Never under a key `code` (functions are full of `$`); `$${` is a literal `${`; a `$` before anything else is a dollar.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from spillway.config.document import Block, Items

_REFERENCE = re.compile(r"(?P<escape>\$)?\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_START = re.compile(r"(?<!\$)\$\{")

Report = Callable[[int, str, str], None]  # line, key, what


def interpolate(block: Block, env: Mapping[str, str], report: Report) -> None:
    """Replace what is to be replaced in the block and below it, in place."""
    for key, value in block.items():
        if key == "code":
            continue
        if isinstance(value, str):
            block[key] = _text(value, env, block.line_of(key), block.key_path(key), report)
        else:
            _below(value, env, report)


def _below(value: object, env: Mapping[str, str], report: Report) -> None:
    if isinstance(value, Block):
        interpolate(value, env, report)
    elif isinstance(value, Items):
        for index, item in enumerate(value):
            if isinstance(item, str):
                value[index] = _text(item, env, value.lines[index], f"{value.path}[{index}]", report)
            else:
                _below(item, env, report)


def _text(text: str, env: Mapping[str, str], line: int, key: str, report: Report) -> str:
    if "${" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        if match["escape"]:
            return match[0][1:]
        name, default = match["name"], match["default"]
        value = env.get(name)
        if default is not None and "${" in default:
            report(line, key, f"the default of ${{{name}}} may not hold another variable")
        elif value is None and default is None:
            report(line, key, f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return value or default or ""

    if _START.search(_REFERENCE.sub("", text)):
        report(line, key, "holds a ${ that is neither ${VAR} nor ${VAR:-default}; write $${ for a literal ${")
        return text
    return _REFERENCE.sub(replace, text)
