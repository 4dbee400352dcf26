import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featurestore import indexes, recall, spaces
from featurestore.errors import InputError
from featurestore.recall import Pairs


@dataclass
class Unchanged:
    """A projection that only normalises."""

    def apply(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def nothing_learned(_: Pairs) -> tuple[Unchanged, Unchanged]:
    return Unchanged(), Unchanged()


def learn_cca(pairs: Pairs) -> tuple[spaces.Projection, spaces.Projection]:
    return spaces.fit_cca(pairs.x, pairs.y, 8, (1e-3, 1e-3), 1.0)


def planted(n: int = 200, noise: float = 0.0, width: int = 40, seed: int = 0) -> Pairs:
    """Two linear mixtures of one latent; without noise every pair can be found."""
    random = np.random.default_rng(seed)
    latent = random.normal(size=(n, 8))
    x, y = (
        (latent @ random.normal(size=(8, width)) + noise * random.normal(size=(n, width)) + 5).astype(np.float32)
        for _ in range(2)
    )
    return Pairs(x, y, [f"g{i // 2}" for i in range(n)], list(range(n)))


def unrelated(n: int = 200, width: int = 80) -> Pairs:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(n, width)), random.normal(size=(n, width))
    return Pairs(x, y, [f"g{i}" for i in range(n)], list(range(n)))


def test_a_corpus_without_noise_is_found_whole_in_both_directions() -> None:
    figures = recall.evaluate(planted(), learn_cca, ("image", "caption"))
    assert set(figures) == {"image->caption", "caption->image"}
    for measured in figures.values():
        assert measured["recall@1"] == measured["exact@10"] == measured["corpus"]["recall@1"] == 1.0
        assert (measured["n"], measured["gallery"], measured["splits"], measured["sd@10"]) == (40, 40, 5, 0)
        assert measured["chance@10"] == pytest.approx(10 / 40)
        assert measured["corpus"]["gallery"] == 200
        assert measured["corpus"]["chance@10"] == pytest.approx(10 / 200)


