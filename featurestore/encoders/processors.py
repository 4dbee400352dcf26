"""Checkpoints' own preprocessing, of whatever modality: what they say of it, and the object of transformers that does it."""

import json
import threading
from typing import Any, ClassVar

from featurestore.encoders.checkpoints import CheckpointEncoder, silent

__all__ = ["Processor"]

FILES = ("preprocessor_config.json", "processor_config.json")


class Processor:
    """One processor of a checkpoint. Read with the first value; safe in threads.

    Attributes:
        own: what the checkpoint says of it.
    """

    values: ClassVar[str]
    """What it prepares, in words."""
    name: ClassVar[str]
    """Its section, in a file of several."""
    auto: ClassVar[str]
    """The class of transformers that reads it."""
    how: ClassVar[dict[str, Any]] = {}
    """With which arguments."""

    def __init__(self, owner: CheckpointEncoder) -> None:
        self._owner, self._lock = owner, threading.Lock()
        self._made: Any = None
        told = next(
            (json.loads(path.read_text("utf-8")) for path in map(owner.folder.joinpath, FILES) if path.is_file()), None
        )
        if told is None:
            raise owner.unfit(f"it says nothing of how {self.values} are prepared: it lacks {FILES[0]}")
        self.own: dict[str, Any] = told.get(self.name, told)

    def _loaded(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._read()
            return self._made

    def _read(self) -> Any:
        import transformers

        with silent():
            try:
                return getattr(transformers, self.auto).from_pretrained(
                    self._owner.folder, local_files_only=True, trust_remote_code=False, **self.how
                )
            except (OSError, ValueError, KeyError, ImportError) as error:
                told = " ".join(str(error).split())[:300]
                raise self._owner.unfit(f"its {self.name.replace('_', ' ')}: {told}") from error
