"""The engine: builds and wires concrete objects (`Engine`), and goes on after a finding of identity (`adopt`)."""

from spillway.engine.adopt import adopt, identity_findings
from spillway.engine.engine import Engine
from spillway.engine.reload import Reloaded, reload

__all__ = ["Engine", "Reloaded", "adopt", "identity_findings", "reload"]
