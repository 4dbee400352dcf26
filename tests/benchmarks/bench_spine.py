"""Sharding of large files against `cp -r` of the same files.

`cp -r` of files in the page cache is one copy inside the kernel and leaves them in memory. A shard is read, hashed twice (each
value by BLAKE3, 7 GB/s a core here; the tar by sha256, 1.8), written, and synced to the disk before it counts as there. The bar
is the plain comparison. Two more stand beside it: with a `cp -r` whose files are on the disk at its end too, and with both
reading a source that is not in memory, as a corpus larger than memory is read.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from jobs import spec as specs
from jobs.run import Runner
from tests.benchmarks import Bar, at_least

FILES = 320
FILE_BYTES = 5 << 20
ROUNDS = 5
BAR = 0.5


class _Round(NamedTuple):
    """Seconds that each took; `warm` with the source in the page cache, `cold` without."""

    warm_cp: float
    warm_cp_and_sync: float
    warm_shard: float
    cold_cp: float
    cold_shard: float


def bars() -> list[Bar]:
    """The bars of this area."""
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        (folder / "source").mkdir()
        for number in range(FILES):
            content = np.random.default_rng(number).integers(0, 256, FILE_BYTES, dtype=np.uint8)
            (folder / "source" / f"{number:04d}.bin").write_bytes(content.tobytes())
        rounds = [_round(folder) for _ in range(ROUNDS)]
    finally:
        shutil.rmtree(folder)
    median = _Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))
    best = _Round(*(min(column) for column in zip(*rounds, strict=True)))
    detail = {
        "mb": FILES * FILE_BYTES >> 20,
        "cores": len(os.sched_getaffinity(0)),
        "median_s": {name: round(each, 2) for name, each in median._asdict().items()},
        "best_s": {name: round(each, 2) for name, each in best._asdict().items()},
        "rounds_s": [[round(each, 2) for each in one] for one in rounds],
    }
    return [
        at_least(
            "spine", "shard large files over cp -r", median.warm_cp / median.warm_shard, BAR,
            what="cp -r, source in the page cache, copy left in memory / shard, same source, store on the disk", **detail,
        ),
        at_least(
            "spine", "shard large files over cp -r and sync", median.warm_cp_and_sync / median.warm_shard, BAR,
            what="cp -r and sync, source in the page cache, copy on the disk / shard, same source, store on the disk",
            **detail,
        ),
        at_least(
            "spine", "shard large files over cp -r, source on the disk", median.cold_cp / median.cold_shard, BAR,
            what="cp -r, source out of the page cache, copy left in memory / shard, same source, store on the disk",
            **detail,
        ),
    ]  # fmt: skip


def _round(folder: Path) -> _Round:
    source = folder / "source"
    _read(source)
    warm_copy = _copy_s(folder)
    warm_shard = _shard_s(folder)
    _forget(source)
    cold_copy, _ = _copy_s(folder)
    _forget(source)
    return _Round(*warm_copy, warm_shard, cold_copy, _shard_s(folder))


def _read(source: Path) -> None:
    for path in source.glob("*.bin"):
        path.read_bytes()


def _forget(source: Path) -> None:
    """Takes the source's files out of the page cache; only pages that are on the disk can be."""
    subprocess.run(["sync", "-f", str(source)], check=True)
    for path in source.glob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy_s(folder: Path) -> tuple[float, float]:
    """Seconds of cp -r, and until its files are on the disk."""
    target = folder / "copy"
    subprocess.run(["sync", "-f", str(folder)], check=True)
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(folder / "source"), str(target)], check=True)
    copied = time.monotonic() - begun
    subprocess.run(["sync", "-f", str(target)], check=True)
    synced = time.monotonic() - begun
    shutil.rmtree(target)
    return copied, synced


def _shard_s(folder: Path) -> float:
    manifest, store = folder / "source" / "manifest.jsonl", folder / "store"
    rows = ({"id": f"{number:04d}", "image": f"{number:04d}.bin"} for number in range(FILES))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # With a view, as corpora have: it decodes the values. Without one, sharding would, and noise is no image.
    text = f"""
version: 1
store: {{uri: {store}}}
corpus:
  name: bench
  source: {{type: manifest, path: {manifest}}}
  columns: {{id: id}}
  fields: {{image: {{modality: image, from: image}}}}
  shard_mb: 64
views:
  image: {{field: image, encoder: efficientnet-lite0}}
"""
    spec = specs.parse(text, "benchmark")
    subprocess.run(["sync", "-f", str(folder)], check=True)
    begun = time.monotonic()
    Runner(spec, Console(quiet=True)).run(("shard",))
    seconds = time.monotonic() - begun
    shutil.rmtree(store)
    return seconds
