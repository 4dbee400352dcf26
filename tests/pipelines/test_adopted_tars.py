"""`adopt: true`: each tar is a shard where it lies, row for row, with the vectors, hits and training rows of a copy."""

import gc
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import s3fs
import webdataset
from rich.console import Console

from featurestore.corpora import MEDIA, ROWS, disordered, read_rows
from featurestore.errors import AlignmentError, InputError
from featurestore.export import export_webdataset
from featurestore.row_order import BY_TAR
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.tombstones import TOMBSTONES
from featurestore.verify import LEVELS, verify
from jobs import plan
from jobs import spec as specs
from jobs.compact import compact
from jobs.report import field_counts
from jobs.run import Runner
from pipelines import encode
from tests.conftest import check_same
from tests.loopback_s3 import loopback_s3
from tests.pipelines.tars import pairs, tar_of
from tests.planted import write_planted

SAMPLES, SIZES = 48, (20, 9, 19)
NAMES = [f"{number:05}.tar" for number in range(len(SIZES))]
FILE_TIME_S = 1_700_000_000

SPEC = """
version: 1
store: {{uri: {store}}}
corpus:
  name: tars
  source: {{type: webdataset, path: "{tars}/{{00000..00002}}.tar"{adopt}}}
  columns: {{id: id, group: video}}
  fields:
    sound: {{modality: audio, from: [wav, ogg]}}
    caption: {{modality: text, from: txt}}
    image: {{modality: image, from: [jpg, png]}}
  shard_rows: 8
views:
  loud: {{field: sound, encoder: log-mel}}
  timbre: {{field: sound, encoder: mfcc}}
spaces:
  heard: {{views: [loud, timbre], method: cca, dim: 8}}
indexes:
  heard: {{space: heard, views: [loud, timbre], recall: 1.0}}
training_sets:
  heard: {{views: [loud, timbre], label: label, splits: {{train: 0.6, test: 0.4}}}}
"""


def key_of(number: int) -> str:
    """Keys that do not ascend, some of which Braid would escape in a tar of its own."""
    mark = hashlib.sha256(str(number).encode()).hexdigest()[:4]
    return f"{'100%/é ' if number % 7 == 3 else ''}{mark}-{number:09}"


def sample_members(corpus: Path, row: dict[str, Any], number: int) -> list[tuple[str, bytes]]:
    """A sample as img2dataset has it, and a sound: values and `json` under one key."""
    found = []
    for column in ("image_path", "sound_path"):
        if row[column]:
            found.append((f"{key_of(number)}.{row[column].rpartition('.')[2]}", (corpus / row[column]).read_bytes()))
    if row["caption"]:
        found.append((f"{key_of(number)}.txt", row["caption"].encode()))
    about = {"label": row["label"], "video": row["group"], "url": f"https://example.com/{number}"}
    return [*found, (f"{key_of(number)}.json", json.dumps(about).encode()), (f"{key_of(number)}.cls", b"7")]


def write_tar(path: Path, contents: list[tuple[str, bytes]]) -> None:
    path.write_bytes(tar_of(contents, 2))
    os.utime(path, (FILE_TIME_S, FILE_TIME_S))


def write_tars(folder: Path) -> list[list[list[tuple[str, bytes]]]]:
    """Three tars and the tables beside them; the members of each sample, by tar."""
    manifest = write_planted(folder / "corpus", SAMPLES)
    rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    tars, start = folder / "tars", 0
    tars.mkdir()
    made = []
    for name, size in zip(NAMES, SIZES, strict=True):
        numbers = range(start, start + size)
        made.append([sample_members(folder / "corpus", rows[number], number) for number in numbers])
        write_tar(tars / name, [member for sample in made[-1] for member in sample])
        table = {"key": [key_of(number) for number in numbers], "width": [number * 2 for number in numbers]}
        pq.write_table(pa.table(table), tars / name.replace(".tar", ".parquet"))
        start += size
    return made


