"""`media: reference`: the vectors and hits of a copy, no media in the store, and no value that is not the one sharded."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from featurestore import artefact, files, references
from featurestore.catalog import Catalog
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.errors import AlignmentError, InputError, NotFound, StoreError
from featurestore.export import export_webdataset
from featurestore.identity import input_digest
from featurestore.search import Hits
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import compact, plan
from jobs import spec as specs
from jobs.report import rejected
from jobs.run import Runner
from pipelines import dataflow, encode, encode_plan
from pipelines.shard_writer import ShardTask, ShardWriter
from pipelines.sources.files import FileValue, Part
from tests.conftest import check_same, small_spec
from tests.faults.runs import Run, start_server
from tests.loopback_s3 import loopback_s3
from tests.planted import planted_spec, write_planted

SAMPLES = 48
FIELDS = {"image", "caption", "note", "sound"}


def referring(text: str) -> str:
    """A spec whose values stay where they are."""
    return text.replace("  shard_rows:", "  media: reference\n  shard_rows:")


def run(text: str, stages: tuple[str, ...] = plan.STAGES) -> FeatureStore:
    spec = specs.parse(text, "spec")
    Runner(spec, Console(quiet=True)).run(stages)
    return FeatureStore(spec.store)


def raw_bytes(corpus: Path) -> int:
    return sum(
        path.stat().st_size for path in corpus.rglob("*") if path.suffix in {".png", ".jpg", ".wav", ".ogg", ".txt"}
    )


def stored_bytes(store: FeatureStore, folder: str) -> int:
    return sum(store.storage.list(folder).values())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FeatureStore, FeatureStore]:
    """A corpus, and all stages over it by copy and by reference."""
    folder = tmp_path_factory.mktemp("both")
    write_planted(folder / "corpus", SAMPLES)
    copied = run(planted_spec(folder / "corpus", folder / "copied"))
    return folder / "corpus", copied, run(referring(planted_spec(folder / "corpus", folder / "referring")))


def test_every_value_and_vector_is_that_of_a_copy(both: tuple[Path, FeatureStore, FeatureStore]) -> None:
    _, copied, referring = both
    one, other = copied.corpus("planted"), referring.corpus("planted")
    for entry, same in zip(one.shards, other.shards, strict=True):
        assert entry.ids_sha256 == same.ids_sha256
        for field in FIELDS:
            assert list(one.values(entry.shard, field)) == list(other.values(same.shard, field))
    for name in copied.views():
        (vectors, present), (found, there) = copied.view(name).matrix(), referring.view(name).matrix()
        assert np.array_equal(vectors, found, equal_nan=True)
        assert np.array_equal(present, there)
    for name in copied.spaces():
        left, right = (store.space(name).projections for store in both[1:])
        assert all(np.array_equal(a.matrix, b.matrix) for a, b in zip(left.values(), right.values(), strict=True))


def _told(hits: Hits) -> list[Any]:
    return [(hit.id, hit.score, hit.view, hit.columns, hit.text, hit.raw("image"), hit.raw("audio")) for hit in hits]


def test_a_search_finds_what_it_finds_in_a_copy_and_opens_it(both: tuple[Path, FeatureStore, FeatureStore]) -> None:
    found = [_told(store.search("seen", text="a red circle", k=9)) for store in both[1:]]
    assert found[0] == found[1]
    assert any(row[5] for row in found[0])
    assert any(row[6] for row in found[0])


def test_the_store_holds_no_media_but_the_texts_of_the_manifest(both: tuple[Path, FeatureStore, FeatureStore]) -> None:
    folder, copied, referring = both
    media = raw_bytes(folder)
    assert stored_bytes(copied, "corpora") - stored_bytes(referring, "corpora") > media
    for entry in referring.snapshot.entries(MEDIA, "planted"):
        assert b".caption.txt" in referring.storage.read(entry.path)
        assert not any(
            mark in referring.storage.read(entry.path) for mark in (b"\x89PNG", b"RIFF", b"OggS", b"\xff\xd8\xff")
        )
    for row in referring.corpus("planted").to_arrow().to_pylist():
        assert row["caption"]["uri"] is None
        for field in FIELDS - {"caption"}:
            assert row[field]["uri"] == (row[field]["source"] if row[field]["present"] else None)


def test_a_store_by_reference_is_proven_and_exported_as_a_copy_is(
    both: tuple[Path, FeatureStore, FeatureStore], tmp_path: Path
) -> None:
    for store in both[1:]:
        assert list(map(str, verify(store.storage).findings)) == []
    one, other = (
        export_webdataset(store, ["sound"], tmp_path / name, raw=True)
        for name, store in zip(("copied", "referring"), both[1:], strict=True)
    )
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


class Sounds:
    """48 samples whose sounds and captions are files: shards without a tar. Two views; a folder that may be changed."""

    def __init__(self, folder: Path, media: str = "reference") -> None:
        self.corpus, self.folder = folder / "corpus", folder
        if not self.corpus.exists():
            manifest = write_planted(self.corpus, SAMPLES)
            rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
            for number, row in enumerate(rows):
                if caption := row.pop("caption"):
                    row["caption"] = f"{number}.txt"
                    (self.corpus / row["caption"]).write_text(caption)
                    os.utime(self.corpus / row["caption"], (1, 1))
            manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = small_spec(self.corpus, folder / "store").replace("from: caption", "from: caption, read: file")
        text = text.replace("  shard_rows:", f"  media: {media}\n  failure_budget: 20%\n  shard_rows:")
        self.text = text.partition("  timbre:")[0]

    def run(self, *stages: str) -> FeatureStore:
        return run(self.text, stages or ("shard", "encode"))

    def sounds(self) -> list[tuple[str, int, str, Path]]:
        """(shard, row, id, file) of every sound."""
        corpus = FeatureStore(specs.parse(self.text, "spec").store).corpus("planted")
        return [
            (entry.shard, row, each["id"], self.corpus / each["sound"]["uri"])
            for entry in corpus.shards
            for row, each in enumerate(corpus.read(entry.shard).to_pylist())
            if each["sound"]["present"]
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    made = Sounds(tmp_path_factory.mktemp("sounds"))
    made.run()
    return made


@pytest.fixture
def sounds(whole: Sounds, tmp_path: Path) -> Sounds:
    """A copy of its own, of the corpus elsewhere and with other times."""
    shutil.copytree(whole.folder, tmp_path / "moved")
    return Sounds(tmp_path / "moved")


def test_shards_whose_values_are_all_files_have_no_tar(whole: Sounds) -> None:
    store = whole.run()
    assert [key for key in store.storage.list() if key.endswith(".tar")] == []
    assert store.snapshot.entries(MEDIA, "planted") == []
    assert {entry.input_sha256 for entry in store.snapshot.entries(ROWS, "planted")} == {""}
    assert verify(store.storage).ok
    assert {step.state for step in plan.steps(specs.parse(whole.text, "spec"), store.snapshot)} == {plan.FRESH}


def test_the_bytes_do_not_depend_on_where_the_corpus_lies(whole: Sounds, tmp_path: Path) -> None:
    shutil.copytree(whole.corpus, tmp_path / "elsewhere" / "corpus", copy_function=shutil.copy2)
    check_same(Sounds(tmp_path / "elsewhere").run(), whole.run())


def test_a_corpus_that_moved_is_found_by_its_spec_and_nothing_is_made_again(sounds: Sounds) -> None:
    before = FeatureStore(sounds.folder / "store").digest()
    store = sounds.run()
    assert store.digest() == before
    assert verify(store.storage).ok
    shard, row, _, path = sounds.sounds()[0]
    assert store.corpus("planted").value(shard, row, "sound") == path.read_bytes()


def spoiled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Path.unlink, "gone"), (spoiled, "changed"), (cut, "changed"), (piped, "gone")],
    ids=["deleted", "changed", "cut", "pipe"],
)
def test_a_value_that_is_no_longer_there_is_told_and_never_another(
    sounds: Sounds, fault: Callable[[Path], None], reason: str
) -> None:
    shard, row, sample_id, path = sounds.sounds()[3]
    fault(path)
    store = FeatureStore(specs.parse(sounds.text, "spec").store)
    assert verify(store.storage, level="rows").ok
    (finding,) = verify(store.storage).findings
    assert (finding.kind, finding.shard, finding.row, finding.id) == (ROWS, shard, row, sample_id)
    assert str(path) in finding.problem
    assert "put the file back" in finding.mend
    told = "gone since" if reason == "gone" else "not the value that was stored"
    with pytest.raises(AlignmentError, match=rf"the sound of '{sample_id}' \(shard .*{told}.*braid shard"):
        store.corpus("planted").value(shard, row, "sound")

    sounds.text = sounds.text.replace("encoder: log-mel", "encoder: mfcc").replace(
        "options: {batch_size: 32}", "options: {}"
    )
    view = sounds.run("encode").view("loud")
    (missing,) = view.take([sample_id]).to_pylist()
    assert (missing["present"], missing["miss_reason"], missing["embedding"]) == (False, reason, None)
    (entry,) = store.__class__(store.storage).snapshot.entries(QUARANTINE, "encode/loud")
    (rejected,) = artefact.read_table(store.storage.read(entry.path)).to_pylist()
    assert (rejected["id"], rejected["reason"], rejected["stage"]) == (sample_id, reason, "encode")
    right = [each for each in sounds.sounds() if each[2] != sample_id]
    assert view.take([each[2] for each in right])["present"].to_pylist() == [True] * len(right)


def test_two_files_that_were_swapped_are_both_found(sounds: Sounds) -> None:
    (_, _, one, first), (_, _, other, second) = sounds.sounds()[1:3]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    store = FeatureStore(specs.parse(sounds.text, "spec").store)
    assert {finding.id for finding in verify(store.storage).findings} == {one, other}
    sounds.text = sounds.text.replace("batch_size: 32", "n_mels: 8")
    reasons = sounds.run("encode").view("loud").take([one, other])["miss_reason"].to_pylist()
    assert reasons == ["changed", "changed"]


def test_a_changed_file_comes_in_with_the_next_ingest_and_nothing_is_left_to_find(sounds: Sounds) -> None:
    _, _, sample_id, path = sounds.sounds()[5]
    spoiled(path)
    store = sounds.run()
    corpus = store.corpus("planted")
    assert corpus.value(*corpus.locate(sample_id), "sound") == path.read_bytes()
    assert corpus.rows == SAMPLES
    assert list(map(str, verify(store.storage).findings)) == []
    spec = specs.parse(sounds.text, "spec")
    compact.compact(spec, Console(quiet=True))
    after = FeatureStore(spec.store)
    assert [key for key in after.storage.list() if key.endswith(".tar")] == []
    assert after.corpus("planted").value(*after.corpus("planted").locate(sample_id), "sound") == path.read_bytes()
    assert {each["sound"]["uri"] for each in after.corpus("planted").to_arrow().to_pylist()} == {
        each["sound"]["uri"] for each in corpus.to_arrow().to_pylist()
    }
    assert verify(after.storage).ok


def test_what_a_tombstone_is_of_is_no_failure_of_a_later_view(sounds: Sounds) -> None:
    shard, row, sample_id, path = sounds.sounds()[5]
    spoiled(path)
    sounds.run("shard")
    sounds.text = sounds.text.replace("failure_budget: 20%", "failure_budget: 0%").replace("  loud:", "  later:")
    store = sounds.run("encode")
    view = store.view("later")
    assert {each["id"]: each["present"] for each in view.to_arrow(["id", "present"]).to_pylist()}[sample_id]
    stored = store.snapshot.entries("view", "later").find(shard)
    assert stored is not None
    assert artefact.read_table(store.storage.read(stored.path))["miss_reason"][row].as_py() == "changed"
    # The other view has not yet what was taken in.
    assert {(each.name, "incomplete" in each.problem) for each in verify(store.storage).findings} == {("loud", True)}


def test_a_file_that_cannot_be_read_now_fails_the_job_and_loses_nothing(
    sounds: Sounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds.text = sounds.text.replace("batch_size: 32", "n_mels: 8")

    def refuses(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_part", refuses)
        with pytest.raises(StoreError, match=r"cannot be read now: Permission denied; mend"):
            sounds.run("encode")
    assert sounds.run("encode").view("loud").to_arrow()["miss_reason"].drop_null().unique().to_pylist() == ["absent"]


def test_many_values_are_in_flight_at_once(sounds: Sounds, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds.text = sounds.text.replace("batch_size: 32", "batch_size: 4")
    plain, lock, now, most = files._part, threading.Lock(), 0, 0

    def slow(*place: Any) -> bytes:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.02)
        with lock:
            now -= 1
        return plain(*place)

    monkeypatch.setattr(files, "_part", slow)
    sounds.run("encode")
    assert most >= 6


def test_what_is_fetched_ahead_is_bounded(sounds: Sounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more fit, one batch of each of the two shards in flight is."""
    monkeypatch.setattr(encode, "_FETCH_AHEAD_BYTES", 1)
    fetch, proven, lock, now, most = encode.ShardEncoder._fetch, encode.ShardEncoder._proven, threading.Lock(), 0, 0

    def begun(self: encode.ShardEncoder, value: encode.Value) -> Any:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        return fetch(self, value)

    def done(self: encode.ShardEncoder, task: Any, batch: Any, outcomes: Any) -> Any:
        nonlocal now
        with lock:
            now -= len(batch)
        return proven(self, task, batch, outcomes)

    monkeypatch.setattr(encode.ShardEncoder, "_fetch", begun)
    monkeypatch.setattr(encode.ShardEncoder, "_proven", done)
    sounds.text = sounds.text.replace("batch_size: 32", "batch_size: 1")
    assert sounds.run("encode").view("loud").rows == SAMPLES
    assert (now, most) in ((0, 1), (0, 2))


