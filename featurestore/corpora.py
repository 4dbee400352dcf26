"""Reading a corpus: its shards' rows, and the raw values in their tars or where their source has them.

A corpus shard is two files: a WebDataset tar of raw fields, and a Parquet table with one row per sample, in the order of the
ids or of the source (row_order.py). Per field the table has a struct `present, offset, size, digest, ext, miss_reason, source,
uri`: offset and size locate the value in the tar, so that one value is read without reading the tar; or, where `uri` is not
null, in a file outside the store (references.py). A shard none of whose values is in a tar has no tar.

What is read by sample (`to_arrow`, `locate`, `rows`) leaves out those that are gone (tombstones.py); what is read by place
(`read`, `ids`, `value`) gives every row that a shard has.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore import artefact
from featurestore.catalog import Entries, Entry, Snapshot
from featurestore.errors import AlignmentError, NotFound
from featurestore.identity import DIGEST_BYTES, ids_sha256, input_digest, tar_key
from featurestore.ids import Ids, hashes
from featurestore.references import read_value
from featurestore.row_order import BY_ID, order_of, out_of_order
from featurestore.storage import Storage
from featurestore.tombstones import gone_rows

ROWS, MEDIA, QUARANTINE = "corpus", "media", "quarantine"
"""Kinds in the catalog: a shard's rows, its tar, and what a stage rejected of it."""

