"""Joint spaces learned from pairs: regularised CCA in closed form, one linear projection per view.

Each view is centred on its own mean (two modalities sit in separate cones, the 'modality gap'), reduced to its
principal components, whitened with a ridge, and turned so that dimension i of one view correlates with
dimension i of the other. Dimensions are weighted by a power of their canonical correlation (Yao, Deng, Mak:
correlation weighting of CCA for retrieval), and rows are normalised: the inner product is the score.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore import splits
from featurestore.errors import AlignmentError, InputError, MissingExtra, NotFound
from featurestore.heads import one_thread
from featurestore.recall import Pairs, first_hits, labels

__all__ = ["METHODS", "Projection", "Settings", "Space", "choose", "fit_cca", "learn"]

Floats = NDArray[np.floating[Any]]
Matrix = NDArray[np.float64]
Vectors = NDArray[np.float32]

# Above it recall no longer moved on 785 pairs of images and captions (128: 0.01 lower), and a fit takes 20 ms.
COMPONENTS = 256
MAX_HELD_OUT = 2000  # validation pairs ranked against each other in one fold
METHODS = ("cca",)
# Ridges in units of a view's mean variance per component, and powers of the canonical correlations.
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
POWERS = (0.5, 1.0, 2.0)
FOLDS = 3
VALIDATION = 0.2


class Settings(NamedTuple):
    """Hyperparameters of `fit_cca`, in the order of its arguments."""

    dim: int
    regularisation: tuple[float, float]
    power: float


@dataclass(frozen=True, eq=False)
class Projection:
    """A view's way into a space.

    Attributes:
        mean: [D] float32, of the view over the pairs that it was fitted on.
        matrix: [D, dim] float32.
    """

    mean: Vectors
    matrix: Vectors

    def apply(self, vectors: Floats) -> Vectors:
        """Project [n, D] to [n, dim] float32 unit rows. A row with a NaN (a missing value) is NaN all over."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise InputError(f"vectors of shape {vectors.shape}: this projection takes [n, {len(self.mean)}]")
        return _unit((vectors.astype(np.float32) - self.mean) @ self.matrix)


@dataclass(frozen=True, eq=False)
class Space:
    """A joint space as it is stored.

    Attributes:
        name: of the space.
        method: how it was learned, e.g. `cca`.
        dim: of its vectors.
        projections: by view.
        card: what was measured and chosen; JSON values.
    """

    name: str
    method: str
    dim: int
    projections: Mapping[str, Projection]
    card: Mapping[str, Any]

    def apply(self, view: str, vectors: Floats) -> Vectors:
        """Project vectors of one of the space's views: see `Projection.apply`."""
        if view not in self.projections:
            raise NotFound(f"space {self.name} has no view {view!r}; it has: {', '.join(self.projections)}")
        return self.projections[view].apply(vectors)

    def to_bytes(self) -> bytes:
        """Return safetensors bytes: the same space gives the same bytes."""
        tensors = {
            f"{view}/{part}": np.ascontiguousarray(getattr(projection, part))
            for view, projection in sorted(self.projections.items())
            for part in ("mean", "matrix")
        }
        about = {"name": self.name, "method": self.method, "dim": self.dim, "card": dict(self.card)}
        # One key: safetensors writes several in an order that changes from run to run.
        metadata = {"space": json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False)}
        return bytes(_safetensors().save(tensors, metadata=metadata))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Space":
        """Read what `to_bytes` wrote.

        Raises:
            AlignmentError: the bytes are no space, or its projections do not have its dimension.
        """
        try:
            tensors = _safetensors().load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["space"])
            views = sorted({key.rpartition("/")[0] for key in tensors})
            projections = {view: Projection(tensors[f"{view}/mean"], tensors[f"{view}/matrix"]) for view in views}
            space = cls(about["name"], about["method"], about["dim"], projections, about["card"])
        except Exception as error:  # safetensors' own error is only importable with it
            raise AlignmentError(f"{len(data)} bytes are no space: {error}; run `braid verify`") from error
        for view, projection in projections.items():
            if projection.matrix.shape != (*projection.mean.shape, space.dim):
                raise AlignmentError(
                    f"space {space.name}: view {view} has a matrix of shape {projection.matrix.shape} and a "
                    f"mean of {projection.mean.shape}, the space has dimension {space.dim}; run `braid verify`"
                )
        return space


