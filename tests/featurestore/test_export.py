"""Views and corpora as upstream WebDataset reads them back."""

import gc
import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from featurestore.errors import InputError
from featurestore.export import add_member, export_webdataset
from featurestore.identity import from_tar_key
from featurestore.media import decode_sensor
from featurestore.store import FeatureStore
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import small_spec
from tests.planted import ODD_IDS, plant_bad_values, write_planted
from tests.recordings import sensor_csv

with warnings.catch_warnings():
    # webdataset 1.0.2 uses what torch and Python are about to drop.
    warnings.simplefilter("ignore")
    import webdataset

ODD_VIEWS = ("loud", "timbre")
SAMPLES = 33
MORE_IDS = (
    "ünï/字 й.png",
    "long/" + "x" * 300,
    "../../etc/passwd",
    "/absolute",
    "back\\slash",
    "trailing/",
    "a//b",
    ".hidden",
)
ALL = SAMPLES + len(ODD_IDS) + len(MORE_IDS)


def upstream(tars: list[Path], decode: bool = False) -> list[dict[str, Any]]:
    """Samples as upstream reads them: key and the bytes (or arrays and dicts) of each member."""
    with warnings.catch_warnings():
        # It leaves the files that it opened to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = webdataset.WebDataset(
            [str(tar) for tar in tars], shardshuffle=False, handler=webdataset.reraise_exception
        )
        read = list(samples.decode() if decode else samples)
        del samples
        gc.collect()
    return read


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store with bad values, with ids that WebDataset would misread, and one id that differs from another by case."""
    folder = tmp_path_factory.mktemp("odd")
    manifest = write_planted(folder / "corpus", SAMPLES)
    plant_bad_values(folder / "corpus", manifest)
    first = json.loads(manifest.read_bytes().splitlines()[0])
    with manifest.open("a") as file:
        file.writelines(json.dumps(first | {"id": each, "caption": f"of {each}"}) + "\n" for each in MORE_IDS)
    text = small_spec(folder / "corpus", folder / "store").replace("shard_rows:", "failure_budget: 20%\n  shard_rows:")
    text = text.replace("    sound:", "    image: {modality: image, from: image_path}\n    sound:")
    (folder / "spec.yaml").write_text(text)
    Runner(load(folder / "spec.yaml"), Console(quiet=True)).run(("shard", "encode"))
    return FeatureStore(folder / "store")


@pytest.fixture(scope="module")
def tars(odd: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return export_webdataset(odd, ODD_VIEWS, tmp_path_factory.mktemp("out"), raw=True)


def test_upstream_reads_every_id_in_the_order_of_the_corpus(odd: FeatureStore, tars: list[Path]) -> None:
    corpus = odd.corpus("planted")
    assert len(tars) == len(corpus.shards)
    ids = []
    for tar, shard in zip(tars, corpus.shards, strict=True):
        own = [from_tar_key(sample["__key__"]) for sample in upstream([tar])]
        assert own == corpus.ids(shard.shard)
        ids += own
    assert len(ids) == ALL
    assert {*ODD_IDS, *MORE_IDS} < set(ids)


def test_upstream_reads_vectors_bit_for_bit_and_none_where_one_is_missing(odd: FeatureStore, tars: list[Path]) -> None:
    views = {name: odd.view(name) for name in ODD_VIEWS}
    rows = {name: view.matrix() for name, view in views.items()}
    assert not all(present.all() for _, present in rows.values())
    for row, sample in enumerate(upstream(tars, decode=True)):
        for name, (matrix, present) in rows.items():
            found = sample.get(f"{name}.npy")
            assert (found is not None) == present[row]
            if found is not None:
                assert found.dtype == np.float32
                assert found.tobytes() == matrix[row].tobytes()
    assert row == ALL - 1


def test_upstream_reads_columns_and_raw_fields_beside_the_vectors(odd: FeatureStore, tars: list[Path]) -> None:
    corpus = odd.corpus("planted")
    columns = [row for shard in corpus.shards for row in corpus.columns(shard.shard)]
    kinds: set[str] = set()
    for about, sample in zip(columns, upstream(tars), strict=True):
        told = json.loads(sample["json"])
        assert told == about
        assert told["id"] == from_tar_key(sample["__key__"])
        assert told.keys() == {"id", "group", "label", "event_timestamp", "note_path"}
        members = {name: raw for name, raw in sample.items() if not name.startswith("__") and name != "json"}
        raw = {name: value for name, value in members.items() if not name.endswith(".npy")}
        shard, row = corpus.locate(about["id"])
        stored = {field: corpus.value(shard, row, field) for field in corpus.fields}
        assert {name.partition(".")[0]: value for name, value in raw.items()} == {
            field: value for field, value in stored.items() if value is not None
        }
        kinds |= members.keys()
    good = {"loud.npy", "timbre.npy", "caption.txt", "image.png", "image.jpg", "sound.ogg", "sound.wav"}
    # A sound that is a text file is found out only when it is decoded.
    assert kinds == good | {"sound.txt"}


def test_an_export_without_raw_fields_holds_vectors_and_columns_alone(odd: FeatureStore, tmp_path: Path) -> None:
    written = export_webdataset(odd, ["loud"], tmp_path)
    for sample in upstream(written):
        assert {name for name in sample if not name.startswith("__")} <= {"json", "loud.npy"}


def test_the_corpus_itself_is_read_by_upstream_with_no_sample_merged_or_split(odd: FeatureStore) -> None:
    corpus = odd.corpus("planted")
    read = []
    for shard in corpus.shards:
        path = Path(odd.storage.uri) / corpus.media(shard.shard).path
        for sample in upstream([path]):
            read.append(from_tar_key(sample["__key__"]))
            place = corpus.locate(read[-1])
            fields = {name.partition(".")[0]: value for name, value in sample.items() if not name.startswith("__")}
            assert fields == {f: raw for f in corpus.fields if (raw := corpus.value(*place, f)) is not None}
    with_values = [
        sample_id
        for shard in corpus.shards
        for sample_id in corpus.ids(shard.shard)
        if any(corpus.value(*corpus.locate(sample_id), field) is not None for field in corpus.fields)
    ]
    assert read == with_values
    assert {*ODD_IDS, *MORE_IDS} < set(read)


def test_upstream_itself_merges_keys_as_they_are(tmp_path: Path) -> None:
    """What the escaping is for: without it this very reader gives one sample for two."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "clip_00.37.jpg", b"first")
        add_member(tar, "clip_00.42.jpg", b"second")
    assert [sample["__key__"] for sample in upstream([tmp_path / "a.tar"])] == ["clip_00"]


