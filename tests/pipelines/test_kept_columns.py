"""Columns that are kept beside the values: what is the same in them when a sample is read again, and no digit of them lost."""

import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from featurestore.store import FeatureStore
from jobs import plan
from jobs import spec as specs
from jobs.compact import compact
from jobs.report import rejected
from jobs.retry import Retrier
from jobs.run import Runner
from jobs.show_plan import show
from pipelines.ingest import Ingest
from pipelines.shard_writer import kept_column
from tests.pipelines.tars import tar_of

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: texts
  source: {{type: {type}, path: "{folder}/{path}"}}
  fields: {{text: {{modality: text, from: {field}}}}}
  shard_rows: 4
"""
NAN = float("nan")
SCORES = [0.5, NAN, None, 2.0, NAN, 7.0]
TEXTS = [f"text {number}" for number in range(len(SCORES))]
IDS = pa.array([f"s{number}" for number in range(len(SCORES))])


def parquet(folder: Path, scores: list[float | None]) -> tuple[specs.Spec, Path]:
    """Values in the file itself."""
    cells = [text.encode() for text in TEXTS]
    pq.write_table(pa.table({"id": IDS, "text": cells, "score": scores}), folder / "a.parquet")
    return spec(folder, "parquet", "a.parquet", "text"), folder / "a.parquet"


def sidecar(folder: Path, scores: list[float | None]) -> tuple[specs.Spec, Path]:
    """A tar and the table beside it."""
    (folder / "a.tar").write_bytes(tar_of([(f"s{number}.txt", text.encode()) for number, text in enumerate(TEXTS)]))
    pq.write_table(pa.table({"key": IDS, "score": scores}), folder / "a.parquet")
    return spec(folder, "webdataset", "a.tar", "txt"), folder / "a.tar"


def manifest(folder: Path, scores: list[float | None]) -> tuple[specs.Spec, Path]:
    """Values in files that a table names."""
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    paths = [f"{number}.txt" for number in range(len(TEXTS))]
    pq.write_table(pa.table({"id": IDS, "path": paths, "score": scores}), folder / "m.parquet")
    return spec(folder, "manifest", "m.parquet", "path, read: file"), folder / "1.txt"


Write = Callable[[Path, list[float | None]], tuple[specs.Spec, Path]]


def spec(folder: Path, kind: str, path: str, field: str) -> specs.Spec:
    return specs.parse(SPEC.format(folder=folder, type=kind, path=path, field=field), "spec")


def run(chosen: specs.Spec) -> FeatureStore:
    Runner(chosen, Console(quiet=True)).run(("shard",))
    return FeatureStore(chosen.store)


def counts(found: Ingest) -> dict[str, int]:
    return {"samples": found.samples, "changed": found.changed, "gone": found.gone, "touched": found.touched}


@pytest.mark.parametrize("write", [parquet, sidecar, manifest])
def test_a_sample_with_a_nan_that_is_only_touched_stays(tmp_path: Path, write: Write) -> None:
    """A NaN is equal to nothing, not even to itself."""
    chosen, touched = write(tmp_path, SCORES)
    store = run(chosen)
    os.utime(touched, (1, 1))
    many = 1 if write is manifest else len(SCORES)
    found = plan.ingest(chosen, store.snapshot)
    assert counts(found) == {"samples": 0, "changed": 0, "gone": 0, "touched": many}
    again = run(chosen)
    assert not again.corpus("texts").gone
    scores = again.corpus("texts").to_arrow().sort_by("id")["score"].to_pylist()
    assert [str(each) for each in scores] == [str(each) for each in SCORES]
    write(tmp_path, [0.5, 0.0, None, 2.0, NAN, NAN])
    found = plan.ingest(chosen, again.snapshot)
    assert (found.samples, found.changed, found.gone) == (2, 2, 0)


def test_a_rejected_value_beside_a_nan_comes_in_once_it_is_mended(tmp_path: Path) -> None:
    manifest(tmp_path, SCORES)
    (tmp_path / "1.txt").write_bytes(b"")
    text = SPEC.format(folder=tmp_path, type="manifest", path="m.parquet", field="path, read: file")
    chosen = specs.parse(text + "  failure_budget: 50%\n", "spec")
    store = run(chosen)
    assert [row["id"] for row in rejected(store, "texts")] == ["s1"]
    (tmp_path / "1.txt").write_text("mended")
    Retrier(chosen, Console(quiet=True)).retry("spec.yaml")
    corpus = FeatureStore(chosen.store).corpus("texts")
    assert corpus.value(*corpus.locate("s1"), "text") == b"mended"
    assert plan.ingest(chosen, FeatureStore(chosen.store).snapshot).known == 6


# Numbers

LARGE = (1 << 60) + 1
"""Has more digits than float64."""


@pytest.mark.parametrize(
    ("values", "kind", "kept"),
    [
        ([LARGE, None, 7], pa.int64(), [LARGE, None, 7]),
        ([1 << 60, 0.5, None], pa.float64(), [float(1 << 60), 0.5, None]),
        ([LARGE, 0.5, None, "x"], pa.string(), [f"{LARGE}", "0.5", None, "x"]),
        ([-LARGE, 1.0, None], pa.string(), [f"{-LARGE}", "1.0", None]),
        ([(1 << 53) + 1, 0.5], pa.string(), [f"{(1 << 53) + 1}", "0.5"]),
        ([10**400, 0.5], pa.string(), [f"{10**400}", "0.5"]),
        ([1, math.inf, 1e300], pa.float64(), [1.0, math.inf, 1e300]),
    ],
)
def test_a_whole_number_beside_others_keeps_its_digits(values: list[Any], kind: pa.DataType, kept: list[Any]) -> None:
    column = kept_column(values)
    assert column.type == kind
    assert column.to_pylist() == kept


def test_shards_whose_numbers_differ_are_read_without_loss_and_compacted_to_the_same(tmp_path: Path) -> None:
    """Files of one column of whole numbers, and of another of fractions: a shard each."""
    counts, halves = [LARGE, None, 3, 4], [0.5, 1.0, NAN, 2.5]
    for number, (large, small) in enumerate(((counts, [1 << 60, 2, 3, None]), (halves, halves))):
        ids, texts = [f"{number}{row}" for row in range(4)], [b"a text"] * 4
        table = {"id": ids, "text": texts, "large": large, "small": small}
        pq.write_table(pa.table(table), tmp_path / f"{number}.parquet")
    store = run(spec(tmp_path, "parquet", "*.parquet", "text"))
    table = store.corpus("texts").to_arrow()
    large = [f"{LARGE}", None, "3", "4", "0.5", "1.0", "NaN", "2.5"]
    small = [float(1 << 60), 2.0, 3.0, None, *halves]
    chosen = specs.parse(
        SPEC.format(folder=tmp_path, type="parquet", path="*.parquet", field="text").replace("4\n", "40\n"), "spec"
    )
    compact(chosen, Console(quiet=True))
    compacted = FeatureStore(chosen.store).corpus("texts")
    assert len(store.corpus("texts").shards) == 2 > len(compacted.shards)
    for found in (table, compacted.to_arrow()):
        assert (found["large"].type, found["small"].type) == (pa.string(), pa.float64())
        assert found["large"].to_pylist() == large
        assert str(found["small"].to_pylist()) == str(small)
    os.utime(tmp_path / "0.parquet", (1, 1))
    assert plan.ingest(chosen, FeatureStore(chosen.store).snapshot).touched == 4


def test_a_plan_with_a_sample_reads_shards_of_unlike_columns(tmp_path: Path) -> None:
    rows = [{"id": f"s{n:02}", "text": f"text {n}", "year": "unknown" if n == 3 else 1990} for n in range(16)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    show(spec(tmp_path, "manifest", "m.jsonl", "text"), Console(file=out, width=200), 16, {})
    assert "1 of 1 step to run" in out.getvalue()
