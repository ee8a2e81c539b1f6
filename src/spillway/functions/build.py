"""`build`: the functions of a sink from what its configuration says. Without Python they run in this process, with it
all of them in a worker process of the sink."""

from __future__ import annotations

from spillway.errors import SpillwayError
from spillway.functions.base import Functions
from spillway.functions.inprocess import BuiltInFunctions
from spillway.functions.isolated import IsolatedFunctions
from spillway.functions.spec import FunctionSpec, PathExpression
from spillway.functions.steps import PATH, PATH_CHARACTERS


def build(spec: FunctionSpec) -> Functions:
    """Nothing is started. Raises `SpillwayError` for a path that is none."""
    if isinstance(spec.transform, PathExpression):
        path = spec.transform.path
        if len(path) > PATH_CHARACTERS or not PATH.fullmatch(path):
            raise SpillwayError(
                "function_path",
                f"{path[:100]!r} is no path",
                "write record, record.address.city, changes, action or metadata.table_name",
            )
    return IsolatedFunctions(spec) if spec.python else BuiltInFunctions(spec)
