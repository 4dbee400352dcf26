import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore import splits
from featurestore.errors import InputError

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}
SIZES = st.lists(st.integers(1, 9), min_size=60, max_size=150)


def test_groups_are_joined_through_equal_bytes_and_called_by_their_first_name() -> None:
    groups = ["b", "b", "c", "a", "d", "e"]
    first = [b"1", None, b"1", None, b"2", b"3"]
    second = [None, b"x", None, b"x", None, None]
    assert splits.joined(groups, []) == groups
    assert splits.joined(groups, [first]) == ["b", "b", "b", "a", "d", "e"]
    assert splits.joined(groups, [first, second]) == ["a", "a", "a", "a", "d", "e"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40), st.randoms(use_true_random=False))
def test_joined_groups_are_the_components_whatever_the_order(rows: list[tuple[int, int]], rng: random.Random) -> None:
    def found(rows: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
        groups, digests = [f"g{group}" for group, _ in rows], [bytes([value]) if value else None for _, value in rows]
        return dict(zip(rows, splits.joined(groups, [digests]), strict=True))

    of = found(rows)
    for one in rows:
        for other in rows:
            if one[0] == other[0] or one[1] == other[1] != 0:
                assert of[one] == of[other]
    rng.shuffle(rows)
    assert found(rows) == of


def _groups(sizes: list[int]) -> list[str]:
    return [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]


@given(SIZES, st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_no_group_crosses_a_split(sizes: list[int], seed: int) -> None:
    groups = _groups(sizes)
    sides = splits.assign(groups, FRACTIONS, seed)
    seen = {(group, side) for group, side in zip(groups, sides.tolist(), strict=True)}
    assert len(seen) == len(sizes)


@given(SIZES, st.integers(0, 10), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_rows_does_not_matter(sizes: list[int], seed: int, shuffler: random.Random) -> None:
    groups = _groups(sizes)
    shuffled = groups.copy()
    shuffler.shuffle(shuffled)
    side = dict(zip(groups, splits.assign(groups, FRACTIONS, seed).tolist(), strict=True))
    assert splits.assign(shuffled, FRACTIONS, seed).tolist() == [side[group] for group in shuffled]


@given(st.lists(st.integers(1, 60), min_size=40, max_size=120), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_fractions_hold_by_rows_whatever_the_sizes_of_groups(sizes: list[int], seed: int) -> None:
    groups = _groups(sizes)
    smallest = 0.1 * len(groups)
    if sum(size for size in sizes if size > smallest / 2) > 0.8 * len(groups):
        return  # the large groups alone overflow the largest split: nothing is promised
    rows = Counter(splits.assign(groups, FRACTIONS, seed).tolist())
    for name, fraction in FRACTIONS.items():
        assert abs(rows[name] - fraction * len(groups)) <= 2 * max(smallest / 4, 0.5) + 1e-9


def test_a_huge_group_goes_to_the_largest_split() -> None:
    groups = ["huge"] * 300 + [f"g{i}" for i in range(700)]
    for seed in range(20):
        sides = splits.assign(groups, FRACTIONS, seed)
        assert sides[0] == "train"
        assert Counter(sides.tolist()) == {"train": 800, "val": 100, "test": 100}


def test_groups_that_overflow_the_largest_split_leave_something_for_the_others() -> None:
    groups = ["huge"] * 950 + [f"g{i}" for i in range(50)]
    rows = Counter(splits.assign(groups, FRACTIONS, 0).tolist())
    assert rows == {"train": 950, "val": 25, "test": 25}


def test_added_rows_move_few_of_the_old_ones() -> None:
    groups = [f"g{i // 3}" for i in range(3000)]
    before = splits.assign(groups, FRACTIONS, 0)
    after = splits.assign(groups + [f"new{i // 3}" for i in range(300)], FRACTIONS, 0)[:3000]
    assert np.mean(before != after) < 0.03
    assert np.mean(before != splits.assign(groups, FRACTIONS, 1)) > 0.2  # which another seed does move


def test_the_assignment_is_the_same_on_every_machine() -> None:
    """Golden: a change here moves samples from train to test in every store that exists."""
    sides = splits.assign([f"g{i}" for i in range(20)], {"train": 0.5, "val": 0.25, "held": 0.25}, 7)
    assert "".join(side[0] for side in sides.tolist()) == "ttvtthvthtvhtttvhtvh"


def test_a_split_without_a_group_is_refused() -> None:
    with pytest.raises(InputError, match=r"split test would be empty: 3 rows in 3 groups"):
        splits.assign(["a", "b", "c"], FRACTIONS, 0)


@pytest.mark.parametrize(
    "fractions", [{"train": 0.8, "test": 0.3}, {"train": 1.0, "test": 0.0}, {}], ids=["above 1", "zero", "none"]
)
def test_fractions_must_be_positive_and_sum_to_one(fractions: dict[str, float]) -> None:
    with pytest.raises(InputError, match="every fraction must be above 0 and their sum 1"):
        splits.assign(["a", "b"], fractions, 0)


def test_repeated_splits_cover_all_rows_once_and_differ() -> None:
    groups = [f"g{i // 2}" for i in range(500)]
    made = splits.repeated(groups)
    assert len(made) == 5
    for split in made:
        assert sorted(np.concatenate(split).tolist()) == list(range(500))
        assert [len(part) for part in split] == pytest.approx([400, 100], abs=2)
        train, test = ({groups[row] for row in part} for part in split)
        assert not train & test
    assert len({tuple(split.test.tolist()) for split in made}) == 5
