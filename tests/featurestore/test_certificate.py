import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.certificate import certify, require
from featurestore.errors import InputError

IDS = ["a", "b", "c", "d", "e", "f"]
GROUPS = ["g1", "g1", "g2", "g3", "g4", "g5"]
SPLITS = ["train", "train", "train", "val", "test", "test"]


def test_a_clean_set_passes_with_its_balance():
    image = [b"1", b"1", b"2", b"3", b"4", None]
    certificate = certify(
        IDS, GROUPS, SPLITS, {"image": pa.array(image), "sound": pa.nulls(6, pa.binary())}, list("xyxyxy")
    )
    assert certificate["passed"]
    assert certificate["samples"] == {"train": 3, "val": 1, "test": 2}
    assert certificate["labels"] == {"train": {"x": 2, "y": 1}, "val": {"y": 1}, "test": {"x": 1, "y": 1}}
    assert certificate["patterns"]["test"] == {"image": 1, "none": 1}
    assert certificate["shared_bytes"]["sound"] == {"count": 0, "examples": []}
    assert json.loads(json.dumps(certificate)) == certificate
    require(certificate, "set category")


def test_a_group_on_two_sides_fails_and_is_named():
    certificate = certify(IDS, ["g1", "g1", "g2", "g3", "g2", "g5"], SPLITS, {})
    assert not certificate["passed"]
    with pytest.raises(InputError, match=r"(?s)set category: 1 leaks.*group in train and test: c, e\n.*group_equal"):
        require(certificate, "set category")


def test_equal_bytes_in_different_groups_fail_and_name_ids_field_and_splits():
    digests = {"image": pa.array([b"1", b"2", b"3", b"3", b"5", b"3"]), "sound": pa.array([None] * 6, pa.binary())}
    certificate = certify(IDS, GROUPS, SPLITS, digests)
    assert certificate["shared_bytes"]["image"] == {
        "count": 1,
        "examples": [{"splits": ["train", "val", "test"], "ids": ["c", "d", "f"]}],
    }
    with pytest.raises(InputError, match="equal bytes of image in train and val and test: c, d, f"):
        require(certificate, "set category")


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([pa.array([7, None], pa.uint64()), pa.array([None, 7, None, 2**63], pa.uint64())]),
        np.ma.masked_array(np.array([7, 0, 0, 7, 0, 2**63], dtype=np.uint64), mask=[0, 1, 1, 0, 1, 0]),
        np.array([b"7", None, None, b"7", None, b"8"], dtype=object),
        pa.DictionaryArray.from_arrays(pa.array([0, None, None, 1, None, 2]), pa.array([b"7", b"7", b"8"])),
    ],
    ids=["arrow", "masked", "objects", "dictionary with a value twice"],
)
def test_every_way_to_give_digests_finds_the_leak_and_ignores_missing_values(column):
    leak = certify(IDS, GROUPS, SPLITS, {"sound": column})["shared_bytes"]["sound"]
    assert leak == {"count": 1, "examples": [{"splits": ["train", "val"], "ids": ["a", "d"]}]}


def test_many_leaks_are_counted_and_twenty_are_spelt_out():
    ids = [f"s{i}" for i in range(80)]
    values = pa.array([i % 40 for i in range(80)], pa.uint64())
    certificate = certify(ids, ids, ["train"] * 40 + ["test"] * 40, {"image": values})
    assert certificate["shared_bytes"]["image"]["count"] == 40
    with pytest.raises(InputError, match=r"40 leaks(?s:.*)s19, s59\n  equal bytes of image … and 20 more"):
        require(certificate, "set category")


def test_wrong_columns_are_refused():
    with pytest.raises(InputError, match=r"different lengths: .*'digests of image': 1.*give one value per sample"):
        certify(IDS, GROUPS, SPLITS, {"image": pa.array([b"1"])})
    with pytest.raises(InputError, match="sample c has no split"):
        certify(IDS, GROUPS, ["train", "train", None, "val", "test", "test"], {})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.none() | st.integers(0, 5)), min_size=1))
def test_it_finds_what_comparing_every_pair_finds(rows):
    groups, splits, values = ([row[at] for row in rows] for at in range(3))
    certificate = certify(
        [str(i) for i in range(len(rows))], list(map(str, groups)), splits, {"f": pa.array(values, pa.uint64())}
    )
    for found, column in ((certificate["shared_groups"], groups), (certificate["shared_bytes"]["f"], values)):
        leaked = {
            x
            for x, s in zip(column, splits, strict=True)
            for y, t in zip(column, splits, strict=True)
            if x is not None and x == y and s != t
        }
        assert found["count"] == len(leaked)
