"""Tombstones: the samples of a corpus that are gone, or that stand again in a later ingest because they changed.

Shards are immutable, so a sample that is gone keeps its row; a tombstone says that no reader hands it out. An ingest that
finds samples gone or changed adds one file of them, and nothing that was there before is touched.
"""

import itertools

import numpy as np
import pyarrow as pa

from featurestore import artefact
from featurestore.catalog import Snapshot

__all__ = ["CHANGED", "GONE", "SCHEMA", "TOMBSTONES", "gone_rows"]

TOMBSTONES = "tombstones"
"""Kind in the catalog; its shard is called after the ingest that found them."""

GONE, CHANGED = "gone", "changed"

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""A tombstone file, sorted by shard and row; `reason` is `gone` or `changed`."""


def gone_rows(snapshot: Snapshot, corpus: str) -> dict[str, np.ndarray]:
    """Shard -> int64 row numbers that are gone, ascending; shards that are whole are left out."""
    storage = snapshot.storage
    tables = [SCHEMA.empty_table()]
    for entry in snapshot.entries(TOMBSTONES, corpus):
        tables.append(artefact.read_table(artefact.read_checked(storage, entry.path, entry.sha256)))
    table = pa.concat_tables([each.select(["shard", "row"]) for each in tables]).combine_chunks()
    table = table.sort_by([("shard", "ascending"), ("row", "ascending")])
    shards, rows = table["shard"].to_pylist(), np.asarray(table["row"], np.int64)
    starts = [0, *(at for at in range(1, len(shards)) if shards[at] != shards[at - 1]), len(shards)]
    return {shards[first]: rows[first:end] for first, end in itertools.pairwise(starts) if end > first}
