"""Is it Python with the function that is wanted, or SQL that can be asked? Found without running any of it.

Python is parsed and compiled here, never executed: that happens in the worker alone. What a problem says may hold lines
of the code, which is never interpolated and so holds no secret of the environment.
"""

from __future__ import annotations

import ast
import re
import warnings

from spillway.config.elixir import PARAMETERS, in_python, is_elixir
from spillway.config.section import nearest

MAX_CODE_BYTES = 256 << 10
ENTRY = {"transform": "transform", "filter": "filter", "routing": "route"}  # by type: the function that is called

_CHANGES = PARAMETERS.index("changes")
_DOLLAR = re.compile(r"\$([0-9]+)")


def python_problem(code: str, kind: str) -> str | None:
    """What is wrong with the code of a function of this type."""
    name = ENTRY[kind]
    if len(code.encode()) > MAX_CODE_BYTES:
        return f"is longer than {MAX_CODE_BYTES >> 10} kB; put it into a package and name it with module"
    tree, problem = _parsed(code)
    if tree is None:
        if is_elixir(code):
            return (
                "is Elixir, as Sequin has it; here functions are Python (docs/functions.md#from-sequin):\n"
                + in_python(code, name)
            )
        return problem
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    wanted = [node for node in found if node.name == name]
    signature = f"def {name}({', '.join(PARAMETERS)})"
    if not wanted:
        near = nearest(name, [node.name for node in found])
        return f"must define {signature}" + (near.replace("did you mean", "is that") if near else "")
    if isinstance(wanted[-1], ast.AsyncFunctionDef):
        return f"must define {signature}: not async def"
    if not _takes_four(wanted[-1].args):
        return f"line {wanted[-1].lineno}: must be {signature}, with these four parameters"
    return None


def names_changes(code: str) -> bool:
    """Whether a filter, which is right, looks at its third parameter anywhere."""
    entries = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == "filter"]
    arguments = entries[-1].args
    positional = [*arguments.posonlyargs, *arguments.args]
    if len(positional) <= _CHANGES:
        return False  # it takes them with others, as *args
    name = positional[_CHANGES].arg
    return any(isinstance(node, ast.Name) and node.id == name for part in entries[-1].body for node in ast.walk(part))


def sql_problem(code: str, arrays: int | None = None) -> str | None:
    """``arrays``: how many there are to be had as ``$1..$n``, where that is known."""
    numbers = {int(number) for number in _DOLLAR.findall(code)}
    if 1 not in numbers:
        return "must contain $1, the array of the keys: ... WHERE id = ANY($1)"
    if arrays is not None and max(numbers) > arrays:
        return f"has ${max(numbers)}, but there {'is 1 column' if arrays == 1 else f'are {arrays} columns'}"
    return None


def _parsed(code: str) -> tuple[ast.Module | None, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of style, such as an escape that is none
            tree = ast.parse(code)
            compile(code, "function", "exec", dont_inherit=True)  # finds a `return` outside of a function
    except SyntaxError as error:
        text = (error.text or "").strip()
        return None, f"line {error.lineno or 1}: {error.msg}" + (f": {text}" if text and text.isprintable() else "")
    except ValueError:
        return None, "holds a zero byte"
    except (RecursionError, MemoryError):
        return None, "is nested too deeply"
    return tree, ""


def _takes_four(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    keywords = any(default is None for default in arguments.kw_defaults)
    enough = positional == len(PARAMETERS) or (arguments.vararg is not None and positional < len(PARAMETERS))
    return enough and not keywords
