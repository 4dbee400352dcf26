"""Shards of the store itself as a source: what `braid compact` writes anew. No spec names it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, ids
from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import MISSES, QUARANTINE, Corpus
from featurestore.errors import DecodeError, InputError
from featurestore.ids import IDS
from featurestore.storage import Storage
from featurestore.times import TIMESTAMPS
from pipelines.sources import Missing, Sample, SampleRef, Source, Value


class _Stored(NamedTuple):
    """A value of a shard."""

    corpus: Corpus
    shard: str
    row: int
    field: str
    size: int
    source: str
    address: tuple[str, int] | None

    def stat(self) -> tuple[int, str]:
        """Its size; it never changes."""
        return self.size, ""

    def fetch(self) -> bytes:
        """Its bytes, proven."""
        raw = self.corpus.value(self.shard, self.row, self.field)
        assert raw is not None
        return raw


class _Rejected(NamedTuple):
    """A value that stands in quarantine, and is rejected again as it was."""

    reason: str
    detail: str
    source: str

    def stat(self) -> tuple[int, str]:
        """Nothing is there."""
        return 0, ""

    def fetch(self) -> bytes:
        """Raises what it was rejected for."""
        raise DecodeError(self.reason, self.detail)


def open_source(corpus: dict[str, Any]) -> Source:
    """The shards that `corpus["source"]` lists, of the store's version that it names, to be cut in the order it names."""
    source = corpus["source"]
    snapshot = Catalog(Storage.from_json(source["store"])).snapshot(source["version"])
    return StoredShards(snapshot, corpus["name"], source["shards"], source["order"])


class StoredShards:
    """Samples of some shards, whose keys ascend, those left out that are gone; a reference is (shard, row, 0)."""

    def __init__(self, snapshot: Snapshot, name: str, shards: list[str], order: str) -> None:
        self.order = order
        self._snapshot, self._corpus, self._shards = snapshot, Corpus(snapshot, name), shards
        self._root = (snapshot.storage.media_root or "").rstrip("/")

    def references(self) -> Iterator[SampleRef]:
        """Every sample, shard by shard."""
        for shard in self._shards:
            rows = self._corpus.read(shard)
            sizes = [pc.fill_null(pc.struct_field(rows[each], "size"), 0) for each in self._corpus.fields]
            columns = [rows[name].to_pylist() for name in ("id", "group", "etag")] + [
                each.to_pylist() for each in sizes
            ]
            samples = list(zip(*columns, strict=True))
            for row in self._corpus.live_rows(shard).tolist():
                sample_id, group, etag, *bytes_ = samples[row]
                yield SampleRef(sample_id, group, etag, sum(bytes_), shard, row, 0)

    def etags(self, references: Sequence[SampleRef]) -> np.ndarray:
        """uint64 [n]: hashes of the samples' etags of now, as the id index has them; their rows may have older ones."""
        stems = [reference.uri.rpartition("-")[0] for reference in references]
        etags = np.zeros(len(references), np.uint64)
        for stem in sorted({*stems}):
            entry = self._snapshot.entries(IDS, self._corpus.name).find(f"{stem}-00000")
            assert entry is not None
            index = ids.read(self._snapshot.storage, entry)
            places = np.asarray(index["part"], np.int64) << 32 | np.asarray(index["row"])
            order = np.argsort(places)
            own = [number for number, each in enumerate(stems) if each == stem]
            wanted = [int(references[n].uri.rpartition("-")[2]) << 32 | references[n].offset for n in own]
            etags[own] = np.asarray(index["etag"])[order[np.searchsorted(places[order], wanted)]]
        return etags

    def columns(self) -> set[str]:
        """None that anything is checked against."""
        return set()

    def kept(self) -> set[str]:
        """None that anything is checked against."""
        return set()

    def unmatched(self) -> dict[str, str]:
        """None."""
        return {}

    def remarks(self) -> list[str]:
        """None."""
        return []

    def whole(self) -> bool:
        """Always: a shard that is not whole is an error."""
        return True

    def place(self, reference: SampleRef) -> str:
        """Shard and row."""
        return f"shard {reference.uri}, row {reference.offset}"

    def samples(self, references: Iterable[SampleRef]) -> Iterator[Sample]:
        """The samples of some references, in the order given."""
        details: dict[str, dict[tuple[str, str], str]] = {}
        for reference in references:
            shard, row = reference.uri, reference.offset
            if shard not in details:
                details[shard] = self._rejections(shard)
            rows = self._corpus.read(shard)
            stored = _row(rows, row)
            if stored["id"] != reference.id:
                raise InputError(
                    f"shard {shard}, row {row}: found {stored['id']!r}, not {reference.id!r}: run it again"
                )
            own = {"id", "group", "etag", *self._corpus.fields}
            columns = {name: value for name, value in stored.items() if name not in own and value is not None}
            values: dict[str, Value | Missing | None] = {
                field: self._value(reference, field, stored[field], details[shard]) for field in self._corpus.fields
            }
            yield Sample(reference.id, reference.group, reference.etag, columns, values)

    def _value(
        self, reference: SampleRef, field: str, member: dict[str, Any], details: dict[tuple[str, str], str]
    ) -> Value | Missing:
        if member["present"]:
            address = None if member["uri"] is None else (f"{self._root}/{member['uri']}", member["offset"])
            source = member["source"] or ""
            return _Stored(self._corpus, reference.uri, reference.offset, field, member["size"], source, address)
        if member["miss_reason"] in MISSES:
            return Missing(member["miss_reason"])
        detail = details.get((reference.id, field), "")
        return _Rejected(member["miss_reason"], detail, member["source"] or "")

    def _rejections(self, shard: str) -> dict[tuple[str, str], str]:
        """(id, field) -> detail of what the shard stage rejected of a shard."""
        entry = self._snapshot.entries(QUARANTINE, f"shard/{self._corpus.name}").find(shard)
        if entry is None:
            return {}
        table = artefact.read_table(artefact.read_checked(self._snapshot.storage, entry.path, entry.sha256))
        return {(row["id"], row["field"]): row["detail"] for row in table.to_pylist()}


def _row(rows: pa.Table, row: int) -> dict[str, Any]:
    """A row with its times in nanoseconds: a `datetime` cannot hold them."""
    part = rows.slice(row, 1)
    for name in set(TIMESTAMPS) & {*rows.column_names}:
        part = part.set_column(part.column_names.index(name), name, part[name].cast(pa.int64()))
    (stored,) = part.to_pylist()
    return dict(stored)
