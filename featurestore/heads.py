"""Multinomial logistic heads over embeddings: the classifiers of training sets and of the fusion table.

Shapes: n rows, D dimensions, K classes. A row that is all NaN is missing and is given the class prior; a
single NaN is the column's mean. Labels are integer codes 0 to K-1, and a class may be absent from the rows that a head
is fitted on. Everything runs on one thread, so a result is the same bits whatever the number of cores.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import InputError

__all__ = [
    "GRID",
    "Head",
    "Standard",
    "choose",
    "fit",
    "fit_path",
    "log_loss",
    "log_prior",
    "logistic",
    "one_thread",
    "predictions",
    "present",
    "rotate",
    "temperature",
]

Floats = NDArray[Any]
Ints = NDArray[np.integer]

GRID = (1e-2, 5e-2, 0.25)
"""Inverse regularisation strengths tried, strongest penalty first. (On the stamps the best of seven from 3e-3 to 3 was
within 0.01 of accuracy of 1e-2 or 0.3, for each of four views.)"""

TOLERANCE = 1e-3
"""Largest slope of the mean loss at which a fit ends. (Against 1e-4, on two splits of the stamps: half the time, and
no fusion's accuracy more than 0.006 away.)"""

# Labels are classes here, however few samples each has; scikit-learn asks whether they are numbers to regress on.
warnings.filterwarnings("ignore", r"The number of unique classes is greater than 50%", UserWarning)

SMOOTHING = 1e-2
"""Share of the class prior mixed into every prediction: bounds what one sure and wrong head costs a fusion,
and gives a class that was absent from the training rows a probability."""


@dataclass(frozen=True)
class Standard:
    """Means and scales of the columns, over the values that are not NaN; a constant column has scale 1."""

    mean: Floats
    scale: Floats

    @classmethod
    def of(cls, x: Floats) -> "Standard":
        """Measures the columns of x [n, D]."""
        known = np.asarray(~np.isnan(x))
        count = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, x, 0.0).sum(axis=0, dtype=np.float64) / count
        variance = (np.where(known, x - mean, 0.0) ** 2).sum(axis=0) / count
        scale = np.sqrt(variance)
        return cls(mean, np.where(scale > 1e-6 * (1 + np.abs(mean)), scale, 1.0))

    def __call__(self, x: Floats) -> Floats:
        """Standardises x [n, D] to float64; NaN stays NaN."""
        return (x.astype(np.float64) - self.mean) / self.scale


@dataclass(frozen=True)
class Head:
    """A fitted head: softmax((standardised x @ weight + bias) / temperature), smoothed with the class prior.

    Attributes:
        standard: fitted on the training rows alone.
        weight: [D, K] float64.
        bias: [K] float64; -inf for a class that was absent from the training rows.
        prior: [K] log-probabilities, from `log_prior`.
        c: inverse regularisation strength.
        temperature: divides the scores; fitted on rows that the head did not see.
    """

    standard: Standard
    weight: Floats
    bias: Floats
    prior: Floats
    c: float
    temperature: float = 1.0

    def scores(self, x: Floats) -> Floats:
        """Scores [n, K] float64 before the temperature; NaN in missing rows."""
        missing = ~present(x)[:, None]
        with one_thread():
            scores = np.nan_to_num(self.standard(x)) @ self.weight + self.bias
        return np.where(missing, np.nan, scores)

    def predict(self, x: Floats) -> NDArray[np.float32]:
        """Log-probabilities [n, K] float32; a missing row is given the class prior."""
        return predictions(self.scores(x), self.prior, self.temperature)


def present(x: Floats) -> NDArray[np.bool_]:
    """Which rows [n] of x [n, D] are not missing, that is, not all NaN."""
    return np.array(~np.isnan(x).all(axis=1), dtype=np.bool_)


def predictions(scores: Floats, prior: Floats, divisor: float) -> NDArray[np.float32]:
    """Log-probabilities [n, K] of scores [n, K]; rows of NaN are given the prior [K]."""
    missing = np.isnan(scores).any(axis=1, keepdims=True)
    shifted = np.where(missing, 0.0, scores) / divisor
    shifted -= shifted.max(axis=1, keepdims=True)
    exponents = np.exp(shifted)
    sharp = exponents / exponents.sum(axis=1, keepdims=True)
    smooth = np.log((1 - SMOOTHING) * sharp + SMOOTHING * np.exp(prior))
    return np.where(missing, prior, smooth).astype(np.float32)


def log_prior(y: Ints, n_classes: int) -> Floats:
    """Log-frequencies [K] of the classes, each counted once more than it occurs (Laplace): none is 0."""
    counts = np.bincount(y, minlength=n_classes) + 1.0
    return np.asarray(np.log(counts / counts.sum()))


