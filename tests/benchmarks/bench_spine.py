"""Sharding of large files against `cp -r` of the same files."""

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from jobs import spec as specs
from jobs.run import Runner
from tests.benchmarks import Bar, at_least

FILES = 160
FILE_BYTES = 5 << 20
ROUNDS = 3


def bars() -> list[Bar]:
    """The bar of this area."""
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        source = folder / "source"
        source.mkdir()
        for number in range(FILES):
            content = np.random.default_rng(number).integers(0, 256, FILE_BYTES, dtype=np.uint8)
            (source / f"{number:04d}.bin").write_bytes(content.tobytes())
        rounds = [(_copy_s(folder), _shard_s(folder)) for _ in range(ROUNDS)]
    finally:
        shutil.rmtree(folder)
    copied, sharded = (statistics.median(column) for column in zip(*rounds, strict=True))
    return [
        at_least(
            "spine",
            "shard large files over cp -r",
            copied / sharded,
            0.5,
            mb=FILES * FILE_BYTES >> 20,
            cp_s=round(copied, 2),
            shard_s=round(sharded, 2),
            rounds=[[round(each, 2) for each in pair] for pair in rounds],
            note="both write to disk and sync",
        )
    ]


def _copy_s(folder: Path) -> float:
    """Seconds of cp -r, its files on disk at the end as the store's are."""
    target = folder / "copy"
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(folder / "source"), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return seconds


def _shard_s(folder: Path) -> float:
    manifest, store = folder / "source" / "manifest.jsonl", folder / "store"
    rows = ({"id": f"{number:04d}", "image": f"{number:04d}.bin"} for number in range(FILES))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
version: 1
store: {{uri: {store}}}
corpus:
  name: bench
  source: {{type: manifest, path: {manifest}}}
  columns: {{id: id}}
  fields: {{image: {{modality: image, from: image}}}}
  shard_mb: 64
"""
    spec = specs.parse(text, "benchmark")
    begun = time.monotonic()
    Runner(spec, Console(quiet=True)).run(("shard",))
    seconds = time.monotonic() - begun
    shutil.rmtree(store)
    return seconds
