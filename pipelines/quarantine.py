"""Quarantine files: every value that a stage rejected, with id, field, stage, reason and where it came from."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from featurestore import artefact
from featurestore.catalog import Snapshot
from featurestore.corpora import QUARANTINE, REJECTED, Corpus
from featurestore.errors import DecodeError
from featurestore.quarantine import read, there
from featurestore.storage import Storage


def rejection(sample_id: str, field: str, stage: str, error: DecodeError, source: str | None) -> dict[str, Any]:
    """A row of a quarantine file."""
    return {
        "id": sample_id, "field": field, "stage": stage, "reason": error.reason, "detail": error.detail, "source": source,
    }  # fmt: skip


def quarantined(snapshot: Snapshot, corpus: str, scope: str, recipe: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each shard with what a stage rejected of it, of samples that are not gone; shards with nothing left out.

    Args:
        snapshot: the catalog.
        corpus: name of the corpus.
        scope: `shard/<corpus>` or `encode/<view>`.
        recipe: of the view; "" for the shard stage.
    """
    opened = Corpus(snapshot, corpus)
    for entry in snapshot.entries(QUARANTINE, scope, recipe):
        if rows := there(opened, entry, read(snapshot, entry)).to_pylist():
            yield entry.shard, rows


def place_rejected(storage: Storage, rejected: list[dict[str, Any]], stem: str) -> list[artefact.Placed]:
    """Writes a quarantine file, where anything was rejected."""
    if not rejected:
        return []
    table = pa.Table.from_pylist(sorted(rejected, key=lambda row: (row["id"], row["field"])), schema=REJECTED)
    return [artefact.place_table(storage, table, stem, {"kind": QUARANTINE, "rows": len(table)})]
