import gc
import hashlib
import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from featurestore import vectors
from featurestore.errors import InputError
from featurestore.identity import from_tar_key
from featurestore.training import training_table, views_of, write_split

CLASSES = ["cat", "dog", "owl"]


def columns(n, seed=0):
    random = np.random.default_rng(seed)
    image = random.normal(size=(n, 4)).astype(np.float32)
    sound = random.normal(size=(n, 3)).astype(np.float16)
    sound[::3] = np.nan
    scalars = {
        "id": [f"a/{i}.5" for i in range(n)],
        "group": [f"g{i // 2}" for i in range(n)],
        "label": [CLASSES[i % 3] for i in range(n)],
        "split": ["train"] * n,
        "fold": np.arange(n) % 5,
        "weight": np.linspace(0.5, 1.5, n),
    }
    reasons = {"image": [None] * n, "sound": [None if i % 3 else "absent" for i in range(n)]}
    preds = {view: np.log(random.dirichlet(np.ones(3), size=n)).astype(np.float32) for view in ("image", "sound")}
    return scalars, {"image": image, "sound": sound}, reasons, preds


def training_rows(n, seed=0):
    return training_table(*columns(n, seed))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_table_has_the_stated_columns_and_no_nulls_but_the_miss_reasons():
    rows = training_rows(7)
    expected = ["id", "group", "label", "split", "fold", "weight"]
    for view in ("image", "sound"):
        expected += [view, f"{view}_present", f"{view}_miss_reason", f"{view}_pred"]
    assert rows.schema.names == [*expected, "row_digest"]
    assert [field.name for field in rows.schema if field.nullable] == ["image_miss_reason", "sound_miss_reason"]
    assert (rows.schema.field("fold").type, rows.schema.field("weight").type) == (pa.int8(), pa.float32())
    assert rows["sound_present"].to_pylist() == [False, True, True, False, True, True, False]
    assert np.isnan(vectors.matrix(rows["sound"])[[0, 3, 6]]).all()
    assert views_of(rows.schema) == ["image", "sound"]


def test_parquet_gives_back_equal_rows_in_files_of_the_asked_length(tmp_path):
    rows = training_rows(25)
    written = write_split(rows, tmp_path, "train", 10)
    assert [path.name for path in written] == [f"train-0000{i}.{kind}" for i in range(3) for kind in ("parquet", "tar")]
    back = [pq.read_table(path) for path in written if path.suffix == ".parquet"]
    assert [part.num_rows for part in back] == [10, 10, 5]
    back = pa.concat_tables(back)
    assert back.schema == rows.schema
    for name in rows.column_names:
        if pa.types.is_fixed_size_list(rows.schema.field(name).type):
            np.testing.assert_array_equal(vectors.matrix(back[name]), vectors.matrix(rows[name]))
        else:
            assert back[name].to_pylist() == rows[name].to_pylist()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_upstream_webdataset_reads_equal_vectors_and_ids_in_order(tmp_path):
    rows = training_rows(25)
    tars = [str(path) for path in write_split(rows, tmp_path, "train", 10) if path.suffix == ".tar"]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    gc.collect()
    assert [sample["json"]["id"] for sample in samples] == rows["id"].to_pylist()
    assert [from_tar_key(sample["__key__"]) for sample in samples] == rows["id"].to_pylist()
    for row, sample in enumerate(samples):
        assert sample["json"]["label"] == rows["label"][row].as_py()
        assert sample["json"]["fold"] == rows["fold"][row].as_py()
        for view in ("image", "sound"):
            assert sample["json"][f"{view}_present"] == (f"{view}.npy" in sample)
            np.testing.assert_array_equal(sample[f"{view}_pred.npy"], vectors.matrix(rows[f"{view}_pred"])[row])
            if f"{view}.npy" in sample:
                np.testing.assert_array_equal(sample[f"{view}.npy"], vectors.matrix(rows[view])[row])
                assert sample[f"{view}.npy"].dtype == vectors.matrix(rows[view]).dtype
    assert sum("sound.npy" in sample for sample in samples) == 16


def test_tars_have_no_clock_no_owner_no_pickle_and_adjacent_samples(tmp_path):
    path = write_split(training_rows(6), tmp_path, "train", 10)[1]
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        keys = [member.name.split(".")[0] for member in members]
        assert [m.name.partition(".")[2] for m in members[:5]] == [
            "image.npy",
            "image_pred.npy",
            "json",
            "sound_pred.npy",  # The first sample has no sound.
            "image.npy",
        ]
        assert len([1 for a, b in pairwise(keys) if a != b]) == 5
        for member in members:
            content = tar.extractfile(member).read()
            if member.name.endswith(".npy"):
                np.load(io.BytesIO(content), allow_pickle=False)
            else:
                json.loads(content)


def test_writing_twice_gives_the_same_bytes_whatever_the_chunks(tmp_path):
    rows = training_rows(25)
    write_split(rows, tmp_path / "a", "train", 10)
    write_split(pa.concat_tables([rows.slice(0, 7), rows.slice(7)]), tmp_path / "b", "train", 10)
    write_split(rows, tmp_path / "b", "train", 10)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 6


def test_a_split_without_rows_is_one_empty_file_of_each_kind(tmp_path):
    parquet, tar = write_split(training_rows(3).slice(0, 0), tmp_path, "val", 10)
    assert pq.read_table(parquet).schema == training_rows(3).schema
    with tarfile.open(tar) as opened:
        assert opened.getmembers() == []


def test_wrong_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="rows of split train among those of test"):
        write_split(training_rows(3), tmp_path, "test", 10)
    with pytest.raises(InputError, match="0 rows per file; at least 1"):
        write_split(training_rows(3), tmp_path, "train", 0)
    scalars, embeddings, reasons, preds = columns(5)
    with pytest.raises(InputError, match="columns fold are lacking"):
        training_table({k: v for k, v in scalars.items() if k != "fold"}, embeddings, reasons, preds)
    with pytest.raises(
        InputError, match=r"view sound: sample a/0\.5 is not present but its miss reason is None \(2 such"
    ):
        training_table(scalars, embeddings, reasons | {"sound": [None] * 5}, preds)
    with pytest.raises(InputError, match="view label: a training set has a column 'label' already"):
        training_table(scalars, {"label": embeddings["image"]}, {"label": reasons["image"]}, {"label": preds["image"]})
