"""The decoders that the tests hold for: the readable reference, and what must give the same bytes."""

from __future__ import annotations

from spillway.pgoutput.decoder import Decoder

TWINS: tuple[type[Decoder], ...] = (Decoder,)
