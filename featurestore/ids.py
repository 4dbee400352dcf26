"""The id index of a corpus: where an id stands, and what its source last said of it, without reading any rows.

An ingest writes one file for each of its ranges, with 24 bytes a sample: a hash of the id, its part (the last number of its
shard's key) and row, and a hash of its etag, sorted by the first. Equal hashes of two ids are told apart by the rows.

The etag is that of now: of what the sample's source was when it was last found to hold the same as is stored. The one in the
sample's row is of when it was stored; the two differ where files were touched or copied since.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact
from featurestore.catalog import Entry, Snapshot
from featurestore.errors import AlignmentError
from featurestore.identity import hash64
from featurestore.storage import Storage

__all__ = ["IDS", "SCHEMA", "Ids", "hashes", "parts_of", "place", "read", "renewed", "table", "there"]

IDS = "ids"
"""Kind in the catalog; its shard is the first of the range's."""

SCHEMA = pa.schema(
    [
        pa.field("hash", pa.uint64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("etag", pa.uint64(), nullable=False),
    ]
)


def table(parts: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    """The id index of a range: part -> the hashes of its shard's ids and those of their etags, in the order of its rows."""
    lengths = [len(own) for own, _ in parts.values()]
    columns = {
        "hash": np.concatenate([np.array([], np.uint64), *(own for own, _ in parts.values())]),
        "part": np.repeat(np.array([*parts], np.int32), lengths),
        "row": np.concatenate([np.arange(length, dtype=np.int32) for length in [*lengths, 0]]),
        "etag": np.concatenate([np.array([], np.uint64), *(etags for _, etags in parts.values())]),
    }
    return pa.table(columns, schema=SCHEMA).sort_by([(name, "ascending") for name in ("hash", "part", "row")])


def renewed(index: pa.Table, etags: Mapping[int, tuple[Sequence[int], Sequence[int]]]) -> pa.Table:
    """An id index with other etags: part -> some rows of its shard, and the hashes of their etags."""
    parts, rows, etag = (np.asarray(index[name]).copy() for name in ("part", "row", "etag"))
    for part, (own, new) in etags.items():
        mine = np.flatnonzero(parts == part)
        etag[mine[np.argsort(rows[mine])][np.asarray(own, np.int64)]] = np.asarray(new, np.uint64)
    at = SCHEMA.get_field_index("etag")
    return index.set_column(at, SCHEMA.field(at), pa.array(etag))


def read(storage: Storage, entry: Entry) -> pa.Table:
    """One file of the index, checked."""
    content = artefact.read_checked(storage, entry.path, entry.sha256)
    with artefact.parsing(entry.path):
        table = artefact.read_table(content).replace_schema_metadata(None)
    if table.schema != SCHEMA or len(table) != entry.rows:
        raise AlignmentError(f"{entry.path} is not an id index of {entry.rows} rows; run `braid verify`")
    return table


def place(storage: Storage, corpus: str, stem: str, table: pa.Table) -> Entry:
    """Writes the index of one range."""
    footer = {"kind": IDS, "rows": len(table)}
    path, size, sha256 = artefact.place_table(storage, table, f"corpora/{corpus}/ids/{stem}", footer)
    return Entry(IDS, corpus, "", f"{stem}-00000", path, len(table), size, sha256)


def parts_of(snapshot: Snapshot, corpus: str) -> dict[str, list[int]]:
    """Range (a shard's key without its last number) -> the parts of it that the corpus has."""
    found: dict[str, list[int]] = {}
    for key in snapshot.table("corpus", corpus, None, ("shard",))["shard"].to_pylist():
        stem, _, part = key.rpartition("-")
        found.setdefault(stem, []).append(int(part))
    return found


def there(index: pa.Table, parts: list[int]) -> pa.Table:
    """An id index without the shards that were compacted since it was written."""
    kept = pc.is_in(index["part"], pa.array(parts, pa.int32()))
    return index if pc.all(kept, min_count=0).as_py() else index.filter(kept)


def hashes(texts: list[str]) -> np.ndarray:
    """uint64 [n]: `hash64` of each."""
    return np.array([hash64(text) for text in texts], np.uint64)


class Ids:
    """Every stored sample of a corpus, those that are gone too, sorted by the hash of its id.

    Attributes:
        hash: uint64 [n].
        etag: uint64 [n], `hash64` of the etag.
        rows: int32 [n], row in its shard.

    Args:
        snapshot: of the store.
        corpus: its name.
        renewed: files of the index that are read instead of those that the snapshot names.
    """

    def __init__(self, snapshot: Snapshot, corpus: str, renewed: Sequence[Entry] = ()) -> None:
        tables, keys = [SCHEMA.empty_table()], []
        parts, instead = parts_of(snapshot, corpus), {entry.shard: entry for entry in renewed}
        for entry in snapshot.entries(IDS, corpus):
            keys.append(entry.shard.rpartition("-")[0])
            own = read(snapshot.storage, instead.get(entry.shard, entry))
            tables.append(there(own, parts.get(keys[-1], [])))
        columns = {name: np.concatenate([np.asarray(each[name]) for each in tables]) for name in SCHEMA.names}
        order = np.argsort(columns["hash"], kind="stable")
        self.hash, self.etag = columns["hash"][order], columns["etag"][order]
        self.rows, self._parts = columns["row"][order], columns["part"][order]
        lengths = [len(each) for each in tables[1:]]
        self._ranges = np.repeat(np.arange(len(keys), dtype=np.int32), lengths)[order]
        self._keys = keys

    def __len__(self) -> int:
        return len(self.hash)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """int64 [m]: the first place of each hash of uint64 [m], or -1. Places of equal hashes follow each other."""
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self.hash, wanted)
        found: np.ndarray = np.where(self.hash[np.minimum(at, len(self) - 1)] == wanted, at, -1)
        return found

    def places(self, sample_id: str) -> list[tuple[str, int]]:
        """(shard, row) of every sample whose id has this one's hash."""
        wanted = np.uint64(hash64(sample_id))
        first, end = (int(np.searchsorted(self.hash, wanted, side)) for side in ("left", "right"))
        return [(self.shard(place), int(self.rows[place])) for place in range(first, end)]

    def shard(self, place: int) -> str:
        """Key of the shard of a sample."""
        return f"{self._keys[self._ranges[place]]}-{self._parts[place]:05d}"

    def code(self, place: int) -> int:
        """A number that a sample's shard has among these."""
        return int(self._ranges[place]) << 32 | int(self._parts[place])

    def of_code(self, code: int) -> np.ndarray:
        """int64 places of the samples of the shard that has a number."""
        return np.flatnonzero((self._ranges == code >> 32) & (self._parts == code & 0xFFFFFFFF))

    @cached_property
    def by_shard(self) -> dict[str, np.ndarray]:
        """Shard -> int64 places of its samples."""
        return self.grouped(np.arange(len(self)))

    def grouped(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Shard -> int64 numbers of those of `places` that are of its samples, ascending."""
        codes = self._ranges[places].astype(np.int64) << 32 | self._parts[places]
        order = np.argsort(codes, kind="stable")
        bounds = np.flatnonzero(np.diff(codes[order])) + 1
        return {self.shard(int(places[each[0]])): each for each in np.split(order, bounds) if len(each)}
