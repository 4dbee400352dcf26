"""Writing one shard of a view: its quarantine, then its file, whose footer says what it was made from."""

import json
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from featurestore import artefact, vectors, views
from featurestore.catalog import Entry
from featurestore.corpora import QUARANTINE
from featurestore.errors import AlignmentError
from featurestore.identity import DIGEST_BYTES, row_digest
from featurestore.storage import Storage
from pipelines.quarantine import place_rejected
from pipelines.runner import Result, result


class Beside(NamedTuple):
    """The corpus shard that a view's shard stands beside: its key, rows, the digest of its ids and of its rows' file."""

    shard: str
    rows: int
    ids_sha256: str
    sha256: str


class ViewWriter:
    """Writes shards of one view.

    Args:
        storage: the store.
        name: of the view.
        recipe: of the view.
        about: `corpus`, `field` and `encoder` (its card, with its fingerprint), for the catalog.
    """

    def __init__(self, storage: Storage, name: str, recipe: str, about: dict[str, Any]) -> None:
        self.storage, self.name, self.recipe, self._about = storage, name, recipe, about

    @property
    def folder(self) -> str:
        """Where the view's shards are."""
        return f"views/{self.name}/{self.recipe}"

    def footer(
        self, beside: Beside, quarantine: list[artefact.Placed], tried: int, example: str, halved: int = 0
    ) -> dict[str, Any]:
        """What a shard's file says of itself; of batches that were halved nothing where none was."""
        return {
            "kind": views.VIEW,
            "shard": beside.shard,
            "recipe": self.recipe,
            "rows": beside.rows,
            "ids_sha256": beside.ids_sha256,
            "input_sha256": beside.sha256,
            "quarantine": [list(each) for each in quarantine],
            "tried": tried,
            "example": example,
            **_halved(halved),
        }

    def write(
        self, beside: Beside, table: pa.Table, rejected: list[dict[str, Any]], tried: int, halved: int = 0
    ) -> Result:
        """Places a shard's quarantine, where anything was rejected, and its file.

        Args:
            beside: the corpus shard.
            table: of `views.schema`, a row for each of the corpus shard's.
            rejected: what the encoder rejected, as `quarantine.rejection` makes it.
            tried: number of values that it was given.
            halved: how often a batch of them was halved because it did not fit into memory.
        """
        stem = f"quarantine/encode/{self.name}/{self.recipe}/{beside.shard}"
        quarantine = place_rejected(self.storage, rejected, stem)
        example = f"{rejected[0]['field']} of {rejected[0]['id']!r}: {rejected[0]['detail']}" if rejected else ""
        footer = self.footer(beside, quarantine, tried, example, halved)
        placed = artefact.place_table(self.storage, table, f"{self.folder}/{beside.shard}", footer)
        return self.result(beside, placed, footer)

    def result(self, beside: Beside, placed: artefact.Placed, footer: dict[str, Any]) -> Result:
        """The Result of a shard whose file is there."""
        path, size, sha256 = placed
        made_from = beside.sha256
        told = {"tried": footer["tried"], **_halved(footer.get("batches_halved", 0))}
        about = json.dumps({**self._about, **told}, sort_keys=True)
        entries = [
            Entry(
                views.VIEW, self.name, self.recipe, beside.shard, path, beside.rows, size, sha256, beside.ids_sha256,
                made_from, lineage=about,
            )
        ]  # fmt: skip
        rejected = 0
        for path, size, sha256 in footer["quarantine"]:
            rejected = artefact.rows(self.storage.read(path))
            scope = f"encode/{self.name}"
            entries.append(
                Entry(
                    QUARANTINE, scope, self.recipe, beside.shard, path, rejected, size, sha256, input_sha256=made_from
                )
            )
        return result(beside.shard, entries, footer["tried"], rejected, footer["example"])


def _halved(times: int) -> dict[str, int]:
    return {"batches_halved": times} if times else {}


class Earlier(NamedTuple):
    """A view's shard as it was made before by the same recipe, for the same ids: what of its values is the same is not encoded.

    Args:
        placed: its file.
        footer: what that says of itself.
        matrix: float32 [rows, dim].
        digests, row_digests, reasons: its other columns.
        rejected: id -> its rows of the quarantine: of several fields, one for each that was rejected.
    """

    placed: artefact.Placed
    footer: dict[str, Any]
    matrix: np.ndarray
    digests: list[bytes | None]
    row_digests: list[bytes]
    reasons: list[str | None]
    rejected: dict[str, list[dict[str, Any]]]

    def without(self, rows: Collection[int]) -> "Earlier":
        """The same, as if it had been made without the values of some rows."""
        return self._replace(digests=[None if row in rows else digest for row, digest in enumerate(self.digests)])

    def kept(self, ids: list[str], digests: list[bytes | None]) -> dict[int, list[dict[str, Any]]]:
        """Row -> its rows of the quarantine, where it was made from the values that these digests are of.

        Raises:
            AlignmentError: a vector is not bound to its sample and its input; it would be by being copied.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for row, (sample_id, digest) in enumerate(zip(ids, digests, strict=True)):
            if digest is None or digest != self.digests[row]:
                continue
            if self.row_digests[row] != row_digest(sample_id, digest, self.matrix[row].tobytes()):
                raise AlignmentError(
                    f"{self.placed.path}: row {row}, id {sample_id!r}: its row_digest does not bind this vector to it: "
                    "run `braid verify`"
                )
            if self.reasons[row] is None or sample_id in self.rejected:
                found[row] = self.rejected.get(sample_id, [])
        return found


def read_earlier(storage: Storage, view: tuple[str, str], quarantine: tuple[str, str] | None) -> Earlier:
    """A view's shard and its quarantine, by (key, sha256); AlignmentError where either is gone or damaged."""
    content = artefact.read_checked(storage, *view)
    with artefact.parsing(view[0]):
        table, footer = artefact.read_table(content), artefact.read_footer(content)
    rejected: dict[str, list[dict[str, Any]]] = {}
    for row in artefact.read_table(artefact.read_checked(storage, *quarantine)).to_pylist() if quarantine else ():
        rejected.setdefault(row["id"], []).append(row)
    placed, matrix = artefact.Placed(view[0], len(content), view[1]), vectors.matrix(table["embedding"])
    digests, row_digests, reasons = (table[name].to_pylist() for name in ("input_digest", "row_digest", "miss_reason"))
    return Earlier(placed, footer, matrix, digests, row_digests, reasons, rejected)


def view_table(ids: list[str], matrix: np.ndarray, digests: list[bytes | None], reasons: list[str | None]) -> pa.Table:
    """A shard of `views.schema`: float32 [rows, dim] with rows of NaN where missing, each bound to its id and its input."""
    row_digests = [row_digest(*row) for row in zip(ids, digests, (vector.tobytes() for vector in matrix), strict=True)]
    return pa.Table.from_arrays(
        [
            pa.array([reason is None for reason in reasons]),
            vectors.column(matrix),
            pa.array(digests, pa.binary(DIGEST_BYTES)),
            pa.array(row_digests, pa.binary(DIGEST_BYTES)),
            pa.array(reasons, pa.string()),
        ],
        schema=views.schema(matrix.shape[1]),
    )
