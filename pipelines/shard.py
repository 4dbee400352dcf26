"""Stage 1: cut a corpus into immutable shards.

References (about 200 bytes a sample) are grouped by coarse ranges of about 32 shards: the job's one shuffle of samples, which
some references of a range cross together. A range is a slice of hash(group), cut into shards whose rows stand in the order of
their ids; or, where the source is dear to read here and there (Parquet, tars), a stretch of the source, cut into shards of
consecutive samples whose rows stand as they do there: a worker then reads one stretch of it, and not all of it for each shard
(cuts.py). The cuts are written to the store as a plan, one row group per shard, and only descriptors of them travel on.
A worker then fetches a shard's values, checks them, and writes its tar first and its rows second: the second means done.

A sample that changed is a tombstone for the old row and a row in the new ingest; one that is gone is a tombstone. What was
stored before is never touched. An ingest whose samples only were touched does nothing.

Shard keys come from the sets of new, changed and gone samples alone, so any runner and any number of workers write the same
bytes; in the order of ids the source's own order makes no difference either.
"""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from featurestore import artefact, ids, media
from featurestore.catalog import Catalog, Entry, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.encoders.runtime import keep_freed_memory
from featurestore.errors import DecodeError, InputError
from featurestore.identity import IngestDigest, hash64, input_digest
from featurestore.ids import IDS, Ids, hashes
from featurestore.storage import Storage
from featurestore.times import TIMESTAMPS
from featurestore.tombstones import CHANGED, GONE, SCHEMA, TOMBSTONES
from pipelines.cuts import SHARDS_PER_RANGE, Cut
from pipelines.measure import Measure, MeasureWork, measuring
from pipelines.reference_blocks import packed, unpacked
from pipelines.runner import Commit, InFlight, Job, Result, Scope, keyed, result
from pipelines.shard_writer import ShardTask, ShardWriter, fetched, reference_to, write_plan
from pipelines.sources import Missing, Sample, SampleRef, Source, Value, open_source

_BATCH = 65_536
"""References whose ids are looked up at once."""
_AGAIN_BYTES = 512 << 20
"""Of samples that may have changed, how many are read again at once."""

NEW, SAME = "new", "same"
"""What a sample of the source is to the store; or CHANGED, of tombstones.py."""


