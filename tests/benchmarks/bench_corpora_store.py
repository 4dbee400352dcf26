"""Ten million samples into a store, and what comes after: planned again, a thousand added, a thousand gone.

The captions stand in the manifest, a Parquet file, so that what is measured is Braid and not a disk of media. Each part runs in
a process of its own. Memory is the rise of its peak RSS over what it held after the imports, divided by the samples; of the
worker processes the peak is told beside it. How full shards are is measured on a million samples by the cuts alone, because
the rows do not change it: single samples, groups of 50, and groups as large as Zipf's law makes them.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from featurestore.corpora import ROWS
from featurestore.row_order import BY_ID
from featurestore.store import FeatureStore
from jobs import plan as planning
from jobs import spec as specs
from jobs.run import Runner
from pipelines.cuts import Cut
from pipelines.ingest import Ingest
from pipelines.sources import SampleRef
from tests.benchmarks import Bar, at_least, at_most
from tests.benchmarks.bench_corpora import MAX_BYTES, SPEC, _memory, _write

SAMPLES, MORE = 10_000_000, 1_000
WORKERS = 2
FILL_SAMPLES = 1_000_000
MIN_FILL = 0.95


def bars() -> list[Bar]:
    """The bars of a store of ten million samples, and of how full shards are."""
    found = [
        at_least("corpora", f"shard fill, {what}", _fill(groups), MIN_FILL, samples=FILL_SAMPLES)
        for what, groups in (("single samples", _singles()), ("groups of 50", _fifties()), ("groups of Zipf", _zipf()))
    ]
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        _measure("write", folder)
        parts = {part: _measure(part, folder) for part in ("shard", "again", "add", "remove")}
    first, again, add, remove = parts.values()
    of = f"{SAMPLES:,} samples"
    return [
        *found,
        at_most("corpora", f"{of} sharded: bytes of memory each", first["bytes_each"], MAX_BYTES, **first),
        at_most("corpora", f"{of} planned again: bytes of memory each", again["bytes_each"], MAX_BYTES, **again),
        at_least("corpora", f"{of}: shard fill", first["fill"], MIN_FILL),
        at_most("corpora", f"{MORE:,} added to {of}: share of their shards in the store's", add["share"], 0.01, **add),
        at_most("corpora", f"{MORE:,} gone of {of}: old shards touched", remove["touched"], 0, **remove),
    ]


def _measure(part: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_corpora_store", part, folder]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def _singles() -> Iterator[str]:
    return (f"{number}" for number in range(FILL_SAMPLES))


def _fifties() -> Iterator[str]:
    return (f"{number // 50}" for number in range(FILL_SAMPLES))


def _zipf() -> Iterator[str]:
    """The n-th group has 1/n of the samples that the first one has."""
    left, rank = FILL_SAMPLES, 0
    while left:
        rank += 1
        size = min(left, max(1, FILL_SAMPLES // 14 // rank))
        yield from (f"{rank}" for _ in range(size))
        left -= size


def _fill(groups: Iterator[str]) -> float:
    """Rows over the room that their shards have, of a corpus in the order of ids."""
    rows, most_bytes = 10_000, 1 << 40
    ranges = Ingest("", FILL_SAMPLES, 0, 0, 0, 0).ranges({"shard_rows": rows, "shard_mb": 1 << 20})
    references = (SampleRef(f"s{number}", group, "", 0, "", 0, 0) for number, group in enumerate(groups))
    cut, own = Cut(BY_ID, rows, most_bytes), {}
    for number, reference in cut.ranges(references, ranges):
        own.setdefault(number, []).append(reference)
    shards = sum(1 for each in own.values() for _ in cut.shards(each))
    return FILL_SAMPLES / (shards * rows)


def _shard(spec: specs.Spec) -> dict[str, Any]:
    Runner(spec, Console(quiet=True), workers=WORKERS).run(("shard",))
    corpus = FeatureStore(spec.store).corpus("big")
    rows = [entry.rows for entry in corpus.shards]
    if corpus.rows != SAMPLES or sum(rows) != SAMPLES:
        raise RuntimeError(f"{corpus.rows} samples in {sum(rows)} rows; {SAMPLES} were given")
    return {
        "fill": SAMPLES / (len(rows) * spec.corpus.shard_rows),
        "shards": len(rows),
        "worker_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def _again(spec: specs.Spec) -> dict[str, Any]:
    found = planning.ingest(spec, planning.open_catalog(spec.store))
    if (found.samples, found.known, found.gone) != (0, SAMPLES, 0):
        raise RuntimeError(f"planned again: {found}")
    return {}


def _add(spec: specs.Spec) -> dict[str, Any]:
    """A second file with more samples: an ingest of its own, and no old entry touched."""
    first = Path(spec.corpus.source.path[0])
    table = pq.ParquetFile(first).read_row_group(0).slice(0, MORE).to_pylist()
    more = [row | {"id": f"new-{number:08d}"} for number, row in enumerate(table)]
    pq.write_table(pq.read_schema(first).empty_table().from_pylist(more), first.with_name("more.parquet"))
    before = _entries(spec)
    Runner(_both(spec), Console(quiet=True), workers=WORKERS).run(("shard",))
    after = _entries(spec)
    if not before <= after:
        raise RuntimeError("an old shard was touched")
    return {"share": len(after - before) / len(after), "new_shards": len(after - before)}


def _remove(spec: specs.Spec) -> dict[str, Any]:
    """The second file is gone: tombstones alone, and their samples are not read any more."""
    before = _entries(spec)
    Runner(spec, Console(quiet=True), workers=WORKERS).run(("shard",))
    store = FeatureStore(spec.store)
    if store.corpus("big").rows != SAMPLES:
        raise RuntimeError(f"{store.corpus('big').rows} samples are left")
    return {"touched": len(before - _entries(spec))}


def _entries(spec: specs.Spec) -> set[tuple[Any, ...]]:
    return {tuple(entry) for entry in FeatureStore(spec.store).snapshot.entries(ROWS, "big")}


def _both(spec: specs.Spec) -> specs.Spec:
    first = spec.corpus.source.path[0]
    folder = str(Path(first).parent)
    return _spec(folder, f"[{first}, {folder}/more.parquet]")


def _spec(folder: str, path: str) -> specs.Spec:
    return specs.parse(
        SPEC.format(folder=folder, name="big", read="inline").replace(f"{folder}/big}}", f"{path}}}"), "benchmark"
    )


if __name__ == "__main__":
    part, folder = sys.argv[1:]
    spec = _spec(folder, f"{folder}/{SAMPLES}.parquet")
    before, begun = _memory("VmRSS"), time.monotonic()
    if part == "write":
        found: dict[str, Any] = {"written": _write(spec, SAMPLES)}
    else:
        found = {"shard": _shard, "again": _again, "add": _add, "remove": _remove}[part](spec)
    seconds, peak = time.monotonic() - begun, _memory("VmHWM")
    found |= {
        "seconds": seconds,
        "per_s": SAMPLES / seconds,
        "bytes_each": (peak - before) / SAMPLES,
        "peak_mb": peak / 1e6,
    }
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
