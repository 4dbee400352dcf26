"""Placing a build's files and card, and the catalog's entries for them: what align, index and fuse end with."""

import json
from typing import Any

import numpy as np

from featurestore import artefact, builds
from featurestore.catalog import Entry
from featurestore.storage import Storage
from pipelines.runner import Result, result


def place_build(storage: Storage, build: builds.Build, files: dict[str, bytes]) -> Result:
    """Places a build of small files without rows, by their names in the build, and returns their entries."""
    entries = []
    for name, content in sorted(files.items()):
        stem, _, ext = name.partition(".")
        entries.append(
            build_entry(build, stem, artefact.place_bytes(storage, content, f"{build.stem}/{stem}", f".{ext}"))
        )
    return result(build.key, entries)


def build_entry(build: builds.Build, shard: str, placed: artefact.Placed, rows: int = 0) -> Entry:
    """The catalog's entry of one file of a build; its lineage is the build's settings."""
    lineage = json.dumps({"settings": build.settings}, sort_keys=True)
    path, size, sha256 = placed
    return Entry(build.kind, build.name, build.key, shard, path, rows, size, sha256, lineage=lineage)


def card_bytes(card: dict[str, Any]) -> bytes:
    """A card as JSON; figures rounded to 6 places, no clocks."""
    return json.dumps(_rounded(card), indent=1, sort_keys=True, ensure_ascii=False).encode()


def _rounded(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return round(float(value), 6)
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
