from itertools import product

import numpy as np
import pytest

from featurestore import fusion, heads
from featurestore.errors import InputError

K = 4
DIMS = {"image": 24, "caption": 12, "sound": 6}
NOISE = {"image": 2.2, "caption": 1.8, "sound": 1.5}


def planted(n=400, seed=0, lacking=0.3):
    """Views are linear images of a class's centre plus Gaussian noise, and independent given the class.

    The columns have means far from 0, so zeros in place of missing values are far from any true value.
    """
    shape, random = np.random.default_rng(7), np.random.default_rng(seed)
    y = random.integers(0, K, n)
    views = {}
    for name, dim in DIMS.items():
        centres, mean = shape.normal(size=(K, dim)), shape.normal(size=dim) * 4
        views[name] = (centres[y] + NOISE[name] * random.normal(size=(n, dim)) + mean).astype(np.float32)
        views[name][random.random(n) < lacking] = np.nan
    return views, y


def accuracy(log_probs, y):
    return np.mean(log_probs.argmax(axis=1) == y)


def grouped(n, size=2):
    return [f"g{i // size}" for i in range(n)]


def folds_of(groups, train=None, seed=0):
    return fusion.group_folds(groups, np.ones(len(groups), bool) if train is None else train, seed)


@pytest.fixture(scope="module")
def fusions():
    views, y = planted()
    return fusion.Fusions.fit(views, y, folds_of(grouped(len(y))), K, seed=0)


def test_folds_keep_groups_whole_and_mark_what_is_not_in_train():
    groups = grouped(200, 4)
    train = np.arange(200) < 160
    folds = folds_of(groups, train)
    assert folds.dtype == np.int8
    assert (folds[~train] == -1).all()
    assert set(folds[train].tolist()) == {0, 1, 2, 3, 4}
    assert all(len({folds[i] for i in range(start, start + 4)}) == 1 for start in range(0, 200, 4))
    with pytest.raises(InputError, match="2 folds; at least 3"):
        fusion.group_folds(groups, train, 0, n_folds=2)


def noise():
    """Pure noise, in groups of two near-duplicates with one label: whoever cuts a group sees the answer."""
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(120, 60)), 2, axis=0).astype(np.float32)
    x += 0.01 * random.normal(size=x.shape).astype(np.float32)
    return x, np.repeat(random.integers(0, K, 120), 2)


def test_noise_gives_chance_out_of_fold_but_not_in_fold():
    x, y = noise()
    by_group = fusion.out_of_fold(x, y, folds_of(grouped(240)), K).log_probs
    by_row = fusion.out_of_fold(x, y, folds_of([str(i) for i in range(240)]), K).log_probs
    in_fold = heads.fit_path(x, y, K, [0.1])[0].predict(x)
    assert accuracy(by_group, y) < 0.37
    assert abs(heads.log_loss(by_group, y) - np.log(K)) < 0.1  # Calibrated too: by rows of its own it would be sure.
    assert accuracy(by_row, y) > 0.6
    assert accuracy(in_fold, y) > 0.9


def test_noise_gives_chance_out_of_fold_in_the_early_head_too():
    x, y = noise()
    views = {"image": x[:, :30], "caption": x[:, 30:]}
    masks = [fusion.presence(views)]
    by_group, refit = fusion.early_out_of_fold(views, y, folds_of(grouped(240)), K, masks)
    assert accuracy(by_group[0], y) < 0.37
    assert accuracy(refit.predict(refit.contributions(views), masks[0]), y) > 0.6


@pytest.mark.parametrize("fold", [0, 3])
def test_a_folds_predictions_depend_on_none_of_its_labels(fold):
    views, y = planted(n=150)
    folds = folds_of(grouped(150))
    before = fusion.out_of_fold(views["image"], y, folds, K).log_probs
    changed = np.where(folds == fold, (y + 1) % K, y)
    after = fusion.out_of_fold(views["image"], changed, folds, K).log_probs
    np.testing.assert_array_equal(before[folds == fold], after[folds == fold])
    assert (before[folds != fold] != after[folds != fold]).any()


def test_rows_outside_train_get_the_refit_and_their_labels_are_never_read():
    views, y = planted(n=200)
    train = np.arange(200) < 150
    folds = folds_of(grouped(200), train)
    found = fusion.out_of_fold(views["caption"], y, folds, K)
    np.testing.assert_array_equal(found.log_probs[~train], found.head.predict(views["caption"][~train]))
    again = fusion.out_of_fold(views["caption"], np.where(train, y, 10**6), folds, K)
    np.testing.assert_array_equal(found.log_probs, again.log_probs)
    missing = ~heads.present(views["caption"]) & ~train
    np.testing.assert_allclose(
        found.log_probs[missing], np.tile(heads.log_prior(y[train], K), (missing.sum(), 1)), atol=1e-6
    )


def test_a_view_with_a_single_value_still_gets_predictions():
    x = np.full((60, 5), np.nan, np.float32)
    x[7] = 1
    y = np.arange(60) % K
    assert np.isfinite(fusion.out_of_fold(x, y, folds_of(grouped(60)), K).log_probs).all()


