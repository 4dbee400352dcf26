"""A list or an object where a text should be goes to quarantine, of every source of rows; kept columns stay as they are."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.storage import Storage
from featurestore.store import FeatureStore
from jobs.report import rejected
from tests.faults.stores import shard_corpus

GIVEN: dict[str, Any] = {
    "text": "a boat", "number": 3, "fraction": 0.5, "truth": True,
    "list": ["a"], "empty": [], "object": {"en": "é" * 99}, "none": None,
}  # fmt: skip
STORED = {"text": b"a boat", "number": b"3", "fraction": b"0.5", "truth": b"true"}


def jsonl(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    lines = (json.dumps({"id": key, "title": value, "kept": ["x", 1]}) + "\n" for key, value in rows.items())
    (folder / "m.jsonl").write_text("".join(lines))
    return {"source": {"type": "manifest", "path": [f"{folder}/m.jsonl"]}, "from": "title", "read": "inline"}


def webdataset(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    with tarfile.open(folder / "m.tar", "w") as tar:
        for key, value in rows.items():
            raw = json.dumps({"title": value, "kept": ["x", 1]}).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return {"source": {"type": "webdataset", "path": [f"{folder}/m.tar"]}, "from": "json.title", "read": None}


def sharded(folder: Path, made: dict[str, Any], modality: str = "text") -> FeatureStore:
    corpus = {
        "name": "texts", "source": made["source"], "columns": {"id": "id", "group": None}, "shard_rows": 100, "shard_mb": 64,
        "fields": {"title": {"modality": modality, "from": made["from"], "read": made["read"]}}, "failure_budget": 1.0,
    }  # fmt: skip
    shard_corpus(Storage.of(folder / "store"), corpus)
    return FeatureStore(folder / "store")


@pytest.mark.parametrize("write", [jsonl, webdataset])
def test_numbers_and_truths_are_texts_and_lists_and_objects_are_not(tmp_path: Path, write: Any) -> None:
    store = sharded(tmp_path, write(tmp_path, GIVEN))
    corpus = store.corpus("texts")
    found = {key: corpus.value(*corpus.locate(key), "title") for key in GIVEN}
    assert {key: raw for key, raw in found.items() if raw is not None} == STORED
    told = {row["id"]: (row["reason"], row["detail"]) for row in rejected(store, "texts")}
    assert told == {
        "list": ("not_text", '["a"] is a list; make it a text in the source'),
        "empty": ("not_text", "[] is a list; make it a text in the source"),
        "object": ("not_text", '{"en": "' + "é" * 72 + "… is an object; make it a text in the source"),
    }
    kept = corpus.to_arrow()["kept"].to_pylist()
    assert len({str(each) for each in kept}) == 1
    assert "x" in str(kept[0])


def test_a_nested_column_of_a_parquet_manifest_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "title": [["x"], None]}), tmp_path / "m.parquet")
    made = {"source": {"type": "manifest", "path": [f"{tmp_path}/m.parquet"]}, "from": "title", "read": "inline"}
    (row,) = rejected(sharded(tmp_path, made), "texts")
    assert (row["id"], row["reason"], row["source"]) == ("a", "not_text", "m.parquet")


def test_a_list_is_no_path_either(tmp_path: Path) -> None:
    made = jsonl(tmp_path, {"a": ["a.png"], "b": None}) | {"read": "file"}
    (row,) = rejected(sharded(tmp_path, made, "image"), "texts")
    assert (row["id"], row["reason"]) == ("a", "not_text")
