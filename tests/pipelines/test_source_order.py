"""Corpora cut in the order of their source: what a job reads of it, later ingests, compaction, and that rows are proven."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from featurestore import artefact, files
from featurestore.catalog import Catalog, Change, Entry
from featurestore.corpora import MEMBER, ROWS, disordered, read_rows
from featurestore.errors import AlignmentError
from featurestore.row_order import AS_STORED, BY_ID, BY_SOURCE, BY_TAR
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import plan
from jobs import spec as specs
from jobs.compact import compact
from jobs.run import Runner
from pipelines.sources import open_source, parquet_rows, webdataset
from tests.conftest import check_same
from tests.pipelines.tars import expected, pairs, source_of, tar_of, values_of, written
from tests.planted import write_planted

ROWS_PER_GROUP, SHARD_ROWS = 10, 16

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: heard
  source: {{type: parquet, path: "{folder}/data/*.parquet"}}
  fields: {{sound: {{modality: audio, from: sound}}}}
  shard_rows: 16
views:
  timbre: {{field: sound, encoder: mfcc}}
"""


class Sounds:
    """Parquet files of sounds, whose ids are in no order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = SPEC.format(folder=folder)
        (folder / "data").mkdir(parents=True)
        write_planted(folder / "corpus", 48)
        sounds = sorted((folder / "corpus" / "sounds").iterdir())
        self._sounds = [path.read_bytes() for path in sounds]

    def write(self, name: str, numbers: range, skipped: tuple[int, ...] = ()) -> list[str]:
        """A file of a sound for each number; returns the ids in order."""
        numbers_ = [number for number in numbers if number not in skipped]
        ids = [f"{number * 7919 % 1009:04}" for number in numbers_]
        sounds = [self._sounds[number % len(self._sounds)] + bytes([number % 251]) for number in numbers_]
        table = pa.table({"id": ids, "number": numbers_, "sound": sounds})
        pq.write_table(table, self.folder / "data" / name, row_group_size=ROWS_PER_GROUP)
        os.utime(self.folder / "data" / name, (1, 1))
        return ids

    def run(self, *stages: str, workers: int = 1) -> FeatureStore:
        spec = specs.parse(self.text, "spec")
        Runner(spec, Console(quiet=True), workers=workers).run(stages or ("shard", "encode"))
        return FeatureStore(spec.store)

    def compact(self) -> FeatureStore:
        spec = specs.parse(self.text, "spec")
        compact(spec, Console(quiet=True))
        return FeatureStore(spec.store)


@pytest.fixture
def sounds(tmp_path: Path) -> Sounds:
    return Sounds(tmp_path / "it")


def orders(store: FeatureStore) -> dict[str, str]:
    return {entry.shard: entry.info()["settings"].get("order", BY_ID) for entry in store.snapshot.entries(ROWS)}


def ids(store: FeatureStore, shards: Iterator[Entry] | None = None) -> list[str]:
    corpus = store.corpus("heard")
    return [each for entry in shards or corpus.shards for each in corpus.ids(entry.shard)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often a row group was read for shards; planning reads no values of it."""
    found: Counter[tuple[int, int]] = Counter()
    plain = parquet_rows._of_group

    def counted(file: Any, columns: Any, span: Any, wanted: Any, most_rows: Any) -> Any:
        if wanted is not None:
            # Files differ in their rows.
            found[file.metadata.num_rows, span[0]] += 1
        return plain(file, columns, span, wanted, most_rows)

    monkeypatch.setattr(parquet_rows, "_of_group", counted)
    return found


def test_a_row_group_is_read_twice_at_most_however_many_shards_there_are(
    sounds: Sounds, read: Counter[tuple[int, int]]
) -> None:
    """In the order of ids each of the 25 shards would read each of the 40 row groups."""
    expected = sounds.write("a.parquet", range(300)) + sounds.write("b.parquet", range(300, 395))
    store = sounds.run("shard")
    assert ids(store) == expected
    assert expected != sorted(expected)
    rows = [entry.rows for entry in store.snapshot.entries(ROWS)]
    assert rows == [SHARD_ROWS] * 24 + [395 - 24 * SHARD_ROWS]
    assert sum(rows) / (len(rows) * SHARD_ROWS) >= 0.95
    assert {*orders(store).values()} == {BY_SOURCE}
    assert len(read) == 40
    assert max(read.values()) <= 2
    # Once, and once more for each shard's end inside of it.
    assert sum(read.values()) <= 40 + len(rows)


