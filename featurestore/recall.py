"""Cross-modal recall under a fixed protocol: held-out groups, honest tuning, chance and exact search beside it.

For each of several random splits by group (`splits.repeated`) a learner gets the pairs outside the test part,
and only those; it chooses its hyperparameters on validation groups of its own. The test pairs are then projected and
each asks for its other side, among the test pairs and among all pairs. A hit is the pair itself or one with an
equal key (an equal caption).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore import splits
from featurestore.errors import InputError

__all__ = ["KS", "Pairs", "Projects", "chance", "evaluate", "exact", "first_hits", "labels"]

KS = (1, 5, 10)
MAX_SCORES = 2**24  # scores held at once: 64 MiB

Floats = NDArray[np.floating[Any]]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Search = Callable[[Vectors, Vectors, int], Rows]


class Projects(Protocol):
    """One side of a learned space: [n, D] -> [n, dim] float32 unit rows."""

    def apply(self, vectors: Floats) -> Vectors: ...


class Pairs(NamedTuple):
    """Samples that have both views, row i of each the same sample.

    Attributes:
        x: [n, dx] the first view.
        y: [n, dy] the second view.
        groups: what must not be split.
        keys: samples with equal keys answer each other's queries.
    """

    x: Floats
    y: Floats
    groups: Sequence[str]
    keys: Sequence[Hashable]

    def take(self, rows: Rows) -> "Pairs":
        """Return the pairs of some rows, in their order."""
        kept = rows.tolist()
        groups, keys = [self.groups[i] for i in kept], [self.keys[i] for i in kept]
        return Pairs(self.x[rows], self.y[rows], groups, keys)


Learn = Callable[[Pairs], tuple[Projects, Projects]]


def evaluate(
    pairs: Pairs,
    learn: Learn,
    names: tuple[str, str],
    n_splits: int = 5,
    search: Search | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure recall in both directions by the fixed protocol: 20 % of the rows are the test, by group.

    Args:
        pairs: every sample with both views.
        learn: sees only what is not in the test part, and returns the projections of x and of y.
        names: of x and y, for the directions `x->y` and `y->x`.
        n_splits: seeds 0 to n_splits - 1; few pairs need more splits.
        search: (gallery, queries, k) -> [q, k] row numbers, best first: builds an index of the kind that will
            be served and searches it. None is exact search.

    Returns:
        For each direction `recall@k` (through `search`), `sd@k` over the splits, `chance@10`, `exact@10` (brute
        force: where `search` is exact, as through a Flat index, that is `recall@10` again, but for ties), `n` (test pairs
        a split, mean), `splits`, and `corpus`: the same with all pairs as the gallery.
        A sample standard deviation over splits that share training pairs: smaller than between fresh corpora.
    """
    _check(pairs)
    if n_splits < 2:
        raise InputError(f"n_splits is {n_splits}: a deviation over splits needs at least 2")
    search = search or exact
    key = labels(pairs.keys)
    figures: dict[str, list[dict[str, float]]] = {}
    for split in splits.repeated(pairs.groups, n_splits):
        project_x, project_y = learn(pairs.take(split.train))
        x, y = project_x.apply(pairs.x), project_y.apply(pairs.y)
        for direction, query, gallery in (("->".join(names), x, y), ("->".join(names[::-1]), y, x)):
            for where, rows in (("", split.test), ("corpus", np.arange(len(key)))):
                measured = _figures(query[split.test], gallery[rows], key[split.test], key[rows], search)
                figures.setdefault(f"{direction} {where}", []).append(measured)
    return {
        direction: {**_summary(figures[f"{direction} "]), "corpus": _summary(figures[f"{direction} corpus"])}
        for direction in ("->".join(names), "->".join(names[::-1]))
    }


def chance(relevant: NDArray[np.integer[Any]], gallery: int, k: int) -> float:
    """Expected recall@k of a random order: the mean over queries of 1 - C(gallery - r, k) / C(gallery, k).

    Args:
        relevant: r, the hits that the gallery holds, per query.
        gallery: its size.
        k: how many are looked at.
    """
    drawn = np.arange(min(k, gallery))
    # The chance that none of k draws without putting back hits; a factor reaches 0 when only hits are left.
    miss = np.clip(1 - np.asarray(relevant)[:, None] / (gallery - drawn)[None, :], 0, 1).prod(axis=1)
    return float(np.mean(1 - miss))


def first_hits(queries: Vectors, gallery: Vectors, query_keys: Rows, gallery_keys: Rows) -> NDArray[np.int64]:
    """Return the rank, from 0, of each query's best hit under brute force; the gallery's size if it has none.

    Ties count against the hit, so that a space that maps everything to one point scores nothing.
    """
    scores = queries @ gallery.T
    relevant = query_keys[:, None] == gallery_keys[None, :]
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return np.where(relevant.any(axis=1), ((scores >= best) & ~relevant).sum(axis=1), len(gallery))


def exact(gallery: Vectors, queries: Vectors, k: int) -> Rows:
    """Brute force: the rows of the k largest inner products, best first, equal scores by row where k cuts none."""
    found = np.empty((len(queries), min(k, len(gallery))), np.int64)
    block = max(1, MAX_SCORES // len(gallery))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T
        best = np.argpartition(-scores, found.shape[1] - 1, axis=1)[:, : found.shape[1]]
        order = np.lexsort((best, -np.take_along_axis(scores, best, axis=1)), axis=1)
        found[start : start + block] = np.take_along_axis(best, order, axis=1)
    return found


def labels(keys: Sequence[Hashable]) -> Rows:
    """Number the keys: equal keys, equal numbers."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _figures(
    queries: Vectors, gallery: Vectors, query_keys: Rows, gallery_keys: Rows, search: Search
) -> dict[str, float]:
    most = min(max(KS), len(gallery))
    relevant = np.bincount(gallery_keys, minlength=query_keys.max() + 1)[query_keys]
    hits = _hits(search(gallery, queries, most), query_keys, gallery_keys)
    truth = _hits(exact(gallery, queries, most), query_keys, gallery_keys)
    return {
        **{f"recall@{k}": float(hits[:, :k].any(axis=1).mean()) for k in KS},
        "chance@10": chance(relevant, len(gallery), 10),
        "exact@10": float(truth[:, :10].any(axis=1).mean()),
        "n": len(queries),
        "gallery": len(gallery),
    }


def _hits(found: Rows, query_keys: Rows, gallery_keys: Rows) -> NDArray[np.bool_]:
    """Which of the found rows are hits; an approximate index pads with -1, which must not read as the last row."""
    return np.asarray((gallery_keys[found] == query_keys[:, None]) & (found >= 0))


def _summary(measured: list[dict[str, float]]) -> dict[str, float]:
    mean = {name: float(np.mean([figures[name] for figures in measured])) for name in measured[0]}
    spread = {f"sd@{k}": float(np.std([m[f"recall@{k}"] for m in measured], ddof=1)) for k in KS}
    return mean | spread | {"splits": len(measured)}


def _check(pairs: Pairs) -> None:
    lengths = [len(column) for column in pairs]
    if len(set(lengths)) != 1:
        raise InputError(f"pairs with columns of {lengths} rows: x, y, groups and keys must have equally many")
    for name, view in (("x", pairs.x), ("y", pairs.y)):
        bad = np.flatnonzero(~np.isfinite(view).all(axis=1))
        if bad.size:
            raise InputError(
                f"{bad.size} rows of {name} are not finite, the first is row {bad[0]}: "
                "keep the samples that have both views"
            )
