"""Stage 1: cut a corpus into immutable shards.

References (about 200 bytes a sample) are grouped by coarse ranges of about 32 shards: the job's one shuffle of samples, which
some references of a range cross together. A range is a slice of hash(group), cut into shards whose rows stand in the order of
their ids; or, where the source is dear to read here and there (Parquet, tars), a stretch of the source, cut into shards of
consecutive samples whose rows stand as they do there: a worker then reads one stretch of it, and not all of it for each shard
(cuts.py). The cuts are written to the store as a plan, one row group per shard, and only descriptors of them travel on.
A worker then fetches a shard's values, checks them, and writes its tar first and its rows second: the second means done.

What of the source is new, changed or gone ingest.py says. What was stored before is never changed, but for the id index, which
takes on the etags of samples that were only touched: in the commit of the ingest, or in one of its own where there is nothing
else to do.

Shard keys come from the sets of new, changed and gone samples alone, so any runner and any number of workers write the same
bytes; in the order of ids the source's own order makes no difference either.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from featurestore import artefact, ids
from featurestore.catalog import Catalog, Entry, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS
from featurestore.encoders.runtime import keep_freed_memory
from featurestore.errors import InputError
from featurestore.identity import hash64
from featurestore.ids import IDS
from featurestore.storage import Storage
from featurestore.tombstones import TOMBSTONES
from pipelines.cuts import Cut
from pipelines.ingest import SAME, Ingest, Known
from pipelines.measure import Measure, MeasureWork, measuring
from pipelines.reference_blocks import packed, unpacked
from pipelines.runner import Commit, InFlight, Job, Result, Scope, keyed, result
from pipelines.shard_writer import ShardTask, ShardWriter, write_plan
from pipelines.sources import SampleRef, Source, open_source
from pipelines.sources.stored import StoredShards


def _cut(source: Source, corpus: dict[str, Any]) -> Cut:
    return Cut(source.order, corpus["shard_rows"], corpus["shard_mb"] << 20)


class _ReadNew(beam.DoFn):
    """Yields (range, block of references) for the samples that are new or changed."""

    def __init__(self, storage: str, corpus: str, ranges: int, version: int, renewed: str) -> None:
        self._storage, self._corpus, self._ranges, self._version = storage, corpus, ranges, version
        self._renewed = renewed

    def process(self, _: Any) -> Iterator[tuple[int, bytes]]:
        corpus = json.loads(self._corpus)
        catalog = Catalog(Storage.from_json(self._storage))
        stored = catalog.snapshot(self._version) if self._version >= 0 else Snapshot(catalog.storage, [], -1)
        known = Known(stored, corpus["name"], _entries(self._renewed))
        source = open_source(corpus)
        new = (reference for reference, state, _place in known.compare(source) if state != SAME)
        yield from packed(_cut(source, corpus).ranges(new, self._ranges))


class _Bury(beam.DoFn):
    """Reads the source to its end and places a tombstone for each sample that is gone or changed."""

    def __init__(self, storage: str, corpus: str, ingest: Ingest, version: int, renewed: str) -> None:
        self._storage, self._corpus, self._ingest, self._version = storage, corpus, ingest, version
        self._renewed = renewed

    def process(self, _: Any) -> Iterator[tuple[int, Result]]:
        storage, corpus, ingest = Storage.from_json(self._storage), json.loads(self._corpus), self._ingest
        known = Known(Catalog(storage).snapshot(self._version), corpus["name"], _entries(self._renewed))
        for _ in known.compare(open_source(corpus)):
            pass
        table = known.tombstones()
        if len(table) != ingest.gone + ingest.changed:
            raise InputError(
                f"corpus {corpus['name']!r}: {len(table)} samples are gone or changed where planning saw "
                f"{ingest.gone + ingest.changed}: the source changed while the job ran; run it again"
            )
        key = f"{ingest.key}-gone"
        footer = {"kind": TOMBSTONES, "name": corpus["name"], "rows": len(table)}
        placed = artefact.place_table(storage, table, f"corpora/{corpus['name']}/{key}", footer)
        yield keyed(result(key, [_entry(TOMBSTONES, corpus["name"], key, placed, len(table))]))


def _entries(told: str) -> list[Entry]:
    return [Entry(*each) for each in json.loads(told)]


def _entry(kind: str, corpus: str, shard: str, placed: artefact.Placed, rows: int) -> Entry:
    path, size, sha256 = placed
    return Entry(kind, corpus, "", shard, path, rows, size, sha256)


class _PlanRange(beam.DoFn):
    """Cuts a range into shards, writes the plan and the ids, and yields a descriptor of each shard, under a key of its own."""

    def __init__(self, storage: str, corpus: str, ingest: str) -> None:
        self._storage, self._corpus, self._ingest = storage, corpus, ingest

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, ShardTask]]:
        number, blocks = element
        storage, corpus = Storage.from_json(self._storage), json.loads(self._corpus)
        source = open_source(corpus)
        folder, stem = f"corpora/{corpus['name']}", f"{self._ingest}-{number:05d}"
        parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        def shards() -> Iterator[list[SampleRef]]:
            for part, own in enumerate(_cut(source, corpus).shards(unpacked(blocks))):
                parts[part] = ids.hashes([reference.id for reference in own]), _etags(source, own)
                yield own

        with storage.scratch() as scratch:
            local = scratch / "plan.parquet"
            write_plan(local, shards())
            plan = artefact.place(storage, local, f"{folder}/plans/{stem}")
        index = json.dumps([ids.place(storage, corpus["name"], stem, ids.table(parts))])
        for part in parts:
            shard = f"{stem}-{part:05d}"
            # The first shard's Result brings the range's id index into the catalog.
            task = ShardTask(shard, plan.path, plan.sha256, part, "[]" if part else index)
            yield hash64(shard) >> 1, task


def _etags(source: Source, references: list[SampleRef]) -> np.ndarray:
    """uint64 [n]: hashes of the etags of now."""
    if isinstance(source, StoredShards):
        return source.etags(references)
    return ids.hashes([reference.etag for reference in references])


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
    """One impulse -> PCollection of keyed Results: reads a source's new samples and writes their shards.

    Args:
        storage: the store.
        corpus: the corpus part of a spec.
        ingest: what is to be written.
        version: of the store that the source is compared with; -1 is an empty one, to which all is new.
        in_flight: does the work on a ShardTask.
        measure: what comes before it, of a source that measures something for its samples.
        renewed: id indexes that are compared with instead of those that the version names.
    """

    def __init__(
        self,
        storage: Storage,
        corpus: dict[str, Any],
        ingest: Ingest,
        version: int,
        in_flight: InFlight,
        measure: Measure | None = None,
        renewed: Sequence[Entry] = (),
    ) -> None:
        super().__init__()
        self._measure = measure
        self._args, self._do_fn = (storage.to_json(), json.dumps(corpus, sort_keys=True)), in_flight
        self._ingest, self._ranges, self._since = ingest, ingest.ranges(corpus), (version, json.dumps(renewed))

    def expand(self, begin: beam.Pipeline) -> beam.PCollection:
        """Pipeline -> PCollection of keyed Results."""
        references = (
            begin
            | "Start" >> beam.Create([0])
            | "ReadReferences"
            >> beam.ParDo(_ReadNew(*self._args, self._ranges, *self._since)).with_output_types(tuple[int, bytes])
        )
        tasks = (
            references
            | "GroupByRange" >> beam.GroupByKey()
            | "PlanShards"
            >> beam.ParDo(_PlanRange(*self._args, self._ingest.key)).with_output_types(tuple[int, ShardTask])
        )
        if self._measure is not None:
            tasks = (tasks, references | "MeasureOnce" >> self._measure) | "Measured" >> beam.Flatten()
        written = (
            tasks
            | "Spread" >> beam.GroupByKey()
            | "WriteShards" >> beam.ParDo(self._do_fn).with_output_types(tuple[int, Result])
        )
        if not self._ingest.gone + self._ingest.changed:
            return written
        bury = _Bury(*self._args, self._ingest, *self._since)
        buried = begin | "Again" >> beam.Create([0]) | "Bury" >> beam.ParDo(bury).with_output_types(tuple[int, Result])
        return (written, buried) | "All" >> beam.Flatten()


class Renewed(NamedTuple):
    """Id indexes with the etags of now: those to publish, of samples that were only touched, and those to compare with.

    The two differ where samples could not be read when the job was planned: it takes them for the same, and publishes nothing
    of them.
    """

    published: Sequence[Entry] = ()
    compared: Sequence[Entry] = ()


NOTHING_RENEWED = Renewed()


def renew(storage: Storage, corpus: str, known: Known) -> Renewed:
    """Writes them; the job's commit publishes them."""
    published = [ids.place(storage, corpus, stem, table) for stem, table in known.renewed()]
    return Renewed(published, [ids.place(storage, corpus, stem, table) for stem, table in known.taken()] or published)


