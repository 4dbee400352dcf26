"""Reading a corpus and a view; what they do when a store is broken is in tests/faults."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurestore import views
from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import MEMBER, Corpus, disordered, member_header
from featurestore.errors import AlignmentError, InputError, NotFound
from featurestore.identity import input_digest
from featurestore.storage import Storage
from featurestore.views import COLUMNS, View
from tests.faults.stores import corpus_settings, encode_view, shard_corpus
from tests.planted import ODD_IDS, SHARD_ROWS


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("read")
    storage = Storage.of(folder / "store")
    shard_corpus(storage, corpus_settings(folder / "corpus"))
    encode_view(storage, "sound", "log-mel")
    return Catalog(storage).snapshot()


@pytest.fixture
def corpus(snapshot: Snapshot) -> Corpus:
    return Corpus(snapshot, "planted")


@pytest.fixture
def view(snapshot: Snapshot) -> View:
    return View(snapshot, "sound")


def test_a_corpus_is_its_shards_in_the_order_of_their_keys_and_rows_in_that_of_their_ids(corpus: Corpus) -> None:
    table = corpus.to_arrow()
    assert corpus.rows == len(table) == 48 + len(ODD_IDS)
    assert table.column_names[:3] == ["shard", "row", "id"]
    places = list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert places == sorted(places)
    for entry in corpus.shards:
        ids = corpus.ids(entry.shard)
        assert ids == sorted(ids)
        assert len(ids) == entry.rows <= SHARD_ROWS
    assert corpus.fields == {"caption": "text", "sound": "audio"}
    assert "55 samples in 7 shards" in repr(corpus)


def test_every_sample_is_found_where_it_stands(corpus: Corpus) -> None:
    for sample_id in ODD_IDS:
        shard, row = corpus.locate(sample_id)
        assert corpus.ids(shard)[row] == sample_id
    with pytest.raises(NotFound, match="has no sample 'nobody' in version 2"):
        corpus.locate("nobody")


def test_a_value_is_what_the_source_had_and_missing_ones_are_none(corpus: Corpus) -> None:
    present = missing = 0
    for entry in corpus.shards:
        members = corpus.read(entry.shard)["caption"].to_pylist()
        for member, raw in zip(members, corpus.values(entry.shard, "caption"), strict=True):
            present, missing = present + (raw is not None), missing + (raw is None)
            assert (raw is None) == (member["miss_reason"] is not None)
            if raw is not None:
                assert raw.decode().startswith("A ")
                assert input_digest(raw) == member["digest"]
    assert present + missing == corpus.rows
    assert missing >= 3


def test_a_field_or_shard_or_corpus_that_is_not_there_is_named(corpus: Corpus, snapshot: Snapshot) -> None:
    with pytest.raises(NotFound, match="no field 'smell'; it has: caption, sound"):
        corpus.value(corpus.shards[0].shard, 0, "smell")
    with pytest.raises(NotFound, match="no shard 'x'"):
        corpus.read("x")
    with pytest.raises(NotFound, match=r"no corpus 'stamps' in .*; it has: planted"):
        Corpus(snapshot, "stamps")
    with pytest.raises(NotFound, match=r"no view 'image' in .*; it has: sound"):
        View(snapshot, "image")


def members(*offsets: int) -> pa.Array:
    rows = [{"present": True, "offset": at, "size": 10, "digest": b"12345678", "ext": "x"} for at in offsets]
    return pa.array(rows, MEMBER)


def test_rows_out_of_order_are_told() -> None:
    good = pa.table({"id": ["a", "b", "c"], "x": members(0, 100, 200), "y": members(50, 150, 250)})
    assert list(disordered(good)) == []
    assert [row for row, _ in disordered(good.set_column(0, "id", pa.array(["a", "c", "b"])))] == [2]
    assert [row for row, _ in disordered(good.set_column(0, "id", pa.array(["a", "a", "b"])))] == [1]
    assert [row for row, _ in disordered(good.set_column(1, "x", members(100, 0, 200)))] == [0, 1]
    assert [row for row, _ in disordered(good.set_column(1, "x", members(0, 55, 200)))] == [1]


@pytest.mark.parametrize("sample_id", ["a", "odd/clip_00.37", "é" * 90, "x" * 300])
def test_the_header_of_a_value_binds_it_to_its_sample_and_field(sample_id: str) -> None:
    header = member_header(sample_id, "image", "png", 5)
    assert len(header) % 512 == 0
    others = [(sample_id + "b", "image", "png", 5), (sample_id, "sound", "png", 5), (sample_id, "image", "png", 6)]
    assert len({header, *(member_header(*other) for other in others)}) == 4


def test_a_view_stands_row_for_row_beside_its_corpus(view: View, corpus: Corpus) -> None:
    table = view.to_arrow()
    assert table.column_names == list(COLUMNS)
    assert table.schema.equals(view.schema)
    assert table["id"].to_pylist() == corpus.to_arrow()["id"].to_pylist()
    assert len(view.files()) == len(corpus.shards)
    members = corpus.to_arrow()["sound"].to_pylist()
    for row, member in zip(table.to_pylist(), members, strict=True):
        assert row["present"] == (row["embedding"] is not None) == (row["miss_reason"] is None)
        assert row["input_digest"] == member["digest"]
        assert member["present"] or row["miss_reason"] == member["miss_reason"]


def test_take_gives_a_row_for_each_asked_for_in_that_order(view: View) -> None:
    whole = view.to_arrow()
    ids = whole["id"].to_pylist()
    wanted = [ids[each] for each in (30, 2, 54, 2, 8)]
    taken = view.take(wanted)
    assert taken["id"].to_pylist() == wanted
    for column in ("row_digest", "present", "embedding"):
        assert taken[column].to_pylist() == [whole[column][each].as_py() for each in (30, 2, 54, 2, 8)]
    assert view.take(np.array([54, 0]))["id"].to_pylist() == [ids[54], ids[0]]
    assert view.take([], ["id", "present"]).schema.names == ["id", "present"]
    assert len(view.take([])) == 0


def test_what_take_cannot_give_is_an_error(view: View) -> None:
    with pytest.raises(NotFound, match="no sample 'nobody'"):
        view.take(["nobody"])
    for row in (55, -1):
        with pytest.raises(NotFound, match=f"has no row {row}; it has rows 0 to 54"):
            view.take([row])
    with pytest.raises(InputError, match="no column 'vector'; allowed: id, present"):
        view.take([0], ["vector"])


def test_the_matrix_the_batches_and_the_table_hold_the_same(view: View) -> None:
    matrix, present = view.matrix()
    table = view.to_arrow()
    assert matrix.shape == (view.rows, view.dim) == (55, 128)
    assert present.tolist() == table["present"].to_pylist() == np.isfinite(matrix).all(axis=1).tolist()
    batches = pa.Table.from_batches(view.scanner(batch_size=3))
    assert max(len(batch) for batch in view.scanner(batch_size=3)) == 3
    for column in ("id", "present", "row_digest", "miss_reason"):
        assert batches[column].to_pylist() == table[column].to_pylist()
    kept = table["embedding"].drop_null()
    assert np.array(kept.to_pylist(), np.float32).tobytes() == matrix[present].tobytes()
    with pytest.raises(InputError, match="batch_size is 0; allowed: a whole number, at least 1"):
        next(view.scanner(batch_size=0))


def test_a_view_says_what_made_it(view: View) -> None:
    assert view.recipe == views.recipe("sound", view.encoder["fingerprint"])
    assert view.recipe != views.recipe("speech", view.encoder["fingerprint"])
    assert view.modality == "audio"
    assert repr(view) == "View('sound', 55 rows × 128, log-mel of planted.sound)"
    with pytest.raises(NotFound, match="no shard 'x'"):
        view.read("x")


def test_rows_are_proven_before_they_are_handed_out_and_once(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object) -> list[tuple[int, str]]:
        calls.append(arguments)
        return [(4, "is another's")] if len(calls) == 2 else []

    monkeypatch.setattr(views, "misaligned", counted)
    first, second = (entry.shard for entry in view.entries()[:2])
    view.read(first)
    view.read(first)
    assert len(calls) == 1
    with pytest.raises(AlignmentError, match=f"is another's; shard {second}, row 4, id '.*' of view 'sound'"):
        view.read(second)
    view.read(second)
    assert len(calls) == 3


def test_a_snapshot_reads_what_it_named_whatever_is_committed_since(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "store")
    settings = corpus_settings(tmp_path / "corpus", n=16, bad=False)
    shard_corpus(storage, settings)
    encode_view(storage, "sound", "log-mel")
    before = Catalog(storage).snapshot()
    vectors = View(before, "sound").matrix()[0]
    encode_view(storage, "sound", "log-mel", {"n_mels": 16})
    assert View(Catalog(storage).snapshot(), "sound").dim == 32
    assert View(before, "sound").matrix()[0].tobytes() == vectors.tobytes()
