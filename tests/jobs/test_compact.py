"""Compaction: fewer shards, the same samples, values and vectors, nothing encoded again; and erasure for good."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from featurestore.corpora import ROWS
from featurestore.errors import NotFound, StoreError
from featurestore.store import FeatureStore
from featurestore.tombstones import TOMBSTONES
from featurestore.verify import verify
from jobs import plan
from jobs.compact import compact
from jobs.report import field_counts, rejected
from jobs.spec import load
from pipelines import compact as pipeline
from pipelines.encode import ShardEncoder
from tests.conftest import Made, check_same
from tests.jobs.test_tombstones import change, ids_of, manifest, run, write


def compacted(made: Made, *, workers: int = 1, purge: bool = False) -> FeatureStore:
    compact(load(made.spec), Console(quiet=True), workers=workers, purge=purge)
    return made.open()


def samples(store: FeatureStore) -> dict[str, tuple[object, ...]]:
    """Id -> everything that a reader gets of the sample."""
    corpus = store.corpus("planted")
    rows = corpus.to_arrow().drop_columns(["shard", "row"]).to_pylist()
    views = {name: store.view(name) for name in store.views()}
    tables = {name: view.to_arrow() for name, view in views.items()}
    found = {}
    for number, row in enumerate(rows):
        places = {field: corpus.value(*corpus.locate(row["id"]), field) for field in corpus.fields}
        reasons = {field: (row[field]["miss_reason"], row[field]["source"]) for field in corpus.fields}
        kept = {name: value for name, value in row.items() if name not in corpus.fields}
        vectors = {name: tables[name].slice(number, 1).to_pylist() for name in tables}
        found[row["id"]] = (str(kept), str(places), str(reasons), str(vectors))
    return found


@pytest.fixture(scope="module")
def grown(small: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The small store after an ingest that left tombstones and small shards, with values in quarantine. Read only."""
    copy = small.copy_to(tmp_path_factory.mktemp("grown"))
    change(copy)
    rows = manifest(copy)
    sounds = [copy.corpus / row["sound_path"] for row in rows if row.get("sound_path")]
    sounds[1].write_bytes(b"no sound at all")
    sounds[2].write_bytes(b"")
    copy.spec.write_text(copy.spec.read_text().replace("  shard_rows:", "  failure_budget: 20%\n  shard_rows:"))
    run(copy)
    write(copy, [*manifest(copy), {"id": "last", "group": "last", "label": "ring", "caption": "One more."}])
    run(copy)
    assert len(rejected(copy.open(), "planted")) > 1
    return copy


def test_samples_values_vectors_and_rejections_are_the_same_and_nothing_is_encoded(
    grown: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = grown.copy_to(tmp_path)
    before = copy.open()
    expected, counts, bad = samples(before), field_counts(before, "planted"), rejected(before, "planted")
    with monkeypatch.context() as patch:
        patch.setattr(ShardEncoder, "encode", None)
        store = compacted(copy)
    assert store.version == before.version + 1
    assert samples(store) == expected
    assert field_counts(store, "planted") == counts
    key = lambda row: sorted(row.items(), key=str)  # noqa: E731
    assert sorted(rejected(store, "planted"), key=key) == sorted(bad, key=key)
    assert len(store.corpus("planted").shards) < len(before.corpus("planted").shards)
    assert not store.snapshot.entries(TOMBSTONES)
    assert store.corpus("planted").gone == {}
    found = verify(store.storage).findings
    assert {finding.kind for finding in found} == {"space", "index", "training"}
    steps = {(step.stage, step.state) for step in plan.steps(load(copy.spec), store.snapshot)}
    assert steps >= {("shard", plan.FRESH), ("encode", plan.FRESH), ("index", plan.STALE)}
    assert [stage for stage, *_ in run(copy)] == ["align", "align", "index", "index", "fuse", "fuse"]
    assert verify(store.storage).ok
    assert pipeline.plan(copy.open().snapshot, plan.corpus_dict(load(copy.spec))) is None
    assert copy.open().version == compacted(copy).version


def test_full_shards_without_holes_stay_as_they_are(grown: Made, tmp_path: Path) -> None:
    copy = grown.copy_to(tmp_path)
    before = copy.open().corpus("planted")
    whole = {entry for entry in before.shards if entry.shard not in before.gone and entry.rows == 8}
    assert 0 < len(whole) < len(before.shards)
    assert whole < set(compacted(copy).snapshot.entries(ROWS, "planted"))


def test_two_workers_write_the_same_bytes(grown: Made, tmp_path: Path) -> None:
    one, two = grown.copy_to(tmp_path / "one"), grown.copy_to(tmp_path / "two")
    check_same(compacted(one), compacted(two, workers=2))


def test_an_earlier_version_is_as_it_was(grown: Made, tmp_path: Path) -> None:
    copy = grown.copy_to(tmp_path)
    version = copy.open().version
    compacted(copy)
    check_same(copy.open(version), grown.open())
    assert samples(copy.open(version)) == samples(grown.open())


def test_a_source_is_compared_with_compacted_shards_as_before(grown: Made, tmp_path: Path) -> None:
    copy = grown.copy_to(tmp_path)
    compacted(copy)
    assert run(copy, "shard") == []
    rows = manifest(copy)
    write(copy, rows[1:])
    run(copy, "shard")
    store = copy.open()
    with pytest.raises(NotFound, match="any more"):
        store.corpus("planted").locate(rows[0]["id"])
    assert store.corpus("planted").locate(rows[1]["id"])


def test_purge_leaves_nothing_of_what_is_gone(small: Made, grown: Made, tmp_path: Path) -> None:
    copy = grown.copy_to(tmp_path)
    gone, _ = ids_of(small)
    first = copy.open()
    assert any(mentions(path, gone) for path in files(copy.store))
    store = compacted(copy, purge=True)
    named = {entry.path for entry in store.snapshot.all()}
    assert {str(path.relative_to(copy.store)) for path in files(copy.store)} == named
    assert [path for path in files(copy.store) if mentions(path, gone)] == []
    assert not any(gone.encode() in path.read_bytes() for path in (copy.store / "catalog").rglob("*.json"))
    assert store.spaces() == store.indexes() == store.training_sets() == []
    run(copy)
    assert verify(store.storage).ok
    assert samples(copy.open()) == samples(grown.open())
    with pytest.raises((NotFound, StoreError)):
        samples(copy.open(first.version))


def files(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and "catalog" not in path.parts]


def mentions(path: Path, sample_id: str) -> bool:
    """Whether a file has a sample; its id may be the group of others."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return "id" in table.column_names and sample_id in table["id"].to_pylist()
    return f"{sample_id}.".encode() in path.read_bytes()


def test_a_kill_before_the_commit_leaves_the_old_version_and_the_next_one_ends_the_same(
    grown: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, other = grown.copy_to(tmp_path / "a"), grown.copy_to(tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "changes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compacted(copy)
    check_same(copy.open(), grown.open())
    check_same(compacted(copy), compacted(other))


def test_a_store_without_the_corpus_is_told(grown: Made, tmp_path: Path) -> None:
    copy = grown.copy_to(tmp_path)
    shutil.rmtree(copy.store)
    with pytest.raises(NotFound, match="holds no Braid store"):
        compacted(copy)
