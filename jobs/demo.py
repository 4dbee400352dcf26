"""What `make demo` shows after `braid run`: the store in figures, recall and fusion as its cards have them, three searches.

    python -m jobs.demo jobs/recipes/stamps.yaml --metrics build/run.json --out build/demo.json

Recall and accuracy are not measured here: `align` and `fuse` measured them on held-out groups and wrote them to their cards.
The raw forward rates are: the bare encoder on decoded values, on as many threads as the pipeline has.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from featurestore import encoders
from featurestore.corpora import Corpus
from featurestore.encoders.runtime import tune_process
from featurestore.errors import DecodeError
from featurestore.search import Hits
from featurestore.store import FeatureStore
from featurestore.views import View
from jobs import spec as specs
from jobs.report import counted, field_counts

WIDTH = 130
RAW_SECONDS = 4.0
RAW_VALUES = 256


def main() -> None:
    """Prints the report and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--metrics", type=Path, required=True, help="what `braid run --metrics` wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begun = time.monotonic()
    spec, console = (
        specs.load(args.spec),
        Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH),
    )
    store = FeatureStore(spec.store)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    steps = json.loads(args.metrics.read_text())
    report = {
        "samples": store.corpus(spec.corpus.name).rows,
        "fields": field_counts(store, spec.corpus.name),
        "encode": encode_rates(store, steps, before.get("encode", {})),
        "retrieval": retrieval(store),
        "fusion": fusion(store),
        "store": {"version": store.version, "digest": store.digest()},
    }
    show(console, report)
    searches(console, store)
    report["recomputed"] = [f"{step['stage']} {step['name']}" for step in steps]
    report["seconds"] = round(sum(step["seconds"] for step in steps) + time.monotonic() - begun, 1)
    console.print(f"\n{counted(len(steps), 'step')} computed; {report['seconds']} s in all; figures in {args.out}")
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


Rates = dict[str, float | None]
NOT_MEASURED: Rates = {"rate": None, "raw_rate": None}


def encode_rates(store: FeatureStore, steps: list[dict[str, Any]], before: dict[str, Rates]) -> dict[str, Rates]:
    """Values per second of each view's encode job, beside the bare encoder's.

    Of an earlier run where none ran now; None where no run is known that measured it.
    """
    rates: dict[str, Rates] = {}
    ran = {step["name"]: step for step in steps if step["stage"] == "encode" and step["span_s"]}
    for name in store.views():
        if name in ran:
            rate = ran[name]["values"] / ran[name]["span_s"]
            rates[name] = {"rate": round(rate, 1), "raw_rate": round(raw_rate(store.view(name)), 1)}
        else:
            rates[name] = before.get(name, NOT_MEASURED)
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
    """Recall per direction, from the cards of the spaces."""
    return {
        direction: figures
        for name in store.spaces()
        for direction, figures in store.card("space", name)["recall"].items()
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
        table.add_row(view, *("-" if rate is None else f"{rate:.1f}" for rate in rates.values()))
    console.print(table)
    if unknown := [view for view, rates in report["encode"].items() if rates["rate"] is None]:
        console.print(f"not measured: {', '.join(unknown)} (encoded before this run, and no earlier report is there)")
    console.print("recall on held-out groups: gallery = the test samples (whole = all samples that have both)")
    table = _table(
        "query → hit", "R@1", "R@5", "R@10", "sd", "chance@10", "exact@10", "n", "splits", "whole R@10", "chance"
    )
    for direction, found in report["retrieval"].items():
        figures = [
            f"{found[name]:.3f}" for name in ("recall@1", "recall@5", "recall@10", "sd@10", "chance@10", "exact@10")
        ]
        whole = [f"{found['corpus'][name]:.3f}" for name in ("recall@10", "chance@10")]
        table.add_row(direction.replace("->", " → "), *figures, f"{found['n']:.0f}", str(found["splits"]), *whole)
    console.print(table)
    console.print("accuracy on held-out groups, all values and half of them withheld")
    table = _table("fusion", "complete", "95 %", "half", "95 %", "n")
    for kind, row in report["fusion"].items():
        cells = []
        for part in ("complete", "half"):
            low, high = row[part]["ci95"]
            cells += [f"{row[part]['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(kind, *cells, str(row["complete"]["n"]))
    console.print(table)


def searches(console: Console, store: FeatureStore) -> None:
    """Three searches: a text for images, an image for captions, a sound for images."""
    corpus = store.corpus("stamps")
    _print(console, 'text "a dog" → image', store.search("stamps", text="a dog", modality="image", k=5))
    sample, picture = _first(corpus, "image", "animals/")
    _print(console, f"image of {sample} → caption", store.search("stamps", image=picture, modality="text", k=5))
    sample, sound = _first(corpus, "sound", "animals/")
    _print(console, f"sound of {sample} → image", store.search("heard", audio=sound, modality="image", k=5))


def _first(corpus: Corpus, field: str, prefix: str) -> tuple[str, bytes]:
    """The first sample under a prefix that has a field, in the order of the ids."""
    for sample_id in sorted(name for shard in corpus.shards for name in corpus.ids(shard.shard)):
        raw = corpus.value(*corpus.locate(sample_id), field) if sample_id.startswith(prefix) else None
        if raw is not None:
            return sample_id, raw
    raise LookupError(f"no sample under {prefix} has a {field}")


def _print(console: Console, title: str, hits: Hits) -> None:
    console.print(f"\n{title}")
    for hit in hits:
        console.print(f"  {hit.score:.3f}  {hit.id}  {hit.text or '(no caption)'}", markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


if __name__ == "__main__":
    main()