class Tars:
    """A folder of tars and the store of it, adopted or copied."""

    def __init__(self, folder: Path, adopt: bool = True, store: str = "store") -> None:
        self.folder, self.tars = folder, folder / "tars"
        adopted = ", adopt: true" if adopt else ""
        self.text = SPEC.format(store=folder / store, tars=self.tars, adopt=adopted)

    @property
    def spec(self) -> specs.Spec:
        return specs.parse(self.text, "spec")

    def open(self) -> FeatureStore:
        return FeatureStore(self.spec.store)

    def run(self, *stages: str, workers: int = 1) -> FeatureStore:
        Runner(self.spec, Console(quiet=True), workers=workers).run(stages or plan.STAGES)
        return self.open()

    def copy_to(self, folder: Path) -> "Tars":
        shutil.copytree(self.folder, folder, copy_function=shutil.copy2)
        return Tars(folder)


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Tars:
    """Read only."""
    folder = tmp_path_factory.mktemp("adopted")
    write_tars(folder)
    made = Tars(folder)
    made.run()
    return made


@pytest.fixture(scope="module")
def copied(adopted: Tars) -> FeatureStore:
    return Tars(adopted.folder, adopt=False, store="copied").run()


@pytest.fixture
def mine(adopted: Tars, tmp_path: Path) -> Tars:
    return adopted.copy_to(tmp_path / "mine")


