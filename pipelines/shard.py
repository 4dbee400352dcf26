"""Stage 1: cut a corpus into immutable shards.

References (about 200 bytes a sample) are grouped by a coarse range of hash(group): the job's one shuffle of samples. Each
range is sorted by (hash(group), group, id) and cut when rows or bytes would overflow; rows inside a shard stand in the order
of their ids. The cuts are written to the store as a plan, one row group per shard, and only descriptors of them travel on.
A worker then fetches a shard's values, checks them, and writes its tar first and its rows second: the second means done.

Shard keys come from the set of new (id, etag) alone, so any runner and any number of workers write the same bytes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from featurestore import artefact
from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.encoders.runtime import keep_freed_memory
from featurestore.errors import DecodeError, InputError
from featurestore.identity import IngestDigest, hash64, input_digest
from featurestore.storage import Storage
from featurestore.times import TIMESTAMPS
from pipelines.runner import Commit, InFlight, Job, Result, Scope, typed
from pipelines.shard_writer import ShardTask, ShardWriter, write_plan
from pipelines.sources import SampleRef, Source, Value, open_source

SHARDS_PER_RANGE = 32

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


def scan(
    source: Source, known: dict[str, str], unchanged: Callable[[SampleRef], bool] = lambda reference: False
) -> Ingest:
    """Reads all references once and says what is new. InputError where an id stands twice, naming both places.

    Args:
        source: the corpus's source.
        known: id -> etag of what the store holds.
        unchanged: asked of a sample with another etag than the stored one: whether it is the same all the same.
    """
    digest, size, changed, seen = IngestDigest(), 0, 0, 0
    hashes: list[int] = []
    for reference in source.references():
        seen += 1
        hashes.append(hash64(reference.id))
        etag = known.get(reference.id)
        if etag is None:
            digest.add(reference.id, reference.etag)
            size += reference.bytes
        elif etag != reference.etag and not unchanged(reference):
            changed += 1
    unique, counts = np.unique(np.array(hashes, np.uint64), return_counts=True)
    if len(unique) < len(hashes):
        _name_duplicate(source, set(unique[counts > 1].tolist()))
    return Ingest(digest.key(), digest.count, size, seen - digest.count, changed, len(known) - (seen - digest.count))


def same_content(corpus: Corpus, source: Source) -> Callable[[SampleRef], bool]:
    """Tells a sample whose files were only touched or copied from one that changed: by its columns and its values' digests."""

    def unchanged(reference: SampleRef) -> bool:
        (sample,) = source.samples([reference])
        key, row = corpus.locate(reference.id)
        rows = corpus.read(key).slice(row, 1)
        times = [name for name in TIMESTAMPS if name in rows.column_names]
        stored = rows.drop_columns(times).to_pylist()[0]
        columns = {name: value for name, value in sample.columns.items() if name not in times and value is not None}
        kept = {
            name for name in stored if name not in {"id", "group", "etag", *corpus.fields} and stored[name] is not None
        }
        return (
            stored["group"] == sample.group
            and all(rows[name].cast(pa.int64())[0].as_py() == sample.columns.get(name) for name in times)
            and kept == columns.keys()
            and all(stored[name] in (value, json.dumps(value, sort_keys=True)) for name, value in columns.items())
            and all(_same_value(stored[name], value) for name, value in sample.values.items())
        )

    return unchanged


def _same_value(member: dict[str, Any], value: Value | None) -> bool:
    if value is None:
        return bool(member["miss_reason"] == "absent")
    try:
        return bool(member["digest"] == input_digest(value.fetch()))
    except DecodeError:
        return False


def _name_duplicate(source: Source, suspects: set[int]) -> None:
    places: dict[str, SampleRef] = {}
    for reference in source.references():
        if hash64(reference.id) not in suspects:
            continue
        first = places.setdefault(reference.id, reference)
        if first is not reference:
            raise InputError(
                f"id {reference.id!r} stands twice: {source.place(first)} and {source.place(reference)}; ids must be "
                "unique in a corpus, so rename or remove one"
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
        corpus = json.loads(self._corpus)
        known = known_etags(Catalog(Storage.from_json(self._storage)).snapshot(self._version), corpus["name"])
        for reference in open_source(corpus).references():
            if reference.id not in known:
                yield range_of(reference.group, self._ranges), reference


class _PlanRange(beam.DoFn):
    """Cuts a range into shards, writes the plan and yields a descriptor for each shard, under a key of its own."""

    def __init__(self, storage: str, corpus: str, ingest: str) -> None:
        self._storage, self._corpus, self._ingest = storage, corpus, ingest

    def process(self, element: tuple[int, Iterable[SampleRef]]) -> Iterator[tuple[int, ShardTask]]:
        number, references = element
        storage, corpus = Storage.from_json(self._storage), json.loads(self._corpus)
        shards = cut(references, corpus["shard_rows"], corpus["shard_mb"] << 20)
        with storage.scratch() as folder:
            local = folder / "plan.parquet"
            write_plan(local, shards)
            plan = artefact.place(storage, local, f"corpora/{corpus['name']}/plans/{self._ingest}-{number:05d}")
        for part in range(len(shards)):
            shard = f"{self._ingest}-{number:05d}-{part:05d}"
            yield hash64(shard) >> 1, ShardTask(shard, plan.path, plan.sha256, part)


class ShardWork(NamedTuple):
    """What a worker of the shard stage does: ShardTask -> Result."""

    storage: str
    corpus: str

    def open(self, threads: int) -> ShardWriter:
        """The writer, and the allocator set."""
        keep_freed_memory()
        return ShardWriter(Storage.from_json(self.storage), json.loads(self.corpus))

    def do(self, writer: ShardWriter, task: ShardTask) -> Result:
        """One shard."""
        return writer.write(task)


class Shard(beam.PTransform):
    """One impulse -> PCollection of keyed Results: reads a source's new samples and writes their shards."""

    def __init__(
        self, storage: Storage, corpus: dict[str, Any], ingest: Ingest, version: int, processes: int = 1
    ) -> None:
        super().__init__()
        self._args = (storage.to_json(), json.dumps(corpus, sort_keys=True))
        self._do_fn = InFlight(f"shard {corpus['name']}", ShardWork(*self._args), processes)
        self._ingest, self._ranges, self._version = ingest.key, ingest.ranges(corpus), version

    def expand(self, begin: beam.Pipeline) -> beam.PCollection:
        """Pipeline -> PCollection of keyed Results."""
        return (
            begin
            | "Start" >> beam.Create([0])
            | "ReadReferences"
            >> beam.ParDo(_ReadNew(*self._args, self._ranges, self._version)).with_output_types(tuple[int, SampleRef])
            | "GroupByRange" >> beam.GroupByKey()
            | "PlanShards" >> beam.ParDo(_PlanRange(*self._args, self._ingest)).with_output_types(tuple[int, ShardTask])
            | "Spread" >> beam.GroupByKey()
            | "WriteShards" >> beam.ParDo(self._do_fn).with_output_types(tuple[int, Result])
        )


def build(job: Job, storage: Storage, corpus: dict[str, Any], ingest: Ingest, version: int) -> None:
    """Puts the shard job into a pipeline: write every new shard, then one commit."""
    name = corpus["name"]
    scopes = [Scope(ROWS, name, ""), Scope(MEDIA, name, ""), Scope(QUARANTINE, f"shard/{name}", "")]
    (
        job.pipeline
        | "Shard" >> Shard(storage, corpus, ingest, version, job.workers)
        | "Commit" >> Commit(storage, f"shard {name}", scopes, corpus["failure_budget"], ingest.samples)
    )
