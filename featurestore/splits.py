"""Splits by group: rows that share a group never end up on two sides.

Groups are ordered by a hash of (seed, group) and laid end to end; a group belongs to the split in whose
stretch its middle row falls. The result is a function of the multiset of groups and the seed alone: neither
the order of the rows nor the number of workers matters.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import InputError

__all__ = ["Split", "assign", "joined", "repeated"]

Rows = NDArray[np.int64]


class Split(NamedTuple):
    """Row numbers of one random split, each ascending; together they are every row once."""

    train: Rows
    test: Rows


def assign(groups: Sequence[str], fractions: Mapping[str, float], seed: int) -> NDArray[np.str_]:
    """Give every row the name of a split, such that no group crosses and the fractions hold by rows.

    A group with more rows than half of the smallest split's share ('oversized') goes to the largest split,
    because no order of the groups could meet the fractions otherwise. While the oversized groups fit there,
    each split is within a quarter of the smallest split's share (and of one row) at each of its ends.

    When rows are added: the order of the old groups stays. A group changes sides only if the boundary beside
    it moves past its middle, so of the old rows about as large a share as the cumulated shares shift (a few
    per cent after a tenth more rows), or if it becomes, or ceases to be, oversized. With a new seed all moves.

    Args:
        groups: one group per row.
        fractions: share of the rows of each split, in the order in which the splits are laid out; sum 1.
        seed: another seed gives an independent split.

    Returns:
        The split's name per row, in the order of `groups`.

    Raises:
        InputError: fractions that are not positive or do not sum to 1, or a split that gets no group.
    """
    _check_fractions(fractions)
    sizes = Counter(groups)
    names = list(fractions)
    largest = max(names, key=lambda name: fractions[name])
    limit = min(fractions.values()) * len(groups) / 2
    side = {group: largest for group, size in sizes.items() if size > max(limit, 1)}
    shares = {name: fractions[name] * len(groups) for name in names}
    shares[largest] = max(0.0, shares[largest] - sum(sizes[group] for group in side))
    ends = np.cumsum([shares[name] for name in names])
    ordered = sorted(sizes.keys() - side.keys(), key=lambda group: (_position(seed, group), group))
    middles = np.cumsum([sizes[group] for group in ordered]) - np.array([sizes[g] for g in ordered]) / 2
    # Oversized groups that overflow the largest split leave fewer rows than the ends add up to: scale to them.
    scale = sum(sizes[group] for group in ordered) / ends[-1] if ends[-1] else 1.0
    cells = np.searchsorted(ends[:-1] * scale, middles, side="right")
    side.update({group: names[cell] for group, cell in zip(ordered, cells.tolist(), strict=True)})
    empty = [name for name in names if name not in set(side.values())]
    if empty:
        raise InputError(
            f"split {', '.join(empty)} would be empty: {len(groups)} rows in {len(sizes)} groups, "
            f"fractions {dict(fractions)}; add samples, use smaller groups, or give it a larger fraction"
        )
    return np.array([side[group] for group in groups], dtype=np.str_)


def repeated(groups: Sequence[str], n_splits: int = 5, test: float = 0.2) -> list[Split]:
    """The random splits of the fixed protocol: seeds 0 to n_splits - 1, each by group.

    Args:
        groups: one group per row.
        n_splits: how many.
        test: share of the rows that are held out; what is chosen or fitted comes from the rest.
    """
    fractions = {"test": test, "train": 1 - test}
    sides = [assign(groups, fractions, seed) for seed in range(n_splits)]
    return [Split(*(np.flatnonzero(side == name) for name in Split._fields)) for side in sides]


def joined(groups: Sequence[str], digests: Iterable[Sequence[bytes | None]]) -> list[str]:
    """Groups that are joined where they share bytes, directly or through others; each is called by its first name.

    Args:
        groups: one group per row.
        digests: for each of some fields one digest per row, None where the value is missing.
    """
    first = {group: group for group in groups}

    def root(group: str) -> str:
        while first[group] != group:
            first[group] = first[first[group]]
            group = first[group]
        return group

    for column in digests:
        seen: dict[bytes, str] = {}
        for group, digest in zip(groups, column, strict=True):
            if digest is not None:
                one, other = sorted((root(group), root(seen.setdefault(digest, group))))
                first[other] = one
    return [root(group) for group in groups]


def _position(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _check_fractions(fractions: Mapping[str, float]) -> None:
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) <= 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise InputError(f"splits {dict(fractions)}: every fraction must be above 0 and their sum 1, it is {total:g}")