def test_nothing_outside_of_the_root_that_the_reader_names_is_opened(sounds: Sounds) -> None:
    bare = FeatureStore(sounds.folder / "store")
    shard, row, _, path = sounds.sounds()[0]
    with pytest.raises(StoreError, match=r"refers to values outside the store, and nothing says where: name the spec"):
        bare.corpus("planted").value(shard, row, "sound")
    findings = verify(bare.storage).findings
    assert len(findings) == len(bare.corpus("planted").shards)
    assert all("cannot be proven" in each.problem and "media_root" in each.mend for each in findings)
    named = Storage(uri=str(sounds.folder / "store"), media_root=str(sounds.corpus))
    assert FeatureStore(named).corpus("planted").value(shard, row, "sound") == path.read_bytes()


@pytest.mark.parametrize("reference", ["../secret", "a/../../secret", "%2e%2e/secret", "a\\..\\..\\secret", "x\0"])
def test_a_reference_that_leads_out_of_the_root_is_not_followed(tmp_path: Path, reference: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "a").mkdir(parents=True)
    for root in (str(tmp_path / "root"), "https://localhost/root", "s3://bucket/root"):
        storage = Storage(uri=str(tmp_path / "store"), media_root=root)
        with pytest.raises(AlignmentError, match=r"no reference to a value below"):
            references.read_value(storage, reference, 0, 6, input_digest(b"secret"))


