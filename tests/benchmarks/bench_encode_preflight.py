"""`braid plan --sample 200` against the run that follows: seconds and bytes of each view, predicted over measured.

On a planted corpus of 640 samples, and on the stamps where the demo's recipe has fetched them (build/stamps). The value of a
bar is how far a prediction is off, the larger over the smaller: 1 is none, and the bar is a quarter. Seconds are those between
the first shard's start and the last one's end; each round plans and runs after each other, because a shared machine's speed
drifts, and the value is the median of the rounds.
"""

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs import spec as specs
from jobs.run import Done, Runner
from jobs.show_plan import show
from tests.benchmarks import Bar, at_most
from tests.planted import planted_spec, write_planted

SAMPLE, PLANTED, SHARD_ROWS = 200, 640, 64
ROUNDS = 3
OFF = 1.25
STAMPS = Path("jobs/recipes/stamps.yaml")
FIGURES = {"seconds": "span_s", "written_bytes": "written_bytes", "read_bytes": "read_bytes"}
"""What is predicted -> what the run calls it."""


def bars() -> list[Bar]:
    """Of each view of each corpus that is here."""
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        write_planted(folder / "corpus", PLANTED)
        text = planted_spec(folder / "corpus", folder / "store")
        made = _measure("planted", text.replace("shard_rows: 8", f"shard_rows: {SHARD_ROWS}"), folder / "store")
        if Path("build/stamps/stamps.jsonl").is_file():
            text = STAMPS.read_text().replace("./build/stamps-store", str(folder / "stamps"))
            made += _measure("stamps", text, folder / "stamps")
    finally:
        shutil.rmtree(folder)
    return made


def _measure(corpus: str, text: str, store: Path) -> list[Bar]:
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for step in _planned_and_run(text, store):
            rounds.setdefault(f"{step.stage} {step.name}", []).append(_ratios(step))
    return [
        at_most("encode", f"plan's {figure} of {corpus}, {step}", _off(ratios), OFF, ratios=ratios)
        for step, each in rounds.items()
        for figure in FIGURES
        # Sharding takes a second, and half of it is the disk's.
        if not (step.startswith("shard") and figure == "seconds")
        for ratios in [[round(ratio[figure], 3) for ratio in each]]
    ]


def _planned_and_run(text: str, store: Path) -> list[Done]:
    shutil.rmtree(store, ignore_errors=True)
    spec: Any = specs.parse(text, "benchmark")
    show(spec, Console(quiet=True), SAMPLE, {})
    return Runner(spec, Console(quiet=True)).run(("shard", "encode"))


def _ratios(step: Done) -> dict[str, float]:
    assert step.predicted is not None
    return {figure: step.predicted[figure] / getattr(step, measured) for figure, measured in FIGURES.items()}


def _off(ratios: list[float]) -> float:
    middle = statistics.median(ratios)
    return max(middle, 1 / middle)