def fit_cca(
    x: Floats, y: Floats, dim: int, regularisation: tuple[float, float], power: float
) -> tuple[Projection, Projection]:
    """Fit regularised CCA with correlation weighting to pairs of rows; deterministic, signs included.

    Works on at most COMPONENTS principal components of each view, found from the smaller of its two Gram
    matrices: as quick for fewer pairs than dimensions as for many. On one thread, so that the bits do not hang
    on the number of cores.

    Args:
        x: [n, dx] the first view, finite, row i the same sample as row i of `y`.
        y: [n, dy] the second view.
        dim: of the space; fewer where the pairs span fewer.
        regularisation: ridge of x and of y, in units of the view's mean variance per component; above 0.
        power: of the canonical correlations that weight the dimensions of both views.

    Returns:
        The projections of x and of y.
    """
    if min(regularisation) <= 0 or dim < 1:
        raise InputError(f"dim {dim}, regularisation {regularisation}: dim must be at least 1, both ridges above 0")
    if len(x) != len(y):
        raise InputError(f"{len(x)} rows of x and {len(y)} of y: they are pairs")
    with one_thread():
        (mean_x, axes_x), (mean_y, axes_y) = _principal("x", x), _principal("y", y)
        pair = _Moments((x - mean_x) @ axes_x, (y - mean_y) @ axes_y)
        turn_x, turn_y, correlations = pair.canonical(regularisation)
        # Which way a decomposition points is chance: let the largest coordinate be positive.
        largest = np.take_along_axis(turn_x, np.abs(turn_x).argmax(axis=0)[None, :], axis=0)[0]
        weights = (np.where(largest < 0, -1.0, 1.0) * correlations**power)[:dim]
        return (
            Projection(mean_x.astype(np.float32), (axes_x @ turn_x[:, :dim] * weights).astype(np.float32)),
            Projection(mean_y.astype(np.float32), (axes_y @ turn_y[:, :dim] * weights).astype(np.float32)),
        )


def choose(pairs: Pairs, dim: int) -> Settings:
    """Choose ridges and power on validation groups: RIDGES x RIDGES x POWERS, the mean of FOLDS splits by group.

    The figure is the mean log rank of the best hit, both directions: smoother than recall@k on few pairs. The
    principal axes are found once, without the pairing, on all the rows given.
    """
    key = labels(pairs.keys)
    costs: dict[Settings, float] = {}
    with one_thread():
        (mean_x, axes_x), (mean_y, axes_y) = _principal("x", pairs.x), _principal("y", pairs.y)
        x, y = (pairs.x - mean_x) @ axes_x, (pairs.y - mean_y) @ axes_y
        for fold in range(FOLDS):
            side = splits.assign(pairs.groups, {"train": 1 - VALIDATION, "validation": VALIDATION}, fold)
            held_out = np.flatnonzero(side == "validation")[:MAX_HELD_OUT]
            pair = _Moments(x[side == "train"], y[side == "train"])
            for ridges in itertools.product(RIDGES, RIDGES):
                turn_x, turn_y, correlations = pair.canonical(ridges)
                u = (x[held_out] - pair.mean_x) @ turn_x[:, :dim]
                v = (y[held_out] - pair.mean_y) @ turn_y[:, :dim]
                for power in POWERS:
                    weights = correlations[:dim] ** power
                    settings = Settings(dim, ridges, power)
                    cost = _log_rank(_unit(u * weights), _unit(v * weights), key[held_out])
                    costs[settings] = costs.get(settings, 0.0) + cost
    return min(costs, key=lambda settings: costs[settings])


