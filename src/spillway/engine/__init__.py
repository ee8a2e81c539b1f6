"""The engine: builds and wires concrete objects (`Engine`), and goes on after a finding of identity (`adopt`)."""

from spillway.engine.adopt import adopt, missing_state
from spillway.engine.engine import Engine

__all__ = ["Engine", "adopt", "missing_state"]