MEMBER = pa.struct(
    [
        pa.field("present", pa.bool_(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("digest", pa.binary(DIGEST_BYTES)),
        pa.field("ext", pa.string()),
        pa.field("miss_reason", pa.string()),
        pa.field("source", pa.string()),
        pa.field("uri", pa.string()),
    ]
)
"""A field's column. `miss_reason` is null where the value is present, one of MISSES where there is none, or the reason
under which it stands in quarantine. `uri` is null where the value is in the shard's tar; else the file outside the store that
holds it, relative to the root that the reader names."""

MISSES = frozenset(
    {"absent", "no_stream", "no_clock", "no_event", "not_started", "stream_ended", "out_of_tolerance", "stale"}
)
"""Why there is no value, where nothing was rejected: `absent` where the source has none. The others are of timed streams: the
file has no such track (`no_stream`), or its clock cannot be told from another's (`no_clock`); within the window nothing
happens (`no_event`), or not yet or no longer; what is nearest is too far away (`out_of_tolerance`) or too old (`stale`)."""

REJECTED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("field", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("source", pa.string()),
    ]
)
"""A quarantine file: every value that a stage rejected of one shard."""


def member_name(sample_id: str, field: str, ext: str) -> str:
    """The name of a value in its shard's tar."""
    return f"{tar_key(sample_id)}.{field}.{ext}"


def member_header(sample_id: str, field: str, ext: str, size: int) -> bytes:
    """The bytes that stand before a value in its shard's tar: they bind it to its sample and field."""
    info = tarfile.TarInfo(member_name(sample_id, field, ext))
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


class Corpus:
    """A corpus at one version of the store.

    Iterating shards in order of their keys and rows in their order is the order of every artefact made from it.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self.name = name
        self.storage: Storage = snapshot.storage
        self.version = snapshot.version
        if name not in snapshot.names(ROWS):
            raise NotFound(
                f"no corpus {name!r} in {self.storage.uri}; it has: {', '.join(snapshot.names(ROWS)) or 'none'}; "
                "`braid shard SPEC` brings one in"
            )
        self._snapshot = snapshot
        self._rows: dict[str, pa.Table] = {}

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, {self.rows} samples in {len(self.shards)} shards, fields {', '.join(self.fields)})"
        )

    @property
    def rows(self) -> int:
        """Number of samples."""
        return int(pc.sum(self.shards.table["rows"]).as_py()) - sum(map(len, self.gone.values()))

    @cached_property
    def gone(self) -> dict[str, np.ndarray]:
        """Shard -> int64 numbers of its rows that are gone, ascending; shards that are whole are left out."""
        return gone_rows(self._snapshot, self.name)

    @cached_property
    def index(self) -> Ids:
        """The id index."""
        return Ids(self._snapshot, self.name)

    def live_rows(self, key: str) -> np.ndarray:
        """int64 numbers of a shard's rows that are not gone, ascending."""
        return np.delete(np.arange(self.shard(key).rows), self.gone.get(key, []))

    def live(self, key: str, table: pa.Table) -> pa.Table:
        """A table with the rows of a shard, without those that are gone."""
        return table.take(pa.array(self.live_rows(key))) if key in self.gone else table

    @property
    def fields(self) -> dict[str, str]:
        """Modality of each field."""
        return dict(self.shards[0].info()["fields"])

    def shard(self, key: str) -> Entry:
        """The catalog's entry of a shard's rows."""
        found = self.shards.find(key)
        if found is None:
            raise NotFound(f"corpus {self.name!r} has no shard {key!r} in version {self.version}")
        return found

    @cached_property
    def shards(self) -> Entries:
        """The catalog's entries of the shards' rows."""
        return self._snapshot.entries(ROWS, self.name)

    @cached_property
    def tars(self) -> Entries:
        """The catalog's entries of the shards' tars."""
        return self._snapshot.entries(MEDIA, self.name)

    def media(self, key: str) -> Entry:
        """The catalog's entry of a shard's tar."""
        found = self.tars.find(key)
        if found is None:
            raise AlignmentError(
                f"shard {key} of corpus {self.name!r} has rows but no tar in the catalog; run `braid verify`"
            )
        return found

    def read(self, key: str) -> pa.Table:
        """A shard's rows, checked against the catalog. Kept in memory once read."""
        if key not in self._rows:
            self._rows[key] = read_rows(self.storage, self.shard(key))
        return self._rows[key]

    def ids(self, key: str) -> list[str]:
        """A shard's ids in order."""
        return list(self.read(key)["id"].to_pylist())

    def columns(self, key: str, start: int = 0, rows: int | None = None) -> list[dict[str, Any]]:
        """What a shard's rows say of their samples: `id`, `group`, times and the source's own columns, a dict for each.

        Times are ISO 8601 texts in UTC: a `datetime` cannot hold nanoseconds.
        """
        table = self.read(key).drop_columns(["etag", *self.fields]).slice(start, rows)
        for place, field in enumerate(table.schema):
            if pa.types.is_timestamp(field.type):
                times = pc.strftime(table[field.name].cast(pa.timestamp("ns")), "%Y-%m-%dT%H:%M:%SZ")
                table = table.set_column(place, field.name, times)
        columns: list[dict[str, Any]] = table.to_pylist()
        return columns

    def locate(self, sample_id: str) -> tuple[str, int]:
        """The (shard, row) of a sample; NotFound where the corpus has no such id."""
        stored = [(key, row) for key, row in self.index.places(sample_id) if self._id_at(key, row) == sample_id]
        found = [(key, row) for key, row in stored if row not in self.gone.get(key, ())]
        if len(found) > 1:
            (first, at), (other, row) = sorted(found)[:2]
            raise AlignmentError(
                f"corpus {self.name!r}: id {sample_id!r} stands in shard {first}, row {at}, and in shard {other}, row "
                f"{row}; run `braid verify`"
            )
        if not found:
            went = " any more: it was taken out of the source, or changed" if stored else ""
            raise NotFound(f"corpus {self.name!r} has no sample {sample_id!r} in version {self.version}{went}")
        return found[0]

    def locate_all(self, ids: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What `locate` says of each of many: shard -> (int64 positions in `ids`, int64 rows in the shard)."""
        names, wanted = pa.array(ids, pa.string()), hashes(list(ids))
        first = self.index.find(wanted)
        # Hardly a hash stands twice: what stands once is there or nowhere, and is looked up with the others of its shard.
        once = np.flatnonzero((first >= 0) & (np.searchsorted(self.index.hash, wanted, "right") - first == 1))
        found, there = {}, np.zeros(len(ids), bool)
        for key, own in self.index.grouped(first[once]).items():
            at, stored = once[own], self.read(key)["id"]
            rows = self.index.rows[first[at]].astype(np.int64)
            good = (rows < len(stored)) & ~np.isin(rows, self.gone.get(key, []))
            good[good] = np.asarray(pc.equal(stored.take(rows[good]), names.take(at[good])))
            found[key], there[at] = (at[good], rows[good]), good
        for number in np.flatnonzero(~there).tolist():
            key, row = self.locate(ids[number])
            at, rows = found.get(key, (np.array([], np.int64),) * 2)
            found[key] = np.append(at, number), np.append(rows, row)
        return found

    def _id_at(self, key: str, row: int) -> str:
        ids = self.read(key)["id"]
        if row >= len(ids):
            raise AlignmentError(
                f"corpus {self.name!r}: the id index names row {row} of shard {key}, which has {len(ids)}; run `braid verify`"
            )
        return str(ids[row])

    def to_arrow(self) -> pa.Table:
        """All samples in order, with `shard` and `row` columns in front."""
        return concatenated(
            [self.live(entry.shard, _located(self.read(entry.shard), entry.shard)) for entry in self.shards]
        )

    def value(self, key: str, row: int, field: str) -> bytes | None:
        """A raw value, or None where it is missing.

        Raises:
            AlignmentError: the bytes in the tar are not the ones that the rows name, or stand there under another id; or the
                file that the rows refer to is gone, or holds another value.
            StoreError: that file is at a root that is not named, or cannot be read now.
        """
        rows = self.read(key)
        if field not in rows.column_names:
            raise NotFound(f"corpus {self.name!r} has no field {field!r}; it has: {', '.join(self.fields)}")
        member = rows[field][row].as_py()
        if not member["present"]:
            return None
        sample_id = rows["id"][row].as_py()
        if member["uri"] is not None:
            return self._referenced(member, f"the {field} of {sample_id!r} (shard {key}, row {row})")
        header = member_header(sample_id, field, member["ext"], member["size"])
        tar, start = self.media(key).path, max(0, member["offset"] - len(header))
        try:
            stored = self.storage.read(tar, start, len(header) + member["size"])
        except NotFound:
            raise AlignmentError(f"{tar}: the catalog names this tar, and it is gone; run `braid verify`") from None
        raw = stored[len(header) :]
        if not stored.startswith(header) or input_digest(raw) != member["digest"]:
            raise AlignmentError(
                f"{tar}: the {field} of {sample_id!r} (shard {key}, row {row}) is not the value that was stored; "
                "run `braid verify`"
            )
        return raw

    def _referenced(self, member: dict[str, Any], what: str) -> bytes:
        try:
            return read_value(self.storage, member["uri"], member["offset"], member["size"], member["digest"])
        except (AlignmentError, NotFound) as error:
            raise AlignmentError(f"{what}: {error}; put the file back, or `braid shard` takes it as changed") from None

    def values(self, key: str, field: str) -> Iterator[bytes | None]:
        """A field's raw values of one shard, in the order of its rows."""
        for row in range(self.shard(key).rows):
            yield self.value(key, row, field)


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """Shards' tables as one.

    A kept column whose type differs between shards is float64 where all are numbers that it holds to the last digit, else JSON
    texts, as within a shard.
    """
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    types = {name: _common([table[name] for table in tables if name in table.column_names]) for name in names}
    return pa.table(
        {name: pa.chunked_array([_as_type(each, name, kind) for each in tables], kind) for name, kind in types.items()}
    )


def float_holds(numbers: Iterable[Any]) -> bool:
    """Whether float64 holds each of some numbers to the last digit; None, and what is a float, it does."""
    return all(not isinstance(each, int) or (abs(each) < 1 << 63 and float(each) == each) for each in numbers)


def _common(columns: list[pa.ChunkedArray]) -> pa.DataType:
    kinds = {column.type for column in columns if column.null_count < len(column)} or {columns[0].type}
    if len(kinds) == 1:
        return kinds.pop()
    whole = [column for column in columns if pa.types.is_integer(column.type)]
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds)
    return pa.float64() if numbers and all(float_holds(each.to_pylist()) for each in whole) else pa.string()


def _as_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    if name not in table.column_names or table[name].null_count == len(table):
        return pa.nulls(len(table), kind)
    column = table[name]
    if pa.types.is_string(kind) and column.type != kind:
        return pa.array([None if value is None else json.dumps(value) for value in column.to_pylist()], kind)
    # Not checked: Arrow takes any number from 2^53 on for one that is not held.
    column = column.cast(kind, safe=False)
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _located(rows: pa.Table, key: str) -> pa.Table:
    table = rows.add_column(0, "shard", pa.array([key] * len(rows), pa.string()))
    return table.add_column(1, "row", pa.array(range(len(rows)), pa.int64()))


def read_rows(storage: Storage, entry: Entry) -> pa.Table:
    """The rows of a corpus shard, checked: the file's sha256, the number of rows, and the digest of its ids."""
    content = artefact.read_checked(storage, entry.path, entry.sha256)
    with artefact.parsing(entry.path):
        table = artefact.read_table(content)
    if len(table) != entry.rows:
        raise AlignmentError(f"{entry.path}: {len(table)} rows where the catalog says {entry.rows}; run `braid verify`")
    strange = [name for name in entry.info().get("fields", {}) if _type(table.schema, name) != MEMBER]
    if strange or _type(table.schema, "id") != pa.string():
        raise AlignmentError(f"{entry.path}: {(strange or ['id'])[0]!r} is not what it should be; run `braid verify`")
    if ids_sha256(table["id"].to_pylist()) != entry.ids_sha256:
        raise AlignmentError(f"{entry.path}: its ids are not the ones that the catalog names; run `braid verify`")
    # Not by the entry's lineage, which a worker is not given: the file's sha256 proves its footer as well.
    for row, problem in disordered(table, order_of(artefact.footer_of(table.schema).get("settings", {}))):
        raise AlignmentError(
            f"{entry.path}: {problem} (row {row}, id {table['id'][row].as_py()!r}); run `braid verify`"
        )
    return table.replace_schema_metadata(None)


def read_ids(storage: Storage, entry: Entry) -> pa.ChunkedArray:
    """The ids of a corpus shard alone, in its order; the file is proven by its sha256."""
    content = artefact.read_checked(storage, entry.path, entry.sha256)
    with artefact.parsing(entry.path):
        return pq.read_table(pa.BufferReader(content), columns=["id"])["id"]


def _type(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if schema.names.count(name) == 1 else None


def disordered(rows: pa.Table, order: str = BY_ID) -> Iterator[tuple[int, str]]:
    """(row, what does not hold) of every row that stands out of its shard's order: ids, or values that were moved to others."""
    fields = {field.name: rows[field.name].to_pylist() for field in rows.schema if field.type == MEMBER}
    return out_of_order(rows["id"].to_pylist(), fields, order)