def upstream(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # It leaves the files that it opened to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(path)], shardshuffle=False, handler=webdataset.reraise_exception))
        gc.collect()
    return samples


def test_a_tar_is_a_shard_whose_rows_are_what_webdataset_reads_in_its_order(adopted: Tars) -> None:
    """However large: shard_rows is 8."""
    corpus = adopted.open().corpus("tars")
    assert [entry.rows for entry in corpus.shards] == list(SIZES)
    for name, entry in zip(NAMES, corpus.shards, strict=True):
        theirs, ours = upstream(adopted.tars / name), corpus.read(entry.shard).to_pylist()
        assert [row["id"] for row in ours] == [sample["__key__"] for sample in theirs]
        assert [row["id"] for row in ours] != sorted(row["id"] for row in ours)
        for row, sample in enumerate(theirs):
            for field, extensions in (("sound", ("wav", "ogg")), ("caption", ("txt",)), ("image", ("jpg", "png"))):
                (given,) = [sample[each] for each in extensions if each in sample] or [None]
                assert corpus.value(entry.shard, row, field) == given
                assert ours[row][field]["uri"] == (name if given else None)


def test_no_byte_of_a_value_is_in_the_store(adopted: Tars, copied: FeatureStore) -> None:
    store = adopted.open()
    assert [key for key in store.storage.list("corpora") if key.endswith(".tar")] == []
    assert store.snapshot.entries(MEDIA) == []
    stored = b"".join(store.storage.read(key) for key in store.storage.list("corpora"))
    assert not any(mark in stored for mark in (b"RIFF", b"OggS", b"\x89PNG", b"\xff\xd8\xff"))
    sizes = [sum(each.storage.list("corpora").values()) for each in (store, copied)]
    media = sum(path.stat().st_size for path in adopted.tars.glob("*.tar"))
    assert sizes[0] < 150_000 < media < sizes[1]


def by_id(store: FeatureStore, view: str) -> dict[str, Any]:
    table = store.view(view).to_arrow(["id", "embedding"])
    return dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def test_vectors_columns_and_counts_are_those_of_a_copy(adopted: Tars, copied: FeatureStore) -> None:
    store = adopted.open()
    for view in store.views():
        ours, theirs = by_id(store, view), by_id(copied, view)
        assert len(ours) == SAMPLES
        assert ours.keys() == theirs.keys()
        for sample, vector in theirs.items():
            assert ours[sample] == (vector if vector is None else pytest.approx(vector, abs=1e-5))
    assert field_counts(store, "tars") == field_counts(copied, "tars")
    one, other = (each.corpus("tars").to_arrow().sort_by("id") for each in (store, copied))
    for name in ("id", "group", "etag", "label", "url", "width"):
        assert one[name].to_pylist() == other[name].to_pylist()
    some = one["id"].to_pylist()[::5]
    assert store.view("loud").take(some)["id"].to_pylist() == some


def test_hits_and_training_rows_are_those_of_a_copy(adopted: Tars, copied: FeatureStore) -> None:
    query = next((adopted.folder / "corpus" / "sounds").iterdir()).read_bytes()
    hits = [store.search("heard", audio=query, via="loud", k=6) for store in (adopted.open(), copied)]
    assert [hit.id for hit in hits[0]] == [hit.id for hit in hits[1]]
    assert [hit.raw("audio") for hit in hits[0]] == [hit.raw("audio") for hit in hits[1]]
    assert all(hit.raw("audio") for hit in hits[0])
    sets = [store.training_set("heard") for store in (adopted.open(), copied)]
    for split in ("train", "test"):
        one, other = (each.to_arrow(split).sort_by("id") for each in sets)
        assert one["id"].to_pylist() == other["id"].to_pylist()
        assert one["label"].to_pylist() == other["label"].to_pylist()


def test_an_adopted_corpus_is_proven_at_every_level_and_exported_with_its_values(adopted: Tars, tmp_path: Path) -> None:
    store = adopted.open()
    for level in LEVELS:
        assert [*map(str, verify(store.storage, level=level).findings)] == []
    paths = export_webdataset(store, ["loud"], tmp_path, raw=True)
    for path, name in zip(paths, NAMES, strict=True):
        ours, theirs = upstream(path), upstream(adopted.tars / name)
        for one, other in zip(ours, theirs, strict=True):
            values = [other[each] for each in ("wav", "ogg") if each in other]
            assert [raw for member, raw in one.items() if member.startswith("sound.")] == values


def test_two_workers_write_the_same_bytes_and_so_does_another_folder(adopted: Tars, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copytree(adopted.tars, tmp_path / "other" / "tars", copy_function=shutil.copy2)
    check_same(Tars(tmp_path / "other").run(workers=2), adopted.open())


def test_values_are_found_below_the_root_that_the_reader_names(mine: Tars) -> None:
    moved = mine.folder / "elsewhere"
    shutil.move(mine.tars, moved)
    named = Storage(uri=str(mine.folder / "store"), media_root=str(moved))
    assert verify(named).ok
    mine.text = mine.text.replace(f"{mine.folder}/store}}", f"{mine.folder}/store, media_root: {mine.folder}}}")
    mine.text = mine.text.replace(f"{mine.folder}/store,", f"{mine.folder}/new,").replace(str(mine.tars), str(moved))
    corpus = mine.run("shard").corpus("tars")
    assert pc.unique(pc.struct_field(corpus.to_arrow()["sound"], "uri")).drop_null().to_pylist() == [
        f"elsewhere/{name}" for name in NAMES
    ]
    assert corpus.value(*corpus.locate(key_of(0)), "caption")


# A tar that changes


def counts(found: Tars) -> tuple[int, int, int, int]:
    ingest = plan.ingest(found.spec, found.open().snapshot)
    return ingest.samples, ingest.known, ingest.changed, ingest.gone


def test_a_tar_that_comes_later_is_a_new_shard_and_the_others_stay(mine: Tars) -> None:
    before = set(mine.open().snapshot.entries(ROWS))
    write_tar(mine.tars / "00003.tar", [member for member in pairs(5) if member[0].endswith(".txt")])
    mine.text = mine.text.replace("00002}", "00003}")
    assert counts(mine) == (5, SAMPLES, 0, 0)
    store = mine.run("shard", "encode")
    (new,) = set(store.snapshot.entries(ROWS)) - before
    assert before < set(store.snapshot.entries(ROWS))
    assert store.corpus("tars").ids(new.shard) == [f"{number:04}" for number in range(5)]
    assert {each.kind for each in verify(store.storage).findings} <= {"space", "index", "training"}
    assert counts(mine) == (0, SAMPLES + 5, 0, 0)


def replaced(found: Tars, name: str, edit: Callable[[list[list[tuple[str, bytes]]]], Any]) -> list[str]:
    """Writes a tar anew with other samples; returns their keys in order."""
    samples: list[list[tuple[str, bytes]]] = []
    for sample in upstream(found.tars / name):
        key = sample["__key__"]
        samples.append([(f"{key}.{each}", raw) for each, raw in sample.items() if not each.startswith("__")])
    edit(samples)
    (found.tars / name).write_bytes(tar_of([member for sample in samples for member in sample], 2))
    return [sample[0][0].partition(".")[0] for sample in samples]


def spoil(samples: list[list[tuple[str, bytes]]]) -> None:
    """Another caption of the same length at the 4th sample that has one, from which on nothing moves."""
    at = [number for number, each in enumerate(samples) if any(name.endswith(".txt") for name, _ in each)][3]
    samples[at] = [(name, raw[::-1] if name.endswith(".txt") else raw) for name, raw in samples[at]]


def test_a_tar_that_was_replaced_gives_a_new_shard_of_what_changed(mine: Tars) -> None:
    before = {entry.shard for entry in mine.open().snapshot.entries(ROWS)}
    replaced(mine, NAMES[1], spoil)
    assert counts(mine) == (1, SAMPLES - 1, 1, 0)
    store = mine.run()
    corpus = store.corpus("tars")
    assert {entry.rows for entry in corpus.shards if entry.shard not in before} == {1}
    assert corpus.rows == SAMPLES
    assert [*map(str, verify(store.storage).findings)] == []


def test_values_that_moved_in_their_tar_come_in_again(mine: Tars) -> None:
    """Their bytes are the same, but no longer where the rows say."""
    keys = replaced(mine, NAMES[1], lambda samples: samples.insert(2, [("new.txt", b"x" * 3000), ("new.json", b"{}")]))
    samples, known, changed, gone = counts(mine)
    assert (samples, changed, gone) == (SIZES[1] - 2 + 1, SIZES[1] - 2, 0)
    assert known == SAMPLES - changed
    store = mine.run("shard", "encode")
    corpus = store.corpus("tars")
    (new,) = [entry for entry in corpus.shards if entry.rows == samples]
    assert corpus.ids(new.shard) == keys[2:]
    kinds = {each.kind for each in verify(store.storage).findings}
    assert kinds <= {"space", "index", "training"}, kinds


def test_a_tar_that_is_gone_is_tombstones_and_its_rows_go_when_compacted(mine: Tars) -> None:
    (mine.tars / NAMES[1]).unlink()
    (mine.tars / NAMES[1].replace(".tar", ".parquet")).unlink()
    replaced(mine, NAMES[0], lambda samples: samples.pop(7))
    mine.text = mine.text.replace("{00000..00002}", "{00000,00002}")
    store = mine.run()
    # Behind the 7th sample of the first tar, all have moved.
    assert store.corpus("tars").rows == SIZES[0] - 1 + SIZES[2]
    assert [*map(str, verify(store.storage).findings)] == []
    expected, moved = by_id(store, "timbre"), (mine.tars / NAMES[0]).read_bytes()
    for _ in range(2):
        compact(mine.spec, Console(quiet=True), purge=True)
        store = mine.open()
        corpus = store.corpus("tars")
        assert corpus.gone == {}
        assert not store.snapshot.entries(TOMBSTONES)
        assert sorted(entry.rows for entry in corpus.shards) == [7, SIZES[0] - 8, SIZES[2]], (
            "no tar is merged with another"
        )
        assert {str(each.info()["settings"]["order"]) for each in corpus.shards} == {BY_TAR}
        for entry in corpus.shards:
            uris = {each["uri"] for each in corpus.read(entry.shard)["sound"].to_pylist() if each["present"]}
            assert len(uris) == 1
    assert by_id(store, "timbre") == expected
    assert (mine.tars / NAMES[0]).read_bytes() == moved
    mine.run()
    assert [*map(str, verify(mine.open().storage).findings)] == []


def test_tars_that_are_adopted_after_others_were_referred_to_are_compacted_apart(mine: Tars) -> None:
    """Two compactions, of which the first leaves the tombstones of the second."""
    adopting = mine.text.replace(f"{mine.folder}/store", f"{mine.folder}/mixed")
    mine.text = adopting.replace(", adopt: true", "").replace("  shard_rows", "  media: reference\n  shard_rows")
    mine.text = mine.text.replace("00002}", "00001}")
    mine.run("shard", "encode")
    mine.text = adopting
    mine.run("shard", "encode")
    for name in (NAMES[0], NAMES[2]):
        replaced(mine, name, lambda samples: samples.pop())
    store = mine.run("shard", "encode")
    assert len(store.corpus("tars").gone) == 2
    expected = by_id(store, "loud")
    compact(mine.spec, Console(quiet=True))
    store = mine.open()
    assert store.corpus("tars").gone == {}
    assert by_id(store, "loud") == expected
    found = {str(each.info()["settings"].get("order")): each.rows for each in store.corpus("tars").shards}
    assert found[BY_TAR] == SIZES[2] - 1
    assert [*map(str, verify(store.storage).findings)] == []


def test_a_value_is_proven_where_it_is_read(mine: Tars) -> None:
    path = mine.tars / NAMES[2]
    corpus = mine.open().corpus("tars")
    entry = next(entry for entry in corpus.shards if entry.rows == SIZES[2])
    member = next(each for each in corpus.read(entry.shard)["sound"].to_pylist() if each["present"])
    row = [each["present"] for each in corpus.read(entry.shard)["sound"].to_pylist()].index(True)
    content = bytearray(path.read_bytes())
    content[member["offset"] + 50] ^= 1
    path.write_bytes(content)
    with pytest.raises(AlignmentError, match=r"not the value that was stored.*braid shard"):
        corpus.value(entry.shard, row, "sound")
    assert [(each.shard, each.row) for each in verify(mine.spec.store).findings] == [(entry.shard, row)]


def _swapped(rows: pa.Table, one: int, other: int, columns: list[str] | None = None) -> pa.Table:
    order = list(range(len(rows)))
    order[one], order[other] = other, one
    for name in columns or rows.column_names:
        rows = rows.set_column(rows.column_names.index(name), name, rows[name].take(pa.array(order)))
    return rows


def test_rows_that_are_swapped_are_refused(adopted: Tars) -> None:
    """Whole rows by the ids' digest; values under ids that stayed by their places in the tar."""
    corpus = adopted.open().corpus("tars")
    for entry in corpus.shards:
        rows = corpus.read(entry.shard)
        assert list(disordered(rows, BY_TAR)) == []
        present = [row for row, each in enumerate(rows["sound"].to_pylist()) if each["present"]]
        for one, other in itertools.pairwise(present):
            assert list(disordered(_swapped(rows, one, other, ["sound"]), BY_TAR)), (one, other)
        assert list(disordered(pa.concat_tables([rows, rows.slice(0, 1)]), BY_TAR))
    entry = corpus.shards[0]
    with pytest.raises(AlignmentError, match="its ids are not the ones that the catalog names"):
        read_rows(corpus.storage, entry._replace(ids_sha256=corpus.shards[1].ids_sha256))


def test_a_copied_corpus_is_not_adopted_later(copied: FeatureStore, adopted: Tars) -> None:
    found = Tars(adopted.folder, store="copied")
    with pytest.raises(InputError, match=r"'reference', as adopt means, where .* with 'copy'; .*, so leave adopt out"):
        plan.ingest(found.spec, copied.snapshot)


def test_tars_on_s3_are_adopted(mine: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_s3() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", "eu-west-1")
        s3fs.S3FileSystem.clear_instance_cache()
        client = s3fs.S3FileSystem(endpoint_url=endpoint)
        client.mkdir("shelf")
        client.put(f"{mine.tars}/", "shelf/tars/", recursive=True)
        before = {name: by_id(mine.open(), name) for name in ("loud",)}
        mine.text = mine.text.replace(f"{mine.folder}/store", f"{mine.folder}/other").replace(
            str(mine.tars), "s3://shelf/tars"
        )
        store = mine.run("shard", "encode")
        assert store.storage.media_root == "s3://shelf/tars"
        for sample, vector in before["loud"].items():
            found = by_id(store, "loud")[sample]
            assert found == (vector if vector is None else pytest.approx(vector, abs=1e-5))
        assert verify(store.storage).ok
        assert [key for key in store.storage.list("corpora") if key.endswith(".tar")] == []
    s3fs.S3FileSystem.clear_instance_cache()


def test_encoding_reads_each_value_once_from_the_tar(mine: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    fetch = encode.ShardEncoder._fetch

    def counted(self: encode.ShardEncoder, value: encode.Value) -> Any:
        asked.append((str(value.uri), value.offset))
        return fetch(self, value)

    monkeypatch.setattr(encode.ShardEncoder, "_fetch", counted)
    mine.text = mine.text.replace("encoder: log-mel", "encoder: mfcc, options: {n_mfcc: 8}")
    view = mine.run("encode").view("loud")
    assert len(asked) == len(set(asked)) == pc.sum(view.to_arrow()["present"]).as_py()
    assert np.isfinite(view.matrix()[0][view.matrix()[1]]).all()