@pytest.mark.parametrize("reference", ["file://{}/secret", "{}/secret", "secret::file://{}/secret", "file:/{}/secret"])
def test_an_address_in_place_of_a_reference_is_a_name_below_the_root(tmp_path: Path, reference: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    storage = Storage(uri=str(tmp_path / "store"), media_root=str(tmp_path / "root"))
    with pytest.raises(NotFound, match="gone since"):
        references.read_value(storage, reference.format(tmp_path), 0, 6, input_digest(b"secret"))


@pytest.mark.parametrize(("offset", "size"), [(-1, 6), (0, 0), (0, -1), (0, (256 << 20) + 1), (0, 1 << 62)])
def test_a_range_that_no_value_has_is_not_read(tmp_path: Path, offset: int, size: int) -> None:
    (tmp_path / "a").write_bytes(b"secret")
    storage = Storage(uri=str(tmp_path / "store"), media_root=str(tmp_path))
    with pytest.raises(AlignmentError, match="no reference to a value"):
        references.read_value(storage, "a", offset, size, input_digest(b"secret"))


@pytest.mark.parametrize(
    ("root", "uri", "expected"),
    [
        ("/data", "file:///data/a/b.png", "a/b.png"),
        ("/data/", "file:///data/x/../a.png", "a.png"),
        ("/", "/etc/x", "etc/x"),
        ("file:///data", "local:///data/é%20.png", "é%20.png"),
        ("s3://b/k/", "s3://b/k/a/b", "a/b"),
        ("s3://b", "s3://b/k", "k"),
        ("https://h/x", "https://h/x/a.png?v=1", "a.png?v=1"),
        ("/data", "file:///data/\udcff.png", None),
        ("s3://b", "s3://b/x/../y", None),
    ],
)
def test_a_reference_is_relative_to_the_root(tmp_path: Path, root: str, uri: str, expected: str | None) -> None:
    assert references.relative(Storage(uri=str(tmp_path), media_root=root), uri) == expected


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/data", "/data/m.jsonl", "m.jsonl"),
        ("/data/media", "file:///data/m.jsonl", "../m.jsonl"),
        ("s3://b/a", "s3://b/a/x/m.jsonl", "x/m.jsonl"),
        ("s3://b/a", "s3://c/m.jsonl", "../../c/m.jsonl"),
        ("s3://b/a", "/data/m.jsonl", "s3://b/a"),
    ],
)
def test_what_is_taken_up_of_an_earlier_run_has_the_same_root(
    tmp_path: Path, root: str, path: str, expected: str
) -> None:
    assert references.from_root(Storage(uri=str(tmp_path), media_root=root), path) == expected


