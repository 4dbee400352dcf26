"""What was predicted of a step, and what its run then measured: kept side by side.

They stand in the store as `forecasts/<stage>/<name>.json`, which no catalog names: times differ from run to run, and no bytes
that hold one may enter the store's digest. A forecast is of one ingest, recipe or setting of a build: of another one it says
nothing. `braid run --metrics` gives both too.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from featurestore.errors import NotFound
from featurestore.storage import Storage
from jobs.sizes import Size

__all__ = ["keep", "read", "save"]

FOLDER = "forecasts"
_PREDICTED = ("shards", "rows", "read_bytes", "written_bytes", "seconds", "memory_bytes", "hours", "device")


def save(storage: Storage, sizes: Iterable[Size]) -> None:
    """Keeps what was predicted of each step, in place of what was before."""
    for size in sizes:
        told = {name: value for name in _PREDICTED if (value := getattr(size, name)) not in (None, "")}
        _put(storage, size.stage, size.name, {"key": size.key, "predicted": told})


def keep(storage: Storage, stage: str, name: str, key: str, measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """Puts what was measured beside what was predicted, and returns that; None where nothing was of this key."""
    kept = read(storage, stage, name)
    if kept is None or kept["key"] != key:
        return None
    _put(storage, stage, name, kept | {"measured": dict(measured)})
    predicted: dict[str, Any] = kept["predicted"]
    return predicted


def read(storage: Storage, stage: str, name: str) -> dict[str, Any] | None:
    """`key`, `predicted` and, of a step that was run since, `measured`; None where nothing was predicted."""
    try:
        kept = json.loads(storage.read(_path(stage, name)))
    except (NotFound, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.keys() >= {"key", "predicted"} else None


def _path(stage: str, name: str) -> str:
    return f"{FOLDER}/{stage}/{name}.json"


def _put(storage: Storage, stage: str, name: str, content: Mapping[str, Any]) -> None:
    with storage.scratch() as folder:
        local = folder / "forecast.json"
        local.write_text(json.dumps(content, indent=1, sort_keys=True))
        storage.put(local, _path(stage, name))
