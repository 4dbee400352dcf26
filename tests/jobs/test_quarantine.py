"""Bad values go to quarantine with id, field, stage and reason; they stop no job, vanish nowhere, and are counted."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from featurestore.corpora import QUARANTINE
from featurestore.encoders import log_mel
from featurestore.errors import BudgetExceeded, NotFound
from featurestore.store import FeatureStore
from jobs.quarantine import listed
from jobs.report import field_counts, rejected
from jobs.run import Runner
from jobs.spec import load
from jobs.status import Status
from pipelines.encode import ShardEncoder
from pipelines.shard_writer import ShardWriter
from tests.conftest import Made
from tests.planted import ODD_IDS, SHARD_ROWS, plant_bad_values, write_planted

SAMPLES = 40
AT_SHARD = {"empty", "unreadable", "invalid_utf8"}
"""What needs no decoder to be seen."""


def spec_text(corpus: Path, store: Path, budget: str) -> str:
    return f"""\
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: manifest, path: {corpus}/manifest.jsonl}}
  columns: {{id: id, group: group}}
  fields:
    image: {{modality: image, from: image_path}}
    caption: {{modality: text, from: caption}}
    note: {{modality: text, from: note_path, read: file}}
    sound: {{modality: audio, from: sound_path}}
  shard_rows: {SHARD_ROWS}
  failure_budget: {budget}
views:
  image: {{field: image, encoder: efficientnet-lite0}}
  sound: {{field: sound, encoder: log-mel}}
