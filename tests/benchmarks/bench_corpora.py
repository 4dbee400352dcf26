"""Manifests of a million and of ten million references: what planning and the shuffle take of memory and time.

Each part runs in a process of its own. Memory is the rise of its peak RSS over what it held after the imports, divided by the
references. The shuffle is the shard job on the local runner with nothing behind the cuts: its workers are told what to write
and write nothing. Captions stand in the manifest itself, or in `.paths.` are paths of local files, each of which is asked for
its size and change: 1,000 files, each named by 1,000 rows. Ids have 15 characters, groups 10; in `.one.` all are of one group,
and so of one range.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import plan as planning
from jobs import spec as specs
from pipelines import shard
from pipelines.ingest import Ingest
from pipelines.runner import InFlight, Job, Result
from tests.benchmarks import Bar, at_least, at_most

SIZES = {
    "jsonl": (1_000_000, 10_000_000),
    "paths.jsonl": (1_000_000,),
    "one.jsonl": (400_000,),
    "csv": (1_000_000,),
    "parquet": (1_000_000,),
}
FILES = 1_000
MAX_BYTES = 400
MIN_ROWS_PER_S = {"csv": 100_000, "paths.jsonl": 5_000}
"""Of references that are read and nothing else."""

BATCH = 50_000
SPEC = """
version: 1
store: {{uri: {folder}/store-{name}}}
corpus:
  name: big
  source: {{type: manifest, path: {folder}/{name}}}
  columns: {{id: id, group: group}}
  fields: {{caption: {{modality: text, from: caption, read: {read}}}}}
"""


def bars() -> list[Bar]:
    """The bars of this area that are about references."""
    found = []
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        for ending, sizes in SIZES.items():
            for count in sizes:
                name = f"{count}.{ending}"
                _measure("write", folder, name)
                for part, what in (("plan", "planned"), ("shuffle", "read, shuffled and cut")):
                    taken = _measure(part, folder, name)
                    of = f"{count:,} references of a {ending} {what}"
                    found.append(
                        at_most("corpora", f"{of}: bytes of memory each", taken["bytes_each"], MAX_BYTES, **taken)
                    )
                if ending in MIN_ROWS_PER_S:
                    taken, least = _measure("read", folder, name), MIN_ROWS_PER_S[ending]
                    found.append(at_least("corpora", f"rows of a {ending} a second", taken["per_s"], least, **taken))
                Path(folder, name).unlink()
    return found


def _measure(part: str, folder: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_corpora", part, folder, name]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def _rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        # The order of the ids is not that of the file.
        yield {
            "id": f"sample-{number * 7919 % count:08d}",
            "group": f"group-{number // 3 % (1 << 20):07x}"[:10],
            "caption": f"a caption of a few words, number {number}",
            "label": ("sea", "land", "sky")[number % 3],
        }


def _paths(rows: Iterator[dict[str, str]], folder: Path) -> Iterator[dict[str, str]]:
    """Rows whose captions stand in files."""
    (folder / "texts").mkdir()
    for number in range(FILES):
        (folder / f"texts/{number:03}.txt").write_text(f"a caption of a few words, number {number}")
    for number, row in enumerate(rows):
        yield row | {"caption": f"texts/{number % FILES:03}.txt"}


def _write(spec: specs.Spec, count: int) -> int:
    path = Path(spec.corpus.source.path[0])
    rows = _rows(count)
    if ".paths." in path.name:
        rows = _paths(rows, path.parent)
    if ".one." in path.name:
        rows = (row | {"group": "the-one"} for row in rows)
    if path.suffix == ".parquet":
        schema = pa.schema([(name, pa.string()) for name in ("id", "group", "caption", "label")])
        with pq.ParquetWriter(path, schema) as writer:
            while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
                writer.write_table(pa.Table.from_pylist(batch, schema))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, ("id", "group", "caption", "label"))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return count


def _read(spec: specs.Spec, count: int) -> int:
    source = planning.open_source(planning.corpus_dict(spec))
    return sum(1 for _ in source.references())


def _plan(spec: specs.Spec, count: int) -> int:
    return planning.ingest(spec, planning.open_catalog(spec.store)).samples


class _Nothing(NamedTuple):
    """The work on a shard, left out."""

    def open(self, threads: int) -> None:
        pass

    def do(self, opened: None, task: shard.ShardTask) -> Result:
        return Result(task.key, "[]", 0, 0, "")


def _shuffle(spec: specs.Spec, count: int) -> int:
    corpus, ingest = planning.corpus_dict(spec), Ingest("0123456789ab", count, 80 * count, 0, 0, 0)
    version = planning.open_catalog(spec.store).version
    job = Job()
    job.pipeline | shard.Shard(spec.store, corpus, ingest, version, InFlight("shard big", _Nothing()))
    job.run()
    files = [pq.ParquetFile(Path(spec.store.root, each)).metadata for each in spec.store.list("corpora/big/plans")]
    shards = sum(each.num_row_groups for each in files)
    if shards > 1.05 * count / corpus["shard_rows"] + len(files):
        raise RuntimeError(f"{shards} shards of {count} references")
    return sum(each.num_rows for each in files)


PARTS: dict[str, Callable[[specs.Spec, int], int]] = {
    "write": _write,
    "read": _read,
    "plan": _plan,
    "shuffle": _shuffle,
}


def _memory(what: str) -> int:
    """Bytes that this process holds (VmRSS), or the most that it has held (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) << 10


if __name__ == "__main__":
    part, folder, name = sys.argv[1:]
    read = "file" if ".paths." in name else "inline"
    spec = specs.parse(SPEC.format(folder=folder, name=name, read=read), "benchmark")
    count = int(name.partition(".")[0])
    before, begun = _memory("VmRSS"), time.monotonic()
    done = PARTS[part](spec, count)
    seconds, peak = time.monotonic() - begun, _memory("VmHWM")
    if done != count:
        raise RuntimeError(f"{part}: {done} of {count} references")
    measured = {
        "bytes_each": (peak - before) / count,
        "per_s": count / seconds,
        "peak_mb": peak / 1e6,
        "before_mb": before / 1e6,
    }
    print(json.dumps({name: round(value, 1) for name, value in measured.items()}))
