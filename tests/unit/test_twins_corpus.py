"""What the fuzzer has found interesting once, both decoders still agree on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.inputs import run

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_the_corpus(path: Path) -> None:
    run(path.read_bytes())
