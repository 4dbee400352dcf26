"""How well each modality and each fusion classifies, with all values and with half of them withheld.

The fixed protocol: 5 splits by group, 20 % test; everything that is chosen or fitted, strengths, temperatures and
the weights of a pool included, comes from the other 80 %, by folds of groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore import fusion, heads
from featurestore.errors import InputError
from featurestore.fusion import Mask
from featurestore.heads import Floats, Ints
from featurestore.splits import Split, repeated

__all__ = ["fusion_table", "withhold"]

RESAMPLES = 2000
FUSIONS = ("chance", "early", "late", "hybrid")

Predictions = dict[str, NDArray[np.int64]]


def fusion_table(
    views: Mapping[str, Floats], labels: Sequence[str], groups: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Measures each view alone, `chance` (the largest class), `early`, `late` and `hybrid`.

    All rows of the table are over the same test samples: a view alone predicts the class prior for a sample that
    lacks it, and a fusion for a sample that lacks everything. `half` withholds half of the test values, drawn per
    sample and view; nothing is fitted anew for it. The result is a function of the arguments, to the bit on one kind of CPU.

    Args:
        views: float32 [n, D] each; rows of NaN are missing.
        labels: [n] class of each sample.
        groups: [n]; a group is never on both sides of a split.
        seed: of the withheld values and of the dropout that early fusion and the pools are trained with.

    Returns:
        `{kind: {"complete": cell, "half": cell}}`, a cell being `accuracy` (mean of the splits), `ci95` ([low, high],
        by resampling groups, each with all its predictions in all splits), `n` (predictions, of the test samples of all
        splits: a sample counts once in each split that tests it), `n_present` (those of them that had a value to go by),
        `splits` (how many) and `samples` (test samples a split, mean: `n` / `splits`).

    Raises:
        InputError: lengths differ, a view has a reserved name, or there are too few groups for the protocol.
    """
    reserved = sorted(set(views) & set(FUSIONS))
    if reserved:
        raise InputError(f"view {reserved[0]!r}: the fusion table has a row of that name; rename the view")
    present = fusion.presence(views)
    if not len(present) == len(labels) == len(groups):
        raise InputError(f"{len(present)} rows, {len(labels)} labels, {len(groups)} groups; give one of each per row")
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    group_names, group_codes = np.unique(np.asarray(groups), return_inverse=True)
    tests = [
        _run_split(views, y, group_codes, len(classes), split, seed + number)
        for number, split in enumerate(repeated(list(groups)))
    ]
    draws = _group_draws(len(group_names), seed)
    return {
        kind: {
            case: _cell([test.cells[kind, case] for test in tests], [group_codes[test.rows] for test in tests], draws)
            for case in ("complete", "half")
        }
        for kind in [*views, *FUSIONS]
    }


def withhold(present: Mask, seed: int) -> Mask:
    """The mask [n, V] without half of its values, drawn over all samples and views together."""
    values = np.flatnonzero(present)
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(values))[: len(values) // 2]
    left = present.copy()
    left.reshape(-1)[values[drawn]] = False
    return left


@dataclass(frozen=True)
class _Test:
    """One split's test rows, and for each (kind, case) which predictions are right and which had a value, [n] bool."""

    rows: Ints
    cells: dict[tuple[str, str], tuple[Mask, Mask]]


def _run_split(views: Mapping[str, Floats], y: Ints, groups: Ints, n_classes: int, split: Split, seed: int) -> _Test:
    rest, test = split
    known, unseen = ({name: x[rows] for name, x in views.items()} for rows in (rest, test))
    train = np.ones(len(rest), dtype=np.bool_)
    folds = fusion.group_folds([str(group) for group in groups[rest]], train, seed)
    fitted = fusion.Fusions.fit(known, y[rest], folds, n_classes, seed)
    prior = np.broadcast_to(heads.log_prior(y[rest], n_classes), (len(test), n_classes))
    present, cells = fusion.presence(unseen), {}
    for case, mask in (("complete", present), ("half", withhold(present, seed))):
        answers = fitted.predict(unseen, mask) | {"chance": prior}
        has = dict(zip(views, mask.T, strict=True)) | {"chance": np.zeros(len(test), dtype=np.bool_)}
        for kind, log_probs in answers.items():
            right = np.asarray(log_probs.argmax(axis=1) == y[test])
            cells[kind, case] = right, has.get(kind, mask.any(axis=1))
    return _Test(test, cells)


def _cell(tests: Sequence[tuple[Mask, Mask]], groups: Sequence[Ints], draws: Floats) -> dict[str, Any]:
    """One cell of the table from each split's (right, had a value) and groups, and the draws of groups."""
    n_groups = draws.shape[1]
    right = np.stack([np.bincount(g, r, n_groups) for (r, _), g in zip(tests, groups, strict=True)], axis=1)
    count = np.stack([np.bincount(g, minlength=n_groups) for g in groups], axis=1)
    with heads.one_thread():
        right_drawn, drawn = draws @ right, draws @ count
    # A draw may hold no group of a small split's test samples: that split then tells nothing, and the others count.
    splits_drawn = (drawn > 0).sum(axis=1)
    accuracy = (right_drawn / np.maximum(drawn, 1)).sum(axis=1)[splits_drawn > 0] / splits_drawn[splits_drawn > 0]
    low, high = np.percentile(accuracy, [2.5, 97.5])
    return {
        "accuracy": float(np.mean([r.mean() for r, _ in tests])),
        "ci95": [float(low), float(high)],
        "n": sum(len(r) for r, _ in tests),
        "n_present": int(sum(has.sum() for _, has in tests)),
        "splits": len(tests),
        "samples": float(np.mean([len(r) for r, _ in tests])),
    }


def _group_draws(n_groups: int, seed: int) -> Floats:
    """How often each of RESAMPLES bootstrap samples of the groups holds each group: [RESAMPLES, groups]."""
    random = np.random.Generator(np.random.Philox(key=seed))
    return random.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES).astype(np.float64)