def fit_path(x: Floats, y: Ints, n_classes: int, grid: Sequence[float] = GRID) -> list[Head]:
    """Fits one L2-penalised head for each strength of the grid, each starting from the last.

    The rows are first rotated onto their own principal axes. A rotation changes neither likelihood nor penalty,
    and no axis that the rows do not reach can carry weight: nothing is lost, and n rows of D > n dimensions cost
    n x n. (640 x 1280, 16 classes, one core: 0.07 s for the rotation, 0.03 s for each strength.)

    Args:
        x: [n, D] training rows; missing ones are left out (with none present, the head says the prior).
        y: [n] codes of the classes.
        n_classes: K.
        grid: ascending inverse strengths.

    Raises:
        InputError: there are no rows, lengths differ, or a label is not 0 … K-1.
    """
    _check(x, y, n_classes)
    rows = present(x)
    standard, prior = Standard.of(x[rows]), log_prior(y, n_classes)
    with one_thread():
        rotated, axes = rotate(np.nan_to_num(standard(x[rows])))
        fitted = logistic(rotated, y[rows], prior, grid)
        return [Head(standard, axes @ weight, bias, prior, c) for c, (weight, bias) in zip(grid, fitted, strict=True)]


def rotate(x: Floats) -> tuple[Floats, Floats]:
    """Returns x [n, D] on its principal axes, [n, r], and the axes [D, r], by the smaller Gram matrix."""
    if not len(x):
        return x[:, :0], x[:0].T
    tall = len(x) >= x.shape[1]
    values, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)
    reached = values > max(values[-1], 1.0) * 1e-10
    values, vectors = values[reached], vectors[:, reached]
    if tall:
        return x @ vectors, vectors
    return vectors * np.sqrt(values), x.T @ (vectors / np.sqrt(values))


def logistic(x: Floats, y: Ints, prior: Floats, grid: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Weights [D, K] and bias [K] for each strength; the bias of a class that is not in y is -inf."""
    from sklearn.linear_model import LogisticRegression

    seen, shape = np.unique(y), (x.shape[1], len(prior))
    if len(seen) < 2 or not x.shape[1]:  # Nothing to tell apart, or nothing to tell it by.
        return [(np.zeros(shape), prior.copy())] * len(grid)
    model, fitted = LogisticRegression(tol=TOLERANCE, max_iter=1000, warm_start=True), []
    for c in grid:
        model.set_params(C=c).fit(x, y)
        found, offset = model.coef_.T, model.intercept_
        if len(seen) == 2:  # scikit-learn keeps the difference of the two scores.
            found, offset = np.hstack([-found, found]) / 2, np.hstack([-offset, offset]) / 2
        weight, bias = np.zeros(shape), np.full(len(prior), -np.inf)
        weight[:, seen], bias[seen] = found, offset
        fitted.append((weight, bias))
    return fitted


def fit(x: Floats, y: Ints, n_classes: int, held_out: NDArray[np.bool_]) -> Head:
    """Fits a head whose strength and temperature are chosen on `held_out` rows, then refits it on all rows.

    Args:
        x: [n, D]; rows of NaN are missing.
        y: [n] codes.
        n_classes: K.
        held_out: [n] bool; whole groups, or the choice is made on rows that the head has as good as seen.
    """
    path = fit_path(x[~held_out], y[~held_out], n_classes)
    best = choose(path, x[held_out], y[held_out])
    return replace(fit_path(x, y, n_classes, [best.c])[0], temperature=best.temperature)


def choose(path: Sequence[Head], x: Floats, y: Ints) -> Head:
    """The head of a path with the lowest log-loss on rows it has not seen, each at its best temperature."""
    rows = present(x)
    tuned = [replace(head, temperature=temperature(head.scores(x[rows]), head.prior, y[rows])) for head in path]
    return min(tuned, key=lambda head: log_loss(head.predict(x[rows]), y[rows]))


def temperature(scores: Floats, prior: Floats, y: Ints) -> float:
    """The divisor in 1/8 … 8 that gives held-out scores [n, K] the lowest log-loss; 1 without rows."""
    from scipy.optimize import minimize_scalar

    if not len(y):
        return 1.0
    found = minimize_scalar(
        lambda power: log_loss(predictions(scores, prior, 2.0**power), y),
        bounds=(-3, 3),
        options={"xatol": 0.02},
    )
    return float(2.0**found.x)


def log_loss(log_probs: Floats, y: Ints) -> float:
    """Mean negative log-probability of the true classes."""
    return float(-np.mean(log_probs[np.arange(len(y)), y], dtype=np.float64)) if len(y) else 0.0


def one_thread() -> AbstractContextManager[object]:
    """Holds BLAS and OpenMP to one thread in a `with` block: more threads add in another order."""
    limited: AbstractContextManager[object] = _thread_pools().limit(limits=1)
    return limited


@cache
def _thread_pools() -> Any:
    import scipy.linalg
    import sklearn.linear_model
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    # Only libraries that are loaded by now are found, hence the two imports, which are used for nothing else.
    del scipy, sklearn
    return ThreadpoolController()


def _check(x: Floats, y: Ints, n_classes: int) -> None:
    if len(x) != len(y):
        raise InputError(f"{len(x)} rows but {len(y)} labels; give one label per row")
    if not len(y):
        raise InputError("no training rows: a head needs at least one; give the train split a larger fraction")
    if y.min() < 0 or y.max() >= n_classes:
        raise InputError(f"label codes {y.min()} to {y.max()}; allowed are 0 to {n_classes - 1}")
