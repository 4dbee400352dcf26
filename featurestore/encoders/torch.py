"""A person's own encoder: a class of a module that can be imported where the job runs.

    # my_models/birds.py
    class Birds:
        modality, dim, version = "image", 64, "1"

        def load(self): ...                  # once a process; what it returns goes to encode
        def decode(self, raw: bytes): ...    # optional: bytes -> one value; without it the value as Braid reads it
        def encode(self, model, values): ... # -> [len(values), dim], row i for value i

    views: {birds: {field: image, encoder: torch, options: {class: "my_models.birds:Birds", arguments: {}}}}

A class that reads several fields at once names them in order, `modality = "image+text"`: its values are tuples with None for
what is missing, and a `decode` of its own is given the field's place too, `decode(raw, place)`.

One whose weights were trained may say the last day of what they saw, `trained_until = "2021-03-01"`.

A video is read as the bytes of a file that was tried; `featurestore.video.sample(raw, count)` gives its frames.

`braid check-encoder my_models.birds:Birds` tries what every encoder promises. The fingerprint is of the class's name, its
`version`, its arguments, the bytes of its module's file, and of the files that an optional `weights()` names. A store's card
never makes Braid import a module: a search through such a view wants it imported before.
"""

import importlib
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions
from featurestore.errors import InputError

__all__ = ["Encoder", "Options"]

MODALITIES = ("audio", "image", "sensor", "text", "video")
SAMPLE_RATE = 16_000
_ALLOWED = (
    f"modality (one of {', '.join(MODALITIES)}, or several: image+text), dim (a positive number), load() and "
    "encode(model, values)"
)


class Options(EncoderOptions):
    """Which class, and what it is made with."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    class_: str = Field(
        alias="class",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:Class, to be imported where jobs run",
    )
    arguments: dict[str, Any] = Field(default={}, description="what the class is made with")


class Encoder(BaseEncoder):
    """Values are what the class's `decode` gives."""

    key = "torch"
    modalities = MODALITIES
    licence = "its owner's"
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "torch")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.source = options.class_
        self._own = self._made()
        self.dim = self._own.dim
        self._until = self._said_until()
        self.normalised = bool(getattr(self._own, "normalised", False))

    @property
    def trained_until(self) -> str | None:
        """What the class says."""
        return self._until

    @property
    def modality(self) -> str:
        """What the class says."""
        return str(self._own.modality)

    def _made(self) -> Any:
        name, _, cls = self.options.class_.partition(":")
        try:
            made = getattr(importlib.import_module(name), cls)(**self.options.arguments)
        except (ImportError, AttributeError, TypeError) as error:
            raise InputError(
                f"encoder class {self.options.class_!r} cannot be made: {error}; install its module where the job runs, and "
                "correct options.class and options.arguments"
            ) from error
        dim, modality = getattr(made, "dim", None), getattr(made, "modality", None)
        has = isinstance(dim, int) and dim > 0 and isinstance(modality, str) and self.takes(modality)
        if not has or not callable(getattr(made, "load", None)) or not callable(getattr(made, "encode", None)):
            raise InputError(
                f"encoder class {self.options.class_!r} (modality {modality!r}, dim {dim!r}) lacks one of: {_ALLOWED}"
            )
        return made

    def _said_until(self) -> str | None:
        said = getattr(self._own, "trained_until", None)
        try:
            return None if said is None else date.fromisoformat(str(said)).isoformat()
        except ValueError:
            raise InputError(
                f"encoder class {self.options.class_!r}: trained_until {said!r} is no day; allowed: YYYY-MM-DD, or None"
            ) from None

    @classmethod
    def takes(cls, modality: str) -> bool:
        """Whatever there is."""
        return {*modality.split("+")} <= {*MODALITIES}

    def preprocessing(self) -> dict[str, Any]:
        """Return the class's version."""
        return {"version": str(getattr(self._own, "version", ""))}

    def weights(self) -> dict[str, Path]:
        """Return its module's file, and what its own `weights()` names."""
        file = getattr(sys.modules[type(self._own).__module__], "__file__", None)
        own = self._own.weights() if hasattr(self._own, "weights") else {}
        return {**({"module": Path(file)} if file else {}), **{str(name): Path(path) for name, path in own.items()}}

    def decode(self, raw: bytes) -> Any:
        """As `decode_field`, of the first field, without the others."""
        return self.joined([self.decode_field(raw), *[None] * (len(self.reads) - 1)])

    def joined(self, parts: Sequence[Any]) -> Any:
        """Keep what there is."""
        return parts[0] if len(parts) == 1 else tuple(parts)

    def decode_field(self, raw: bytes, place: int = 0) -> Any:
        """What the class makes of the bytes; without a `decode` of its own, the value as Braid reads it."""
        if hasattr(self._own, "decode"):
            return self._own.decode(raw, *([place] if len(self.reads) > 1 else []))
        readers: dict[str, Any] = {
            "text": media.decode_text,
            "image": lambda each: np.asarray(media.decode_image(each)),
            "audio": lambda each: media.decode_audio(each, getattr(self._own, "sample_rate", SAMPLE_RATE)),
            "sensor": media.decode_sensor,
            "video": _checked_video,
        }
        return readers[self.reads[place]](raw)

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """What the class makes of a batch, as float32."""
        model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        made = self._own.encode(model, values)
        if hasattr(made, "detach"):
            made = made.detach().float().cpu().numpy()
        vectors: NDArray[np.float32] = np.ascontiguousarray(made, np.float32)
        return vectors

    def _load(self) -> Any:
        model = self._own.load()
        return () if model is None else model


def _checked_video(raw: bytes) -> bytes:
    """The file as it is, tried: which of its frames are wanted is the class's own to say."""
    media.check("video", raw)
    return raw
