"""Every error a user can meet: one class, a code, and a remedy in the text.

``SpillwayError`` is raised for what the user can mend (a missing grant, a foreign slot, a full disk). ``code`` is
stable and greppable, ``remedy`` says what to do, with the exact SQL or command where there is one. Anything else that
escapes is a defect of ours.

A ``Finding`` is the same thing found before it hurts: ``spillway check`` lists findings, and the engine raises one as
a ``SpillwayError`` when the server refuses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong outside of the configuration file, with the SQL or command that mends it."""

    code: str
    what: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
    database: str | None = None
    sink: str | None = None

    def as_json(self) -> dict[str, str | None]:
        return asdict(self)


class SpillwayError(Exception):
    """Something the user can mend. ``str(error)`` is one line: what is wrong, then the remedy."""

    def __init__(self, code: str, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.code = code
        self.what = what
        self.remedy = remedy

    @classmethod
    def of(cls, finding: Finding) -> SpillwayError:
        return cls(finding.code, finding.what, finding.remedy)


class ConfigError(SpillwayError):
    """The configuration file is wrong: ``FILE:LINE: KEY: what is wrong; did you mean NAME?`` Exit status 2."""

    def __init__(self, file: str, line: int, key: str, what: str) -> None:
        super().__init__("config", f"{file}:{line}: {key}: {what}")
        self.file, self.line, self.key = file, line, key


class SourceUnavailable(SpillwayError):
    """The source database cannot be reached or dropped the connection: retried with back-off, never fatal."""


class StoreFailed(SpillwayError):
    """The state file could not be written or fsynced. The process ends: what was not confirmed is read again."""


def first_of(group: BaseExceptionGroup[SpillwayError]) -> SpillwayError:
    """What a task group is said to have failed of: one error of several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SpillwayError)
    return error
