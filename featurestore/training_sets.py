"""Reading a training set of a store: its rows by split, its files, its card, and its batches for PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from featurestore import artefact, builds
from featurestore.catalog import Entry, Snapshot
from featurestore.errors import AlignmentError, InputError
from featurestore.search import read_card
from featurestore.training import ROW_DIGEST, row_digests

if TYPE_CHECKING:
    from featurestore.loader import Batches

FORMATS = ("parquet", "tar")


class TrainingSet:
    """A training set at one version of the store: one immutable build, which later commits do not change."""

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self.name = name
        self.storage = snapshot.storage
        self._files = builds.files(snapshot, builds.TRAINING, name)
        self.build = self._files["card"].recipe
        self.card = read_card(snapshot, builds.TRAINING, name)

    def __repr__(self) -> str:
        rows = ", ".join(f"{split} {count}" for split, count in self.card["rows"].items())
        return f"TrainingSet({self.name!r}, {rows}; views {', '.join(self.views)}; {len(self.classes)} classes)"

    @property
    def views(self) -> list[str]:
        """The views whose embeddings it holds."""
        return list(self.card["views"])

    @property
    def splits(self) -> list[str]:
        """Names of its splits."""
        return list(self.card["splits"])

    @property
    def classes(self) -> list[str]:
        """Labels, in the order of their codes and of the predictions' columns."""
        return list(self.card["classes"])

    def files(self, split: str, format: str = "parquet") -> list[str]:
        """Keys in the store of a split's files, in order: Parquet, or WebDataset tars with the same rows."""
        return [entry.path for entry in self._entries(split, format)]

    def to_arrow(self, split: str) -> pa.Table:
        """A split's rows in their order, each file checked against the catalog; see `featurestore.training` for the columns."""
        return pa.concat_tables([self._read(entry) for entry in self._entries(split, "parquet")])

    def torch(self, split: str, batch_size: int, seed: int = 0, views: Sequence[str] | None = None) -> "Batches":
        """Batches of a split for PyTorch, in an order that is a function of (this build, seed, epoch) alone.

        See `featurestore.loader.Batches` for what a batch holds and what `state_dict()` promises.
        """
        from featurestore.loader import torch_dataset

        chosen = list(views) if views is not None else self.views
        unknown = [view for view in chosen if view not in self.views]
        if unknown or not chosen:
            raise InputError(
                f"views={chosen}: training set {self.name!r} has {', '.join(self.views)}; name one or more"
            )
        return torch_dataset(self.to_arrow(split), chosen, self.classes, batch_size, seed, self.build)

    def _entries(self, split: str, format: str) -> list[Entry]:
        if split not in self.splits:
            raise InputError(f"split={split!r}: training set {self.name!r} has {', '.join(self.splits)}")
        if format not in FORMATS:
            raise InputError(f"format={format!r} is not allowed; one of: {', '.join(FORMATS)}")
        return [entry for name, entry in sorted(self._files.items()) if _is_of(name, split, format)]

    def _read(self, entry: Entry) -> pa.Table:
        table = artefact.read_table(artefact.read_checked(self.storage, entry.path, entry.sha256))
        if len(table) != entry.rows:
            raise AlignmentError(
                f"{entry.path}: {len(table)} rows where the catalog says {entry.rows}; run `braid verify`"
            )
        for row, (stored, found) in enumerate(zip(table[ROW_DIGEST].to_pylist(), row_digests(table), strict=True)):
            if stored != found:
                raise AlignmentError(
                    f"{entry.path}: row {row}, id {table['id'][row].as_py()!r}, does not hold what was written there; run "
                    "`braid verify`"
                )
        return table


def _is_of(name: str, split: str, format: str) -> bool:
    stem, _, ext = name.partition(".")
    return ext == format and stem.rpartition("-")[0] == split