def test_workers_and_runs_give_the_same_bytes(sounds: Sounds, tmp_path: Path) -> None:
    other = Sounds(tmp_path / "other")
    for each in (sounds, other):
        each.write("a.parquet", range(100))
    check_same(sounds.run(), other.run(workers=2))


def test_later_samples_are_cut_in_order_too_and_compaction_keeps_the_rows_order(sounds: Sounds) -> None:
    first = sounds.write("a.parquet", range(38))
    before = set(sounds.run().snapshot.entries(ROWS))
    sounds.write("a.parquet", range(38), skipped=(3, 20))
    later = sounds.write("b.parquet", range(100, 104)) + sounds.write("c.parquet", range(200, 203))
    store = sounds.run()
    new = [entry for entry in store.snapshot.entries(ROWS) if entry not in before]
    # What stands behind a row that was taken out has another number: its file is other, but its values are the same.
    assert ids(store, iter(new)) == later
    assert store.corpus("heard").rows == 36 + 7
    assert [*map(str, verify(store.storage).findings)] == []
    vectors = dict(zip(*store.view("timbre").to_arrow(["id", "embedding"]).to_pydict().values(), strict=True))

    compacted = sounds.compact()
    assert {*orders(compacted).values()} == {AS_STORED}
    assert [entry.rows for entry in compacted.snapshot.entries(ROWS)] == [16, 16, 11]
    gone = {first[3], first[20]}
    assert ids(compacted) == [each for each in ids(store) if each not in gone]
    again = dict(zip(*compacted.view("timbre").to_arrow(["id", "embedding"]).to_pydict().values(), strict=True))
    assert again == vectors
    assert [*map(str, verify(compacted.storage).findings)] == []
    assert sounds.run().version == compacted.version
    (*_, last) = compacted.snapshot.entries(ROWS)
    broken = swap(compacted, last, ["sound"])
    assert any("before the value ahead" in each.problem for each in verify(broken.storage, level="rows").findings)


def swap(store: FeatureStore, entry: Entry, columns: list[str] | None = None) -> FeatureStore:
    """Rows 1 and 2 of a shard swapped, in a file that is consistent in itself and with the catalog."""
    path = Path(store.storage.root) / entry.path
    table = artefact.read_table(path.read_bytes())
    footer, order = artefact.footer_of(table.schema), [0, 2, 1, *range(3, len(table))]
    for name in columns or table.column_names:
        table = table.set_column(table.column_names.index(name), name, table[name].take(pa.array(order)))
    placed = artefact.place_table(store.storage, table, entry.path.rpartition("-")[0], footer)
    changed = entry._replace(path=placed.path, bytes=placed.bytes, sha256=placed.sha256)
    Catalog(store.storage).commit("swap", [Change(ROWS, entry.name, "", (changed,), frozenset({entry.shard}))])
    return FeatureStore(store.storage)


@pytest.mark.parametrize("columns", [None, ["sound"], ["id"]])
def test_rows_or_values_that_are_swapped_are_refused_and_found(sounds: Sounds, columns: list[str] | None) -> None:
    sounds.write("a.parquet", range(30))
    store = sounds.run("shard")
    broken = swap(store, store.snapshot.entries(ROWS)[0], columns)
    entry = broken.snapshot.entries(ROWS)[0]
    with pytest.raises(
        AlignmentError, match="its ids are not the ones" if columns != ["sound"] else "value ahead of it"
    ):
        read_rows(broken.storage, entry)
    assert {each.shard for each in verify(broken.storage, level="rows").findings} == {entry.shard}


def test_an_order_that_the_catalog_does_not_name_is_found(sounds: Sounds) -> None:
    sounds.write("a.parquet", range(10))
    store = sounds.run("shard")
    (entry,) = store.snapshot.entries(ROWS)
    about = entry.info()
    about["settings"].pop("order")
    changed = entry._replace(lineage=json.dumps(about, sort_keys=True))
    Catalog(store.storage).commit("forge", [Change(ROWS, "heard", "", (changed,), frozenset({entry.shard}))])
    problems = [each.problem for each in verify(store.storage, level="footers").findings]
    assert any(each.startswith("settings does not hold") for each in problems), problems


def member(uri: str | None, offset: int, size: int = 10) -> dict[str, Any]:
    return {"present": True, "offset": offset, "size": size, "uri": uri, "digest": b"12345678"}


def table(*rows: list[dict[str, Any]]) -> pa.Table:
    columns = {f"f{place}": pa.array(each, MEMBER) for place, each in enumerate(zip(*rows, strict=True))}
    return pa.table({"id": pa.array([f"{99 - row}" for row in range(len(rows))], pa.string()), **columns})


