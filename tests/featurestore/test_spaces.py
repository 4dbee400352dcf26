import functools
import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from featurestore import spaces
from featurestore.errors import AlignmentError, InputError, NotFound
from featurestore.recall import Pairs
from featurestore.spaces import Projection, Space

LATENT = 6
NOISE = 0.3


@functools.cache
def planted(n: int = 400, dx: int = 60, dy: int = 30, seed: int = 0) -> tuple[Pairs, NDArray[np.float64]]:
    """Two views of one latent: each mixes it linearly with private factors, noise and a mean of its own."""
    random = np.random.default_rng(seed)
    latent = random.normal(size=(n, LATENT))
    views = []
    for width in (dx, dy):
        private = 3 * random.normal(size=(n, 5)) @ random.normal(size=(5, width))
        shared = latent @ random.normal(size=(LATENT, width))
        gap = 20 * random.normal(size=width)
        views.append((shared + private + NOISE * random.normal(size=(n, width)) + gap).astype(np.float32))
    groups = [f"g{i // 2}" for i in range(n)]
    return Pairs(views[0], views[1], groups, list(range(n))), latent


def _hit_rate(x: NDArray[np.float32], y: NDArray[np.float32], k: int = 1) -> float:
    scores = x @ y.T
    return float(np.mean((scores > np.diag(scores)[:, None]).sum(axis=1) < k))


def _unit(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cca_finds_the_planted_latent_under_a_gap_and_private_factors() -> None:
    pairs, latent = planted()
    x, y = pairs.x[:300], pairs.y[:300]
    project_x, project_y = spaces.fit_cca(x, y, LATENT, (1e-3, 1e-3), 1.0)
    found = project_x.apply(pairs.x[300:])
    # The latent is a linear function of the space: what least squares leaves of it is the planted noise.
    away = (pairs.x[300:] - project_x.mean) @ project_x.matrix
    fit, *_ = np.linalg.lstsq(away, latent[300:] - latent[:300].mean(axis=0), rcond=None)
    left = np.var(latent[300:] - latent[:300].mean(axis=0) - away @ fit) / np.var(latent[300:])
    assert left < 0.02
    assert _hit_rate(found, project_y.apply(pairs.y[300:])) > 0.9


def test_a_modality_gap_hides_pairs_from_raw_cosines_and_not_from_the_space() -> None:
    """Both views are one latent, each shifted: what lies along the gap wins every raw query, centred all are found."""
    random = np.random.default_rng(0)
    latent = random.normal(size=(200, 8)).astype(np.float32)
    noisy = latent + 0.05 * random.normal(size=latent.shape).astype(np.float32)
    gap = 100 * np.eye(8, dtype=np.float32)
    x, y = latent + gap[0], noisy + gap[1]
    raw = _unit(x), _unit(y)
    projections = spaces.fit_cca(x[:150], y[:150], 8, (1e-3, 1e-3), 1.0)
    mapped = [projection.apply(view[150:]) for projection, view in zip(projections, (x, y), strict=True)]
    assert _hit_rate(raw[0][150:], raw[1][150:]) < 0.2
    assert _hit_rate(*mapped) == 1.0


def test_more_dimensions_than_pairs_fit_as_well_as_fewer() -> None:
    """A rotation into more dimensions adds nothing: the dual form gives the same space as the primal."""
    pairs, _ = planted()
    x, y = pairs.x[:100].astype(np.float64), pairs.y[:100].astype(np.float64)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(500, 60)))
    narrow = spaces.fit_cca(x, y, 5, (0.1, 0.1), 1.0)
    wide = spaces.fit_cca(x @ turn.T, y, 5, (0.1, 0.1), 1.0)
    expected = narrow[0].apply(x) @ narrow[1].apply(y).T
    np.testing.assert_allclose(wide[0].apply(x @ turn.T) @ wide[1].apply(y).T, expected, atol=1e-4)


def test_the_correlations_are_those_of_textbook_cca() -> None:
    """Against the eigenvalues of Cxx^-1 Cxy Cyy^-1 Cyx, for a ridge near 0 and power 0 (no weights)."""
    random = np.random.default_rng(1)
    x = random.normal(size=(500, 4))
    y = x @ random.normal(size=(4, 3)) + random.normal(size=(500, 3))
    cxx, cyy, cxy = np.cov(x.T), np.cov(y.T), np.cov(x.T, y.T)[:4, 4:]
    squares = np.linalg.eigvals(np.linalg.solve(cxx, cxy) @ np.linalg.solve(cyy, cxy.T)).real
    project_x, project_y = spaces.fit_cca(x, y, 3, (1e-9, 1e-9), 0.0)
    u, v = (x - project_x.mean) @ project_x.matrix, (y - project_y.mean) @ project_y.matrix
    measured = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(measured, np.sqrt(np.sort(squares)[::-1][:3]), atol=1e-5)


def test_signs_and_bytes_do_not_depend_on_chance_or_the_order_of_rows() -> None:
    pairs, _ = planted()
    first = spaces.fit_cca(pairs.x, pairs.y, 6, (1.0, 1.0), 1.0)
    again = spaces.fit_cca(pairs.x, pairs.y, 6, (1.0, 1.0), 1.0)
    assert first[0].matrix.tobytes() == again[0].matrix.tobytes()
    order = np.random.default_rng(0).permutation(len(pairs.x))
    shuffled = spaces.fit_cca(pairs.x[order], pairs.y[order], 6, (1.0, 1.0), 1.0)
    for one, other in zip(first, shuffled, strict=True):
        np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-3, atol=1e-4 * np.abs(one.matrix).max())