def test_recall_is_near_that_of_the_planted_latents_own_posterior() -> None:
    """With noise, the optimum is the cosine of the true latents' best estimates: CCA comes near it from pairs alone."""
    pairs = planted(n=500, noise=2.0)
    random = np.random.default_rng(0)
    random.normal(size=(500, 8))
    mixes = []
    for _ in range(2):  # the same draws as `planted`
        mixes.append(random.normal(size=(8, 40)))
        random.normal(size=(500, 40))

    @dataclass
    class Oracle:
        mix: NDArray[np.float64]

        def apply(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
            posterior = np.linalg.solve(self.mix @ self.mix.T + 4 * np.eye(8), self.mix @ (vectors - 5).T).T
            return Unchanged().apply(posterior)

    best = recall.evaluate(pairs, lambda _: (Oracle(mixes[0]), Oracle(mixes[1])), ("x", "y"))["x->y"]
    found = recall.evaluate(pairs, learn_cca, ("x", "y"))["x->y"]
    assert 0.5 < best["recall@1"] < 1.0
    assert found["recall@10"] > best["recall@10"] - 0.03
    assert found["recall@1"] > best["recall@1"] - 0.1


def test_unrelated_views_score_chance_and_a_learner_that_saw_the_test_rows_does_not() -> None:
    """The mutant that leaks: fitted to all pairs, it 'finds' most of what only chance could find."""
    pairs = unrelated()
    honest = recall.evaluate(pairs, learn_cca, ("x", "y"))["x->y"]
    leaking = recall.evaluate(pairs, lambda _: learn_cca(pairs), ("x", "y"))["x->y"]
    assert honest["recall@10"] == pytest.approx(honest["chance@10"], abs=0.08)
    assert leaking["recall@10"] > 0.9


def test_the_learner_never_sees_a_row_or_a_group_of_the_test_part() -> None:
    pairs = unrelated(100)
    pairs = pairs._replace(groups=[f"g{i // 3}" for i in range(100)])
    asked: list[set[Any]] = []
    given: list[Pairs] = []

    def learn(held_in: Pairs) -> tuple[Unchanged, Unchanged]:
        given.append(held_in)
        return nothing_learned(held_in)

    def search(gallery: NDArray[Any], queries: NDArray[Any], k: int) -> NDArray[np.int64]:
        asked.append({row.tobytes() for row in queries})
        return recall.exact(gallery, queries, k)

    recall.evaluate(pairs, learn, ("x", "y"), search=search)
    assert len(given) == 5
    for number, held_in in enumerate(given):
        queries = asked[4 * number]  # x->y among the test part
        seen = {row.tobytes() for row in Unchanged().apply(held_in.x)}
        assert not seen & queries
        assert len(seen) + len(queries) == 100
        rows = {row.tobytes(): group for row, group in zip(Unchanged().apply(pairs.x), pairs.groups, strict=True)}
        assert not {rows[query] for query in queries} & set(held_in.groups)


def test_an_equal_key_is_a_hit_and_raises_chance() -> None:
    """y of a row is the vector of its twin: found by key, never by identity."""
    x = np.eye(300)
    twins = np.arange(300) ^ 1
    groups = [f"g{i // 2}" for i in range(300)]
    by_identity = recall.evaluate(Pairs(x, x[twins], groups, list(range(300))), nothing_learned, ("x", "y"))["x->y"]
    by_key = recall.evaluate(Pairs(x, x[twins], groups, groups), nothing_learned, ("x", "y"))["x->y"]
    assert by_identity["recall@1"] == 0
    assert by_key["recall@1"] == 1
    assert by_key["chance@10"] > 1.5 * by_identity["chance@10"]


@pytest.mark.parametrize(("gallery", "k"), [(30, 10), (30, 1), (7, 10), (12, 5)])
def test_chance_is_what_random_rankings_give(gallery: int, k: int) -> None:
    random = np.random.default_rng(0)
    relevant = np.array([1, 2, 5, 7])
    drawn = random.permuted(np.tile(np.arange(gallery), (20_000, 1)), axis=1)[:, :k]
    simulated = np.mean([(drawn < r).any(axis=1).mean() for r in relevant])
    assert recall.chance(relevant, gallery, k) == pytest.approx(simulated, abs=0.005)


def test_chance_is_the_hypergeometric_formula() -> None:
    relevant = np.array([0, 1, 3, 25, 30])
    exact = np.mean([1 - math.comb(30 - r, 10) / math.comb(30, 10) for r in relevant])
    assert recall.chance(relevant, 30, 10) == pytest.approx(exact, abs=1e-12)


def test_a_space_that_maps_all_to_one_point_gains_nothing_by_ties() -> None:
    one = np.ones((20, 3), np.float32)
    key = np.arange(20)
    assert recall.first_hits(one, one, key, key).tolist() == [19] * 20
    assert recall.first_hits(one[:1], one, np.array([99]), key).tolist() == [20]


def test_exact_search_is_a_full_sort_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    gallery, queries = random.normal(size=(50, 4)).astype("f4"), random.normal(size=(9, 4)).astype("f4")
    full = np.argsort(-(queries @ gallery.T), axis=1)[:, :7]
    for most in (1, 120, 10**6):
        monkeypatch.setattr(recall, "MAX_SCORES", most)
        assert recall.exact(gallery, queries, 7).tolist() == full.tolist()


def test_recall_of_an_index_stands_beside_exact_search_and_padding_is_no_hit() -> None:
    """All -1 is what an approximate index that finds nothing returns; read as a row it would be the last one."""

    def misses(gallery: NDArray[Any], queries: NDArray[Any], k: int) -> NDArray[np.int64]:
        return np.full((len(queries), k), -1)

    figures = recall.evaluate(planted(), learn_cca, ("x", "y"), search=misses)["x->y"]
    assert (figures["recall@10"], figures["exact@10"]) == (0.0, 1.0)


def test_a_flat_index_gives_the_recall_of_exact_search() -> None:
    def search(gallery: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return indexes.search(indexes.build(gallery, "Flat", 0), queries, k)[1]

    through_index = recall.evaluate(planted(noise=1.0), learn_cca, ("x", "y"), search=search)
    for measured in through_index.values():
        assert measured["recall@10"] == measured["exact@10"]
    assert through_index == recall.evaluate(planted(noise=1.0), learn_cca, ("x", "y"))


def test_choosing_and_fitting_is_what_evaluate_takes() -> None:
    def learn(held_in: Pairs) -> tuple[spaces.Projection, spaces.Projection]:
        space = spaces.learn("seen", held_in, ("a", "b"), "cca", 8)
        return space.projections["a"], space.projections["b"]

    figures = recall.evaluate(planted(n=120, noise=0.5), learn, ("a", "b"), n_splits=2)
    assert figures["a->b"]["recall@10"] > 0.9
    assert figures["b->a"]["splits"] == 2


def test_pairs_with_holes_or_columns_of_other_lengths_are_refused() -> None:
    pairs = unrelated(50)
    y = pairs.y.copy()
    y[7] = np.nan
    with pytest.raises(InputError, match=r"1 rows of y are not finite, the first is row 7"):
        recall.evaluate(pairs._replace(y=y), nothing_learned, ("x", "y"))
    with pytest.raises(InputError, match=r"columns of \[50, 50, 50, 49\] rows"):
        recall.evaluate(pairs._replace(keys=pairs.keys[1:]), nothing_learned, ("x", "y"))
    with pytest.raises(InputError, match="n_splits is 1"):
        recall.evaluate(pairs, nothing_learned, ("x", "y"), n_splits=1)
