"""Measured clocks in the store, a small file for each recording: so that it is decoded for them once, whoever reads it."""

import hashlib
import json
import math
from bisect import bisect_left
from typing import Any

from featurestore import artefact
from featurestore.errors import DecodeError
from featurestore.storage import Storage
from pipelines.synchronize.clocks import Clock, Estimate, Weak

__all__ = ["ClockStore", "Measured"]

Measured = Estimate | DecodeError | Weak
"""The clock of a stream, or why there is none."""


class ClockStore:
    """The measured clocks of a corpus, by keys that stand for a recording as it is and for how its clocks are measured.

    Nothing is overwritten: should another kind of processor measure another last digit, that is another file, and all who read
    take the first by name.
    """

    def __init__(self, storage: Storage, corpus: str) -> None:
        self._storage, self._folder = storage, f"corpora/{corpus}/clocks"
        self._paths: list[str] | None = None

    def get(self, key: str) -> dict[str, Measured] | None:
        """Field -> what was measured; None where nothing is kept. What is kept is listed once, when it is first asked for."""
        if self._paths is None:
            self._paths = sorted(self._storage.list(self._folder))
        stem = f"{self._folder}/{key}-"
        for path in self._paths[bisect_left(self._paths, stem) :]:
            if not path.startswith(stem):
                break
            content = self._storage.read(path)
            if artefact.is_named_for(path, hashlib.sha256(content).hexdigest()):
                return {name: _measured(**each) for name, each in json.loads(content).items()}
        return None

    def put(self, key: str, found: dict[str, Measured]) -> None:
        """Keeps what was measured, but not where a file could not be read: that may be mended, and the key stays the same."""
        if not any(isinstance(each, DecodeError) and each.reason == "unreadable" for each in found.values()):
            text = json.dumps({name: _told(each) for name, each in found.items()}, sort_keys=True, allow_nan=False)
            artefact.place_bytes(self._storage, text.encode(), f"{self._folder}/{key}", ".json")


def _told(found: Measured) -> dict[str, Any]:
    if isinstance(found, Weak):
        return {"weak": str(found)}
    if isinstance(found, DecodeError):
        return {"reason": found.reason, "detail": found.detail}
    # JSON has no infinity: what a recording too short for a drift has for its error.
    error_ppm = found.drift_error_ppm if math.isfinite(found.drift_error_ppm) else None
    return {
        **found.clock._asdict(),
        "offset_error_ns": found.offset_error_ns,
        "drift_error_ppm": error_ppm,
        "certainty": found.certainty,
        "ambiguous_ns": found.ambiguous_ns,
    }


def _measured(**told: Any) -> Measured:
    if "weak" in told:
        return Weak(told["weak"])
    if "reason" in told:
        return DecodeError(**told)
    error_ppm = math.inf if told["drift_error_ppm"] is None else told["drift_error_ppm"]
    clock = Clock(told["offset_ns"], told["drift_ppm"])
    return Estimate(clock, told["offset_error_ns"], error_ppm, told["certainty"], told["ambiguous_ns"])