def learn(name: str, pairs: Pairs, views: tuple[str, str], method: str, dim: int) -> Space:
    """Learn a space from pairs: settings chosen on validation groups among them, then fitted to all of them.

    Args:
        name: of the space.
        pairs: samples with both views.
        views: the names of x and y.
        method: a key of METHODS.
        dim: of the space; fewer where the pairs span fewer.
    """
    if method not in METHODS:
        raise InputError(f"space {name}: method {method!r}; there is: {', '.join(METHODS)}")
    settings = choose(pairs, dim)
    projections = fit_cca(pairs.x, pairs.y, *settings)
    card = {
        "pairs": len(pairs.keys),
        "regularisation": dict(zip(views, settings.regularisation, strict=True)),
        "power": settings.power,
    }
    found = projections[0].matrix.shape[1]
    return Space(name, method, found, dict(zip(views, projections, strict=True)), card)


class _Moments:
    """Second moments of paired rows, each view in its own principal axes: what all ridges and powers share."""

    def __init__(self, x: Matrix, y: Matrix) -> None:
        self.mean_x, self.mean_y = x.mean(axis=0), y.mean(axis=0)
        x, y = x - self.mean_x, y - self.mean_y
        self._energy_x, self._axes_x = np.linalg.eigh(x.T @ x)
        self._energy_y, self._axes_y = np.linalg.eigh(y.T @ y)
        self._cross = self._axes_x.T @ (x.T @ y) @ self._axes_y

    def canonical(self, ridges: tuple[float, float]) -> tuple[Matrix, Matrix, Matrix]:
        """Return the directions of x and of y, columns by falling canonical correlation, and the correlations."""
        scale_x, scale_y = _whitening(self._energy_x, ridges[0]), _whitening(self._energy_y, ridges[1])
        left, correlations, right = np.linalg.svd(
            scale_x[:, None] * self._cross * scale_y[None, :], full_matrices=False
        )
        turn_x, turn_y = self._axes_x @ (scale_x[:, None] * left), self._axes_y @ (scale_y[:, None] * right.T)
        return turn_x, turn_y, correlations


def _whitening(energy: Matrix, ridge: float) -> Matrix:
    energy = np.maximum(energy, 0.0)
    return np.asarray(1 / np.sqrt(energy + ridge * energy.mean()))


def _principal(name: str, view: Floats) -> tuple[Matrix, Matrix]:
    """The mean [D] and the largest principal axes [D, k] of a view [n, D], in float64."""
    if view.ndim != 2 or not np.isfinite(view).all():
        raise InputError(f"view {name} of shape {view.shape}: it must be [n, D] and finite; leave missing rows out")
    mean = view.mean(axis=0, dtype=np.float64)
    centred = view - mean
    wide = centred.shape[0] < centred.shape[1]
    energy, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = np.flatnonzero(energy > 1e-10 * max(energy[-1], np.finfo(np.float64).tiny))[::-1][:COMPONENTS]
    # What float32 leaves of a constant is not a direction.
    if not kept.size or energy[-1] <= 1e-12 * len(view) * float(mean @ mean):
        raise InputError(f"view {name}: its {len(view)} rows are equal; a space needs vectors that differ")
    axes = vectors[:, kept]
    return mean, centred.T @ (axes / np.sqrt(energy[kept])) if wide else axes


def _unit(rows: NDArray[Any]) -> Vectors:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, np.finfo(np.float32).tiny), dtype=np.float32)


def _log_rank(x: Vectors, y: Vectors, key: NDArray[np.int64]) -> float:
    ranks = np.concatenate([first_hits(x, y, key, key), first_hits(y, x, key, key)])
    return float(np.log1p(ranks).mean())


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingExtra("reading a space needs safetensors: pip install -e '.[read]'") from error
    return safetensors.numpy
