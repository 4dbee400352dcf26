import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featurestore import indexes
from featurestore.errors import AlignmentError, InputError

KINDS = ["Flat", "HNSW32,Flat", "IVF16,Flat"]
DIM = 16


def unit(n: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS, QUERIES = unit(1000), unit(40, seed=1)


def brute(queries: NDArray[np.float32], allowed: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return allowed[np.argsort(-(queries @ VECTORS[allowed].T), axis=1)[:, :k]]


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest) -> faiss.Index:
    return indexes.build(VECTORS, request.param, 0)


@pytest.fixture
def small_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 20 rows were what one scans exhaustively."""
    monkeypatch.setattr(indexes, "FLAT_BYTES", 20 * 4 * DIM)


def test_the_kind_follows_size_dimension_and_recall_at_the_borders() -> None:
    flat = indexes.FLAT_BYTES // (4 * 128)
    assert indexes.choose_factory(flat, 128, 0.95) == "Flat"
    assert indexes.choose_factory(flat + 1, 128, 0.95) == "HNSW32,Flat"
    assert indexes.choose_factory(flat + 1, 64, 0.95) == "Flat"
    assert indexes.choose_factory(indexes.HNSW_ROWS, 128, 0.95) == "HNSW32,Flat"
    assert indexes.choose_factory(indexes.HNSW_ROWS + 1, 128, 0.95) == "IVF2048,Flat"
    assert indexes.choose_factory(10**6, 128, 0.95) == "IVF4096,Flat"
    assert indexes.choose_factory(10**6, 128, 1.0) == "Flat"
    assert indexes.choose_factory(1, 1, 0.01) == "Flat"


@pytest.mark.parametrize(("rows", "dim", "recall"), [(0, 8, 0.9), (8, 0, 0.9), (8, 8, 0.0), (8, 8, 1.1)])
def test_no_kind_fits_an_empty_index_or_an_impossible_recall(rows: int, dim: int, recall: float) -> None:
    with pytest.raises(InputError, match=f"{rows} rows of dimension {dim} at recall {recall}"):
        indexes.choose_factory(rows, dim, recall)


@pytest.mark.parametrize("factory", KINDS)
def test_the_same_vectors_and_seed_give_the_same_bytes_on_any_number_of_threads(factory: str) -> None:
    threads = faiss.omp_get_max_threads()
    try:
        made = set()
        for count in (1, 2, 4):
            faiss.omp_set_num_threads(count)
            made.add(indexes.serialise(indexes.build(VECTORS, factory, 0)))
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    assert len(made) == 1
    if factory != "Flat":
        assert indexes.serialise(indexes.build(VECTORS, factory, 1)) not in made


def test_one_thread_builds_and_the_processs_own_number_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(faiss, "omp_set_num_threads", asked.append)
    indexes.build(VECTORS, "Flat", 0)
    assert asked == [1, faiss.omp_get_max_threads()]


def test_an_index_comes_back_from_its_bytes(index: faiss.Index) -> None:
    kind = next(kind for kind in KINDS if kind.startswith(indexes._kind(index)))
    back = indexes.deserialise(indexes.serialise(index), kind, DIM, 1000)
    for found, expected in zip(indexes.search(back, QUERIES, 5), indexes.search(index, QUERIES, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert indexes.serialise(back) == indexes.serialise(index)


def test_an_index_of_another_kind_dimension_or_size_is_refused() -> None:
    data = indexes.serialise(indexes.build(VECTORS, "Flat", 0))
    for factory, dim, rows in (("HNSW32,Flat", DIM, 1000), ("Flat", DIM + 1, 1000), ("Flat", DIM, 999)):
        with pytest.raises(AlignmentError, match=r"not the one expected.*\('Flat', 0, 16, 1000\), not"):
            indexes.deserialise(data, factory, dim, rows)
    distances = faiss.IndexFlatL2(DIM)
    distances.add(VECTORS)
    with pytest.raises(AlignmentError, match=r"\('Flat', 1, 16, 1000\)"):
        indexes.deserialise(indexes.serialise(distances), "Flat", DIM, 1000)


@pytest.mark.parametrize("data", [b"", b"no index", indexes.serialise(indexes.build(VECTORS, "Flat", 0))[:-50]])
def test_broken_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(AlignmentError, match=f"{len(data)} bytes are no FAISS index"):
        indexes.deserialise(data, "Flat", DIM, 1000)


def test_a_flat_index_is_brute_force() -> None:
    scores, rows = indexes.search(indexes.build(VECTORS, "Flat", 0), QUERIES, 10)
    np.testing.assert_array_equal(rows, brute(QUERIES, np.arange(1000), 10))
    np.testing.assert_allclose(scores, np.take_along_axis(QUERIES @ VECTORS.T, rows, axis=1), atol=1e-6)


@given(st.sets(st.integers(0, 999), max_size=60), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_a_filter_returns_the_right_k_wherever_k_are_allowed(allowed: set[int], k: int) -> None:
    rows = np.array(sorted(allowed), dtype=np.int64)
    for factory in KINDS:
        _, found = indexes.search(BUILT[factory], QUERIES[:3], k, rows)
        np.testing.assert_array_equal(found, brute(QUERIES[:3], rows, k))


BUILT = {factory: indexes.build(VECTORS, factory, 0) for factory in KINDS}


@pytest.mark.usefixtures("small_flat")
@pytest.mark.parametrize("factory", KINDS)
def test_a_filter_too_large_to_scan_still_returns_k_allowed_rows(factory: str) -> None:
    """30 allowed rows among 1000: a graph or one list of 16 finds few of them by itself."""
    rows = np.arange(0, 900, 30)
    before = indexes.serialise(BUILT[factory])
    scores, found = indexes.search(BUILT[factory], QUERIES, 25, rows)
    assert np.isin(found, rows).all()
    assert all(len(set(row)) == 25 for row in found.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_array_equal(found, brute(QUERIES, rows, 25))
    assert indexes.serialise(BUILT[factory]) == before


def test_allowed_rows_may_repeat_and_come_in_any_order(index: faiss.Index) -> None:
    _, found = indexes.search(index, QUERIES, 5, np.array([7, 3, 3, 500, 7]))
    np.testing.assert_array_equal(found, brute(QUERIES, np.array([3, 7, 500]), 3))


def test_equal_scores_come_in_the_order_of_rows() -> None:
    same = np.repeat(VECTORS[:1], 6, axis=0)
    _, rows = indexes.search(indexes.build(same, "Flat", 0), VECTORS[:1], 6)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_k_above_the_number_of_rows_returns_them_all() -> None:
    small = indexes.build(VECTORS[:3], "Flat", 0)
    scores, rows = indexes.search(small, QUERIES[:2], 10)
    assert scores.shape == (2, 3)
    assert sorted(rows[0].tolist()) == [0, 1, 2]
    assert indexes.search(small, QUERIES[:2], 10, np.array([], dtype=np.int64))[1].shape == (2, 0)


def test_wrong_queries_say_what_is_wrong(index: faiss.Index) -> None:
    missing = QUERIES.copy()
    missing[3, 2] = np.nan
    with pytest.raises(InputError, match=r"queries \[3\] are not finite"):
        indexes.search(index, missing, 5)
    with pytest.raises(InputError, match=r"shape \(40, 15\): this index takes \[q, 16\]"):
        indexes.search(index, QUERIES[:, 1:], 5)
    with pytest.raises(InputError, match=r"shape \(16,\)"):
        indexes.search(index, QUERIES[0], 5)
    with pytest.raises(InputError, match="k is 0"):
        indexes.search(index, QUERIES, 0)
    with pytest.raises(InputError, match="allowed rows 0 to 1000: the index has rows 0 to 999"):
        indexes.search(index, QUERIES, 5, np.array([0, 1000]))


def test_vectors_that_are_missing_or_none_make_no_index() -> None:
    missing = VECTORS.copy()
    missing[5] = np.nan
    with pytest.raises(InputError, match="16 values that are not finite"):
        indexes.build(missing, "Flat", 0)
    with pytest.raises(InputError, match=r"shape \(0, 16\)"):
        indexes.build(VECTORS[:0], "Flat", 0)


@pytest.mark.parametrize(("factory", "parameter"), [("HNSW32,Flat", "efSearch"), ("IVF16,Flat", "nprobe")])
def test_tuning_takes_the_smallest_setting_that_reaches_the_recall(factory: str, parameter: str) -> None:
    index = indexes.build(VECTORS, factory, 0)
    truth = brute(QUERIES, np.arange(1000), 10)
    tuned = indexes.tune(index, QUERIES, truth, 0.9)
    assert (tuned.parameter, tuned.recall >= 0.9) == (parameter, True)
    back = indexes.deserialise(indexes.serialise(index), factory, DIM, 1000)
    assert indexes._found(back, QUERIES, truth) == tuned.recall  # the setting is in the bytes
    indexes.configure(back, tuned._replace(value=tuned.value // 2))
    assert indexes._found(back, QUERIES, truth) < 0.9


def test_tuning_measures_with_other_queries_than_rows_of_the_index() -> None:
    """The mutant: an index asked for its own rows reports a recall that another modality's queries do not get."""
    index = indexes.build(VECTORS, "IVF16,Flat", 0)
    own = indexes.tune(index, VECTORS[:200], brute(VECTORS[:200], np.arange(1000), 1), 0.95)
    other = indexes.tune(index, QUERIES, brute(QUERIES, np.arange(1000), 1), 0.95)
    assert own.value < other.value


def test_there_is_nothing_to_tune_in_exact_search() -> None:
    index = indexes.build(VECTORS, "Flat", 0)
    tuned = indexes.tune(index, QUERIES, brute(QUERIES, np.arange(1000), 10), 0.9)
    assert tuned == ("exact", 0, 1.0)
    indexes.configure(index, tuned)


def test_a_recall_that_is_not_reached_leaves_the_largest_setting() -> None:
    index = indexes.build(VECTORS, "IVF16,Flat", 0)
    wrong = np.full((40, 1), 10**6)
    assert indexes.tune(index, QUERIES, wrong, 0.9) == ("nprobe", 16, 0.0)
