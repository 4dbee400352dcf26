"""What `braid init` guesses: fields and columns of a corpus, and by what names they go.

A guess is a pure function of the first files (guess_files.py) or rows (guess_columns.py) of a corpus. None is more than a
proposal: how many samples have what is told beside it, and it is written into a spec to be edited.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from featurestore.times import RESERVED
from jobs.spec import TRAINING_COLUMNS

__all__ = [
    "MAX_LABELS",
    "MIN_PER_LABEL",
    "MODALITIES",
    "Columns",
    "Field",
    "extension",
    "field_name",
    "modality_of",
    "slug",
]

MODALITIES = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts"),
    "audio": ("ogg", "oga", "opus", "wav", "flac"),
    "text": ("txt", "text", "caption"),
}
"""What is decoded, and the endings it goes by."""

_OF_ENDING = {ending: modality for modality, endings in MODALITIES.items() for ending in endings}

MIN_PER_LABEL = 10
"""Samples a value of a label has on average, where only its values say that it is one."""

MAX_LABELS = 100


class Field(NamedTuple):
    """A guessed field: `given` is its `from`, `samples` are those seen that have it."""

    name: str
    modality: str
    given: str | list[str]
    read: str | None
    samples: set[str]


class Columns(NamedTuple):
    """Guessed columns: of the spec's `columns`, the label, all that are kept, and fields that columns hold."""

    roles: dict[str, str]
    label: str | None
    kept: list[str]
    fields: list[Field]


def extension(path: str) -> str:
    """The ending of a path's or an address's last part, as it is written, without the dot."""
    name = (urlsplit(path).path if "://" in path else path).rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return ending if dot and stem else ""


def modality_of(path: str) -> str | None:
    """The modality that a file's ending promises; None where it is not decoded."""
    return _OF_ENDING.get(extension(path).lower())


def slug(text: str, otherwise: str) -> str:
    """A text as a name in a spec."""
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).strip("_-")[:48] or otherwise


def field_name(wanted: str, modality: str, taken: Iterable[str]) -> str:
    """A name for a field and its view: the one wanted, or one like it that is free."""
    name = slug(wanted, modality)
    used = RESERVED | TRAINING_COLUMNS | set(taken)
    tried = [name, f"{modality}_{name}", *(f"{modality}_{name}_{number}" for number in range(2, 1000))]
    return next(each for each in tried if each not in used)
