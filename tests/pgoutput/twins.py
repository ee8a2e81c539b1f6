"""The decoders that the tests hold for: the readable reference, and what must give the same bytes."""

from __future__ import annotations

from spillway import impl
from spillway.pgoutput.decoder import Decoder

TWINS: tuple[type[Decoder], ...] = (Decoder,) if impl.native is None else (Decoder, impl.native.Decoder)
