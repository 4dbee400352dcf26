"""Feature views: the vectors of one (field, encoder), row for row beside their corpus.

A view shard is a Parquet file with the columns `present, embedding, input_digest, row_digest, miss_reason`, in the order of
its corpus shard's rows, and a footer that says what it was made from. Readers check both before they hand out a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore import artefact, vectors
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import Corpus
from featurestore.errors import AlignmentError, InputError, NotFound
from featurestore.identity import DIGEST_BYTES, digest_of

VIEW = "view"
COLUMNS = ("id", "present", "embedding", "input_digest", "row_digest", "miss_reason")


def recipe(field: str, fingerprint: str) -> str:
    """What a view's shards are filed under, known before the run: hash of field, encoder fingerprint and codec."""
    return digest_of(field, fingerprint, vectors.CODEC_VERSION)


def schema(dim: int) -> pa.Schema:
    """The schema of a view shard of `dim` float32 values."""
    return pa.schema(
        [
            pa.field("present", pa.bool_(), nullable=False),
            vectors.field("embedding", dim),
            pa.field("input_digest", pa.binary(DIGEST_BYTES)),
            pa.field("row_digest", pa.binary(DIGEST_BYTES), nullable=False),
            pa.field("miss_reason", pa.string()),
        ]
    )


def check(content: bytes, entry: Entry, corpus_shard: Entry) -> None:
    """Raises AlignmentError unless a view shard's footer and entry belong to the corpus shard beside it."""
    footer = artefact.read_footer(content)
    claims = {
        "shard": (footer.get("shard"), entry.shard, corpus_shard.shard),
        "recipe": (footer.get("recipe"), entry.recipe),
        "rows": (footer.get("rows"), entry.rows, corpus_shard.rows, artefact.rows(content)),
        "ids_sha256": (footer.get("ids_sha256"), entry.ids_sha256, corpus_shard.ids_sha256),
        "input_sha256": (footer.get("input_sha256"), entry.input_sha256, corpus_shard.sha256),
    }
    for name, values in claims.items():
        if len(set(values)) > 1:
            raise AlignmentError(
                f"{entry.path}: {name} does not hold: {' / '.join(str(value)[:16] for value in values)} (footer / "
                f"catalog / corpus); shard {entry.shard} of view {entry.name!r} is not aligned: run `braid verify`"
            )


class View:
    """A view at one version of the store."""

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self.name = name
        self.storage = snapshot.storage
        self.version = snapshot.version
        entries = snapshot.entries(VIEW, name)
        if not entries:
            raise NotFound(
                f"no view {name!r} in {self.storage.uri}; it has: {', '.join(snapshot.names(VIEW)) or 'none'}"
            )
        info = entries[0].info()
        self.recipe = entries[0].recipe
        self.field: str = info["field"]
        self.encoder: dict[str, Any] = info["encoder"]
        self.corpus = Corpus(snapshot, info["corpus"])
        self._entries = {entry.shard: entry for entry in entries}
        stale = [shard.shard for shard in self.corpus.shards if shard.shard not in self._entries]
        if stale or len(self._entries) != len(self.corpus.shards) or {e.recipe for e in entries} != {self.recipe}:
            raise AlignmentError(
                f"view {name!r} has {len(entries)} shards where corpus {self.corpus.name!r} has "
                f"{len(self.corpus.shards)}{f' (missing: {stale[0]} …)' if stale else ''}; `braid run` encodes what is missing"
            )

    def __repr__(self) -> str:
        return f"View({self.name!r}, {self.rows} rows × {self.dim}, {self.encoder['key']} of {self.corpus.name}.{self.field})"

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.encoder["dim"])

    @property
    def modality(self) -> str:
        """Modality of the field."""
        return str(self.encoder["modality"])

    @property
    def rows(self) -> int:
        """Number of rows: one per sample of the corpus, missing values included."""
        return self.corpus.rows

    @property
    def schema(self) -> pa.Schema:
        """The columns that reading gives; `embedding` is null where a value is missing."""
        return self._table(self.corpus.shards[0].shard, COLUMNS).schema

    def entries(self) -> list[Entry]:
        """The catalog's entries, in the order of the corpus's shards."""
        return [self._entries[shard.shard] for shard in self.corpus.shards]

    def files(self) -> list[str]:
        """Keys of the Parquet files in the store, in order."""
        return [entry.path for entry in self.entries()]

    def read(self, shard: str) -> pa.Table:
        """One shard as it lies on disk (missing vectors are NaN), checked: bytes, footer, rows, recipe and ids."""
        entry = self._entries[shard]
        content = artefact.read_checked(self.storage, entry.path, entry.sha256)
        check(content, entry, self.corpus.shard(shard))
        return artefact.read_table(content).replace_schema_metadata(None)

    def to_arrow(self, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """All rows in the order of the corpus."""
        _check_columns(columns)
        return pa.concat_tables([self._table(shard.shard, columns) for shard in self.corpus.shards])

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [rows, dim] with rows of NaN where missing, bool [rows] present), in the order of the corpus."""
        tables = [self.read(shard.shard) for shard in self.corpus.shards]
        present = np.concatenate([np.asarray(table["present"]) for table in tables])
        return np.concatenate([vectors.matrix(table["embedding"]) for table in tables]), present

    def scanner(self, columns: Sequence[str] = COLUMNS, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """Record batches of at most `batch_size` rows in the order of the corpus; one shard in memory at a time."""
        _check_columns(columns)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is not allowed; at least 1")
        for shard in self.corpus.shards:
            yield from self._table(shard.shard, columns).to_batches(max_chunksize=batch_size)

    def take(self, ids: Sequence[str] | Sequence[int] | np.ndarray, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """Rows by id or by row number in the corpus, one for each asked for, in the order asked for.

        Raises:
            NotFound: an id that the corpus does not hold, or a row number past its end.
        """
        _check_columns(columns)
        wanted = [self._locate(each) for each in ids]
        tables: dict[str, pa.Table] = {}
        for shard in sorted({shard for shard, _ in wanted}):
            rows = [row for at, row in wanted if at == shard]
            tables[shard] = self._table(shard, columns).take(pa.array(rows, pa.int64()))
        if not wanted:
            return self._table(self.corpus.shards[0].shard, columns).slice(0, 0)
        position = dict.fromkeys(tables, 0)
        picked = []
        for shard, _ in wanted:
            picked.append(tables[shard].slice(position[shard], 1))
            position[shard] += 1
        return pa.concat_tables(picked).combine_chunks()

    def _locate(self, which: str | int | np.integer[Any]) -> tuple[str, int]:
        if isinstance(which, str):
            return self.corpus.locate(which)
        row = int(which)
        for shard in self.corpus.shards:
            if 0 <= row < shard.rows:
                return shard.shard, row
            row -= shard.rows
        raise NotFound(f"view {self.name!r} has no row {int(which)}; it has rows 0 to {self.rows - 1}")

    def _table(self, shard: str, columns: Sequence[str]) -> pa.Table:
        stored = self.read(shard)
        present = np.asarray(stored["present"])
        made: dict[str, Any] = {
            "id": self.corpus.read(shard)["id"],
            "embedding": vectors.masked(stored["embedding"], present),
        }
        return pa.table({name: made.get(name) if name in made else stored[name] for name in columns})


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise InputError(f"a view has no column {unknown[0]!r}; allowed: {', '.join(COLUMNS)}")
