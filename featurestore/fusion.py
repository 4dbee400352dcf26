"""Fusing modalities that may be missing: out-of-fold predictions, and early, late and hybrid heads.

Shapes: n rows, V views, K classes. A view is float32 [n, D]; a row of NaN is a missing value, and `mask` [n, V] bool
says which values a prediction may use. Every fusion predicts the class prior for a row that has no value at all.

- `early`: one head over the standardised embeddings side by side and the mask. A missing value is the mean.
- `late`: the views' own calibrated log-probabilities, pooled with weights that depend on which views are there.
- `hybrid`: the same pool with the early head as one more expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore import heads
from featurestore.errors import InputError
from featurestore.heads import Floats, Head, Ints
from featurestore.splits import assign

__all__ = ["Early", "Fusions", "OutOfFold", "Pool", "drop_masks", "group_folds", "out_of_fold", "presence"]

Mask = NDArray[np.bool_]

N_FOLDS = 5
NOT_TRAIN = -1
"""The fold of a row that is not in train; the refit on all of train predicts it."""

COPIES = 2
"""Copies of the training rows with values withheld, beside the complete ones. (On the stamps 1, 2 and 4 gave early
fusion 0.864, 0.879 and 0.883 with all values and 0.710, 0.714 and 0.736 with half; late and hybrid do not care.)"""

RIDGE = 1.0
"""How strongly a pool's weights are drawn to independence, in units of one sample's log-loss."""


class OutOfFold(NamedTuple):
    """Log-probabilities [n, K] float32 of rows by heads that never saw their groups, and the head for new rows."""

    log_probs: NDArray[np.float32]
    head: Head


def presence(views: Mapping[str, Floats]) -> Mask:
    """Which views a row has: [n, V] bool in the order of the mapping.

    Raises:
        InputError: the views do not have the same number of rows.
    """
    lengths = {name: len(x) for name, x in views.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"rows of each view: {lengths}; give at least one view, all with the same rows in one order")
    return np.stack([heads.present(x) for x in views.values()], axis=1)


def group_folds(groups: Sequence[str], train: Mask, seed: int, n_folds: int = N_FOLDS) -> NDArray[np.int8]:
    """A fold 0 … n_folds-1 for each row [n], whole groups at a time; -1 for rows not in train.

    Raises:
        InputError: fewer than 3 folds, or so few groups that a fold would be empty.
    """
    if n_folds < 3:
        raise InputError(f"{n_folds} folds; at least 3: one to predict, one to calibrate on, the rest to fit on")
    folds = np.full(len(groups), NOT_TRAIN, dtype=np.int8)
    rows = np.flatnonzero(train)
    fractions = {str(fold): 1 / n_folds for fold in range(n_folds)}
    folds[rows] = assign([groups[row] for row in rows.tolist()], fractions, seed).astype(np.int8)
    return folds


def out_of_fold(x: Floats, y: Ints, folds: Ints, n_classes: int) -> OutOfFold:
    """Predicts each training row by a head that saw nothing of its fold, and all other rows by a refit on train.

    For fold f the strength and the temperature are chosen on fold f+1 by heads fitted without both, so neither the
    labels nor the values of f take part in its predictions, not even through calibration. The refit takes the middle
    of the folds' strengths, and the temperature that suits the out-of-fold scores. Labels of rows with fold -1 are
    never read.

    Args:
        x: [n, D] one view; missing rows (NaN) are given the class prior of the rows that were trained on.
        y: [n] class codes.
        folds: [n] from `group_folds`.
        n_classes: K.
    """
    train, names = folds != NOT_TRAIN, np.unique(folds[folds != NOT_TRAIN])
    log_probs = np.empty((len(x), n_classes), dtype=np.float32)
    scores = np.full((len(x), n_classes), np.nan)
    strengths = []
    for fold, following in zip(names, np.roll(names, -1), strict=True):
        inside, outside = folds == fold, train & (folds != fold)
        head = heads.fit(x[outside], y[outside], n_classes, folds[outside] == following)
        scores[inside], log_probs[inside] = head.scores(x[inside]), head.predict(x[inside])
        strengths.append(head.c)
    [refit] = heads.fit_path(x[train], y[train], n_classes, [sorted(strengths)[len(strengths) // 2]])
    known = train & heads.present(x)
    refit = replace(refit, temperature=heads.temperature(scores[known], refit.prior, y[known]))
    log_probs[~train] = refit.predict(x[~train])
    return OutOfFold(log_probs, refit)


def drop_masks(present: Mask, copies: int, seed: int) -> list[Mask]:
    """The mask itself, then `copies` of it in which every value is withheld with probability 1/2 (seeded)."""
    random = np.random.Generator(np.random.Philox(key=seed))
    return [present, *(present & (random.random(present.shape) < 0.5) for _ in range(copies))]


@dataclass(frozen=True)
class Early:
    """A head over all views side by side, whose score is a sum of one part for each view that is there.

    Attributes:
        parts: for each view its standardisation and [D, K] weights.
        offsets: [V, K] weights of the mask.
        bias: [K]; -inf for a class that was absent from the training rows.
        prior: [K] log-probabilities of the classes.
        c: inverse regularisation strength.
    """

    parts: list[tuple[heads.Standard, Floats]]
    offsets: Floats
    bias: Floats
    prior: Floats
    c: float

    def contributions(self, views: Mapping[str, Floats]) -> Floats:
        """What each view adds to the scores: [n, V, K] float64; 0 where it is missing."""
        with heads.one_thread():
            return np.stack(
                [
                    np.where(heads.present(x)[:, None], np.nan_to_num(standard(x)) @ weight + offset, 0.0)
                    for x, (standard, weight), offset in zip(views.values(), self.parts, self.offsets, strict=True)
                ],
                axis=1,
            )

    def predict(self, contributions: Floats, mask: Mask) -> NDArray[np.float32]:
        """Log-probabilities [n, K] float32 from the views that `mask` [n, V] lets it use."""
        scores = np.where(mask[:, :, None], contributions, 0.0).sum(axis=1) + self.bias
        known = mask.any(axis=1, keepdims=True)
        return heads.predictions(np.where(known, scores, np.nan), self.prior, 1.0)


def early_path(
    views: Mapping[str, Floats], y: Ints, n_classes: int, masks: Sequence[Mask], grid: Sequence[float]
) -> list[Early]:
    """Fits an early head for each strength on the rows as often as there are masks, each time with what one leaves.

    Args:
        views: [n, D] each.
        y: [n] class codes.
        n_classes: K.
        masks: [n, V] each, from `drop_masks`.
        grid: ascending inverse strengths; a strength means the same for any number of masks.
    """
    prior = heads.log_prior(y, n_classes)
    standards = [heads.Standard.of(x) for x in views.values()]
    with heads.one_thread():
        turned = [
            heads.rotate(np.nan_to_num(standard(x))) for standard, x in zip(standards, views.values(), strict=True)
        ]
        wide = np.hstack([z for z, _ in turned])
        view_of_column = np.repeat(np.arange(len(turned)), [z.shape[1] for z, _ in turned])
        rows = np.vstack([np.hstack([wide * mask[:, view_of_column], mask]) for mask in masks])
        fitted = heads.logistic(rows, np.tile(y, len(masks)), prior, [c / len(masks) for c in grid])
        ends = np.flatnonzero(np.diff(view_of_column, append=len(turned))) + 1
        found = []
        for c, (weight, bias) in zip(grid, fitted, strict=True):
            *blocks, offsets = np.split(weight, ends)
            parts = [(s, axes @ block) for s, (_, axes), block in zip(standards, turned, blocks, strict=True)]
            found.append(Early(parts, offsets, bias, prior, c))
    return found


def early_out_of_fold(
    views: Mapping[str, Floats], y: Ints, folds: Ints, n_classes: int, masks: Sequence[Mask]
) -> tuple[NDArray[np.float32], Early]:
    """Out-of-fold log-probabilities [n masks, n, K] of training rows under each mask, and the head for new rows.

    All rows given are training rows. The strength is chosen once, on the first fold.
    """

    def path(rows: Mask, grid: Sequence[float]) -> list[Early]:
        return early_path(_take(views, rows), y[rows], n_classes, [mask[rows] for mask in masks], grid)

    def predict(head: Early, rows: Mask) -> NDArray[np.float32]:
        contributions = head.contributions(_take(views, rows))
        return np.stack([head.predict(contributions, mask[rows]) for mask in masks])

    first = folds == folds.min()
    truth = np.tile(y[first], len(masks))
    best = min(
        path(~first, heads.GRID),
        key=lambda head: heads.log_loss(predict(head, first).reshape(-1, n_classes), truth),
    )
    log_probs = np.empty((len(masks), len(y), n_classes), dtype=np.float32)
    for fold in np.unique(folds):
        inside = np.asarray(folds == fold)
        [head] = path(~inside, [best.c])
        log_probs[:, inside] = predict(head, inside)
    [refit] = path(np.ones(len(y), dtype=np.bool_), [best.c])
    return log_probs, refit


def _take(views: Mapping[str, Floats], rows: Mask) -> dict[str, Floats]:
    return {name: x[rows] for name, x in views.items()}


@dataclass(frozen=True)
class Pool:
    """Experts' log-probabilities, pooled: prior + sum over experts of weight x (expert - prior), normalised.

    With weight 1 this is exact for experts that are independent given the class; dependent ones are weighed down, each
    by how much depends on which others are there (a logarithmic opinion pool, Genest & Zidek 1986, with the prior
    as base). Without experts it is the prior.

    Attributes:
        weights: [M, M]; expert v weighs weights[v, v] plus weights[v, u] for every other expert u that is there.
        prior: [K] log-probabilities of the classes.
    """

    weights: Floats
    prior: Floats

    def predict(self, experts: Floats, mask: Mask) -> NDArray[np.float32]:
        """Log-probabilities [n, K] float32 of experts [n, M, K] where `mask` [n, M] has them."""
        return _log_softmax(self._scores(experts, mask)).astype(np.float32)

    def _scores(self, experts: Floats, mask: Mask) -> Floats:
        weight = mask * (mask @ self.weights.T)
        return np.asarray(self.prior + np.einsum("nm,nmk->nk", weight, experts - self.prior))

    @classmethod
    def fit(cls, experts: Floats, mask: Mask, y: Ints, prior: Floats, copies: int) -> "Pool":
        """Fits the weights to out-of-fold predictions by log-loss, with a ridge that draws them to independence.

        Args:
            experts: [n, M, K] log-probabilities of rows that the experts were not fitted on.
            mask: [n, M] bool; what may be used. Repeat the rows with values withheld (`drop_masks`).
            y: [n] class codes.
            prior: [K] log-probabilities of the classes.
            copies: how often each sample occurs among the rows.
        """
        from scipy.optimize import minimize

        truth, start = np.eye(len(prior))[y], np.eye(experts.shape[1])
        evidence = experts - prior

        def loss(flat: Floats) -> tuple[float, Floats]:
            pool = cls(flat.reshape(start.shape), prior)
            log_probs, apart = _log_softmax(pool._scores(experts, mask)), pool.weights - start
            slope = np.einsum("nk,nmk->nm", np.exp(log_probs) - truth, evidence) * mask
            ridge = 0.5 * RIDGE * float((apart**2).sum())
            gradient = slope.T @ mask / copies + RIDGE * apart
            return -float((log_probs * truth).sum()) / copies + ridge, gradient.ravel()

        with heads.one_thread():
            found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B")
        return cls(found.x.reshape(start.shape), prior)


@dataclass(frozen=True)
class Fusions:
    """The heads of all views and the three fusions of them, fitted on the same training rows.

    Attributes:
        alone: for each view the head for new rows.
        early: the early head.
        late: the pool of the views' heads.
        hybrid: the pool of the views' heads and the early head, which comes last.
    """

    alone: dict[str, Head]
    early: Early
    late: Pool
    hybrid: Pool

    @classmethod
    def fit(cls, views: Mapping[str, Floats], y: Ints, folds: Ints, n_classes: int, seed: int) -> "Fusions":
        """Fits everything on training rows; pools on out-of-fold predictions, with values withheld at random.

        Args:
            views: [n, D] each.
            y: [n] class codes.
            folds: [n] from `group_folds`, none -1.
            n_classes: K.
            seed: of the withheld values.
        """
        masks = drop_masks(presence(views), COPIES, seed)
        alone = {name: out_of_fold(x, y, folds, n_classes) for name, x in views.items()}
        joint, early = early_out_of_fold(views, y, folds, n_classes, masks)
        own = np.stack([found.log_probs for found in alone.values()], axis=1)
        experts, mask = np.vstack([own] * len(masks)), np.vstack(masks)
        truth, prior = np.tile(y, len(masks)), heads.log_prior(y, n_classes)
        late = Pool.fit(experts, mask, truth, prior, len(masks))
        hybrid = Pool.fit(*_with(experts, joint.reshape(-1, n_classes), mask), truth, prior, len(masks))
        return cls({name: found.head for name, found in alone.items()}, early, late, hybrid)

    def predict(self, views: Mapping[str, Floats], mask: Mask) -> dict[str, NDArray[np.float32]]:
        """Log-probabilities [n, K] float32 of each view, `early`, `late` and `hybrid`.

        Args:
            views: [n, D] each, in the order in which they were fitted.
            mask: [n, V] bool; the values that may be used. A view's own prediction without its value is the prior.
        """
        shown = {name: np.where(mask[:, [v]], x, np.nan) for v, (name, x) in enumerate(views.items())}
        own = {name: head.predict(shown[name]) for name, head in self.alone.items()}
        early = self.early.predict(self.early.contributions(shown), mask)
        experts = np.stack(list(own.values()), axis=1)
        late, hybrid = self.late.predict(experts, mask), self.hybrid.predict(*_with(experts, early, mask))
        return {**own, "early": early, "late": late, "hybrid": hybrid}


def _with(experts: Floats, joint: Floats, mask: Mask) -> tuple[Floats, Mask]:
    """The experts [n, M, K] and their mask with one more, which is there for every row that has anything."""
    return np.hstack([experts, joint[:, None]]), np.hstack([mask, mask.any(axis=1, keepdims=True)])


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