def test_rows_are_unit_and_a_missing_value_stays_missing() -> None:
    pairs, _ = planted()
    project, _ = spaces.fit_cca(pairs.x, pairs.y, 6, (1.0, 1.0), 1.0)
    rows = pairs.x[:4].copy()
    rows[2, 7] = np.nan
    found = project.apply(rows)
    assert found.dtype == np.float32
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(np.linalg.norm(found[[0, 1, 3]], axis=1), 1, rtol=1e-6)


def test_the_space_is_smaller_where_the_pairs_do_not_span_it() -> None:
    pairs, _ = planted()
    space = spaces.learn("s", pairs.take(np.arange(20)), ("a", "b"), "cca", 128)
    assert space.dim == space.projections["a"].matrix.shape[1] == space.projections["b"].matrix.shape[1] == 19


def test_choose_comes_near_the_best_ridges_for_pairs_it_never_saw() -> None:
    """50 noisy pairs in 60 and 30 dimensions: without a ridge everything correlates on the training rows."""
    pairs, _ = planted()
    random = np.random.default_rng(0)
    x, y = (view + 3 * random.normal(size=view.shape) for view in (pairs.x, pairs.y))
    train, test = pairs._replace(x=x, y=y).take(np.arange(50)), slice(100, 400)

    def rate(settings: spaces.Settings) -> float:
        project_x, project_y = spaces.fit_cca(train.x, train.y, *settings)
        return _hit_rate(project_x.apply(x[test]), project_y.apply(y[test]), k=20)

    chosen = spaces.choose(train, LATENT)
    best = max(rate(chosen._replace(regularisation=(ridge, ridge))) for ridge in spaces.RIDGES)
    assert rate(chosen) > 0.85 * best
    assert rate(chosen) > 1.15 * rate(chosen._replace(regularisation=(1e-6, 1e-6)))


def test_a_learned_space_comes_back_from_its_bytes_and_these_are_always_the_same() -> None:
    pairs, _ = planted()
    space = spaces.learn("seen", pairs, ("image", "caption"), "cca", 6)
    data = space.to_bytes()
    back = Space.from_bytes(data)
    assert (back.name, back.method, back.dim, back.card) == ("seen", "cca", 6, space.card)
    assert back.apply("caption", pairs.y).tobytes() == space.apply("caption", pairs.y).tobytes()
    assert {hashlib.sha256(copy.to_bytes()).hexdigest() for copy in (space, back, Space.from_bytes(data))} == {
        hashlib.sha256(data).hexdigest()
    }
    assert spaces.learn("seen", pairs, ("image", "caption"), "cca", 6).to_bytes() == data


def test_bytes_are_the_same_in_another_process_whatever_the_order_of_views_and_card() -> None:
    """Golden: safetensors' own metadata would change order from process to process."""
    eye = Projection(np.zeros(2, np.float32), np.eye(2, dtype=np.float32))
    one = Space("s", "cca", 2, {"a": eye, "b": eye}, {"x": 1, "y": 2})
    other = Space("s", "cca", 2, {"b": eye, "a": eye}, {"y": 2, "x": 1})
    assert one.to_bytes() == other.to_bytes()
    assert (
        hashlib.sha256(one.to_bytes()).hexdigest() == "27d1982e371d5356df883e93254220e2926d2d133433397514bf472bf6dd7dee"
    )


def test_a_space_of_wrong_shapes_or_broken_bytes_is_refused() -> None:
    eye = Projection(np.zeros(2, np.float32), np.eye(2, dtype=np.float32))
    with pytest.raises(AlignmentError, match=r"view a has a matrix of shape \(2, 2\).*has dimension 3"):
        Space.from_bytes(Space("s", "cca", 3, {"a": eye}, {}).to_bytes())
    good = Space("s", "cca", 2, {"a": eye}, {}).to_bytes()
    for data in (b"", b"no safetensors here", good[:-3]):
        with pytest.raises(AlignmentError, match=rf"{len(data)} bytes are no space"):
            Space.from_bytes(data)


def test_wrong_input_says_what_is_wrong() -> None:
    pairs, _ = planted()
    space = Space("s", "cca", 2, {"a": Projection(np.zeros(2, np.float32), np.eye(2, dtype=np.float32))}, {})
    with pytest.raises(NotFound, match="space s has no view 'b'; it has: a"):
        space.apply("b", pairs.x)
    with pytest.raises(InputError, match=r"shape \(400, 60\): this projection takes \[n, 2\]"):
        space.apply("a", pairs.x)
    with pytest.raises(InputError, match="method 'magic'; there is: cca"):
        spaces.learn("s", pairs, ("a", "b"), "magic", 6)
    with pytest.raises(InputError, match="both ridges above 0"):
        spaces.fit_cca(pairs.x, pairs.y, 6, (0.0, 1.0), 1.0)
    with pytest.raises(InputError, match="399 rows of x and 400 of y"):
        spaces.fit_cca(pairs.x[1:], pairs.y, 6, (1.0, 1.0), 1.0)
    with pytest.raises(InputError, match="view y: its 400 rows are equal"):
        spaces.fit_cca(pairs.x, np.full_like(pairs.y, 0.1), 6, (1.0, 1.0), 1.0)
    missing = pairs.x.copy()
    missing[3] = np.nan
    with pytest.raises(InputError, match=r"view x of shape.*finite; leave missing rows out"):
        spaces.fit_cca(missing, pairs.y, 6, (1.0, 1.0), 1.0)
