"""Quarantine files: every value that a stage rejected, with id, field, stage, reason and where it came from."""

from typing import Any

import pyarrow as pa

from featurestore import artefact
from featurestore.corpora import QUARANTINE, REJECTED
from featurestore.errors import DecodeError
from featurestore.storage import Storage


def rejection(sample_id: str, field: str, stage: str, error: DecodeError, source: str | None) -> dict[str, Any]:
    """A row of a quarantine file."""
    return {
        "id": sample_id, "field": field, "stage": stage, "reason": error.reason, "detail": error.detail, "source": source,
    }  # fmt: skip


def place_rejected(storage: Storage, rejected: list[dict[str, Any]], stem: str) -> list[artefact.Placed]:
    """Writes a quarantine file, where anything was rejected."""
    if not rejected:
        return []
    table = pa.Table.from_pylist(sorted(rejected, key=lambda row: (row["id"], row["field"])), schema=REJECTED)
    return [artefact.place_table(storage, table, stem, {"kind": QUARANTINE, "rows": len(table)})]
