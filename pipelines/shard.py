"""Stage 1: cut a corpus into immutable shards.

References (about 200 bytes a sample) are grouped by a coarse range of hash(group): the job's one shuffle of samples. Each
range is sorted by (hash(group), group, id) and cut when rows or bytes would overflow; rows inside a shard stand in the order
of their ids. The cuts are written to the store as a plan, one row group per shard, and only descriptors of them travel on.
A worker then fetches a shard's values, checks them, and writes its tar first and its rows second: the second means done.

Shard keys come from the set of new (id, etag) alone, so any runner and any number of workers write the same bytes.
"""

import hashlib
import json
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import artefact
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import MEDIA, MEMBER, QUARANTINE, REJECTED, ROWS, Corpus, member_header
from featurestore.encoders.runtime import keep_freed_memory
from featurestore.errors import DecodeError, InputError
from featurestore.identity import IngestDigest, hash64, ids_sha256, input_digest
from featurestore.storage import Storage
from pipelines.runner import Commit, InFlight, Job, Result, Scope, result, typed
from pipelines.sources import TIMESTAMPS, Sample, SampleRef, Source, Value, open_source

SHARDS_PER_RANGE = 32
_FETCH_THREADS = 8
_FETCH_AHEAD = 64

typed(SampleRef)


class Ingest(NamedTuple):
    """What a source holds that the store does not: the size of the job, known before it starts."""

    key: str
    samples: int
    bytes: int
    known: int
    changed: int
    gone: int

    def ranges(self, corpus: dict[str, Any]) -> int:
        """Number of ranges of hash(group): about 32 shards' worth each."""
        by_rows = self.samples / corpus["shard_rows"]
        by_bytes = self.bytes / (corpus["shard_mb"] << 20)
        return max(1, -(-int(max(by_rows, by_bytes)) // SHARDS_PER_RANGE))


@typed
class ShardTask(NamedTuple):
    """A descriptor of one shard to write: row group `row_group` of the plan at `plan_path`."""

    key: str
    plan_path: str
    plan_sha256: str
    row_group: int


def known_etags(snapshot: Snapshot, name: str) -> dict[str, str]:
    """Id -> etag of every sample of a corpus in the store; empty where the corpus is new."""
    if name not in snapshot.names(ROWS):
        return {}
    corpus = Corpus(snapshot, name)
    known: dict[str, str] = {}
    for entry in corpus.shards:
        rows = corpus.read(entry.shard)
        known.update(zip(rows["id"].to_pylist(), rows["etag"].to_pylist(), strict=True))
    return known


def scan(source: Source, known: dict[str, str]) -> Ingest:
    """Reads all references once and says what is new. InputError where an id stands twice, naming both places."""
    digest, size, changed, seen = IngestDigest(), 0, 0, 0
    hashes: list[int] = []
    for reference in source.references():
        seen += 1
        hashes.append(hash64(reference.id))
        etag = known.get(reference.id)
        if etag is None:
            digest.add(reference.id, reference.etag)
            size += reference.bytes
        elif etag != reference.etag:
            changed += 1
    unique, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
    if len(unique) < len(hashes):
        _name_duplicate(source, set(unique[counts > 1].tolist()))
    return Ingest(digest.key(), digest.count, size, seen - digest.count, changed, len(known) - (seen - digest.count))


def _name_duplicate(source: Source, suspects: set[int]) -> None:
    places: dict[str, SampleRef] = {}
    for reference in source.references():
        if hash64(reference.id) not in suspects:
            continue
        first = places.setdefault(reference.id, reference)
        if first is not reference:
            raise InputError(
                f"id {reference.id!r} stands twice: at byte {first.offset} of {first.uri} and at byte {reference.offset} "
                f"of {reference.uri}; ids must be unique in a corpus, so rename or remove one"
            )


def cut(references: Iterable[SampleRef], max_rows: int, max_bytes: int) -> list[list[SampleRef]]:
    """Cuts one range into shards: sorted by (hash(group), group, id), full before the next begins, also inside a group.

    Each shard's references are in the order of their ids.
    """
    shards: list[list[SampleRef]] = []
    rows, size = max_rows, 0
    for reference in sorted(references, key=lambda ref: (hash64(ref.group), ref.group, ref.id)):
        if rows >= max_rows or size + reference.bytes > max_bytes:
            shards.append([])
            rows, size = 0, 0
        shards[-1].append(reference)
        rows, size = rows + 1, size + reference.bytes
    return [sorted(shard, key=lambda ref: ref.id) for shard in shards]


def range_of(group: str, ranges: int) -> int:
    """The range that a group falls into: equal slices of the 64-bit hashes."""
    return hash64(group) * ranges >> 64


class _ReadNew(beam.DoFn):
    """Yields (range, reference) for every sample that the store does not hold."""

    def __init__(self, storage: str, corpus: str, ranges: int, version: int) -> None:
        self._storage, self._corpus, self._ranges, self._version = storage, corpus, ranges, version

    def process(self, _: Any) -> Iterator[tuple[int, SampleRef]]:
        from featurestore.catalog import Catalog

        corpus = json.loads(self._corpus)
        known = known_etags(Catalog(Storage.from_json(self._storage)).snapshot(self._version), corpus["name"])
        for reference in open_source(corpus).references():
            if reference.id not in known:
                yield range_of(reference.group, self._ranges), reference


class _PlanRange(beam.DoFn):
    """Cuts a range into shards, writes the plan and yields a descriptor for each shard."""

    def __init__(self, storage: str, corpus: str, ingest: str) -> None:
        self._storage, self._corpus, self._ingest = storage, corpus, ingest

    def process(self, element: tuple[int, Iterable[SampleRef]]) -> Iterator[ShardTask]:
        number, references = element
        storage, corpus = Storage.from_json(self._storage), json.loads(self._corpus)
        shards = cut(references, corpus["shard_rows"], corpus["shard_mb"] << 20)
        with storage.scratch() as folder:
            local = folder / "plan.parquet"
            _write_plan(local, shards)
            plan = artefact.place(storage, local, f"corpora/{corpus['name']}/plans/{self._ingest}-{number:05d}")
        for part in range(len(shards)):
            yield ShardTask(f"{self._ingest}-{number:05d}-{part:05d}", plan.path, plan.sha256, part)


_PLAN = pa.schema(
    [pa.field(name, pa.int64() if kind is int else pa.string()) for name, kind in SampleRef.__annotations__.items()]
)


def _write_plan(local: Path, shards: list[list[SampleRef]]) -> None:
    with pq.ParquetWriter(local, _PLAN, compression="zstd") as writer:
        for shard in shards:
            columns = [list(column) for column in zip(*shard, strict=True)]
            writer.write_table(pa.table(columns, schema=_PLAN), row_group_size=len(shard))


def _read_plan(storage: Storage, task: ShardTask) -> list[SampleRef]:
    content = artefact.read_checked(storage, task.plan_path, task.plan_sha256)
    rows = pq.ParquetFile(pa.BufferReader(content)).read_row_group(task.row_group)
    return [SampleRef(**row) for row in rows.to_pylist()]


class _WriteShard(InFlight):
    def __init__(self, storage: str, corpus: str) -> None:
        self._storage, self._corpus = storage, corpus

    def setup(self) -> None:
        super().setup()
        keep_freed_memory()
        self._writer = ShardWriter(Storage.from_json(self._storage), json.loads(self._corpus))

    def work(self, task: ShardTask) -> Result:
        return self._writer.write(task)


class ShardWriter:
    """Writes shards of one corpus. Doing a shard again gives the same bytes; one that is done is not done again."""

    def __init__(self, storage: Storage, corpus: dict[str, Any]) -> None:
        self.storage, self.corpus = storage, corpus
        self._folder = f"corpora/{corpus['name']}"
        self._done = storage.list(self._folder)
        self._source = open_source(corpus)

    def write(self, task: ShardTask) -> Result:
        """The shard's tar, quarantine and rows."""
        references = _read_plan(self.storage, task)
        ids = ids_sha256(reference.id for reference in references)
        return self._adopt(task, ids) or self._make(task, references, ids)

    def _adopt(self, task: ShardTask, ids: str) -> Result | None:
        """The Result of a shard that an earlier run finished: its rows are there, and so is the tar they name."""
        stem = f"{self._folder}/{task.key}-"
        for path in sorted(key for key in self._done if key.startswith(stem) and key.endswith(".parquet")):
            content = self.storage.read(path)
            sha256 = hashlib.sha256(content).hexdigest()
            if not artefact.is_named_for(path, sha256):
                continue
            footer = artefact.read_footer(content)
            if footer.get("ids_sha256") != ids or footer.get("settings") != self._settings():
                continue
            made = [
                artefact.Placed(*footer["media"]),
                *(artefact.Placed(*each) for each in footer["quarantine"]),
            ]
            if all(_holds(self.storage, each) for each in made):
                return self._result(task.key, artefact.Placed(path, len(content), sha256), footer)
        return None

    def _settings(self) -> dict[str, Any]:
        return {"fields": self.corpus["fields"], "columns": self.corpus["columns"]}

    def _make(self, task: ShardTask, references: list[SampleRef], ids: str) -> Result:
        stem = f"{self._folder}/{task.key}"
        with self.storage.scratch() as folder:
            local = folder / "shard.tar"
            with _TarWriter(local) as tar:
                samples, members, rejected = self._write_members(references, tar)
            media = artefact.place(self.storage, local, stem, tar.sha256)
        quarantine = place_rejected(self.storage, rejected, f"quarantine/shard/{self.corpus['name']}/{task.key}")
        table = _rows_table(samples, members, self.corpus["fields"])
        footer = {
            "kind": ROWS,
            "name": self.corpus["name"],
            "shard": task.key,
            "rows": len(table),
            "ids_sha256": ids,
            "settings": self._settings(),
            "media": media,
            "quarantine": quarantine,
            "tried": sum(
                member["present"] or member["miss_reason"] != "absent" for row in members for member in row.values()
            ),
            "rejected": len(rejected),
            "example": f"{rejected[0]['field']} of {rejected[0]['id']!r}: {rejected[0]['detail']}" if rejected else "",
            "events": _events(table),
        }
        return self._result(task.key, artefact.place_table(self.storage, table, stem, footer), footer)

    def _result(self, key: str, rows: artefact.Placed, footer: dict[str, Any]) -> Result:
        name, media = self.corpus["name"], artefact.Placed(*footer["media"])
        fields = {field: each["modality"] for field, each in self.corpus["fields"].items()}
        about = json.dumps({"fields": fields, "source": self.corpus["source"]["type"]}, sort_keys=True)
        count, ids, events = footer["rows"], footer["ids_sha256"], footer["events"]
        first, last = events
        entries = [
            Entry(
                ROWS, name, "", key, rows.path, count, rows.bytes, rows.sha256, ids, media.sha256, first, last, about
            ),
            Entry(MEDIA, name, "", key, media.path, count, media.bytes, media.sha256, ids, "", first, last),
        ]
        for each in (artefact.Placed(*each) for each in footer["quarantine"]):
            entries.append(
                Entry(
                    QUARANTINE, f"shard/{name}", "", key, each.path, footer["rejected"], each.bytes, each.sha256,
                    input_sha256=media.sha256,
                )
            )  # fmt: skip
        return result(key, entries, footer["tried"], footer["rejected"], footer["example"])

    def _write_members(
        self, references: list[SampleRef], tar: "_TarWriter"
    ) -> tuple[list[Sample], list[dict[str, dict[str, Any]]], list[dict[str, Any]]]:
        samples, members, rejected = [], [], []
        for sample, values in self._fetch(references):
            row = {}
            for field, (value, raw) in values.items():
                row[field] = self._member(sample.id, field, value, raw, tar)
                if isinstance(raw, DecodeError) and value is not None:
                    rejected.append(rejection(sample.id, field, "shard", raw, value.source))
            samples.append(sample)
            members.append(row)
        return samples, members, rejected

    def _member(
        self,
        sample_id: str,
        field: str,
        value: Value | None,
        raw: bytes | DecodeError | None,
        tar: "_TarWriter",
    ) -> dict[str, Any]:
        source = value.source if value is not None else None
        if raw is None or isinstance(raw, DecodeError):
            reason = "absent" if raw is None else raw.reason
            return {"present": False, "miss_reason": reason, "source": source}
        ext = _extension(self.corpus["fields"][field]["modality"], raw)
        offset = tar.add(member_header(sample_id, field, ext, len(raw)), raw)
        return {
            "present": True, "offset": offset, "size": len(raw), "digest": input_digest(raw), "ext": ext, "source": source,
        }  # fmt: skip

    def _fetch(
        self, references: list[SampleRef]
    ) -> Iterator[tuple[Sample, dict[str, tuple[Value | None, bytes | DecodeError | None]]]]:
        """Samples with their raw values, in order; fetched ahead in threads."""
        waiting: deque[tuple[Sample, Future[Any]]] = deque()
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            for sample in self._source.samples(references):
                waiting.append((sample, pool.submit(self._fetch_one, sample)))
                if len(waiting) >= _FETCH_AHEAD:
                    first, values = waiting.popleft()
                    yield first, values.result()
            for first, values in waiting:
                yield first, values.result()

    def _fetch_one(self, sample: Sample) -> dict[str, tuple[Value | None, bytes | DecodeError | None]]:
        return {
            field: (value, self._checked(field, value) if value is not None else None)
            for field, value in sample.values.items()
        }

    def _checked(self, field: str, value: Value) -> bytes | DecodeError:
        """The raw value, or why it is rejected already here: what needs no decoder."""
        try:
            raw = value.fetch()
            if not raw:
                raise DecodeError("empty", f"{value.source}: 0 bytes")
            if self.corpus["fields"][field]["modality"] == "text":
                raw.decode()
        except UnicodeDecodeError as error:
            return DecodeError("invalid_utf8", f"{value.source}: {error}")
        except DecodeError as error:
            return error
        return raw


def rejection(sample_id: str, field: str, stage: str, error: DecodeError, source: str | None) -> dict[str, Any]:
    """A row of a quarantine file."""
    return {
        "id": sample_id, "field": field, "stage": stage, "reason": error.reason, "detail": error.detail, "source": source,
    }  # fmt: skip


def place_rejected(storage: Storage, rejected: list[dict[str, Any]], stem: str) -> list[artefact.Placed]:
    """Writes a quarantine file, where anything was rejected."""
    if not rejected:
        return []
    table = pa.Table.from_pylist(sorted(rejected, key=lambda row: (row["id"], row["field"])), schema=REJECTED)
    return [artefact.place_table(storage, table, stem, {"kind": QUARANTINE, "rows": len(table)})]


def _holds(storage: Storage, placed: artefact.Placed) -> bool:
    return storage.exists(placed.path) and storage.size(placed.path) == placed.bytes


def _extension(modality: str, raw: bytes) -> str:
    from featurestore.media import sniff_extension

    return "txt" if modality == "text" else sniff_extension(raw)


def _rows_table(samples: list[Sample], members: list[dict[str, dict[str, Any]]], fields: dict[str, Any]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "id": pa.array([sample.id for sample in samples], pa.string()),
        "group": pa.array([sample.group for sample in samples], pa.string()),
        "etag": pa.array([sample.etag for sample in samples], pa.string()),
    }
    names = sorted({name for sample in samples for name in sample.columns})
    for name in names:
        values = [sample.columns.get(name) for sample in samples]
        columns[name] = pa.array(values, pa.timestamp("ns", "UTC")) if name in TIMESTAMPS else _kept_column(values)
    for field in fields:
        columns[field] = pa.array([row[field] for row in members], MEMBER)
    return pa.table(columns)


def _kept_column(values: list[Any]) -> pa.Array:
    """A column of the source: of numbers, truths or texts as it is; of anything mixed or nested as JSON texts."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds or kinds == {str}:
        return pa.array(values, pa.string())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(abs(value) < 1 << 63 for value in values if value is not None):
        return pa.array(values, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values])


def _events(table: pa.Table) -> tuple[int | None, int | None]:
    if "event_timestamp" not in table.column_names:
        return None, None
    times = [value for value in table["event_timestamp"].cast(pa.int64()).to_pylist() if value is not None]
    return (min(times), max(times)) if times else (None, None)


class _TarWriter:
    """Writes a tar whose bytes depend on its members alone, and hashes it on the way."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._size = path, hashlib.sha256(), 0
        self.sha256 = ""

    def __enter__(self) -> "_TarWriter":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        # Two empty blocks, filled up to a record: the end of a tar.
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
        self._file.close()
        self.sha256 = self._digest.hexdigest()

    def add(self, header: bytes, raw: bytes) -> int:
        """Adds a member and returns the offset of its data."""
        self._write(header)
        offset = self._size
        self._write(raw)
        self._write(bytes(-len(raw) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)


class Shard(beam.PTransform):
    """One impulse -> PCollection of Result: reads a source's new samples and writes their shards."""

    def __init__(self, storage: Storage, corpus: dict[str, Any], ingest: Ingest, version: int) -> None:
        super().__init__()
        self._args = (storage.to_json(), json.dumps(corpus, sort_keys=True))
        self._ingest, self._ranges, self._version = ingest.key, ingest.ranges(corpus), version

    def expand(self, begin: beam.Pipeline) -> beam.PCollection:
        """Pipeline -> PCollection of Result."""
        return (
            begin
            | "Start" >> beam.Create([0])
            | "ReadReferences"
            >> beam.ParDo(_ReadNew(*self._args, self._ranges, self._version)).with_output_types(tuple[int, SampleRef])
            | "GroupByRange" >> beam.GroupByKey()
            | "PlanShards" >> beam.ParDo(_PlanRange(*self._args, self._ingest)).with_output_types(ShardTask)
            | "Spread" >> beam.Reshuffle()
            | "WriteShards" >> beam.ParDo(_WriteShard(*self._args)).with_output_types(Result)
        )


def build(job: Job, storage: Storage, corpus: dict[str, Any], ingest: Ingest, version: int) -> None:
    """Puts the shard job into a pipeline: write every new shard, then one commit."""
    name = corpus["name"]
    scopes = [Scope(ROWS, name, ""), Scope(MEDIA, name, ""), Scope(QUARANTINE, f"shard/{name}", "")]
    (
        job.pipeline
        | "Shard" >> Shard(storage, corpus, ingest, version)
        | "Commit" >> Commit(storage, f"shard {name}", scopes, corpus["failure_budget"])
    )