def test_parts_of_files_must_ascend_and_whole_files_may_come_in_any_order() -> None:
    good = table(
        [member("a", 900), member("a", 512)],
        [member("a", 910), member("x", 0)],
        [member("b", 512), member("x", 0)],
        [member("b", 600), member(None, 512)],
    )
    for order in (BY_SOURCE, BY_TAR, AS_STORED):
        assert list(disordered(good, order)) == []
    assert [row for row, _ in disordered(good)] == [1, 2, 3], "ids descend"
    for one, other in itertools.combinations(range(4), 2):
        moved = [0, 1, 2, 3]
        moved[one], moved[other] = other, one
        assert list(disordered(good.take(pa.array(moved)), BY_SOURCE)), (one, other)
        assert list(disordered(good.take(pa.array(moved)), AS_STORED)) == []
    assert [row for row, _ in disordered(pa.concat_tables([good, good.slice(3)]), AS_STORED)] == [4, 4]


@pytest.mark.parametrize(
    ("kind", "path", "order"),
    [
        ("parquet", "a/*.parquet", BY_SOURCE),
        ("manifest", "a/*.PARQUET", BY_SOURCE),
        ("manifest", "a/*.jsonl", BY_ID),
        ("manifest", "a/*", BY_ID),
        ("webdataset", "a/*.tar", BY_SOURCE),
        ("folder", "a", BY_ID),
    ],
)
def test_which_sources_are_cut_in_their_own_order(kind: str, path: str, order: str) -> None:
    fields = {"f": {"modality": "text", "from": "{id}.txt" if kind == "folder" else "txt", "read": None}}
    assert (
        open_source({"source": {"type": kind, "path": [path]}, "columns": {"id": "id"}, "fields": fields}).order
        == order
    )


def test_rows_of_a_parquet_manifest_are_read_twice_at_most(tmp_path: Path, read: Counter[tuple[int, int]]) -> None:
    rows = {"id": [f"{n * 7 % 100:03}" for n in range(100)], "title": [f"number {n}" for n in range(100)]}
    pq.write_table(pa.table(rows), tmp_path / "m.parquet", row_group_size=ROWS_PER_GROUP)
    text = SPEC.format(folder=tmp_path).partition("views:")[0].replace("type: parquet", "type: manifest")
    text = text.replace("data/*.parquet", "m.parquet").replace(
        "sound: {modality: audio, from: sound}", "t: {modality: text, from: title}"
    )
    spec = specs.parse(text, "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    assert ids(FeatureStore(spec.store)) == rows["id"]
    assert (len(read), max(read.values())) == (10, 2)
    assert plan.steps(spec, FeatureStore(spec.store).snapshot)[0].state == plan.FRESH


# Tars that are copied


def test_copied_tars_are_cut_in_their_order_too(tmp_path: Path) -> None:
    for number in (1, 0):
        contents = [(f"{9 - number}{name}", raw) for name, raw in pairs(13)[::-1] if name.endswith("txt")]
        written(tmp_path, tar_of(contents), f"{number}.tar")
    text = (
        SPEC.format(folder=tmp_path)
        .partition("views:")[0]
        .replace("parquet", "tar")
        .replace("type: tar", "type: webdataset")
    )
    text = text.replace("/data/", "/").replace(
        "sound: {modality: audio, from: sound}", "t: {modality: text, from: txt}"
    )
    spec = specs.parse(text, "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    store = FeatureStore(spec.store)
    assert ids(store) == [f"{9 - number}{each:04}" for number in (0, 1) for each in range(12, -1, -1)]
    assert [entry.rows for entry in store.snapshot.entries(ROWS)] == [16, 10]
    assert verify(store.storage).ok


def test_samples_that_stand_side_by_side_come_by_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = files.part

    def counted(uri: str, offset: int, size: int) -> bytes:
        asked.append(size)
        return plain(uri, offset, size)

    monkeypatch.setattr(files, "part", counted)
    monkeypatch.setattr(files, "PROTOCOLS", ("file", "memory"))
    monkeypatch.setattr(webdataset, "MAX_AT_ONCE", 64 << 10)
    content = tar_of(pairs(100, 5000))
    fsspec.filesystem("memory").pipe("/000.tar", content)
    source = source_of("memory://000.tar")
    references = list(source.references())
    asked.clear()
    assert values_of(source, references) == expected(100, 5000)
    assert len(asked) == -(-100 // ((64 << 10) // references[0].length))
    assert sum(asked) <= len(content)
    asked.clear()
    assert values_of(source, references[::2]) == {f"{n:04}": expected(100, 5000)[f"{n:04}"] for n in range(0, 100, 2)}
    assert len(asked) == 50
