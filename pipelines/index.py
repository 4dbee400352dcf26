"""Stage 5: a FAISS index over the views of a space.

The settings that an approximate index is tuned by are found on samples that a trial index holds in none of their views: a row
of the database finds itself and says nothing about what a user will get.
"""

import numpy as np
import pyarrow as pa

from featurestore import artefact, builds, indexes
from featurestore.catalog import Catalog
from featurestore.identity import DIGEST_BYTES, hash64, row_digest
from featurestore.search import read_space
from featurestore.storage import Storage
from featurestore.views import View, whole
from pipelines.publish import build_entry, card_bytes
from pipelines.runner import Result, result

SEED = 0
HELD_OUT = 1_000

ROWS_SCHEMA = pa.schema(
    [
        pa.field("view", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("row_digest", pa.binary(DIGEST_BYTES), nullable=False),
    ]
)
"""What row of which view each row of an index is, and the digest that binds its vector in the index to its id."""


def make(storage: Storage, build: builds.Build, version: int) -> Result:
    """Builds, tunes and places one index: rows in the order of its views, then of the corpus."""
    snapshot = Catalog(storage).snapshot(version)
    space = read_space(snapshot, build.settings["space"])
    tables, parts = [], []
    for name, view in whole(snapshot, build.settings["views"]).items():
        matrix, present = view.matrix()
        parts.append(space.projections[name].apply(matrix[present]))
        tables.append(_rows(view, present, parts[-1]))
    rows, vectors = pa.concat_tables(tables), np.concatenate(parts)
    factory = indexes.choose_factory(len(vectors), space.dim, build.settings["recall"])
    index = indexes.build(vectors, factory, SEED)
    tuned = _tune(rows, vectors, factory, build.settings["recall"])
    if tuned is not None:
        indexes.configure(index, tuned)
    card = {
        "name": build.name,
        "build": build.key,
        **build.settings,
        "factory": factory,
        "rows": len(vectors),
        "dim": space.dim,
        "tuned": tuned._asdict() if tuned else "exact search: nothing to tune, recall against exact search is 1",
    }
    footer = {"kind": build.kind, "name": build.name, "recipe": build.key, "rows": len(rows)}
    placed = {
        "index": artefact.place_bytes(storage, indexes.serialise(index), f"{build.stem}/index", ".faiss"),
        "rows": artefact.place_table(storage, rows, f"{build.stem}/rows", footer),
        "card": artefact.place_bytes(storage, card_bytes(card), f"{build.stem}/card", ".json"),
    }
    count = {"index": len(rows), "rows": len(rows), "card": 0}
    return result(build.key, [build_entry(build, name, each, count[name]) for name, each in placed.items()])


def _rows(view: View, present: np.ndarray, vectors: np.ndarray) -> pa.Table:
    """The rows of a view whose value is present, beside their vectors."""
    places = [
        (shard.shard, row, sample_id)
        for shard in view.shards
        for ids in [view.corpus.ids(shard.shard)]
        for row, sample_id in ((row, ids[row]) for row in view.corpus.live_rows(shard.shard).tolist())
    ]
    kept = [place for place, there in zip(places, present.tolist(), strict=True) if there]
    digests = [row_digest(place[2], None, vector.tobytes()) for place, vector in zip(kept, vectors, strict=True)]
    columns = [[view.name] * len(kept), *([place[each] for place in kept] for each in range(3)), digests]
    return pa.table(columns, schema=ROWS_SCHEMA)


def _tune(rows: pa.Table, vectors: np.ndarray, factory: str, recall: float) -> indexes.Tuned | None:
    """The setting that reaches the recall on samples that a trial index does not hold; None for exact search."""
    if factory == "Flat":
        return None
    ids = np.array([hash64(sample_id) for sample_id in rows["id"].to_pylist()], np.uint64)
    share = min(0.1, HELD_OUT / len(ids))
    held = ids < np.uint64(int(share * 2**63) * 2)
    trial = indexes.build(vectors[~held], factory, SEED)
    queries = vectors[held]
    exact = indexes.build(vectors[~held], "Flat", SEED)
    _, truth = indexes.search(exact, queries, 10)
    return indexes.tune(trial, queries, truth, recall)
