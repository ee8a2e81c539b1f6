"""Reading the file: text -> values with lines -> interpolation -> validated, frozen `Config`, or every problem at once.

`load` reports all that it finds, each problem as ``FILE:LINE: KEY: what is wrong; did you mean NAME?``, in the order of
the file. Values never appear in it, only keys, and names that the file itself gives to its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from spillway.config.database import Database
from spillway.config.destination import NOT_YET, TYPES, File, Sqlite
from spillway.config.document import Block, DocumentError, Items, read
from spillway.config.endpoint import HttpEndpoint
from spillway.config.functions import Function, FunctionLimits
from spillway.config.interpolate import interpolate
from spillway.config.memory import MB
from spillway.config.process import Memory, Server, State
from spillway.config.references import references, sections
from spillway.config.section import Reading, Section, nearest
from spillway.config.sink import MAX_MESSAGE_BYTES, Sink
from spillway.config.values import Wrong
from spillway.config.wording import wording
from spillway.errors import ConfigError


class ConfigErrors(ConfigError):
    """All that is wrong with a file. As a `ConfigError` it is the first of them; its text has a line for each."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(first.file, first.line, first.key, "")
        self.problems = tuple(problems)
        self.args = ("\n".join(map(str, problems)),)
        self.what = str(self)


@dataclass(frozen=True)
class Config:
    """What a file says, complete: everything it leaves out has its default."""

    file: Path
    memory: Memory
    state: State
    server: Server
    databases: tuple[Database, ...]
    sinks: tuple[Sink, ...]
    http_endpoints: tuple[HttpEndpoint, ...]
    functions: tuple[Function, ...]
    function_limits: FunctionLimits
    warnings: tuple[str, ...]  # one line each: FILE:LINE: KEY: what

    @property
    def base_dir(self) -> Path:
        """Relative paths start here."""
        return self.file.parent.absolute()

    @property
    def state_path(self) -> Path:
        return self.state.path(self.base_dir)

    def database(self, name: str) -> Database:
        return next(database for database in self.databases if database.name == name)

    def sink(self, name: str) -> Sink:
        return next(sink for sink in self.sinks if sink.name == name)

    def http_endpoint(self, name: str) -> HttpEndpoint:
        return next(endpoint for endpoint in self.http_endpoints if endpoint.name == name)

    def function(self, name: str) -> Function:
        return next(function for function in self.functions if function.name == name)