def build(
    job: Job,
    storage: Storage,
    corpus: dict[str, Any],
    ingest: Ingest,
    version: int,
    renewed: Renewed = NOTHING_RENEWED,
) -> None:
    """Puts the shard job into a pipeline: write every new shard, then one commit of these and of what is `renewed`."""
    name = corpus["name"]
    scopes = [Scope(kind, name, "") for kind in (ROWS, MEDIA, IDS, TOMBSTONES)]
    scopes.append(Scope(QUARANTINE, f"shard/{name}", ""))
    # Where a source that measures something keeps it.
    corpus = {**corpus, "source": {**corpus["source"], "store": storage.to_json()}}
    told, made = json.dumps(corpus, sort_keys=True), []
    if ingest.samples + ingest.gone:
        in_flight, measure = InFlight(f"shard {name}", ShardWork(storage.to_json(), told), job.workers), None
        if measuring(corpus) is not None:
            measure = Measure(told, InFlight(f"measure {name}", MeasureWork(told), job.workers))
        made.append(
            job.pipeline | "Shard" >> Shard(storage, corpus, ingest, version, in_flight, measure, renewed.compared)
        )
    if renewed.published:
        # Not called after a shard: the commit would take it for one that is made again.
        indexes = [keyed(result(f"{each.shard}-ids", [each])) for each in renewed.published]
        create = beam.Create(indexes, reshuffle=False).with_output_types(tuple[int, Result])
        made.append(job.pipeline | "Renewed" >> create)
    results = made[0] if len(made) == 1 else made | "WithRenewed" >> beam.Flatten()
    remakes = version if renewed.published else None
    results | "Commit" >> Commit(storage, f"shard {name}", scopes, corpus["failure_budget"], ingest.samples, remakes)
