"""`message`: how a transform says where a message goes. Inline code knows it without an import; modules write
``from spillway.functions.message import message``."""

from __future__ import annotations

from collections.abc import Mapping


class RoutedMessage:
    __slots__ = ("body", "route")

    def __init__(self, body: object, route: Mapping[str, object]) -> None:
        self.body = body
        self.route = route

    def __repr__(self) -> str:
        return f"message({self.body!r}, **{dict(self.route)!r})"


def message(body: object, **routing: object) -> RoutedMessage:
    """A message to send, with the routing keys of the sink's type; they stand above what the routing function says."""
    return RoutedMessage(body, routing)