class Ingest(NamedTuple):
    """What a source holds that the store does not: the size of the job, known before it starts.

    `samples` are to be written: new ones, and the `changed` ones among them. `known` stand in the store as they are; `gone`
    are in the store and no longer in the source.
    """

    key: str
    samples: int
    bytes: int
    known: int
    changed: int
    gone: int
    remarks: tuple[str, ...] = ()

    def ranges(self, corpus: dict[str, Any]) -> int:
        """Number of ranges, where they are slices of hash(group): about 32 shards' worth each."""
        by_rows = self.samples / corpus["shard_rows"]
        by_bytes = self.bytes / (corpus["shard_mb"] << 20)
        return max(1, -(-int(max(by_rows, by_bytes)) // SHARDS_PER_RANGE))


class Known:
    """What the store holds of a corpus, to compare a source with: 24 bytes a sample, and no rows are read.

    A sample whose etag is another is the same all the same where its columns and values are: it was only touched or copied.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self._corpus = Corpus(snapshot, name) if name in snapshot.names(ROWS) else None
        self._ids = Ids(snapshot, name)
        self._gone = np.zeros(len(self._ids), bool)
        for shard, rows in (self._corpus.gone if self._corpus else {}).items():
            places = self._ids.by_shard[shard]
            self._gone[places[np.isin(self._ids.rows[places], rows)]] = True

    def compare(self, source: Source) -> Iterator[tuple[SampleRef, str, str]]:
        """Every reference of a source, whether it is NEW, SAME or CHANGED, and where it stood before, in words.

        Afterwards `tombstones` has what of the store was not among them, or changed.
        """
        self._seen = self._gone.copy()
        self._changed: list[int] = []
        references = source.references()
        while batch := list(itertools.islice(references, _BATCH)):
            found = self._ids.find(hashes([reference.id for reference in batch]))
            etags = hashes([reference.etag for reference in batch])
            stored = np.flatnonzero(found >= 0)
            touched = stored[self._gone[found[stored]] | (self._ids.etag[found[stored]] != etags[stored])]
            again = _samples(source, [batch[place] for place in touched])
            for reference, first, etag in zip(batch, found.tolist(), etags, strict=True):
                state = NEW if first < 0 else self._state(reference, first, etag, again)
                before = [] if first < 0 or state == SAME else self._ids.places(reference.id)
                yield reference, state, " ".join(f"{shard}/{row}" for shard, row in sorted(before))

    def tombstones(self) -> pa.Table:
        """What `compare` found gone or changed, as a table of `tombstones.SCHEMA`."""
        rows = []
        left = ((place, GONE) for place in np.flatnonzero(~self._seen).tolist())
        for place, why in itertools.chain(left, ((place, CHANGED) for place in self._changed)):
            shard, row = self._ids.shard(place), int(self._ids.rows[place])
            rows.append((shard, row, self._rows(shard)["id"][row].as_py(), why))
        columns = [list(column) for column in zip(*sorted(rows), strict=True)] or [[]] * len(SCHEMA)
        return pa.table(columns, schema=SCHEMA)

    def _state(self, reference: SampleRef, first: int, etag: np.uint64, again: Iterator[Sample]) -> str:
        """Of the stored samples with the hash of this one's id, the one that it is. `again` comes to its sample."""
        place = first
        while place < len(self._ids) and self._ids.hash[place] == self._ids.hash[first]:
            if not self._gone[place]:
                if self._ids.etag[place] == etag:
                    self._seen[place] = True
                    return SAME
                shard, row = self._ids.shard(place), int(self._ids.rows[place])
                if self._rows(shard)["id"][row].as_py() == reference.id:
                    self._seen[place] = True
                    sample = next(each for each in again if each.id == reference.id)
                    assert self._corpus is not None
                    if same(self._corpus, self._rows(shard).slice(row, 1), sample):
                        return SAME
                    self._changed.append(place)
                    return CHANGED
            place += 1
        return NEW

    def _rows(self, shard: str) -> pa.Table:
        assert self._corpus is not None
        return self._corpus.read(shard)


def same(corpus: Corpus, row: pa.Table, sample: Sample, but: Collection[str] = ()) -> bool:
    """Whether a stored sample has the group, the columns and the values (`but` those of some fields) that the source gives now.

    Args:
        corpus: as it is stored.
        row: the sample's row of its shard.
        sample: the same id, as the source gives it.
        but: fields whose values may be others.
    """
    times = [name for name in TIMESTAMPS if name in row.column_names]
    stored = row.drop_columns(times).to_pylist()[0]
    columns = {name: value for name, value in sample.columns.items() if name not in times and value is not None}
    own = {"id", "group", "etag", *corpus.fields}
    values = ((name, value) for name, value in sample.values.items() if name not in but)
    return (
        stored["group"] == sample.group
        and all(row[name].cast(pa.int64())[0].as_py() == sample.columns.get(name) for name in times)
        and {name for name in stored if name not in own and stored[name] is not None} == columns.keys()
        and all(stored[name] in (value, json.dumps(value, sort_keys=True)) for name, value in columns.items())
        and all(_same_value(corpus, stored[name], name, value) for name, value in values)
    )


def _same_value(corpus: Corpus, member: dict[str, Any], field: str, value: Value | Missing | None) -> bool:
    if value is None or isinstance(value, Missing):
        return bool(member["miss_reason"] == (value.reason if value else "absent"))
    try:
        # Of what was rejected there is no digest: it is the same where it is rejected for the same reason.
        decode = media.check if member["miss_reason"] in media.REASONS else None
        if member["digest"] != input_digest(fetched(value, corpus.fields[field], decode)):
            return False
    except DecodeError as error:
        # What is stored is not given up for a server that does not answer now; what was rejected so before has not changed.
        return error.reason == ("unreadable" if member["present"] else member["miss_reason"])
    # What is referred to must be found where it stands now, too.
    return member["uri"] is None or reference_to(corpus.storage, value) == (member["uri"], member["offset"])


def _samples(source: Source, references: list[SampleRef]) -> Iterator[Sample]:
    """Samples read again in the source's order, about as many at once as a shard has bytes."""
    for _, some in itertools.groupby(
        zip(references, itertools.accumulate(each.bytes for each in references), strict=True),
        key=lambda each: each[1] // _AGAIN_BYTES,
    ):
        yield from source.samples(reference for reference, _ in some)


def scan(source: Source, known: Known) -> Ingest:
    """Reads all references once and says what is to do. InputError where an id stands twice, naming both places."""
    digest, size, counts = IngestDigest(), 0, Counter[str]()
    seen = array("Q")
    for reference, state, before in known.compare(source):
        seen.append(hash64(reference.id))
        counts[state] += 1
        if state != SAME:
            # With where it stood before: one that comes back as it was is another ingest than its first.
            digest.add(reference.id, reference.etag + before)
            size += reference.bytes
    unique = np.sort(np.frombuffer(seen, np.uint64))
    if len(repeated := unique[1:][unique[1:] == unique[:-1]]):
        _name_duplicate(source, set(repeated.tolist()))
    samples, gone = digest.count, 0
    for shard, row, sample_id, why in zip(*known.tombstones().to_pydict().values(), strict=True):
        if why == GONE:
            digest.add(sample_id, f"gone from {shard}, row {row}")
            gone += 1
    return Ingest(digest.key(), samples, size, counts[SAME], counts[CHANGED], gone)


def _name_duplicate(source: Source, suspects: set[int]) -> None:
    places: dict[str, SampleRef] = {}
    for reference in source.references():
        if hash64(reference.id) not in suspects:
            continue
        first = places.setdefault(reference.id, reference)
        if first is not reference:
            raise twice(source, first, reference)


def twice(source: Source, first: SampleRef, other: SampleRef) -> InputError:
    """What is raised where two samples have one id."""
    return InputError(
        f"id {other.id!r} stands twice: {source.place(first)} and {source.place(other)}; ids must be unique in a corpus, so "
        "rename or remove one"
    )


def _cut(source: Source, corpus: dict[str, Any]) -> Cut:
    return Cut(source.order, corpus["shard_rows"], corpus["shard_mb"] << 20)


class _ReadNew(beam.DoFn):
    """Yields (range, block of references) for the samples that are new or changed."""

    def __init__(self, storage: str, corpus: str, ranges: int, version: int) -> None:
        self._storage, self._corpus, self._ranges, self._version = storage, corpus, ranges, version

    def process(self, _: Any) -> Iterator[tuple[int, bytes]]:
        corpus = json.loads(self._corpus)
        catalog = Catalog(Storage.from_json(self._storage))
        stored = catalog.snapshot(self._version) if self._version >= 0 else Snapshot(catalog.storage, [], -1)
        known = Known(stored, corpus["name"])
        source = open_source(corpus)
        new = (reference for reference, state, _before in known.compare(source) if state != SAME)
        yield from packed(_cut(source, corpus).ranges(new, self._ranges))


class _Bury(beam.DoFn):
    """Reads the source to its end and places a tombstone for each sample that is gone or changed."""

    def __init__(self, storage: str, corpus: str, ingest: Ingest, version: int) -> None:
        self._storage, self._corpus, self._ingest, self._version = storage, corpus, ingest, version

    def process(self, _: Any) -> Iterator[tuple[int, Result]]:
        storage, corpus, ingest = Storage.from_json(self._storage), json.loads(self._corpus), self._ingest
        known = Known(Catalog(storage).snapshot(self._version), corpus["name"])
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
        shards = _cut(open_source(corpus), corpus).shards(unpacked(blocks))
        folder, stem = f"corpora/{corpus['name']}", f"{self._ingest}-{number:05d}"
        with storage.scratch() as scratch:
            local = scratch / "plan.parquet"
            write_plan(local, shards)
            plan = artefact.place(storage, local, f"{folder}/plans/{stem}")
        parts = {part: ([ref.id for ref in own], [ref.etag for ref in own]) for part, own in enumerate(shards)}
        table = ids.table(parts)
        placed = artefact.place_table(storage, table, f"{folder}/ids/{stem}", {"kind": IDS, "rows": len(table)})
        index = json.dumps([_entry(IDS, corpus["name"], f"{stem}-00000", placed, len(table))])
        for part in range(len(shards)):
            shard = f"{stem}-{part:05d}"
            # The first shard's Result brings the range's id index into the catalog.
            task = ShardTask(shard, plan.path, plan.sha256, part, "[]" if part else index)
            yield hash64(shard) >> 1, task


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
    """

    def __init__(
        self,
        storage: Storage,
        corpus: dict[str, Any],
        ingest: Ingest,
        version: int,
        in_flight: InFlight,
        measure: Measure | None = None,
    ) -> None:
        super().__init__()
        self._measure = measure
        self._args, self._do_fn = (storage.to_json(), json.dumps(corpus, sort_keys=True)), in_flight
        self._ingest, self._ranges, self._version = ingest, ingest.ranges(corpus), version

    def expand(self, begin: beam.Pipeline) -> beam.PCollection:
        """Pipeline -> PCollection of keyed Results."""
        references = (
            begin
            | "Start" >> beam.Create([0])
            | "ReadReferences"
            >> beam.ParDo(_ReadNew(*self._args, self._ranges, self._version)).with_output_types(tuple[int, bytes])
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
        bury = _Bury(*self._args, self._ingest, self._version)
        buried = begin | "Again" >> beam.Create([0]) | "Bury" >> beam.ParDo(bury).with_output_types(tuple[int, Result])
        return (written, buried) | "All" >> beam.Flatten()


def build(job: Job, storage: Storage, corpus: dict[str, Any], ingest: Ingest, version: int) -> None:
    """Puts the shard job into a pipeline: write every new shard, then one commit."""
    name = corpus["name"]
    scopes = [Scope(kind, name, "") for kind in (ROWS, MEDIA, IDS, TOMBSTONES)]
    scopes.append(Scope(QUARANTINE, f"shard/{name}", ""))
    # Where a source that measures something keeps it.
    corpus = {**corpus, "source": {**corpus["source"], "store": storage.to_json()}}
    told = json.dumps(corpus, sort_keys=True)
    in_flight, measure = InFlight(f"shard {name}", ShardWork(storage.to_json(), told), job.workers), None
    if measuring(corpus) is not None:
        measure = Measure(told, InFlight(f"measure {name}", MeasureWork(told), job.workers))
    (
        job.pipeline
        | "Shard" >> Shard(storage, corpus, ingest, version, in_flight, measure)
        | "Commit" >> Commit(storage, f"shard {name}", scopes, corpus["failure_budget"], ingest.samples)
    )
