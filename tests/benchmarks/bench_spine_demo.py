"""The demo's bars, from the report of `make demo`: recall and fusion on held-out groups of the stamps, and what making it took.

`make demo` runs first: where the store is whole and of this code it computes nothing, and `seconds` is of what made it.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.benchmarks import Bar, at_least, at_most

DIRECTIONS = ("image->caption", "caption->image", "sound->image")
RECALL_AT_10, SECONDS = 0.6, 360
FUSIONS = ("early", "late", "hybrid")


def bars() -> list[Bar]:
    """The bars of this area that are about the demo."""
    # The environment is the one that this runs in: it is not made anew.
    subprocess.run(["make", "-o", ".venv/.installed-run", "demo"], check=True)
    return bars_of(json.loads(Path("build/demo.json").read_text()))


def bars_of(report: dict[str, Any]) -> list[Bar]:
    """The bars of a report: of one whose `seconds` is not known that bar is missed, as not a number."""
    recall = {each: report["retrieval"][each] for each in DIRECTIONS}
    fusion = {kind: row["complete"] for kind, row in report["fusion"].items()}
    best = max(FUSIONS, key=lambda kind: float(fusion[kind]["accuracy"]))
    alone = max(fusion.keys() - {*FUSIONS, "chance"}, key=lambda kind: float(fusion[kind]["accuracy"]))
    ratio = fusion[best]["accuracy"] / fusion[alone]["accuracy"]
    seconds = float("nan") if report["seconds"] is None else report["seconds"]
    return [
        *(at_least("spine", f"recall@10, {each}", found["recall@10"], RECALL_AT_10, **found) for each, found in recall.items()),
        # Above it: equal is not enough.
        Bar(
            "spine", "accuracy of fusion over best modality", round(ratio, 4), 1.0, ratio > 1,
            {best: fusion[best], alone: fusion[alone]},
        ),
        at_most("spine", "make demo: seconds", seconds, SECONDS, encode=report["encode"]),
    ]  # fmt: skip
