"""FAISS indexes over unit vectors: choosing, building, tuning, reading and searching, as functions on arrays.

Rows are numbered as they were added; what sample a row is, the caller knows. Scores are inner products, so on
unit rows the cosine. `faiss` is imported where it is used.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import AlignmentError, InputError, MissingExtra

__all__ = [
    "Tuned", "build", "check_factory", "choose_factory", "configure", "deserialise", "search", "serialise", "size", "tune",
    "vector",
]  # fmt: skip

Index = Any  # faiss.Index: faiss has no types
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]

# What one core scans exhaustively in 4 ms (131,072 rows of 128-d): exact search is fast enough, and always right.
FLAT_BYTES = 64 * 2**20
# A graph is built by one thread: 1.7 s for 20,000 rows of 128-d, so well under a minute at this size.
HNSW_ROWS = 200_000
MAX_EF_SEARCH = 2048
MIN_PER_LIST = 39  # of training rows, below which FAISS says that centroids are poor
EXACT = "exact"  # what `Tuned` says of an index that has nothing to tune


class Tuned(NamedTuple):
    """The setting that `tune` left in an index, and the recall that it measured there."""

    parameter: str
    value: int
    recall: float


def choose_factory(rows: int, dim: int, recall: float) -> str:
    """Choose FAISS's factory string for a number of vectors.

    Exact where an exact scan is quick or `recall` is 1; a graph in the middle; inverted lists, which train on
    a sample and merge from shards, above.

    Args:
        rows: vectors that the index will hold.
        dim: their dimension.
        recall: the recall against exact search that is asked for, above 0 and up to 1.
    """
    if rows < 1 or dim < 1 or not 0 < recall <= 1:
        raise InputError(
            f"an index of {rows} rows of dimension {dim} at recall {recall}: rows and dimension must be at "
            f"least 1, recall above 0 and at most 1"
        )
    if recall == 1 or rows <= _flat_rows(dim):
        return "Flat"
    if rows <= HNSW_ROWS:
        return "HNSW32,Flat"
    lists = 2 ** round(math.log2(4 * math.sqrt(rows)))
    return f"IVF{lists},Flat"


def check_factory(factory: str, rows: int) -> None:
    """Raise InputError where an index has more inverted lists than its rows can train."""
    lists = _lists(factory)
    if rows < MIN_PER_LIST * lists:
        raise InputError(
            f"index {factory} trains {lists} lists, which takes {MIN_PER_LIST * lists} rows, {MIN_PER_LIST} a list; there are "
            f"{rows}: take at most {max(1, rows // MIN_PER_LIST)} lists"
        )


def size(factory: str, rows: int, dim: int) -> int:
    """Bytes of an index of a factory that `choose_factory` gives, within 1 % from 10,000 rows on; in memory the same.

    A vector is `dim` float32. A graph has 65 neighbours a row of 4 bytes each, 64 on its ground and one on the floors above, 4
    bytes of the row's level and 8 of its offset; lists have 8 bytes of each row's number, and their centroids.
    """
    if factory.startswith("HNSW"):
        return rows * (4 * dim + 4 * 65 + 12)
    lists = _lists(factory)
    return rows * (4 * dim + (8 if lists else 0)) + 4 * dim * lists


def _lists(factory: str) -> int:
    match = re.match(r"IVF(\d+)", factory)
    return int(match[1]) if match else 0


def build(vectors: Vectors, factory: str, seed: int) -> Index:
    """Train and fill an inner-product index; the same vectors, factory and seed give the same bytes.

    One thread builds it, whatever the process is set to: FAISS does not promise the same graph or centroids
    for another number of threads.

    Args:
        vectors: [n, d] float32, finite, unit rows in the order of the index's rows.
        factory: what `choose_factory` returned.
        seed: of the graph's levels or of the centroids.
    """
    faiss = _faiss()
    if vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
        raise InputError(
            f"vectors of shape {vectors.shape} with {int((~np.isfinite(vectors)).sum())} values that are not "
            f"finite: an index takes [n, d], at least one row, present rows only"
        )
    index = faiss.index_factory(int(vectors.shape[1]), factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.rng = faiss.RandomGenerator(seed)
    if isinstance(index, faiss.IndexIVF):
        index.cp.seed = seed
        # Training needs 39 to 256 vectors a list; fewer are taken as they are, and faiss would warn on stderr.
        index.cp.min_points_per_centroid = 1
    contiguous = np.ascontiguousarray(vectors, dtype=np.float32)
    with _one_thread():
        index.train(contiguous)
        index.add(contiguous)
    return index


def serialise(index: Index) -> bytes:
    """Return the bytes of an index, its tuned setting included."""
    return bytes(_faiss().serialize_index(index).tobytes())


def deserialise(data: bytes, factory: str, dim: int, rows: int) -> Index:
    """Read an index and check that it is the one expected. Check the bytes' sha256 before: FAISS trusts them.

    Raises:
        AlignmentError: the bytes are no index, or one of another kind, metric, dimension or number of rows.
    """
    faiss = _faiss()
    try:
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except RuntimeError as error:
        raise AlignmentError(f"{len(data)} bytes are no FAISS index: {str(error).splitlines()[-1]}") from error
    found = (_kind(index), index.metric_type, index.d, index.ntotal)
    expected = (_kind_of(factory), faiss.METRIC_INNER_PRODUCT, dim, rows)
    if found != expected:
        raise AlignmentError(
            f"the index is not the one expected: kind, metric, dimension, rows are {found}, not {expected}; "
            f"run `braid verify`, then `braid run` to remake it"
        )
    return index


def search(index: Index, queries: Vectors, k: int, allowed: Rows | None = None) -> tuple[Vectors, Rows]:
    """Find the k rows of largest inner product for each query, best first, equal scores by row.

    Exact on a Flat index. With `allowed`, k rows come back wherever k are allowed: few allowed rows are
    compared one by one (exact, and quicker than walking a graph that they are rare in), many through the
    index, and exactly again where the index found too few.

    Args:
        index: from `build` or `deserialise`.
        queries: [q, d] float32, finite, unit rows of the same space.
        k: how many; more than there are gives all there are.
        allowed: row numbers that may be returned; None allows all.

    Returns:
        (scores [q, m] float32, rows [q, m] int64), m = min(k, rows allowed). A row of -1 with score -inf
        pads what an approximate index did not find; without `allowed`, only there.

    Raises:
        InputError: queries of another dimension, not finite or not 2-d; k below 1; allowed rows not there.
    """
    _check_query(index, queries, k)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if allowed is None:
        return _ordered(*index.search(queries, min(k, index.ntotal)))
    chosen = np.unique(np.asarray(allowed, dtype=np.int64))
    if chosen.size and (chosen[0] < 0 or chosen[-1] >= index.ntotal):
        raise InputError(f"allowed rows {chosen[0]} to {chosen[-1]}: the index has rows 0 to {index.ntotal - 1}")
    k = min(k, chosen.size)
    if k == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    if chosen.size <= _flat_rows(index.d):
        return _exact_among(index, queries, k, chosen)
    scores, rows = index.search(queries, k, params=_parameters(index, chosen))
    short = (rows < 0).any(axis=1)
    if short.any():
        scores[short], rows[short] = _exact_among(index, queries[short], k, chosen)
    return _ordered(scores, rows)


def vector(index: Index, row: int) -> Vectors:
    """The vector of one row, [d] float32, as the index holds it: exact for Flat, HNSW and IVF over Flat."""
    if isinstance(index, _faiss().IndexIVF):
        index.make_direct_map()
    found: Vectors = index.reconstruct(row)
    return found


def tune(index: Index, queries: Vectors, truth: Rows, recall: float) -> Tuned:
    """Set the smallest nprobe or efSearch, of the powers of two, that reaches a recall against exact search.

    The setting stays in the index and in its bytes. If none reaches it, the largest is left: compare `recall`.

    Args:
        index: from `build`.
        queries: [q, d] float32, held out, of the modality that will ask. Never rows of the index: those find
            themselves, and the recall of another modality's queries, which lie further out, is lower.
        truth: [q, k] the rows that exact search returns.
        recall: mean share of `truth` to be found.
    """
    faiss = _faiss()
    if isinstance(index, faiss.IndexIVF):
        tuned, most = Tuned("nprobe", 0, 0.0), index.nlist
    elif isinstance(index, faiss.IndexHNSW):
        tuned, most = Tuned("efSearch", 0, 0.0), MAX_EF_SEARCH
    else:
        return Tuned(EXACT, 0, _found(index, queries, truth))
    while tuned.value < most and tuned.recall < recall:
        tuned = tuned._replace(value=min(most, 2 * tuned.value or 1))
        configure(index, tuned)
        tuned = tuned._replace(recall=_found(index, queries, truth))
    return tuned


def configure(index: Index, tuned: Tuned) -> None:
    """Set what `tune` found on another index of the same kind, a trial one say."""
    if tuned.parameter != EXACT:
        setattr(index.hnsw if tuned.parameter == "efSearch" else index, tuned.parameter, tuned.value)


def _found(index: Index, queries: Vectors, truth: Rows) -> float:
    """Mean share of the true rows among as many found."""
    _, rows = search(index, queries, truth.shape[1])
    pairs = zip(rows, truth, strict=True)
    return float(np.mean([np.isin(expected, found).mean() for found, expected in pairs]))


def _check_query(index: Index, queries: Vectors, k: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != index.d:
        raise InputError(f"queries of shape {queries.shape}: this index takes [q, {index.d}]")
    if not np.isfinite(queries).all():
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        raise InputError(f"queries {bad[:5].tolist()} are not finite: a missing value cannot be searched for")
    if not queries.any(axis=1).all():
        raise InputError("a query is all zeros: it has no direction, so nothing is nearest to it")
    if k < 1:
        raise InputError(f"k is {k}: ask for at least 1 result")


def _exact_among(index: Index, queries: Vectors, k: int, chosen: Rows) -> tuple[Vectors, Rows]:
    """Compare with every chosen row: all lists of an IVF, the flat vectors below a graph."""
    faiss = _faiss()
    selector = _selector(index, chosen)
    if isinstance(index, faiss.IndexIVF):
        return _ordered(*index.search(queries, k, params=faiss.SearchParametersIVF(sel=selector, nprobe=index.nlist)))
    flat = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    return _ordered(*flat.search(queries, k, params=faiss.SearchParameters(sel=selector)))


def _ordered(scores: Vectors, rows: Rows) -> tuple[Vectors, Rows]:
    """Order by score, equal scores by row, so that the order does not hang on how FAISS walked."""
    scores = np.where(rows < 0, np.float32(-np.inf), scores)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _parameters(index: Index, chosen: Rows) -> Any:
    """Search parameters that carry the filter and keep the tuned setting, which they would override."""
    faiss = _faiss()
    selector = _selector(index, chosen)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def _selector(index: Index, chosen: Rows) -> Any:
    allowed = np.zeros(index.ntotal, dtype=np.bool_)
    allowed[chosen] = True
    return _faiss().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _flat_rows(dim: int) -> int:
    return max(1, FLAT_BYTES // (4 * dim))


def _kind(index: Index) -> str:
    faiss = _faiss()
    kinds = {"HNSW": faiss.IndexHNSWFlat, "IVF": faiss.IndexIVFFlat, "Flat": faiss.IndexFlat}
    return next((name for name, kind in kinds.items() if isinstance(index, kind)), type(index).__name__)


def _kind_of(factory: str) -> str:
    return next((kind for kind in ("HNSW", "IVF") if factory.startswith(kind)), "Flat")


@contextmanager
def _one_thread() -> Iterator[None]:
    faiss = _faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("searching needs faiss: install the extra `read` (pip install -e '.[read]')") from error
    return faiss