class _Whole(Section):
    """The file's top level."""

    inert: ClassVar = {
        "account": "has no effect: there are no accounts here",
        "users": "has no effect: there are no users here",
        "api_tokens": "has no effect here; see server.token",
    }
    not_yet: ClassVar = {"change_retentions": ([],)}

    memory: Memory = Field(default_factory=Memory)
    state: State = Field(default_factory=State)
    server: Server = Field(default_factory=Server)
    databases: tuple[Database, ...] = Field(min_length=1)
    http_endpoints: tuple[HttpEndpoint, ...] = ()
    functions: tuple[Function, ...] = ()
    function_limits: FunctionLimits = Field(default_factory=FunctionLimits)
    sinks: tuple[Sink, ...] = ()

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:  # noqa: ARG003 - the hook's signature
        """Take out what is only there to hold anchors; a near miss of a real key is a mistake all the same."""
        known = [*cls.known_keys(), *cls.inert, *cls.not_yet]
        for key in [key for key in block if key not in known]:
            if key.startswith("x-") or (key in block.anchored and not nearest(key, known, cutoff=0.8)):
                del block[key]

    @field_validator("sinks", mode="before")
    @classmethod
    def _largest_message(cls, sinks: object, info: ValidationInfo) -> object:
        """A message has at most an eighth of the memory, unless the file says otherwise."""
        memory = info.data.get("memory")
        if isinstance(sinks, list) and memory is not None:
            for sink in sinks:
                if isinstance(sink, Block) and sink.get("max_message_bytes") is None:
                    sink["max_message_bytes"] = min(MAX_MESSAGE_BYTES, memory.limit_bytes // 8)
        return sinks

    @field_validator("sinks")
    @classmethod
    def _messages_fit(cls, sinks: tuple[Sink, ...], info: ValidationInfo) -> tuple[Sink, ...]:
        memory = info.data.get("memory")
        for index, sink in enumerate(sinks):
            if memory is not None and sink.max_message_bytes > memory.limit_bytes // 8:
                most = memory.limit_bytes // 8 // MB
                raise Wrong(f"{index}.max_message_bytes", f"must be at most an eighth of memory.limit_mb: {most}MB")
        return sinks

    @field_validator("sinks")
    @classmethod
    def _each_its_own(cls, sinks: tuple[Sink, ...]) -> tuple[Sink, ...]:
        """Two sinks in one file would tear its lines, two in one table would undo each other's rows."""
        written: dict[tuple[object, ...], str] = {}
        for index, sink in enumerate(sinks):
            destination = sink.destination
            if isinstance(destination, File):
                place: tuple[object, ...] = (destination.path,)
            elif isinstance(destination, Sqlite):
                place = (destination.path, destination.table or sink.source)
            else:
                continue
            if place in written:
                raise Wrong(f"{index}.destination.path", f"is written by the sink {written[place]} already")
            written[place] = sink.name
        return sinks


def load(path: Path, env: Mapping[str, str]) -> Config:
    """Read and validate a configuration file. Raises ConfigErrors, a ConfigError, with everything that is wrong."""
    reading = Reading(str(path), path.parent.absolute())
    root = _read(path, reading)
    _functions_of_old(root, reading)
    known = _Whole.known_keys()
    used = Block("", root.line)
    used.update({key: value for key, value in root.items() if key in known})
    used.lines = root.lines
    interpolate(used, env, reading.problem)
    root.update(used)
    _unique_names(root, reading)
    try:
        whole = _Whole.model_validate(root, context=reading)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _translate(details, root, reading)
    references(root, reading)
    if reading.problems:
        raise ConfigErrors(sorted(reading.problems, key=lambda problem: problem.line))
    warnings = tuple(text for _, text in sorted(reading.warnings, key=lambda warning: warning[0]))
    return Config(
        path,
        whole.memory,
        whole.state,
        whole.server,
        whole.databases,
        whole.sinks,
        whole.http_endpoints,
        whole.functions,
        whole.function_limits,
        warnings,
    )


def _read(path: Path, reading: Reading) -> Block:
    try:
        return read(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigErrors([ConfigError(reading.file, 1, "file", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigErrors([ConfigError(reading.file, line, "file", "is not UTF-8")]) from None
    except DocumentError as error:
        raise ConfigErrors([ConfigError(reading.file, error.line, error.key, error.what)]) from None


def _unique_names(root: Block, reading: Reading) -> None:
    for key in ("databases", "http_endpoints", "sinks", "functions"):
        seen: dict[object, int] = {}
        for section in sections(root, key):
            name = section.get("name")
            if not isinstance(name, str):
                continue
            line = section.line_of("name")
            if name in seen:
                reading.problem(
                    line, section.key_path("name"), f"is the name of another one too, see line {seen[name]}"
                )
            seen.setdefault(name, line)


def _functions_of_old(root: Block, reading: Reading) -> None:
    """``transforms:`` -> ``functions:``."""
    if root.get("transforms") is None:
        root.pop("transforms", None)
    elif root.get("functions") is not None:
        what = "is an old spelling of functions; give one of the two"
        reading.problem(root.line_of("transforms"), "transforms", what)
        del root["transforms"]
    else:
        root["functions"], root.lines["functions"] = root.pop("transforms"), root.line_of("transforms")


def _translate(details: ErrorDetails, root: Block, reading: Reading) -> None:
    """One error of pydantic's in our words, at its place."""
    if details["type"] == "default_factory_not_called":
        return  # the destination is wrong, which is told already
    if details["type"] == "too_short" and details["input"]:
        return  # its items are wrong, which is told already
    location = list(details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, Wrong):
        location += [int(part) if part.isdigit() else part for part in cause.key.split(".")]
    elif details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        location.append("type")
    line, key = _place(location, root)
    tag = details.get("ctx", {}).get("tag")
    reading.problem(line, key, _unknown_type(str(tag)) if details["type"] == "union_tag_invalid" else wording(details))


def _place(location: Sequence[int | str], root: Block) -> tuple[int, str]:
    """The line and the key of what pydantic speaks of, as far as the file has it."""
    here: object = root
    line, key = root.line, ""
    for part in location:
        if isinstance(here, Block) and isinstance(part, str):
            if key.endswith("destination") and part == here.get("type"):
                continue  # pydantic names the member of a union by its tag
            line, key, here = here.line_of(part), here.key_path(part), here.get(part)
        elif isinstance(here, Items) and isinstance(part, int):
            line, key, here = here.lines[part], f"{here.path}[{part}]", here[part]
        else:
            break
    return line, key or "file"


def _unknown_type(tag: str) -> str:
    if tag in NOT_YET:
        return f"'{tag}' is not there yet in this version"
    return "unknown type" + (nearest(tag, [*TYPES, *NOT_YET]) or f"; there are {', '.join(TYPES)}")
