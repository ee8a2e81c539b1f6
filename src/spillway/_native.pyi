"""What the compiled module offers; the reference of each is in spillway.pgoutput.decoder and spillway.columns."""

from collections.abc import Callable, Sequence

from spillway.chunk import Chunk
from spillway.pgoutput.decoder import Decoder as _Reference

class Decoder(_Reference): ...

def gather(chunk: Chunk, indices: Sequence[int], hash_word: int) -> Chunk: ...
def join(chunk: Chunk, indices: Sequence[int], before: bytes, after: bytes) -> bytes: ...
def by_kind(chunk: Chunk) -> dict[tuple[int, int], list[int]]: ...
def bulk(
    chunk: Chunk,
    indices: Sequence[int],
    epoch: int,
    suffix: bytes | None,
    document_id: Callable[[tuple[str, ...]], str],
) -> bytes: ...
def calls_libpq() -> bool: ...
