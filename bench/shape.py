"""Shaping: filters, functions, enrichment, related tables and compaction, on real servers.

    python bench/shape.py                              all parts at full size
    python bench/shape.py story --scale 0.1 --limit-mb 64 --out /tmp/look

=========  ============================================================================================================
story      the story with documents of twelve tables (`shaping.story`)
refresh    one change that concerns 100,000 documents (`shaping.refresh`)
random     random changes in all twelve tables, and every document against a fresh build (`shaping.changes`)
poison     what a Python transform costs, and what poison in it costs (`shaping.poison`)
outage     1,000,000 updates over 10,000 keys while the index is away, under compact (`shaping.outage`)
=========  ============================================================================================================

Each part writes ``results/shape/PART.{json,md}``; ``results/shape.{json,md}`` is made of what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import stage
from oracle.product import ProductFailed
from shaping import changes, outage, poison, refresh, story

PARTS: dict[str, Callable[[argparse.Namespace, stage.Report], None]] = {
    "story": story.run, "refresh": refresh.run, "random": changes.run, "poison": poison.run, "outage": outage.run,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the full size")
    parser.add_argument("--limit-mb", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=500, help="of the story's sink")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--postgres", choices=("15", "18"), default="18")
    parser.add_argument("--out", type=Path, default=stage.RESULTS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parameters = stage.parameters(options, "parts")
    status = 0
    for part in options.parts or PARTS:
        report = stage.Report(part, parameters)
        try:
            PARTS[part](options, report)
        except (ProductFailed, OSError) as error:
            report.failed(f"the product: {str(error).splitlines()[0][:300]}")
            report.say(str(error))
        status |= report.finish(options.out / "shape")
    _collect(options.out)
    return status


def _collect(out: Path) -> None:
    """The reports of all parts that there are, as one."""
    folder = out / "shape"
    found = [part for part in PARTS if (folder / f"{part}.json").exists()]
    whole = {part: json.loads((folder / f"{part}.json").read_text()) for part in found}
    (out / "shape.json").write_text(json.dumps(whole, indent=2) + "\n")
    texts = [(folder / f"{part}.md").read_text().replace("# ", "## ", 1) for part in found]
    good = all(one["good"] for one in whole.values())
    (out / "shape.md").write_text("\n".join([f"# shape: {'holds' if good else 'DOES NOT HOLD'}\n", *texts]))


if __name__ == "__main__":
    sys.exit(main())
