"""Columns that are kept beside the values: what is the same in them when a sample is read again, and no digit of them lost."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from featurestore.store import FeatureStore
from jobs import plan
from jobs import spec as specs
from jobs.report import rejected
from jobs.retry import Retrier
from jobs.run import Runner
from pipelines.ingest import Ingest
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
