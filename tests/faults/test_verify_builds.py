"""Faults put into spaces, indexes and training sets: `verify` names the build and the row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurestore import indexes, vectors
from featurestore.builds import INDEX, SPACE, TRAINING
from featurestore.catalog import Catalog, Entry
from featurestore.corpora import ROWS
from featurestore.errors import AlignmentError, StoreError
from featurestore.inspection import Finding
from featurestore.spaces import Space
from featurestore.store import FeatureStore
from featurestore.verify import LEVELS, verify
from featurestore.views import VIEW
from tests.faults.conftest import Whole
from tests.faults.stores import Broken, encode_view, flip, members, set_column, swap, tar_of

FORMS = pytest.mark.parametrize("forged", [False, True], ids=["naive", "forged"])
TRAIN = "train-00000.parquet"
TAR = "train-00000.tar"


@pytest.fixture
def store(built: Whole, tmp_path: Path) -> Broken:
    return Broken(built.storage, tmp_path / "store")


def file_of(store: Broken, kind: str, place: str) -> Entry:
    return next(entry for entry in store.snapshot().entries(kind) if entry.shard == place)


def findings(store: Broken, kind: str, level: str = "rows", problem: str = "") -> list[Finding]:
    found = verify(store.storage, level=level).findings
    assert {each.kind for each in found} == {kind}, "\n".join(map(str, found))
    kept = [each for each in found if problem in each.problem]
    assert kept, f"nothing says {problem!r} in\n" + "\n".join(map(str, found))
    return kept


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_found_in_whole_builds(built: Whole, level: str) -> None:
    report = verify(built.storage, level=level)
    assert [str(each) for each in report.findings] == []
    assert {SPACE, INDEX, TRAINING} <= dict(report.artefacts).keys()


def test_builds_are_stale_once_a_view_is_encoded_anew_and_the_index_does_not_answer(store: Broken) -> None:
    encode_view(store.storage, "sound", "log-mel", {"n_mels": 32})
    found = [each for each in verify(store.storage, level="footers").findings if "stale" in each.problem]
    # The index follows from the space, which is stale first.
    assert {(each.kind, each.name) for each in found} == {(SPACE, "heard"), (INDEX, "heard"), (TRAINING, "category")}
    with pytest.raises(StoreError, match="braid run"):
        FeatureStore(store.storage).search("heard", vector=np.ones(8))


def test_a_remade_shard_with_the_same_bytes_leaves_builds_fresh(store: Broken) -> None:
    entry = store.entry(VIEW, "sound", 1)
    store.path(entry).unlink()
    encode_view(store.storage, "sound", "log-mel")
    assert Catalog(store.storage).snapshot().entries(VIEW, "sound")[1] == entry
    assert verify(store.storage).ok


@pytest.mark.parametrize("fault", ["gone", "changed", "not named"])
def test_a_damaged_view_shard_is_mended_alone(store: Broken, fault: str) -> None:
    """Builds made from a file that is damaged are told too, but not to delete them: they are as good as they were."""
    entry = store.entry(VIEW, "sound", 1)
    content = store.path(entry).read_bytes()
    if fault == "not named":
        store.commit(entry, None)
    else:
        store.change(entry, None if fault == "gone" else flip(content, len(content) // 2), False)
    found = verify(store.storage).findings
    mends = {each.mend for each in found if each.kind == VIEW}
    assert (
        mends
        == {
            "gone": {"`braid run` makes it again"},
            "changed": {f"delete {entry.path}, and `braid run` makes it again"},
            "not named": {"`braid run` encodes what is missing"},
        }[fault]
    )
    others = {(each.kind, each.mend) for each in found if each.kind != VIEW}
    assert {kind for kind, _ in others} >= (set() if fault == "not named" else {INDEX, TRAINING})
    assert all("that first" in mend for _, mend in others), others
    store.path(entry).unlink(missing_ok=fault != "changed")
    encode_view(store.storage, "sound", "log-mel")
    assert verify(store.storage).ok


def test_a_build_file_that_is_gone_is_not_to_be_deleted(store: Broken) -> None:
    gone, flipped = file_of(store, SPACE, "space"), file_of(store, TRAINING, TRAIN)
    store.change(gone, None, False)
    store.change(flipped, flip(store.path(flipped).read_bytes(), 400), False)
    mends = {(each.kind, each.mend) for each in verify(store.storage).findings}
    assert mends == {
        (SPACE, "`braid run` makes it again"),
        (INDEX, "mend that first: with its old bytes back, this one needs nothing"),
        (TRAINING, f"delete {flipped.path}, and `braid run` makes it again"),
    }


def test_an_index_over_a_corpus_that_has_grown_is_stale(store: Broken) -> None:
    gone = store.entry(ROWS, "planted", 6)
    for kind in (ROWS, "media"):
        store.commit(store.entry(kind, "planted", 6), None)
    for view in ("sound", "timbre"):
        store.commit(next(e for e in store.snapshot().entries(VIEW, view) if e.shard == gone.shard), None)
    found = verify(store.storage, level="footers").findings
    assert {each.kind for each in found if "stale" in each.problem} == {SPACE, INDEX, TRAINING}


def no_hit_of_another_sample(store: Broken, forged: bool) -> None:
    with pytest.raises(AlignmentError, match="is not the one that was made for" if forged else "sha256"):
        FeatureStore(store.storage).search("heard", vector=np.ones(8), k=10_000)


@FORMS
@pytest.mark.parametrize("place", ["rows", "index"])
def test_an_index_whose_rows_are_not_those_of_its_vectors_is_found(store: Broken, forged: bool, place: str) -> None:
    entry = file_of(store, INDEX, place)
    if place == "rows":
        store.rewrite(entry, swap(store.read(entry), 1, 5), forged)
        assert {1, 5} <= {each.row for each in findings(store, INDEX, problem="vector in the index")}
        no_hit_of_another_sample(store, forged)
        return
    held = indexes.deserialise(store.path(entry).read_bytes(), "Flat", 8, entry.rows)
    matrix = held.reconstruct_n(0, held.ntotal)
    matrix[[1, 5]] = matrix[[5, 1]]
    store.change(entry, indexes.serialise(indexes.build(matrix, "Flat", 0)), forged)
    no_hit_of_another_sample(store, forged)
    if forged:
        assert {1, 5} == {each.row for each in findings(store, INDEX, problem="vector in the index")}
    else:
        findings(store, INDEX, "bytes", "sha256")


@FORMS
def test_an_index_a_row_short_or_with_a_row_twice_is_found(store: Broken, forged: bool) -> None:
    entry = file_of(store, INDEX, "rows")
    table = store.read(entry)
    lost = table["id"][2].as_py()
    store.rewrite(entry, pa.concat_tables([table.slice(0, 2), table.slice(1, 1), table.slice(3)]), forged)
    assert [each.id for each in findings(store, INDEX, problem="is not in the index")] == [lost]
    assert [each.row for each in findings(store, INDEX, problem="stands twice")] == [2]
    store.rewrite(file_of(store, INDEX, "rows"), table.slice(1), forged)
    assert findings(store, INDEX, "rows", "not the one expected")


@FORMS
def test_a_row_of_an_index_under_another_id_or_shard_is_found(store: Broken, forged: bool) -> None:
    entry = file_of(store, INDEX, "rows")
    table = store.read(entry)
    ids, shards = table["id"].to_pylist(), table["shard"].to_pylist()
    ids[3], shards[7] = ids[4], "none"
    changed = set_column(set_column(table, "id", pa.array(ids)), "shard", pa.array(shards))
    store.rewrite(entry, changed, forged)
    assert [(each.row, each.id) for each in findings(store, INDEX, problem=f"is {table['id'][3].as_py()!r}")] == [
        (3, ids[4])
    ]
    assert [each.row for each in findings(store, INDEX, problem="the index has no such")] == [7]


@pytest.mark.parametrize(("kind", "place"), [(INDEX, "index"), (INDEX, "card"), (SPACE, "space"), (TRAINING, "card")])
@pytest.mark.parametrize("fault", ["missing", "flipped"])
def test_a_damaged_file_of_a_build_is_found_and_not_read(store: Broken, kind: str, place: str, fault: str) -> None:
    entry = file_of(store, kind, place)
    content = store.path(entry).read_bytes()
    store.change(entry, {"missing": None, "flipped": flip(content, len(content) // 2)}[fault], False)
    found = verify(store.storage).findings
    assert (kind, place) in {(each.kind, each.shard) for each in found}
    opened = FeatureStore(store.storage)
    with pytest.raises(AlignmentError, match=r"gone|sha256"):
        opened.training_set("category") if kind == TRAINING else opened.index("heard")


def test_a_build_without_one_of_its_files_is_found(store: Broken) -> None:
    for kind, place in ((INDEX, "rows"), (SPACE, "space"), (TRAINING, TAR)):
        store.commit(file_of(store, kind, place), None)
    found = verify(store.storage, level="footers").findings
    told = {(each.kind, each.shard) for each in found if "has no file" in each.problem}
    assert told >= {(INDEX, "rows"), (SPACE, "space"), (TRAINING, TAR)}


def test_a_space_that_takes_vectors_of_another_length_is_found(store: Broken) -> None:
    entry = file_of(store, SPACE, "space")
    space = Space.from_bytes(store.path(entry).read_bytes())
    turned = dict(zip(space.projections, reversed(space.projections.values()), strict=True))
    store.change(entry, Space(space.name, space.method, space.dim, turned, space.card).to_bytes(), True)
    found = [each for each in verify(store.storage, level="rows").findings if each.kind == SPACE]
    assert any("projects vectors of" in each.problem for each in found)


@FORMS
def test_rows_swapped_in_a_training_set_are_found_in_the_order_and_in_the_tar(store: Broken, forged: bool) -> None:
    entry = file_of(store, TRAINING, TRAIN)
    store.rewrite(entry, swap(store.read(entry), 1, 5), forged)
    assert findings(store, TRAINING, problem="stands behind a sample")
    assert findings(store, TRAINING, problem="the rows put")


@pytest.mark.parametrize(
    ("column", "forged"),
    [
        ("sound", False),
        ("sound", True),
        ("label", True),
        ("group", True),
        ("split", True),
        ("timbre_miss_reason", True),
    ],
)
def test_a_column_of_a_training_set_permuted_under_unchanged_ids_is_found(
    store: Broken, forged: bool, column: str
) -> None:
    entry = file_of(store, TRAINING, TRAIN)
    table = store.read(entry)
    if column == "split":
        values = pa.array(["test", *table["split"].to_pylist()[1:]])
        rows = {0}
    else:
        order = np.roll(np.arange(len(table)), 1)
        moved = table[column].take(order)
        plain = vectors.matrix(table[column]).tolist() if column == "sound" else table[column].to_pylist()
        rows = {row for row in range(len(table)) if str(plain[row]) != str(plain[order[row]])}
        values = moved.combine_chunks()
    store.rewrite(entry, set_column(table, column, values), forged)
    named = {each.row for each in findings(store, TRAINING) if each.shard == TRAIN}
    assert len(named & rows) >= min(len(rows), 10)
    with pytest.raises(AlignmentError, match="does not hold what was written there" if forged else "sha256"):
        FeatureStore(store.storage).training_set("category").to_arrow("train")


@FORMS
def test_a_training_set_a_row_short_is_found(store: Broken, forged: bool) -> None:
    entry = file_of(store, TRAINING, TRAIN)
    store.rewrite(entry, store.read(entry).slice(1), forged)
    assert findings(store, TRAINING, "footers", "its card counts" if forged else "rows where the catalog says")
    assert findings(store, TRAINING, problem="samples with a label")


def test_a_sample_or_group_in_two_splits_is_found(store: Broken) -> None:
    train, test = (file_of(store, TRAINING, f"{split}-00000.parquet") for split in ("train", "test"))
    one = set_column(store.read(train).slice(0, 1), "split", pa.array(["test"]))
    store.rewrite(test, pa.concat_tables([one, store.read(test)]), True)
    assert findings(store, TRAINING, problem="its sample")
    assert findings(store, TRAINING, problem="its group")


@FORMS
def test_a_vector_of_a_training_tar_that_is_another_rows_is_found(store: Broken, forged: bool) -> None:
    entry = file_of(store, TRAINING, TAR)
    held = members(store.path(entry).read_bytes())
    first, second = [at for at, (info, _) in enumerate(held) if info.name.endswith(".sound.npy")][1:3]
    (a, x), (b, y) = held[first], held[second]
    held[first], held[second] = (a, y), (b, x)
    store.change(entry, tar_of(held), forged)
    ids = store.read(file_of(store, TRAINING, TRAIN))["id"].to_pylist()
    found = findings(store, TRAINING, problem="is not what the row holds")
    assert [ids[each.row] for each in found if each.row is not None] == [each.id for each in found]
    assert len(found) == 2


@FORMS
def test_a_training_tar_a_sample_short_is_found(store: Broken, forged: bool) -> None:
    entry = file_of(store, TRAINING, TAR)
    held = members(store.path(entry).read_bytes())
    last = held[-1][0].name.rpartition("/")[2].partition(".")[0]
    store.change(entry, tar_of([each for each in held if f"{last}." not in each[0].name]), forged)
    assert findings(store, TRAINING, problem="is not in the tar")


@pytest.mark.parametrize("lineage", ["[]", '{"settings": {}}'])
def test_a_build_whose_lineage_says_nothing_is_a_finding(store: Broken, lineage: str) -> None:
    for kind in (SPACE, INDEX, TRAINING):
        for entry in store.snapshot().entries(kind):
            store.commit(entry, entry._replace(lineage=lineage))
    assert {each.kind for each in verify(store.storage).findings} >= {SPACE, INDEX, TRAINING}


def test_a_card_that_is_no_json_is_a_finding(store: Broken) -> None:
    entry = file_of(store, TRAINING, "card")
    store.change(entry, b"{", True)
    assert findings(store, TRAINING, problem="JSONDecodeError")