@pytest.mark.parametrize("uri", ["file:///database/a", "file:///data/../etc/a", "s3://data/a", "/etc/passwd"])
def test_a_value_outside_of_the_root_is_not_referred_to(tmp_path: Path, uri: str) -> None:
    with pytest.raises(
        InputError, match=r"lies outside of /data; name a folder or bucket that holds all values in store\.m"
    ):
        references.relative(Storage(uri=str(tmp_path), media_root="/data"), uri)


def test_a_value_outside_of_the_root_is_rejected_and_in_where_a_larger_one_is_named(tmp_path: Path) -> None:
    made = Sounds(tmp_path)
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    outside = shutil.move(made.corpus / rows[0]["sound_path"], tmp_path / "outside.wav")
    rows[0]["sound_path"] = str(outside)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bad,) = [row for row in rejected(made.run("shard"), "planted") if row["reason"] == "outside"]
    assert (bad["id"], bad["field"]) == (rows[0]["id"], "sound")
    made.text = made.text.replace(f"{tmp_path}/store", f"{tmp_path}/other, media_root: {tmp_path}")
    corpus = made.run("shard").corpus("planted")
    assert corpus.rows == SAMPLES
    assert corpus.value(*corpus.locate(rows[0]["id"]), "sound") == Path(outside).read_bytes()


