"""The engine: builds and wires concrete objects (`Engine`), and goes on after a finding of identity (`adopt`)."""

from spillway.engine.adopt import adopt, identity_findings
from spillway.engine.engine import Engine

__all__ = ["Engine", "adopt", "identity_findings"]
