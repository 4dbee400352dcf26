"""The front door: everything that a store holds, at one version."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from featurestore import builds
from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import ROWS, Corpus
from featurestore.errors import DecodeError, InputError
from featurestore.quarantine import rejections
from featurestore.search import Hits, Index, Query, read_card, read_space
from featurestore.spaces import Space
from featurestore.storage import Storage
from featurestore.views import VIEW, View

if TYPE_CHECKING:
    from featurestore.training_sets import TrainingSet


class FeatureStore:
    """A store at one version: what others commit later does not show until another FeatureStore is opened.

    Args:
        store: a folder, `s3://…` or `gs://…`, or a `Storage` with its options.
        version: a version of `history()`; None pins the newest there is now.

    Raises:
        NotFound: no store at that address, or no such version.
        InputError: a version that is no whole number.
    """

    def __init__(self, store: "str | os.PathLike[str] | Storage", version: int | None = None) -> None:
        self.storage = Storage.of(store)
        self._catalog = Catalog(self.storage)
        self.snapshot: Snapshot = self._catalog.snapshot(version)
        self._indexes: dict[str, Index] = {}
        self._query = Query()

    def __repr__(self) -> str:
        return (
            f"FeatureStore({self.storage.uri!r}, version={self.version}: corpora {self.corpora()}, views {self.views()}, "
            f"indexes {self.indexes()}, training sets {self.training_sets()})"
        )

    @property
    def version(self) -> int:
        """The version that is read."""
        return self.snapshot.version

    def corpora(self) -> list[str]:
        """Names of the corpora."""
        return self.snapshot.names(ROWS)

    def views(self) -> list[str]:
        """Names of the views."""
        return self.snapshot.names(VIEW)

    def spaces(self) -> list[str]:
        """Names of the spaces."""
        return self.snapshot.names(builds.SPACE)

    def indexes(self) -> list[str]:
        """Names of the indexes."""
        return self.snapshot.names(builds.INDEX)

    def training_sets(self) -> list[str]:
        """Names of the training sets."""
        return self.snapshot.names(builds.TRAINING)

    def history(self) -> list[dict[str, Any]]:
        """Every version, newest first: version, timestamp_ms, job, files."""
        return self._catalog.history()

    def digest(self) -> str:
        """sha256 over everything that this version names; stores with equal content have equal digests."""
        return self.snapshot.digest()

    def corpus(self, name: str) -> Corpus:
        """A corpus: rows, raw values."""
        return Corpus(self.snapshot, name)

    def view(self, name: str) -> View:
        """A view: take, scanner, to_arrow, matrix, files.

        While its corpus grows, it has the rows of the shards that are encoded, and `view.unencoded` is not 0.
        """
        return View(self.snapshot, name)

    def space(self, name: str) -> Space:
        """A joint space: the projection of each of its views."""
        return read_space(self.snapshot, name)

    def index(self, name: str) -> Index:
        """An index; opened once."""
        if name not in self._indexes:
            self._indexes[name] = Index(self.snapshot, name)
        return self._indexes[name]

    def card(self, kind: str, name: str) -> dict[str, Any]:
        """What was chosen and measured when a `space`, `index` or `training` set was made."""
        return read_card(self.snapshot, kind, name)

    def training_set(self, name: str) -> "TrainingSet":
        """A training set: rows by split, the loader for torch, its card."""
        from featurestore.training_sets import TrainingSet

        return TrainingSet(self.snapshot, name)

    def quarantine(self, corpus: str | None = None) -> pa.Table:
        """What was rejected of a corpus (of all where None): id, field, stage, reason, detail, source, corpus, view.

        `view` is the view whose encoder rejected the value; null where it was rejected when the corpus was sharded.
        """
        return rejections(self.snapshot, corpus)

    def search(
        self,
        index: str,
        *,
        text: str | None = None,
        image: Any = None,
        audio: Any = None,
        vector: Any = None,
        via: str | None = None,
        k: int = 10,
        where: str | None = None,
        modality: str | None = None,
        as_of: str | int | None = None,
    ) -> Hits:
        """The k samples of an index nearest to a text, an image, a sound or a vector.

        Args:
            index: one of `indexes()`.
            text: the words to search by.
            image: a file's path, its bytes, or a PIL image.
            audio: a sound file's path or bytes.
            vector: float [d]: of view `via` (as its encoder gives it), or of the index's space where `via` is None, of any
                length but 0.
            via: the view whose encoder reads the query; needed where several views have its modality. One of several fields
                reads it as a sample that has no other.
            k: how many; at least 1.
            where: an SQL condition over the corpus's columns, e.g. `label = 'animals'`.
            modality: only hits through views of this modality, one that the index has, e.g. `image`.
            as_of: only samples available by this time.

        Raises:
            InputError: no query or several, one that cannot be read or decoded, an unknown view, column or modality, a
                vector of another dimension, or a k that is no whole number.
            StoreError: the index's views have been encoded anew, or compacted, since it was built.
        """
        given = {
            name: value
            for name, value in (("text", text), ("image", image), ("audio", audio), ("vector", vector))
            if value is not None
        }
        if len(given) != 1:
            raise InputError(
                f"search by one of: text, image, audio (or, in Python, vector); given: {', '.join(given) or 'none'}"
            )
        ((kind, value),) = given.items()
        opened = self.index(index)
        query = self._vector(opened, value, via) if kind == "vector" else self._encoded(opened, kind, value, via)
        return opened.search(query, k, where, modality, as_of)

    def _encoded(self, index: Index, kind: str, value: Any, via: str | None) -> np.ndarray:
        view = index.via(via, kind)
        if kind not in view.modality.split("+"):
            raise InputError(f"via {view.name!r}: this view reads {view.modality}, not {kind}")
        try:
            encoded = self._query.encode(view, _raw(kind, value), kind)
        except DecodeError as error:
            given = f"{kind} {str(value)!r}" if isinstance(value, str | os.PathLike) else f"the {kind} given"
            raise InputError(f"{given} cannot be searched by: {error}; give another {kind}") from error
        return np.asarray(index.embed(view.name, encoded)[0])

    def _vector(self, index: Index, value: Any, via: str | None) -> np.ndarray:
        dim = index.space.dim if via is None else index.via(via, None).dim
        whose = f"space {index.space.name!r}" if via is None else f"view {via!r}"
        try:
            vector = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise InputError(f"vector {value!r:.80} is none; {whose} has vectors of [{dim}], numbers") from None
        if vector.shape != (dim,) or not np.isfinite(vector).all():
            raise InputError(f"vector of shape {vector.shape}: {whose} has vectors of [{dim}], all finite")
        if via is not None:
            return np.asarray(index.embed(via, vector[None])[0])
        if not vector.any():
            raise InputError(f"a vector of {dim} that is all zeros has no direction: nothing is nearest to it")
        # By the largest first, so that no square overflows or vanishes.
        vector = vector / np.abs(vector).max()
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


def _raw(kind: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if kind == "text":
        return str(value).encode()
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise InputError(
                f"{kind} {str(value)!r} cannot be read: {error.strerror or error}; correct the path"
            ) from error
    if kind == "image" and hasattr(value, "save"):
        import io

        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue()
    raise InputError(
        f"{kind} takes a path or bytes{' or a PIL image' if kind == 'image' else ''}, not {type(value).__name__}"
    )