def test_a_range_of_a_file_is_a_value_and_what_has_no_file_goes_into_the_tar(tmp_path: Path) -> None:
    (tmp_path / "two.bin").write_bytes(b"onetwo")
    assert Part(f"file://{tmp_path}/two.bin", 3, 3, "", "it").address == (f"file://{tmp_path}/two.bin", 3)
    assert FileValue("s3://b/k", "it").address == ("s3://b/k", 0)
    storage = Storage(uri=str(tmp_path / "store"), media_root=str(tmp_path))
    assert references.read_value(storage, "two.bin", 3, 3, input_digest(b"two")) == b"two"


@pytest.mark.parametrize(
    "root", ["", "ftp://h/x", "s3://", "s3://k:s@b", "https://h/../x", "s3://b/x::file:///etc", "a\nb"]
)
def test_a_root_that_is_none_is_refused(root: str) -> None:
    with pytest.raises(InputError, match=r"media_root.*is no root of values; allowed"):
        Storage.from_json(json.dumps({"uri": "/x", "media_root": root}))


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("s3://b/a/m.jsonl", "s3://b/a"),
        ("s3://b/a/{00..99}/m.jsonl", "s3://b/a"),
        ('["s3://b/a/1.jsonl", "s3://b/c/2.jsonl"]', "s3://b"),
        ("/data/x*.jsonl", "/data"),
        ("here/m.jsonl", f"{os.getcwd()}/here"),
        ("m.jsonl", os.getcwd()),
    ],
)
def test_the_root_is_the_folder_of_the_source(path: str, root: str) -> None:
    tree = yaml.safe_load(referring(small_spec(Path("/c"), Path("/s"))))
    tree["corpus"]["source"]["path"] = yaml.safe_load(path)
    assert specs.parse(yaml.safe_dump(tree), "spec").store.media_root == root
    tree["store"]["media_root"] = "gs://other/place"
    assert specs.parse(yaml.safe_dump(tree), "spec").store.media_root == "gs://other/place"


@pytest.mark.parametrize("path", [["s3://a/m.jsonl", "/b/m.jsonl"], ["s3://a/m.jsonl", "s3://b/m.jsonl"]])
def test_sources_that_have_no_folder_in_common_need_a_root(path: list[str]) -> None:
    tree = yaml.safe_load(referring(small_spec(Path("/c"), Path("/s"))))
    tree["corpus"]["source"]["path"] = path
    with pytest.raises(
        InputError, match=r"corpus\.media: 'reference' is wrong: no one folder or bucket holds .* media: copy"
    ):
        specs.parse(yaml.safe_dump(tree), "spec")


def test_a_copied_corpus_is_not_continued_by_reference(both: tuple[Path, FeatureStore, FeatureStore]) -> None:
    folder, copied, _ = both
    spec = specs.parse(referring(planted_spec(folder, copied.storage.root)), "spec")
    with pytest.raises(InputError, match=r"corpus\.media: 'reference' where corpus 'planted' was stored with 'copy'"):
        plan.steps(spec, copied.snapshot)


