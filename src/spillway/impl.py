"""Which twin runs: the compiled module, or the readable Python that it was made after. The one place that decides.

``SPILLWAY_IMPL=python`` or ``native`` forces one. Without it the compiled one runs where it can be loaded, and `WHY`
says why it could not, to be told once. Both give the same bytes; one suite of tests holds for both.
"""

from __future__ import annotations

import os
from types import ModuleType

from spillway import columns
from spillway import members as slices
from spillway.errors import SpillwayError


def _load(wanted: str | None) -> tuple[ModuleType | None, str]:
    if wanted not in (None, "", "python", "native"):
        raise SpillwayError("impl", f"SPILLWAY_IMPL is {wanted!r}", "set it to python or native, or not at all")
    if wanted == "python":
        return None, ""
    try:
        from spillway import _native  # noqa: PLC0415 - it may not be there

    except ImportError as error:
        if wanted == "native":
            raise SpillwayError(
                "impl",
                f"the compiled part cannot be loaded: {error}",
                "install a wheel of spillway-cdc, or build it with a C compiler: pip install spillway-cdc",
            ) from error
        return None, str(error)
    return _native, ""


native, WHY = _load(os.environ.get("SPILLWAY_IMPL"))
NAME = "python" if native is None else "native"

gather = columns.gather if native is None else native.gather
join = columns.join if native is None else native.join
by_kind = columns.by_kind if native is None else native.by_kind
bulk = columns.bulk if native is None else native.bulk

members = slices.members if native is None else native.members
end_of_value = slices.end_of_value if native is None else native.end_of_value
joined = slices.joined if native is None else native.joined
