"""The shard stage on a small corpus; the cuts and what crosses Beam are in test_graph."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from featurestore import artefact
from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus, member_header
from featurestore.errors import BudgetExceeded, InputError
from featurestore.identity import from_tar_key
from featurestore.storage import Storage
from featurestore.verify import verify
from pipelines import shard_writer
from pipelines.ingest import Known, scan
from pipelines.sources import open_source
from tests.faults.stores import corpus_settings, flip, shard_corpus
from tests.planted import ODD_IDS, SHARD_ROWS

LONG_IDS = ("é" * 90 + "/" + "字" * 60, "x" * 400, "__meta__/in", "ends/in.a/")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Storage]:
    folder = tmp_path_factory.mktemp("shard")
    settings = corpus_settings(folder / "corpus")
    manifest = Path(settings["source"]["path"][0])
    rows = [{"id": each, "group": "long", "label": "x", "caption": f"caption of {each}"} for each in LONG_IDS]
    with manifest.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    storage = Storage.of(folder / "store")
    shard_corpus(storage, settings)
    return settings, storage


@pytest.fixture
def settings(planted: tuple[dict[str, Any], Storage]) -> dict[str, Any]:
    return planted[0]


@pytest.fixture
def snapshot(planted: tuple[dict[str, Any], Storage]) -> Snapshot:
    return Catalog(planted[1]).snapshot()


def manifest_rows(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = Path(settings["source"]["path"][0]).read_bytes().splitlines()
    return {row["id"]: row for row in (json.loads(line.decode("utf-8", "surrogateescape")) for line in lines)}


def test_every_sample_of_the_source_stands_once_with_its_values(settings: dict[str, Any], snapshot: Snapshot) -> None:
    corpus, source = Corpus(snapshot, "planted"), manifest_rows(settings)
    folder = Path(settings["source"]["path"][0]).parent
    assert sorted(corpus.to_arrow()["id"].to_pylist()) == sorted(source)
    for entry in corpus.shards:
        for row, sample_id in enumerate(corpus.ids(entry.shard)):
            given = source[sample_id]
            caption, sound = (corpus.value(entry.shard, row, field) for field in ("caption", "sound"))
            if caption is not None:
                assert caption.decode() == given["caption"]
            if sound is not None:
                assert sound == (folder / given["sound_path"]).read_bytes()


def test_columns_of_the_source_are_kept_with_their_types(settings: dict[str, Any], snapshot: Snapshot) -> None:
    rows = Corpus(snapshot, "planted").to_arrow()
    source = manifest_rows(settings)
    assert rows.schema.field("event_timestamp").type == pa.timestamp("ns", "UTC")
    for row in rows.to_pylist():
        assert (row["label"], row["group"]) == (source[row["id"]]["label"], source[row["id"]]["group"])
        assert (row["event_timestamp"] is None) == ("added" not in source[row["id"]])
    entries = snapshot.entries(ROWS, "planted")
    assert {(each.event_min_ns is None) == (each.event_max_ns is None) for each in entries} == {True}
    assert max(each.event_max_ns or 0 for each in entries) > 1.7e18


def test_webdataset_reads_the_tars_sample_by_sample_in_the_order_of_the_rows(snapshot: Snapshot) -> None:
    corpus = Corpus(snapshot, "planted")
    seen = []
    for entry in corpus.shards:
        content = io.BytesIO(corpus.storage.read(corpus.media(entry.shard).path))
        samples = list(group_by_keys({"__url__": "x", **each} for each in tar_file_iterator(content)))
        rows = corpus.read(entry.shard).to_pylist()
        held = [row for row in rows if row["caption"]["present"] or row["sound"]["present"]]
        assert [from_tar_key(each["__key__"]) for each in samples] == [row["id"] for row in held]
        for sample, row in zip(samples, held, strict=True):
            names = {f"{field}.{row[field]['ext']}" for field in ("caption", "sound") if row[field]["present"]}
            assert {name for name in sample if not name.startswith("__")} == names
        seen += [row["id"] for row in held]
    assert {*ODD_IDS, *LONG_IDS} <= set(seen)


def test_a_tar_is_what_pythons_own_writer_makes_of_its_members(snapshot: Snapshot) -> None:
    """The stage writes tars without it, to copy less; a field's offset and size lead to its bytes."""
    corpus = Corpus(snapshot, "planted")
    for entry in corpus.shards:
        content = corpus.storage.read(corpus.media(entry.shard).path)
        again = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(content)) as tar,
            tarfile.open(fileobj=again, mode="w", format=tarfile.PAX_FORMAT) as made,
        ):
            for info in tar:
                member = tarfile.TarInfo(info.name)
                member.size = info.size
                assert (info.mtime, info.uid, info.uname, info.mode) == (0, 0, "", 0o644)
                made.addfile(member, tar.extractfile(info))
        assert again.getvalue() == content