def test_dataflow_is_not_given_a_corpus_of_this_machine(tmp_path: Path) -> None:
    args = [
        "--runner=DataflowRunner",
        "--project=p",
        "--region=r",
        "--temp_location=gs://b/t",
        "--sdk_container_image=i",
    ]
    storage = Storage(uri="s3://bucket/store", media_root=str(tmp_path))
    with pytest.raises(InputError, match=r"refers to values below .* a folder of this machine, .*as store.media_root"):
        dataflow.job_args(args, "encode", "loud", storage)


def test_a_shard_without_a_tar_is_adopted_and_never_one_of_a_copy(whole: Sounds, tmp_path: Path) -> None:
    shutil.copytree(whole.folder / "store", tmp_path / "store")
    spec = specs.parse(whole.text.replace(str(whole.folder / "store"), str(tmp_path / "store")), "spec")
    snapshot, corpus = Catalog(spec.store).snapshot(), plan.corpus_dict(spec)
    entry = snapshot.entries(ROWS, "planted")[0]
    (planned,) = (key for key in spec.store.list("corpora/planted/plans") if key.endswith(".parquet"))
    task = ShardTask(entry.shard, planned, artefact.file_sha256(tmp_path / "store" / planned), int(entry.shard[-5:]))
    before = (tmp_path / "store" / entry.path).stat().st_mtime_ns
    made = json.loads(ShardWriter(spec.store, corpus).write(task).entries)
    assert [each[4] for each in made if each[0] == ROWS] == [entry.path]
    assert (tmp_path / "store" / entry.path).stat().st_mtime_ns == before
    copied = json.loads(ShardWriter(spec.store, corpus | {"media": "copy"}).write(task).entries)
    assert [each[0] for each in copied] == [ROWS, MEDIA]


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(whole: Sounds, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(whole.text.replace(str(whole.folder / "store"), str(tmp_path / "store")))
    server = start_server()
    storage = Storage.of(tmp_path / "store")
    for done in (2, 5):
        with Run(server, spec) as killed:
            while killed.is_alive() and sum(key.endswith(".parquet") for key in storage.list("corpora/planted")) < done:
                time.sleep(0.001)
            killed.kill()
    with Run(server, spec) as last:
        last.check_ended_well()
    check_same(FeatureStore(tmp_path / "store"), FeatureStore(whole.folder / "store"))


def test_the_largest_shard_without_a_tar_comes_first(whole: Sounds) -> None:
    spec = specs.parse(whole.text, "spec")
    snapshot = FeatureStore(spec.store).snapshot
    planned = encode_plan.view_plan("new", "planted", "sound", "mfcc", {}, "audio")
    rows = [task.rows for task in encode_plan.stale(snapshot, planned, {})]
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == len(Corpus(snapshot, "planted").shards)


def test_values_in_an_object_store_are_read_where_they_are(
    whole: Sounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_s3() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", "eu-west-1")
        fs = fsspec.filesystem("s3")
        fs.mkdir("shelf")
        fs.put(f"{whole.corpus}/", "shelf/corpus/", recursive=True)
        text = whole.text.replace(str(whole.corpus), "s3://shelf/corpus")
        store = run(text.replace(str(whole.folder / "store"), str(tmp_path / "store")), ("shard", "encode"))
        assert store.storage.media_root == "s3://shelf/corpus"
        local = FeatureStore(whole.folder / "store").view("loud").to_arrow(["id", "embedding"]).sort_by("id")
        assert store.view("loud").to_arrow(["id", "embedding"]).sort_by("id") == local
        assert verify(store.storage).ok
        corpus = store.corpus("planted")
        _, _, sample_id, path = whole.sounds()[0]
        gone, key = f"s3://shelf/corpus/{path.relative_to(whole.corpus)}", corpus.locate(sample_id)
        assert corpus.value(*key, "sound") == path.read_bytes()
        fs.rm_file(gone)
        (finding,) = verify(store.storage).findings
        assert (finding.id, gone in finding.problem) == (sample_id, True)
        with pytest.raises(AlignmentError, match="gone since"):
            corpus.value(*key, "sound")
        fs.pipe_file(gone, b"another sound")
        (finding,) = verify(store.storage).findings
        assert "not the value that was stored" in finding.problem
    fsspec.filesystem("s3").clear_instance_cache()
    assert isinstance(local, pa.Table)
