"""Feeds anything to both decoders: no crash, no read beyond a frame, the same results or the same error.

    pip install atheris
    PYTHONPATH=tests python tests/fuzz/fuzz_decoder.py tests/fuzz/corpus -max_len=4096 -max_total_time=600

atheris (libFuzzer) follows the coverage of the reference; the compiled twin has to agree with it. Frames lie at the
end of readable memory (`fuzz.guarded`). Writes out of bounds are found by a build with a sanitizer::

    CFLAGS='-fsanitize=address -g' python setup.py build_ext --inplace --force
    export LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc
    pytest tests/unit/test_twins_corpus.py tests/unit/test_twins_decoder.py

What is found goes into the corpus, which every test run replays (tests/unit/test_twins_corpus.py).
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["spillway.pgoutput", "fuzz.inputs"]):
    from fuzz.inputs import run


def one_input(data: bytes) -> None:
    run(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
