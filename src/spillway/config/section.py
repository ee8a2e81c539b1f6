"""What every part of the file has in common: which keys it knows, and what becomes of the others.

A section's keys are the fields (or their aliases) of its model. Of the others it says itself, declaratively:

- ``inert``: Sequin's keys that mean nothing here (or meant nothing there). They load, with a warning that says why.
- ``not_yet``: keys of parts that do not exist in this version, and the values by which a file says that it does not
  use them. Anything else is refused by the key's name.
- old spellings are rewritten by ``rename`` before anything is looked at.

Everything else is an unknown key: an error with the nearest name. A key that is null is as if it were not there.

The rewriting is done in the file's own tree, so that whatever is found wrong later is still found at its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from spillway.config.document import Block
from spillway.errors import ConfigError


@dataclass
class Reading:
    """One reading of one file: where it lies, and what has been found so far."""

    file: str
    base_dir: Path
    problems: list[ConfigError] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def problem(self, line: int, key: str, what: str) -> None:
        """One problem a place: what comes of a value that is known to be wrong is not worth telling."""
        if all((line, key) != (known.line, known.key) for known in self.problems):
            self.problems.append(ConfigError(self.file, line, key, what))

    def warn(self, line: int, key: str, what: str) -> None:
        self.warnings.append((line, f"{self.file}:{line}: {key}: {what}"))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    inert: ClassVar[Mapping[str, str]] = {}
    not_yet: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @classmethod
    def rename(cls, block: Block, reading: Reading) -> None:
        """Rewrite old spellings, in place."""

    @classmethod
    def known_keys(cls) -> list[str]:
        return [info.alias or name for name, info in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _sort_keys(cls, data: Any, info: ValidationInfo) -> Any:  # pydantic's own signature
        if not isinstance(data, Block) or not isinstance(info.context, Reading):
            return data
        reading = info.context
        cls.rename(data, reading)
        for key in list(data):
            if key in cls.known_keys():
                if data[key] is None:
                    del data[key]
                continue
            line, path, value = data.line_of(key), data.key_path(key), data.pop(key)
            if key in cls.inert:
                reading.warn(line, path, cls.inert[key])
            elif key in cls.not_yet:
                if value is not None and value not in cls.not_yet[key]:
                    reading.problem(line, path, f"'{key}' is not there yet in this version; leave it out")
            else:
                reading.problem(line, path, "unknown key" + nearest(key, [*cls.known_keys(), *cls.not_yet]))
        return data


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean NAME?``, or nothing where none is near."""
    candidates = [name for name in known if name.isprintable()]
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
    if not near:
        lower = {candidate.lower(): candidate for candidate in candidates}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)]
    return f"; did you mean {near[0]}?" if near else ""