def test_upstream_reads_the_readings_of_a_sensor_beside_the_vector_of_a_view_of_its_name(tmp_path: Path) -> None:
    times = np.arange(0, 4, 0.05)
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        sensor_csv(tmp_path / "corpus" / f"{name}.csv", times, np.stack([np.sin(times), times], axis=1))
    rows = [{"id": name, "motion": f"{name}.csv"} for name in ("a", "b")]
    (tmp_path / "corpus" / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "spec.yaml").write_text(f"""\
version: 1
store: {{uri: {tmp_path}/store}}
corpus:
  name: moved
  source: {{type: streams, path: {tmp_path}/corpus/m.jsonl, windows: {{every: 1s}}}}
  columns: {{id: id}}
  fields:
    motion: {{modality: sensor, from: motion, policy: window}}
views:
  motion: {{field: motion, encoder: sensor, options: {{channels: 2}}}}
""")
    Runner(load(tmp_path / "spec.yaml"), Console(quiet=True)).run()
    store = FeatureStore(tmp_path / "store")
    (tar,) = export_webdataset(store, ["motion"], tmp_path / "out", raw=True)
    samples, (matrix, present) = upstream([tar], decode=True), store.view("motion").matrix()
    assert len(samples) == len(matrix) == 8
    assert present.all()
    corpus = store.corpus("moved")
    for vector, sample in zip(matrix, samples, strict=True):
        assert {name for name in sample if not name.startswith("__")} == {"json", "motion.npy", "motion.raw.npy"}
        assert sample["motion.npy"].tobytes() == vector.tobytes()
        raw = corpus.value(*corpus.locate(from_tar_key(sample["__key__"])), "motion")
        assert raw is not None
        np.testing.assert_array_equal(sample["motion.raw.npy"], decode_sensor(raw))


def test_two_exports_have_equal_bytes(odd: FeatureStore, tars: list[Path], tmp_path: Path) -> None:
    again = export_webdataset(FeatureStore(odd.storage), ODD_VIEWS, tmp_path, raw=True)
    assert [path.name for path in again] == [path.name for path in tars]
    for one, two in zip(tars, again, strict=True):
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()


def test_arrays_are_written_without_pickle(tars: list[Path]) -> None:
    arrays = [value for sample in upstream(tars) for name, value in sample.items() if name.endswith(".npy")]
    assert arrays
    for raw in arrays:
        assert np.load(io.BytesIO(raw), allow_pickle=False).ndim == 1


def test_a_folder_that_holds_files_or_no_views_are_refused(odd: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        export_webdataset(odd, ["loud"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="name at least one view; the store has: loud, short, timbre"):
        export_webdataset(odd, [], tmp_path / "new")
    assert not (tmp_path / "new").exists()