@pytest.mark.parametrize("sizes", [(), (1, 0, 511), (9 << 20, 3, (256 << 10) - 1, 256 << 10, 5 << 20)])
def test_a_tar_of_large_values_is_hashed_as_it_is_written(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Large pieces are hashed in a thread of their own, beside the write."""
    path, values = tmp_path / "shard.tar", [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    with shard_writer.TarWriter(path) as tar:
        headers = [member_header(f"id/{number}", "image", "bin", len(raw)) for number, raw in enumerate(values)]
        offsets = [tar.add(header, raw) for header, raw in zip(headers, values, strict=True)]
    assert tar.sha256 == artefact.file_sha256(path)
    content = path.read_bytes()
    assert len(content) % tarfile.RECORDSIZE == 0
    for offset, raw in zip(offsets, values, strict=True):
        assert content[offset : offset + len(raw)] == raw
    with tarfile.open(path) as written:
        assert [written.extractfile(each).read() for each in written] == values  # type: ignore[union-attr]


def test_what_is_rejected_stands_in_quarantine_with_its_reason(snapshot: Snapshot) -> None:
    entries = snapshot.entries(QUARANTINE, "shard/planted")
    rows = [row for each in entries for row in artefact.read_table(snapshot.storage.read(each.path)).to_pylist()]
    assert {(row["field"], row["reason"]) for row in rows} == {("caption", "invalid_utf8"), ("sound", "empty")}
    assert all(row["stage"] == "shard" and row["detail"] and row["source"] for row in rows)
    corpus = Corpus(snapshot, "planted")
    for row in rows:
        where, number = corpus.locate(row["id"])
        assert corpus.read(where)[row["field"]][number].as_py()["miss_reason"] == row["reason"]
    assert sum(each.rows for each in entries) == len(rows)


def test_shards_are_full_but_the_last_and_the_catalog_names_both_files(snapshot: Snapshot) -> None:
    rows, tars = snapshot.entries(ROWS, "planted"), snapshot.entries(MEDIA, "planted")
    assert [each.rows for each in rows] == [SHARD_ROWS] * 7 + [3]
    assert [each.shard for each in rows] == [each.shard for each in tars]
    assert [each.input_sha256 for each in rows] == [each.sha256 for each in tars]
    assert [each.ids_sha256 for each in rows] == [each.ids_sha256 for each in tars]


def test_the_same_source_gives_the_same_store(settings: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "again")
    shard_corpus(storage, settings)
    assert Catalog(storage).snapshot().digest() == snapshot.digest()
    assert storage.list("corpora") == snapshot.storage.list("corpora")


def test_the_order_of_the_source_does_not_matter(settings: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    corpus = Path(settings["source"]["path"][0]).parent
    shutil.copytree(corpus, tmp_path / "corpus", copy_function=shutil.copy2)
    manifest = tmp_path / "corpus" / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(reversed(lines)))
    storage = Storage.of(tmp_path / "store")
    shard_corpus(storage, settings | {"source": {"type": "manifest", "path": [str(manifest)]}})
    assert Catalog(storage).snapshot().digest() == snapshot.digest()


class Bench:
    """A store of a small good corpus, and one task of it."""

    def __init__(self, folder: Path) -> None:
        self.settings = corpus_settings(folder / "corpus", n=12, bad=False)
        self.storage = Storage.of(folder / "store")
        shard_corpus(self.storage, self.settings)
        self.snapshot = Catalog(self.storage).snapshot()
        (plan,) = self.storage.list("corpora/planted/plans")
        sha256 = artefact.file_sha256(Path(self.storage.root) / plan)
        self.entry = self.snapshot.entries(ROWS, "planted")[0]
        self.task = shard_writer.ShardTask(self.entry.shard, plan, sha256, 0)

    def path(self, key: str) -> Path:
        return Path(self.storage.root) / key

    def write(self) -> dict[str, Any]:
        """Writes the first shard again; path -> sha256 of what it names."""
        entries = json.loads(shard_writer.ShardWriter(self.storage, self.settings).write(self.task).entries)
        return {each[4]: each[7] for each in entries}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def named(bench: Bench) -> dict[str, str]:
    return {
        each.path: each.sha256
        for each in bench.snapshot.all()
        if each.kind in (ROWS, MEDIA, QUARANTINE) and each.shard == bench.entry.shard
    }


def test_a_shard_that_is_done_is_adopted_without_reading_the_source(bench: Bench) -> None:
    before = {key: bench.path(key).stat().st_mtime_ns for key in named(bench)}
    shutil.rmtree(Path(bench.settings["source"]["path"][0]).parent / "sounds")
    assert bench.write() == named(bench)
    assert {key: bench.path(key).stat().st_mtime_ns for key in before} == before


@pytest.mark.parametrize("kind", [ROWS, MEDIA])
@pytest.mark.parametrize("fault", ["missing", "empty", "short", "flipped rows"])
def test_a_shard_that_is_damaged_is_written_anew(bench: Bench, kind: str, fault: str) -> None:
    path = bench.path(bench.snapshot.entries(kind, "planted")[0].path)
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "flipped rows" and kind == ROWS:
        path.write_bytes(flip(content, len(content) // 4))
    else:
        path.write_bytes(content[: -len(content) // 2] if fault == "short" else b"")
    assert bench.write() == named(bench)
    assert path.read_bytes() == content
    assert verify(bench.storage).ok


def test_rows_without_their_tar_do_not_count_as_done(bench: Bench) -> None:
    """The tar is written first: a kill between the two leaves a tar alone, and rows alone mean it was taken away."""
    for key in bench.storage.list("corpora/planted"):
        if key.endswith(".parquet") and "plans" not in key:
            bench.path(key).unlink()
    assert bench.write() == named(bench)


def test_a_source_that_changed_under_the_job_is_an_error(bench: Bench) -> None:
    manifest = Path(bench.settings["source"]["path"][0])
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([lines[-1], *lines[:-1]]))
    bench.path(bench.entry.path).unlink()
    with pytest.raises(InputError, match=r"the source changed while the job ran; run it again"):
        bench.write()


def test_a_second_ingest_adds_shards_and_changes_none(bench: Bench) -> None:
    manifest = Path(bench.settings["source"]["path"][0])
    more = [
        {"id": f"more/{each}", "group": f"g{each}", "label": "x", "caption": f"Number {each}."} for each in range(9)
    ]
    with manifest.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    ingest = scan(open_source(bench.settings), Known(bench.snapshot, "planted"))
    assert (ingest.samples, ingest.known, ingest.changed, ingest.gone) == (9, 12, 0, 0)
    shard_corpus(bench.storage, bench.settings)
    after = Catalog(bench.storage).snapshot()
    assert set(bench.snapshot.entries(ROWS, "planted")) < set(after.entries(ROWS, "planted"))
    assert Corpus(after, "planted").rows == 21
    again = scan(open_source(bench.settings), Known(after, "planted"))
    assert (again.samples, again.known) == (0, 21)


def test_changed_and_gone_samples_are_counted(bench: Bench) -> None:
    manifest = Path(bench.settings["source"]["path"][0])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["caption"] = "Something else."
    sound = next(row["sound_path"] for row in rows[1:-1] if row["sound_path"])
    os.utime(manifest.parent / sound, (1, 1))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    ingest = scan(open_source(bench.settings), Known(bench.snapshot, "planted"))
    # The sound was only touched.
    assert (ingest.samples, ingest.known, ingest.changed, ingest.gone) == (1, 10, 1, 1)


def test_an_id_that_stands_twice_is_refused_with_both_places(bench: Bench) -> None:
    manifest = Path(bench.settings["source"]["path"][0])
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines, lines[3]]))
    told = rf"stands twice: {manifest}, line 4 and {manifest}, line {len(lines) + 1}; ids must be unique"
    with pytest.raises(InputError, match=told):
        scan(open_source(bench.settings), Known(bench.snapshot, "other"))


def test_more_rejected_values_than_the_budget_publish_nothing_and_lose_nothing(tmp_path: Path) -> None:
    settings = corpus_settings(tmp_path / "corpus", n=24)
    storage = Storage.of(tmp_path / "store")
    with pytest.raises(BudgetExceeded, match=r"2 of \d+ values were rejected .* e\.g\. (caption|sound) of '.*raise"):
        shard_corpus(storage, settings | {"failure_budget": 0.01})
    assert Catalog(storage).snapshot().all() == []
    written = {
        key: (Path(storage.root) / key).stat().st_mtime_ns
        for key in storage.list("corpora")
        if "/plans/" not in key and "/ids/" not in key
    }
    shard_corpus(storage, settings)
    assert {key: (Path(storage.root) / key).stat().st_mtime_ns for key in written} == written
    assert verify(storage).ok
