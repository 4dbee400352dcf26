"""Batches of a training set for PyTorch, in an order that a small state resumes exactly."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featurestore import vectors
from featurestore.errors import InputError, MissingExtra, NotFound

__all__ = ["Batches", "order", "torch_dataset"]

STATE_VERSION = 1


def order(snapshot: str, seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation [n] of an epoch: a function of its arguments alone, on any machine and numpy.

    It sorts the raw numbers of a Philox generator keyed with (snapshot, seed, epoch); numpy promises those never to
    change, as it does not for `permutation`.
    """
    key = int.from_bytes(sha256(f"{snapshot}\n{seed}\n{epoch}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class Batches:
    """Batches of rows gathered from columns in memory; numpy here, tensors from `torch_dataset`.

    A batch is a dict:

    - `emb`: {view: [B, D] float32}. A missing row is 0 here, so that it takes part in sums as nothing; it is told from
      a true vector by `present` only, so a model must use the mask.
    - `present`: [B, V] bool, views in the order asked for.
    - `pred`: {view: [B, K] float32}, log-probabilities by heads that never saw the sample's group.
    - `label`: [B] int64, the place of the label in `classes`.
    - `weight`: [B] float32.
    - `ids`: list of B texts.

    Every epoch is every row once, in the order of `order`; the last batch may be smaller. `state_dict` counts the rows
    that the trainer has been handed. An iterator begins the epoch anew, unless a state was just loaded: then it goes
    on behind it (at the end of an epoch there is nothing left to hand out). When an iterator is exhausted the epoch is
    the next one; `set_epoch` with the present epoch changes nothing. One iterator at a time.
    """

    def __init__(
        self,
        rows: pa.Table,
        views: Sequence[str],
        classes: Sequence[str],
        batch_size: int,
        seed: int,
        snapshot: str,
    ) -> None:
        """Takes the columns; nothing is copied but the ids and labels.

        Args:
            rows: one split, as `training.training_table` makes it, in chunks of any length.
            views: which views to hand out.
            classes: all labels there are, in the order of the columns of `<view>_pred`.
            batch_size: rows; at least 1.
            seed: of the order.
            snapshot: the build of the training set.

        Raises:
            InputError: a batch size below 1, no views, or a label that is not among the classes.
            NotFound: a view that the set does not have.
        """
        if batch_size < 1 or not views:
            raise InputError(f"batch_size={batch_size}, views={list(views)}: give at least 1 row and 1 view")
        known = [name.removesuffix("_present") for name in rows.schema.names if name.endswith("_present")]
        unknown = [view for view in views if view not in known]
        if unknown:
            raise NotFound(f"the training set has no view {unknown[0]!r}; it has: {', '.join(known)}")
        self.views, self.batch_size, self.seed, self.snapshot = list(views), batch_size, seed, snapshot
        self._ids = rows["id"].cast(pa.large_string()).combine_chunks()
        self._label = _label_codes(rows, classes)
        self._weight = rows["weight"].to_numpy()
        self._present = np.stack([rows[f"{view}_present"].to_numpy() for view in views], axis=1)
        self._emb = {view: _Vectors(rows[view]) for view in views}
        self._pred = {view: _Vectors(rows[f"{view}_pred"]) for view in views}
        self._epoch = self._position = self._resume_at = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return ceil(len(self._label) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Hands out the epoch's batches; see the class for where it begins."""
        epoch, start = self._epoch, self._resume_at
        self._position, self._resume_at = start, 0
        rows = order(self.snapshot, self.seed, epoch, len(self._label))
        for begin in range(start, len(rows), self.batch_size):
            batch = self.gather(rows[begin : begin + self.batch_size])
            self._position = min(begin + self.batch_size, len(rows))
            yield batch
        self._epoch, self._position = epoch + 1, 0

    def gather(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """The batch of these row numbers [B], in their order."""
        present = self._present[rows]
        emb = {view: column.take(rows) for view, column in self._emb.items()}
        for v, view in enumerate(self.views):
            emb[view][~present[:, v]] = 0.0
        return {
            "emb": emb,
            "present": present,
            "pred": {view: column.take(rows) for view, column in self._pred.items()},
            "label": self._label[rows],
            "weight": self._weight[rows],
            "ids": self._ids.take(pa.array(rows)).to_pylist(),
        }

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch; nothing happens if it is the present one, so a loaded state stays."""
        if epoch != self._epoch:
            self._epoch, self._position, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the trainer is: JSON values; `position` counts the rows of the epoch that it has been handed."""
        return {
            "version": STATE_VERSION,
            "snapshot": self.snapshot,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": len(self._label),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iterator go on behind the state.

        Raises:
            InputError: a state of another version, snapshot, seed, batch size or number of rows, or impossible.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            raise InputError(
                f"a loader's state has {', '.join(mine)}; this one has {', '.join(map(str, state)) or 'nothing'}"
            )
        for name in ("version", "snapshot", "seed", "batch_size", "rows"):
            if state[name] != mine[name]:
                raise InputError(
                    f"the state is of {name} {state[name]!r}, this loader has {mine[name]!r}; open the loader as it was, "
                    "or start over without the state"
                )
        epoch, position, n = state["epoch"], state["position"], len(self._label)
        if epoch < 0 or not 0 <= position <= n or (position % self.batch_size and position != n):
            raise InputError(
                f"epoch {epoch}, position {position}: no state of {n} rows in batches of {self.batch_size}"
            )
        self._epoch, self._position, self._resume_at = epoch, position, position


def torch_dataset(
    rows: pa.Table,
    views: Sequence[str],
    classes: Sequence[str],
    batch_size: int,
    seed: int,
    snapshot: str,
) -> Batches:
    """`Batches` of contiguous tensors that is also a `torch.utils.data.IterableDataset`; arguments as there.

    Use it as it is, or in `DataLoader(dataset, batch_size=None)`. It resumes exactly in one process; with
    `num_workers` above 0 or in a world of several ranks an iterator raises InputError.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        import torch
        from torch.utils.data import IterableDataset, get_worker_info
    except ImportError as error:
        raise MissingExtra("the loader needs torch; install it, or the extra: pip install -e '.[run]'") from error

    class TorchRows(Batches, IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            if get_worker_info() is not None:
                raise InputError(
                    "the loader ran in a DataLoader's worker, where its state would be lost and each worker would hand out "
                    "every row; use DataLoader(dataset, batch_size=None, num_workers=0)"
                )
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if distributed and torch.distributed.get_world_size() > 1:
                raise InputError(
                    f"the loader serves one process; this is one of {torch.distributed.get_world_size()} ranks, and each "
                    "would be handed every row"
                )
            return super().__iter__()

        def gather(self, rows: NDArray[np.int64]) -> dict[str, Any]:
            return {name: _tensors(value) for name, value in super().gather(rows).items()}

    def _tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: torch.from_numpy(array) for name, array in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    return TorchRows(rows, views, classes, batch_size, seed, snapshot)


class _Vectors:
    """The matrices under a vector column, one for each chunk, and rows gathered from them."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._dim = column.type.list_size
        self._parts = [vectors.matrix(chunk) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows [B] in their order as a new contiguous [B, D] float32 array."""
        if len(self._parts) == 1:
            return np.take(self._parts[0], rows, axis=0).astype(np.float32, copy=False)
        taken = np.empty((len(rows), self._dim), dtype=np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            taken[here] = self._parts[part][rows[here] - self._starts[part]]
        return taken


def _label_codes(rows: pa.Table, classes: Sequence[str]) -> NDArray[np.int64]:
    labels = rows["label"]
    codes = pc.index_in(labels, pa.array(classes, labels.type)).combine_chunks()
    unknown = np.flatnonzero(codes.is_null())
    if len(unknown):
        raise InputError(
            f"sample {rows['id'][int(unknown[0])]}: label {labels[int(unknown[0])].as_py()!r} is none of the "
            f"{len(classes)} classes ({len(unknown)} such samples)"
        )
    return np.asarray(codes.cast(pa.int64()))
