import numpy as np
import pytest

from featurestore import splits
from featurestore.errors import InputError
from featurestore.fusion_table import fusion_table, withhold
from tests.featurestore.test_fusion import DIMS, K, grouped, noise, planted

N = 150
KINDS = [*DIMS, "chance", "early", "late", "hybrid"]


@pytest.fixture(scope="module")
def sample():
    views, y = planted(n=N)
    labels = [f"class {code}" for code in y]
    labels[:2] = ["rare", "rare"]  # One group: absent from the test side of most splits, and from train in the others.
    return views, labels, grouped(N)


@pytest.fixture(scope="module")
def table(sample):
    return fusion_table(*sample, seed=0)


def test_it_has_a_row_for_each_view_and_fusion_over_the_same_test_samples(sample, table):
    assert list(table) == KINDS
    cells = [table[kind][case] for kind in KINDS for case in ("complete", "half")]
    assert len({cell["n"] for cell in cells}) == 1
    assert cells[0]["n"] == pytest.approx(N, abs=10)
    tests = [len(split.test) for split in splits.repeated(sample[2])]
    for cell in cells:
        assert (cell["n"], cell["splits"], cell["samples"]) == (sum(tests), 5, sum(tests) / 5)
    for cell in cells:
        assert cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1]
        assert 0 <= cell["n_present"] <= cell["n"]


def test_fusion_is_above_its_best_view_and_half_is_below_complete(table):
    best = max(table[view]["complete"]["accuracy"] for view in DIMS)
    for kind in ("late", "hybrid"):
        assert table[kind]["complete"]["accuracy"] > best
        assert table[kind]["half"]["accuracy"] < table[kind]["complete"]["accuracy"]
    assert table["chance"]["complete"] == table["chance"]["half"]
    assert table["chance"]["complete"]["accuracy"] < 0.4


def test_half_withholds_half_of_the_values(table):
    complete, half = (sum(table[view][case]["n_present"] for view in DIMS) for case in ("complete", "half"))
    assert complete == pytest.approx(2 * half, abs=5)
    present = np.random.default_rng(0).random((40, 3)) < 0.7
    left = withhold(present, 1)
    assert (left <= present).all()
    assert left.sum() == present.sum() - present.sum() // 2
    np.testing.assert_array_equal(left, withhold(present, 1))
    assert (left != withhold(present, 2)).any()


def test_noise_is_at_chance_in_every_row_of_the_table():
    x, y = noise()
    table = fusion_table({"image": x[:, :30], "caption": x[:, 30:]}, [str(code) for code in y], grouped(240))
    assert max(row["complete"]["accuracy"] for row in table.values()) < 1 / K + 0.12


def test_the_table_is_the_same_twice(sample, table):
    assert fusion_table(*sample, seed=0) == table


def test_wrong_arguments_are_refused(sample):
    views, labels, groups = sample
    with pytest.raises(InputError, match="view 'late': the fusion table has a row of that name"):
        fusion_table({"late": views["image"]}, labels, groups)
    with pytest.raises(InputError, match="150 rows, 149 labels, 150 groups"):
        fusion_table(views, labels[1:], groups)