"""


@dataclasses.dataclass
class Planted:
    """A corpus with bad values, what must be said of each, its rows, and a store made of it."""

    corpus: Path
    store: Path
    expected: dict[tuple[str, str], str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        raw = (self.corpus / "manifest.jsonl").read_bytes().decode("utf-8", "surrogateescape")
        return [json.loads(line) for line in raw.splitlines()]

    def run(self, store: Path, budget: str) -> FeatureStore:
        spec = store.with_suffix(".yaml")
        spec.write_text(spec_text(self.corpus, store, budget))
        Runner(load(spec), Console(quiet=True)).run()
        return FeatureStore(store)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("bad")
    manifest = write_planted(folder / "corpus", SAMPLES)
    planted = Planted(folder / "corpus", folder / "store", plant_bad_values(folder / "corpus", manifest))
    planted.run(planted.store, "20%")
    return planted


@pytest.fixture
def store(planted: Planted) -> FeatureStore:
    return FeatureStore(planted.store)


def test_every_bad_value_is_in_quarantine_with_its_stage_and_reason_and_nothing_else_is(
    planted: Planted, store: FeatureStore
) -> None:
    found = {(row["id"], row["field"]): (row["reason"], row["stage"]) for row in rejected(store, "planted")}
    assert found == {
        key: (reason, "shard" if reason in AT_SHARD else "encode") for key, reason in planted.expected.items()
    }


def test_quarantine_says_where_a_value_came_from_and_names_no_folder_of_this_machine(
    planted: Planted, store: FeatureStore
) -> None:
    sources = {row["id"]: row for row in planted.rows}
    for row in rejected(store, "planted"):
        column = "caption" if row["field"] == "caption" else f"{row['field']}_path"
        expected = "manifest.jsonl" if column == "caption" else sources[row["id"]][column]
        assert row["source"] == expected
        assert row["detail"]
        assert str(planted.corpus) not in row["detail"]


def test_present_missing_and_quarantined_add_up_to_the_samples_of_every_field(
    planted: Planted, store: FeatureStore
) -> None:
    rows = planted.rows
    assert len(rows) == SAMPLES + len(ODD_IDS) == store.corpus("planted").rows
    for field, counts in field_counts(store, "planted").items():
        column = "caption" if field == "caption" else f"{field}_path"
        absent = sum(row[column] is None for row in rows)
        bad = sum(key[1] == field for key in planted.expected)
        assert counts == {"present": len(rows) - absent - bad, "missing": absent, "quarantined": bad}, field
    for view in ("image", "sound"):
        present = sum(store.view(view).to_arrow(["present"])["present"].to_pylist())
        assert present == field_counts(store, "planted")[view]["present"]


def test_a_view_says_why_a_row_has_no_vector(planted: Planted, store: FeatureStore) -> None:
    for view in ("image", "sound"):
        rows = {row["id"]: row for row in store.view(view).to_arrow().to_pylist()}
        assert rows.keys() == {row["id"] for row in planted.rows}
        for row in planted.rows:
            reason = "absent" if row[f"{view}_path"] is None else planted.expected.get((row["id"], view))
            assert rows[row["id"]]["miss_reason"] == reason
            assert rows[row["id"]]["present"] == (reason is None) == (rows[row["id"]]["embedding"] is not None)


def test_status_counts_rejected_values_by_reason_and_folder_as_shares_of_those_tried(
    planted: Planted, store: FeatureStore
) -> None:
    seen = Status(store.storage).look()
    counts = {each.name: each.counts for each in seen.rejections}
    folders = {"image": "images", "sound": "sounds", "caption": "manifest.jsonl", "note": "notes"}
    assert sum(counts.values(), Counter()) == Counter(
        (field, reason, folders[field]) for (_, field), reason in planted.expected.items()
    )
    tried = {each.name: each.tried for each in seen.rejections}
    for view in ("image", "sound"):
        there = sum(row[f"{view}_path"] is not None for row in planted.rows)
        early = sum(key[1] == view and reason in AT_SHARD for key, reason in planted.expected.items())
        assert tried[view] == there - early
    lines = list(seen.lines())
    assert f"  image, decode_error: 2 ({2 / tried['image']:.2%})" in lines
    assert f"    from images: 2 ({2 / tried['image']:.2%})" in lines
    assert f"rejected by shard planted: 5 of {tried['planted']} values ({5 / tried['planted']:.2%})" in lines


def test_a_text_that_is_not_utf8_is_kept_nowhere_else(planted: Planted, store: FeatureStore) -> None:
    """Its sample stays, with its other fields."""
    ((sample_id, _),) = [key for key in planted.expected if key[1] == "caption"]
    assert store.view("sound").take([sample_id])["id"].to_pylist() == [sample_id]
    corpus = store.corpus("planted")
    assert corpus.value(*corpus.locate(sample_id), "caption") is None


def test_the_same_bad_values_in_another_folder_give_the_same_store(planted: Planted, tmp_path: Path) -> None:
    manifest = write_planted(tmp_path / "elsewhere", SAMPLES)
    other = Planted(tmp_path / "elsewhere", tmp_path / "store", plant_bad_values(tmp_path / "elsewhere", manifest))
    assert other.run(other.store, "20%").digest() == FeatureStore(planted.store).digest()


def test_past_the_budget_nothing_is_committed_and_a_raised_one_goes_on_from_what_is_done(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    told = (
        r"shard planted: 5 of \d+ values were rejected \(\d\.\d\d%\), more than the failure budget of 1\.00%; e\.g\. "
    )
    with pytest.raises(BudgetExceeded, match=told):
        planted.run(store, "1%")
    opened = FeatureStore(store)
    assert opened.version == 0
    assert opened.snapshot.all() == []

    def told_of() -> Counter[tuple[str, bool]]:
        rows = listed(FeatureStore(store).snapshot, load(store.with_suffix(".yaml")))
        return Counter((row["view"] or row["corpus"], row["committed"]) for row in rows)

    # What is not committed can be listed nevertheless, and is marked so; a source that was mended since has none of it.
    assert told_of() == {("planted", False): 5}
    assert list(listed(opened.snapshot)) == []
    rows = list(listed(opened.snapshot, load(store.with_suffix(".yaml"))))
    assert {(row["id"], row["field"]): row["reason"] for row in rows} == {
        key: reason for key, reason in planted.expected.items() if reason in AT_SHARD
    }

    # A budget that is wide enough for shard, not for the images: the shards are not written again.
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_make", None)
        told = r"encode image: 4 of \d+ values .* raise corpus\.failure_budget in the spec above (\d+\.\d\d)%"
        with pytest.raises(BudgetExceeded, match=told) as caught:
            planted.run(store, "5%")
    opened = FeatureStore(store)
    assert opened.version == 1
    assert opened.views() == []
    assert opened.snapshot.entries(QUARANTINE, "encode/image") == []
    assert "`braid quarantine SPEC` lists all of them. Nothing was published and nothing is lost" in str(caught.value)
    assert told_of() == {("planted", True): 5, ("image", False): 4}

    # Nor are the images encoded again.
    make = ShardEncoder.make

    def not_the_images(self: ShardEncoder, task: Any) -> Any:
        assert self.plan.name != "image"
        return make(self, task)

    monkeypatch.setattr(ShardEncoder, "make", not_the_images)
    assert planted.run(store, "20%").digest() == FeatureStore(planted.store).digest()
    assert told_of() == {("planted", True): 5, ("image", True): 4, ("sound", True): 1}


def test_the_store_gives_what_was_rejected_as_a_table(planted: Planted, store: FeatureStore) -> None:
    table = store.quarantine()
    assert table.column_names == ["id", "field", "stage", "reason", "detail", "source", "corpus", "view"]
    assert table.equals(store.quarantine("planted"))
    rows = table.to_pylist()
    assert {(row["id"], row["field"]): row["reason"] for row in rows} == planted.expected
    assert {(row["stage"], row["view"] is None) for row in rows} == {("shard", True), ("encode", False)}
    with pytest.raises(NotFound, match=r"no corpus 'stamps' in .*; it has: planted"):
        store.quarantine("stamps")


def test_a_nan_vector_is_quarantined_and_its_batch_stays(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = small.open().view("loud")
    good = view.to_arrow()
    row = good["present"].to_pylist().index(True)
    sample_id = good["id"][row].as_py()
    raw = view.corpus.value(*view.corpus.locate(sample_id), "sound")
    assert raw is not None
    encoder = log_mel.Encoder(log_mel.Options())
    target, encode = encoder.decode(raw), log_mel.Encoder.encode

    def with_nan(self: log_mel.Encoder, values: Sequence[Any]) -> Any:
        vectors = encode(self, values)
        for position, value in enumerate(values):
            if np.array_equal(value, target):
                vectors[position, 3] = np.nan
        return vectors

    monkeypatch.setattr(log_mel.Encoder, "encode", with_nan)
    copy = small.copy_to(tmp_path)
    text = copy.spec.read_text().replace(str(copy.store), str(tmp_path / "again"))
    copy.spec.write_text(text.replace("shard_rows:", "failure_budget: 5%\n  shard_rows:"))
    Runner(load(copy.spec), Console(quiet=True)).run(("shard", "encode"))
    store = FeatureStore(tmp_path / "again")
    (found,) = rejected(store, "planted")
    assert {name: found[name] for name in ("id", "field", "stage", "reason")} == {
        "id": sample_id,
        "field": "sound",
        "stage": "encode",
        "reason": "nan_output",
    }
    made = store.view("loud").to_arrow()
    assert made["miss_reason"][row].as_py() == "nan_output"
    assert made["embedding"][row].as_py() is None
    others = [each for each in range(len(made)) if each != row]
    assert made.take(others)["embedding"].equals(good.take(others)["embedding"])
