"""Sharding of large files against `cp -r` of the same files.

`cp -r` of files in the page cache is one copy inside the kernel and leaves them in memory. A shard is read, hashed twice (each
value, and the tar as a whole: sha256, 1.4 to 1.7 GB/s a core here), written and synced to the disk before it counts as there.
So the plain comparison is shown beside one with a `cp -r` whose files are on the disk at its end too.
"""

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

FILES = 320
FILE_BYTES = 5 << 20
ROUNDS = 3
BAR = 0.5


def bars() -> list[Bar]:
    """The bars of this area."""
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        source = folder / "source"
        source.mkdir()
        for number in range(FILES):
            content = np.random.default_rng(number).integers(0, 256, FILE_BYTES, dtype=np.uint8)
            (source / f"{number:04d}.bin").write_bytes(content.tobytes())
        rounds = [(*_copy_s(folder), _shard_s(folder)) for _ in range(ROUNDS)]
    finally:
        shutil.rmtree(folder)
    plain, synced, sharded = (statistics.median(column) for column in zip(*rounds, strict=True))
    detail = {
        "mb": FILES * FILE_BYTES >> 20,
        "cp_s": round(plain, 2),
        "cp_and_sync_s": round(synced, 2),
        "shard_s": round(sharded, 2),
        "rounds": [[round(each, 2) for each in one] for one in rounds],
    }
    return [
        at_least("spine", "shard large files over cp -r", plain / sharded, BAR, **detail),
        at_least("spine", "shard large files over cp -r and sync", synced / sharded, BAR, **detail),
    ]


def _copy_s(folder: Path) -> tuple[float, float]:
    """Seconds of cp -r, and until its files are on the disk."""
    target = folder / "copy"
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
