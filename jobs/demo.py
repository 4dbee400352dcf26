"""What `make demo` shows after `braid run`: the store in figures, recall and fusion as its cards have them, searches.

    python -m jobs.demo jobs/recipes/stamps.yaml --metrics build/runs/*.json --out build/demo.json

Recall and accuracy are not measured here: `align` and `fuse` measured them on held-out groups and wrote them to their cards.
The raw forward rates are: the bare encoder on decoded values, on as many threads as the pipeline has.

What steps took is read from the metrics of all runs, so that one that was cut off counts. `seconds` is what making the store
and its first report took, `seconds_now` what the last run and this report did; `recomputed` names that run's steps. What no run
tells is taken over from the report that is replaced: `seconds` where the store is the same, rates where a view's recipe is.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from featurestore import encoders
from featurestore.encoders.runtime import tune_process
from featurestore.errors import AlignmentError, DecodeError
from featurestore.search import Hits
from featurestore.store import FeatureStore
from featurestore.views import View
from jobs import metrics, plan
from jobs import spec as specs
from jobs.report import counted, field_counts
from jobs.spec import Spec

WIDTH = 130
RAW_SECONDS = 4.0
RAW_VALUES = 256
TEXT = "a dog"
QUERIES = ("text", "image", "audio")


def main() -> None:
    """Prints the report and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument(
        "--metrics", type=Path, required=True, nargs="+", help="what `braid run --metrics` wrote, the newest run last"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begun = time.monotonic()
    spec, console = (
        specs.load(args.spec),
        Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH),
    )
    store = FeatureStore(spec.store)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs = [json.loads(path.read_text()) for path in args.metrics]
    report = {
        "samples": store.corpus(spec.corpus.name).rows,
        "fields": field_counts(store, spec.corpus.name),
        "encode": encode_rates(store, runs, before.get("encode", {})),
        "retrieval": retrieval(store),
        "fusion": fusion(store),
        "store": {"version": store.version, "digest": store.digest()},
    }
    show(console, report)
    searches(console, store, spec.indexes)
    took = time.monotonic() - begun
    report["recomputed"] = [f"{step['stage']} {step['name']}" for step in runs[-1]]
    report["seconds"] = making_seconds(spec, report, runs, took, before)
    report["seconds_now"] = round(sum(step["seconds"] for step in runs[-1]) + took, 1)
    making = "not known" if report["seconds"] is None else f"{report['seconds']} s"
    console.print(
        f"\n{counted(len(runs[-1]), 'step')} computed now, {report['seconds_now']} s with this report; making the store and "
        f"its first report: {making}; figures in {args.out}"
    )
    metrics.put(args.out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


Report = dict[str, Any]
Runs = Sequence[Sequence[dict[str, Any]]]
"""For each run, the oldest first, its steps: `jobs.run.Done` as JSON."""


def making_seconds(spec: Spec, report: Report, runs: Runs, took: float, before: Report) -> float | None:
    """Seconds of all steps since the whole corpus was sharded, and `took`, those of the report; steps cut off are not counted.

    As it was `before` where that report is of this very store and nothing was computed since; None where some step of the store
    is of no known run.
    """
    known: float | None = before.get("seconds")
    if known is not None and not runs[-1] and before.get("store") == report["store"]:
        return known
    steps = list(itertools.chain(*runs))
    begins = [at for at, each in enumerate(steps) if each["stage"] == "shard" and each.get("rows") == report["samples"]]
    made = steps[begins[-1] :] if begins else []
    needed = {("encode", name) for name in spec.views}
    needed |= {(stage, name) for stage in plan.BUILD_STAGES for name in plan.build_settings(spec, stage)}
    if not begins or needed - {(step["stage"], step["name"]) for step in made}:
        return None
    return float(round(sum(step["seconds"] for step in made) + took, 1))


def encode_rates(store: FeatureStore, runs: Runs, before: dict[str, Report]) -> dict[str, Report]:
    """Per view: its `recipe`, and in values per second `rate` of its encode job, beside `raw_rate` of the bare encoder.

    The rate is of the run that encoded most of the view by its recipe, of such the last, else as it was `before`; None where
    neither is known. The raw rate is measured where the view was encoded in the last run, and where none is known.
    """
    rates: dict[str, Report] = {}
    for name in store.views():
        view = store.view(name)
        known = before.get(name, {})
        known = known if known.get("recipe") == view.recipe else {}
        own = ("encode", name, view.recipe)
        made = [[each for each in run if (each["stage"], each["name"], each.get("key")) == own] for run in runs]
        timed = [each for each in itertools.chain(*made) if each["span_s"]]
        most = max(reversed(timed), key=lambda each: int(each["values"]), default=None)
        raw = None if made[-1] else known.get("raw_rate")
        rates[name] = {
            "recipe": view.recipe,
            "rate": round(most["values"] / most["span_s"], 1) if most else known.get("rate"),
            "raw_rate": round(raw_rate(view), 1) if raw is None else raw,
        }
    return rates


def raw_rate(view: View) -> float:
    """Values per second of the bare forward, decoding left out, on as many threads as the pipeline runs."""
    encoder = encoders.find_as(view.encoder)
    tune_process()
    encoder.load()
    values = _decoded(view, encoder)
    values.sort(key=encoder.length)
    size, threads = encoder.batch_size, len(os.sched_getaffinity(0))
    batches = [values[start : start + size] for start in range(0, len(values), size)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(encoder.encode, batches[:threads]))
        done, begun = 0, time.monotonic()
        while time.monotonic() - begun < RAW_SECONDS:
            list(pool.map(encoder.encode, batches))
            done += len(values)
        return done / (time.monotonic() - begun)


def _decoded(view: View, encoder: encoders.BaseEncoder) -> list[Any]:
    decoded: list[Any] = []
    for shard in view.corpus.shards:
        for raws in zip(*(view.corpus.values(shard.shard, field) for field in view.fields), strict=True):
            if not any(raws) or len(decoded) >= RAW_VALUES:
                continue
            try:
                parts = [each and encoder.decode_field(each, place) for place, each in enumerate(raws)]
            except DecodeError:
                continue
            decoded.append(encoder.joined(parts))
    return decoded


def retrieval(store: FeatureStore) -> dict[str, dict[str, Any]]:
    """Recall per direction, from the cards of the spaces; `index` is the kind of index that it was measured through."""
    cards = [store.card("space", name) for name in store.spaces()]
    return {
        direction: {**figures, "index": card["recall_index"]}
        for card in cards
        for direction, figures in card["recall"].items()
    }


def fusion(store: FeatureStore) -> dict[str, Any]:
    """The fusion table of the first training set, from its card."""
    sets = store.training_sets()
    return dict(store.card("training", sets[0])["fusion"]) if sets else {}


def show(console: Console, report: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    console.print(f"\n{counted(report['samples'], 'sample')}")
    table = _table("field", "present", "missing", "quarantined", "sum")
    for field, counts in report["fields"].items():
        table.add_row(field, *(str(count) for count in counts.values()), str(sum(counts.values())))
    console.print(table)
    table = _table("encode", "values/s", "bare forward/s")
    for view, rates in report["encode"].items():
        table.add_row(view, *("-" if rates[name] is None else f"{rates[name]:.1f}" for name in ("rate", "raw_rate")))
    console.print(table)
    if unknown := [view for view, rates in report["encode"].items() if rates["rate"] is None]:
        console.print(f"not measured: {', '.join(unknown)} (encoded by no run whose metrics are there)")
    console.print("recall on held-out groups: gallery = the test samples (whole = all samples that have both)")
    console.print("R@k is through the index named, exact@10 by brute force: the same search twice where that is exact")
    names = ("query → hit", "R@1", "R@5", "R@10", "sd", "chance@10", "exact@10")
    table = _table(*names, "index", "n", "splits", "whole R@10", "chance")
    for direction, found in report["retrieval"].items():
        figures = [
            f"{found[name]:.3f}" for name in ("recall@1", "recall@5", "recall@10", "sd@10", "chance@10", "exact@10")
        ]
        kind = "exact search (Flat)" if found["index"] == "Flat" else found["index"]
        whole = [f"{found['corpus'][name]:.3f}" for name in ("recall@10", "chance@10")]
        table.add_row(direction.replace("->", " → "), *figures, kind, f"{found['n']:.0f}", str(found["splits"]), *whole)
    console.print(table)
    console.print("accuracy on held-out groups, all values and half of them withheld; n = test samples of all splits")
    table = _table("fusion", "complete", "95 %", "half", "95 %", "n", "samples a split", "splits")
    for kind, row in report["fusion"].items():
        cells = []
        for part in ("complete", "half"):
            low, high = row[part]["ci95"]
            cells += [f"{row[part]['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
        whole = row["complete"]
        table.add_row(kind, *cells, str(whole["n"]), f"{whole['samples']:.1f}", str(whole["splits"]))
    console.print(table)


def searches(console: Console, store: FeatureStore, indexes: Iterable[str]) -> None:
    """Searches each index by each modality that it can be asked in, for each other one: by `TEXT`, else by a sample's value."""
    for index in indexes:
        pairs = itertools.permutations(store.index(index).views.values(), 2)
        asked = {(view.modality, hit.modality): view for view, hit in pairs if view.modality != hit.modality}
        for (given, wanted), view in asked.items():
            if given in QUERIES:
                title, value = _query(view)
                query: dict[str, Any] = {given: value}
                hits = store.search(index, **query, via=view.name, modality=wanted, k=5)
                _print(console, f"{index}: {title} → {wanted}", hits)


def _query(view: View) -> tuple[str, str | bytes]:
    """What to search through a view by, and what it is called: of a sample the first that the view has, by id."""
    if view.modality == "text":
        return f'text "{TEXT}"', TEXT
    rows = view.to_arrow(["id", "present"])
    sample: str = min(rows.filter(rows["present"])["id"].to_pylist())
    raw = view.corpus.value(*view.corpus.locate(sample), view.field)
    if raw is None:
        raise AlignmentError(
            f"view {view.name!r} has a vector of {sample!r}, which has no {view.field}: run `braid verify`"
        )
    return f"{view.field} of {sample}", raw


def _print(console: Console, title: str, hits: Hits) -> None:
    console.print(f"\n{title}", markup=False)
    for hit in hits:
        console.print(f"  {hit.score:.3f}  {hit.id}  {hit.text or '(no caption)'}", markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


if __name__ == "__main__":
    main()
