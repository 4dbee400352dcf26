import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featurestore import heads
from featurestore.errors import InputError

C = 0.1


def planted(n=120, dims=200, n_classes=4, seed=0, noise=1.0):
    random = np.random.default_rng(seed)
    y = random.integers(0, n_classes, n)
    centres = np.random.default_rng(99).normal(size=(n_classes, dims))
    scale = np.geomspace(0.01, 10, dims)
    return ((centres[y] * 0.4 + noise * random.normal(size=(n, dims))) * scale + 3).astype(np.float32), y


def accuracy(log_probs, y):
    return np.mean(log_probs.argmax(axis=1) == y)


def fitted(x, y, n_classes=4, c=C):
    return heads.fit_path(x, y, n_classes, [c])[0]


def test_the_rotation_loses_nothing(monkeypatch):
    monkeypatch.setattr(heads, "TOLERANCE", 1e-7)
    x, y = planted()
    from sklearn.linear_model import LogisticRegression

    z = heads.Standard.of(x)(x)
    direct = LogisticRegression(C=C, tol=1e-7, max_iter=5000).fit(z, y)
    new = planted(seed=1)[0]
    expected = direct.decision_function(heads.Standard.of(x)(new))
    scores = fitted(x, y).scores(new)
    centred = [s - s.mean(axis=1, keepdims=True) for s in (scores, expected)]
    np.testing.assert_allclose(*centred, atol=1e-3)


def test_it_learns_what_is_planted_and_is_at_chance_on_noise():
    (x, y), (new, truth) = planted(), planted(seed=1)
    assert accuracy(fitted(x, y).predict(new), truth) > 0.9
    noise = np.random.default_rng(5).normal(size=(400, 200)).astype(np.float32)
    labels = np.random.default_rng(6).integers(0, 4, 400)
    assert accuracy(fitted(noise[:200], labels[:200]).predict(noise[200:]), labels[200:]) < 0.35


def test_predictions_are_log_probabilities_and_the_prior_where_missing():
    x, y = planted()
    head = fitted(x, y)
    x[3] = np.nan
    x[4, 7] = np.nan
    log_probs = head.predict(x)
    assert log_probs.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(log_probs[3], heads.log_prior(y, 4), atol=1e-6)
    x[4, 7] = head.standard.mean[7]
    np.testing.assert_allclose(head.predict(x)[4], log_probs[4], atol=1e-5)


def test_missing_training_rows_leave_the_head_unchanged_but_for_the_prior():
    x, y = planted()
    more = np.vstack([x, np.full((10, x.shape[1]), np.nan, np.float32)])
    labels = np.append(y, np.zeros(10, int))
    np.testing.assert_array_equal(fitted(more, labels).weight, fitted(x, y).weight)
    assert fitted(more, labels).prior[0] > fitted(x, y).prior[0]


@pytest.mark.parametrize("seen", [[2], [0, 3], [0, 1, 3]])
def test_classes_absent_from_training_get_a_small_finite_probability(seen):
    x, y = planted()
    rows = np.isin(y, seen)
    log_probs = fitted(x[rows], y[rows]).predict(x)
    assert np.isfinite(log_probs).all()
    absent = np.setdiff1d(np.arange(4), seen)
    assert np.exp(log_probs[:, absent]).max() < 0.03
    if len(seen) > 1:
        assert accuracy(log_probs[rows], y[rows]) > 0.9


def test_a_view_without_any_value_predicts_the_prior():
    x = np.full((6, 3), np.nan, np.float32)
    y = np.array([0, 0, 0, 1, 1, 2])
    head = fitted(x, y, 3)
    np.testing.assert_allclose(
        head.predict(np.ones((2, 3), np.float32)), np.tile(heads.log_prior(y, 3), (2, 1)), atol=1e-6
    )


def test_standardisation_ignores_missing_values_and_spares_constant_columns():
    x = np.array([[1.0, 5, np.nan], [3.0, 5, 2], [np.nan, 5, 4]], np.float32)
    standard = heads.Standard.of(x)
    np.testing.assert_allclose(standard.mean, [2, 5, 3])
    np.testing.assert_allclose(standard.scale, [1, 1, 1])


def test_strength_and_temperature_are_chosen_on_held_out_rows():
    x, y = planted(n=160, noise=3.0)
    held_out = np.arange(160) >= 100
    head = heads.fit(x, y, 4, held_out)
    path = heads.fit_path(x[:100], y[:100], 4)
    losses = [
        heads.log_loss(heads.predictions(h.scores(x[100:]), h.prior, t), y[100:])
        for h in path
        for t in np.geomspace(1 / 8, 8, 60)
    ]
    best = path[int(np.argmin(losses)) // 60]
    assert head.c == best.c
    assert np.isclose(
        heads.log_loss(heads.predictions(best.scores(x[100:]), best.prior, head.temperature), y[100:]),
        min(losses),
        atol=1e-3,
    )


def test_the_temperature_undoes_overconfidence():
    random = np.random.default_rng(0)
    scores = random.normal(size=(4000, 5))
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    y = (probabilities.cumsum(axis=1) > random.random((4000, 1))).argmax(axis=1)
    assert heads.temperature(4 * scores, np.log(np.full(5, 0.2)), y) == pytest.approx(4, rel=0.15)
    assert heads.temperature(scores[:0], np.log(np.full(5, 0.2)), y[:0]) == 1.0


def test_the_same_rows_give_the_same_bytes():
    x, y = planted()
    assert fitted(x, y).predict(x).tobytes() == fitted(x.copy(), y.copy()).predict(x).tobytes()


def test_wrong_arguments_are_refused():
    x, y = planted()
    with pytest.raises(InputError, match="120 rows but 119 labels"):
        heads.fit_path(x, y[1:], 4)
    with pytest.raises(InputError, match="label codes 0 to 3; allowed are 0 to 2"):
        heads.fit_path(x, y, 3)
    with pytest.raises(InputError, match="no training rows"):
        heads.fit_path(x[:0], y[:0], 4)


FEW_OF_EACH = """
import numpy as np
from featurestore import heads
x = np.random.default_rng(0).normal(size=(30, 5))
print(len(heads.logistic(x, np.arange(30) % 25, np.zeros(25), [1.0])))
"""


def test_classes_of_a_sample_or_two_are_classes_and_nothing_is_said_of_it():
    from sklearn.linear_model import LogisticRegression

    with pytest.warns(UserWarning, match="unique classes is greater than 50%"):
        LogisticRegression().fit(np.zeros((30, 1)), np.arange(30) % 25)
    # Each test has filters of its own, so what an import sets is seen in another process.
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", FEW_OF_EACH],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60, check=True,
    )  # fmt: skip
    assert (ended.stdout, ended.stderr) == ("1\n", "")