def bayes(views, y, mask):
    """Accuracy of the true model under a mask: nearest centre, each view weighed by its noise."""
    shape = np.random.default_rng(7)
    score = np.zeros((len(y), K))
    for v, (name, dim) in enumerate(DIMS.items()):
        centres, mean = shape.normal(size=(K, dim)), shape.normal(size=dim) * 4
        apart = ((views[name] - mean)[:, None] - centres[None]) / NOISE[name]
        score -= np.where(mask[:, [v]], (np.nan_to_num(apart) ** 2).sum(axis=2), 0) / 2
    return float((score.argmax(axis=1) == y).mean())


def test_with_half_withheld_fusion_is_near_the_planted_optimum_and_clearly_above_zero_filling(fusions):
    views, y = planted(n=3000, seed=1)
    mask = fusion.presence(views) & (np.random.default_rng(2).random((3000, 3)) < 0.5)
    answers = {kind: accuracy(log_probs, y) for kind, log_probs in fusions.predict(views, mask).items()}

    def zero_filled(given, seen):
        return np.hstack([np.where(seen[:, [v]], x, 0) for v, x in enumerate(given.values())]).astype(np.float32)

    known, truth = planted()
    head = heads.fit(zero_filled(known, fusion.presence(known)), truth, K, np.arange(400) >= 320)
    zeros = accuracy(head.predict(zero_filled(views, mask)), y)
    optimum = bayes(views, y, mask)
    for kind in ("early", "late", "hybrid"):
        assert answers[kind] > max(answers[view] for view in DIMS)
        assert optimum - answers[kind] < 0.1
    assert max(answers.values()) > zeros + 0.03


def test_every_presence_pattern_is_served_and_none_at_all_is_the_prior(fusions):
    views, _ = planted(n=8, seed=3, lacking=0)
    mask = np.array(list(product([False, True], repeat=3)))
    answers = fusions.predict(views, mask)
    prior = heads.log_prior(planted()[1], K)
    for log_probs in answers.values():
        assert log_probs.shape == (8, K)
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(log_probs[0], prior, atol=1e-5)
    assert (np.abs(np.diff(answers["late"], axis=0)).max(axis=1) > 1e-3).all()


def test_values_that_the_mask_withholds_change_nothing(fusions):
    views, _ = planted(n=50, seed=4, lacking=0)
    mask = np.random.default_rng(5).random((50, 3)) < 0.5
    other = {name: np.where(mask[:, [v]], x, np.float32(77)) for v, (name, x) in enumerate(views.items())}
    for kind, log_probs in fusions.predict(views, mask).items():
        np.testing.assert_array_equal(log_probs, fusions.predict(other, mask)[kind])


def test_a_pool_of_experts_that_are_independent_given_the_class_is_bayes_rule():
    random = np.random.default_rng(0)
    prior = np.log([0.5, 0.3, 0.2])
    y = random.choice(3, size=2000, p=np.exp(prior))
    likelihood = [-((random.normal(size=(2000, 1)) + y[:, None] - np.arange(3)) ** 2) / 2 for _ in range(2)]

    def normal(scores):
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    experts = np.stack([normal(prior + one) for one in likelihood], axis=1)
    everything = np.ones((2000, 2), bool)
    pool = fusion.Pool.fit(experts, everything, y, prior, 1)
    exact = normal(prior + sum(likelihood))
    np.testing.assert_allclose(np.exp(pool.predict(experts, everything)), np.exp(exact), atol=0.04)
    copied = np.stack([experts[:, 0]] * 2, axis=1)
    twice = fusion.Pool.fit(copied, everything, y, prior, 1)
    np.testing.assert_allclose(np.exp(twice.predict(copied, everything)), np.exp(experts[:, 0]), atol=0.04)


def test_a_pools_gradient_is_that_of_its_loss(monkeypatch):
    from scipy import optimize

    taken = {}
    monkeypatch.setattr(
        optimize, "minimize", lambda loss, start, **_: taken.update(loss=loss) or optimize.OptimizeResult(x=start)
    )
    random = np.random.default_rng(1)
    experts, mask = np.log(random.dirichlet(np.ones(3), size=(20, 4))), random.random((20, 4)) < 0.6
    fusion.Pool.fit(experts, mask, random.integers(0, 3, 20), np.log(np.full(3, 1 / 3)), 2)
    error = optimize.check_grad(lambda w: taken["loss"](w)[0], lambda w: taken["loss"](w)[1], random.normal(size=16))
    assert error < 1e-4


def test_dropout_is_seeded_withholds_half_and_begins_with_the_mask_itself():
    present = np.random.default_rng(0).random((500, 3)) < 0.8
    masks = fusion.drop_masks(present, 2, seed=3)
    np.testing.assert_array_equal(masks[0], present)
    assert all((mask <= present).all() and 0.4 < mask.sum() / present.sum() < 0.6 for mask in masks[1:])
    np.testing.assert_array_equal(masks[2], fusion.drop_masks(present, 2, seed=3)[2])
    assert (masks[1] != masks[2]).any()


def test_views_of_different_lengths_are_refused():
    with pytest.raises(InputError, match=r"rows of each view: \{'a': 3, 'b': 2\}"):
        fusion.presence({"a": np.zeros((3, 1)), "b": np.zeros((2, 1))})
