"""Trying quarantined values again: what is mended comes in at its place, and nothing is renumbered or done anew.

Of a corpus, one worker goes through the source for the samples that the shard stage rejected a value of. Of these only the
rejected values are fetched, in parallel by shards. A shard of which at least one value comes in, or is rejected for another
reason now, is written anew under its own key, with the same ids in the same order: its other values are copied from its tar as
bytes. A sample that is another than the stored one in more than its rejected values is left to the next ingest, as a changed
one. The id index takes on the etags of the samples that were tried, so that the next plan finds nothing changed. Any other
shard is left as it is: trying again what nobody mended changes no byte of the store.

Of a view, what its encoder rejected is given to it again, beside what is new in remade shards; all else is copied (encode.py).

A value that was rejected is a suspect, so all that is decoded here is decoded in a process apart: whatever it does there, no
worker dies of it, in the first attempt or in any later one. So there are no attempt receipts.
"""

import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import IO, Any, NamedTuple

import apache_beam as beam
import pyarrow as pa

from featurestore import artefact, ids, views
from featurestore.catalog import Catalog, Entry, Snapshot
from featurestore.corpora import MEDIA, MEMBER, QUARANTINE, ROWS, Corpus, member_header, read_rows
from featurestore.encoders import runtime
from featurestore.errors import AlignmentError, DecodeError
from featurestore.identity import hash64, input_digest
from featurestore.ids import IDS
from featurestore.storage import Storage
from pipelines.decode_apart import DecodeApart
from pipelines.encode import Encode, Rented, ShardEncoder
from pipelines.encode_plan import EncodeTask, ViewPlan
from pipelines.ingest import same, twice
from pipelines.quarantine import place_rejected, quarantined, rejection
from pipelines.runner import Commit, InFlight, Job, Result, Scope, keyed, result
from pipelines.shard_writer import (
    Fetch,
    Fetched,
    ShardTask,
    ShardWriter,
    TarWriter,
    kept_column,
    read_plan,
    tried_values,
    with_entries,
    write_plan,
)
from pipelines.sources import Missing, Sample, SampleRef, Value, open_source

Rejections = dict[str, list[dict[str, Any]]]
"""Shard -> rows of its quarantine, of samples that are not gone."""


def rejections(snapshot: Snapshot, corpus: str) -> Rejections:
    """What the shard stage rejected of a corpus."""
    return dict(quarantined(snapshot, corpus, f"shard/{corpus}", ""))


def view_rejections(snapshot: Snapshot, plan: ViewPlan) -> Rejections:
    """What the encoder rejected of a view."""
    return dict(quarantined(snapshot, plan.corpus, f"encode/{plan.name}", plan.recipe))


class _FindSamples(beam.DoFn):
    """Goes through the source once, writes where the samples with rejected values stand, and yields a task for each shard."""

    def __init__(self, storage: str, corpus: str, version: int) -> None:
        self._storage, self._corpus, self._version = storage, corpus, version

    def process(self, _: Any) -> Iterator[tuple[int, ShardTask]]:
        storage, corpus = Storage.from_json(self._storage), json.loads(self._corpus)
        rejected = rejections(Catalog(storage).snapshot(self._version), corpus["name"])
        shard_of = {row["id"]: shard for shard, rows in rejected.items() for row in rows}
        found: dict[str, dict[str, SampleRef]] = {shard: {} for shard in rejected}
        source = open_source(corpus)
        for reference in source.references():
            if reference.id in shard_of:
                first = found[shard_of[reference.id]].setdefault(reference.id, reference)
                if first is not reference:
                    raise twice(source, first, reference)
        with storage.scratch() as scratch:
            local = scratch / "plan.parquet"
            write_plan(local, [list(own.values()) for own in found.values()])
            plan = artefact.place(storage, local, f"corpora/{corpus['name']}/retries/plan")
        for number, shard in enumerate(found):
            yield hash64(shard) >> 1, ShardTask(shard, plan.path, plan.sha256, number)


class _Stored(NamedTuple):
    """A shard as it is, with what is to be tried of it: row of each such sample, and id -> field -> row of the quarantine."""

    rows_entry: Entry
    tar: Entry | None
    quarantine: Entry
    rows: pa.Table
    footer: dict[str, Any]
    places: dict[str, int]
    rejected: dict[str, dict[str, dict[str, Any]]]


class ShardRetrier(ShardWriter):
    """Tries the rejected values of a corpus's shards again. Doing a shard again gives the same bytes as long as they do."""

    def __init__(self, storage: Storage, corpus: dict[str, Any], version: int) -> None:
        super().__init__(storage, corpus)
        snapshot = Catalog(storage).snapshot(version)
        self._stored = Corpus(snapshot, corpus["name"])
        self._quarantine = snapshot.entries(QUARANTINE, f"shard/{corpus['name']}")
        self._shard: _Stored

    def retry(self, task: ShardTask) -> Result:
        """The shard with what came in, or as it is; `computed` counts the values that were tried."""
        with DecodeApart() as apart:
            careful = copy.copy(self)
            careful._apart, careful._shard = apart, self._open(task.key)
            return careful._retry(read_plan(self.storage, task))

    def _open(self, key: str) -> _Stored:
        entry, quarantine = self._stored.shard(key), self._quarantine.find(key)
        assert quarantine is not None
        rows = read_rows(self.storage, entry)
        footer = artefact.read_footer(artefact.read_checked(self.storage, entry.path, entry.sha256))
        gone = {rows["id"][row].as_py() for row in self._stored.gone.get(key, ())}
        rejected: dict[str, dict[str, dict[str, Any]]] = {}
        for row in _read(self.storage, quarantine):
            if row["id"] not in gone:
                rejected.setdefault(row["id"], {})[row["field"]] = row
        places = {each: row for row, each in enumerate(rows["id"].to_pylist()) if each in rejected}
        return _Stored(entry, self._stored.tars.find(key), quarantine, rows, footer, places, rejected)

    def _retry(self, references: list[SampleRef]) -> Result:
        references.sort(key=lambda reference: self._shard.places[reference.id])
        fetched, seen, tried = self._fetch(references), [], 0
        for sample, values in fetched:
            seen.append((sample, values))
            tried += len(values)
            before = self._shard.rejected[sample.id]
            if any(_differs(outcome, before[field]) for field, (_, outcome) in values.items()):
                # Only now is anything written; of what came before no outcome is another.
                return self._remake(itertools.chain(seen, fetched))
        return self._as_it_is()._replace(computed=tried)

    def _fetch_one(self, sample: Sample) -> dict[str, tuple[Value | Missing | None, Fetch]]:
        """The sample's rejected values; none where it is another sample than the stored one, or has no such value any more.

        A stream that can be read now may turn out to have nothing in a window: that is Missing, and comes in as such.
        """
        fields = self._shard.rejected[sample.id]
        row = self._shard.rows.slice(self._shard.places[sample.id], 1)
        if sample.etag != row["etag"][0].as_py() and not same(self._stored, row, sample, fields):
            return {}
        values = {field: sample.values.get(field) for field in fields}
        if any(value is None for value in values.values()):
            return {}
        return {field: (value, self._checked(field, value)) for field, value in values.items()}

    def _as_it_is(self) -> Result:
        stored = self._shard
        entries = [each for each in (stored.rows_entry, stored.tar, stored.quarantine) if each]
        tried, example = stored.footer["tried"], stored.footer["example"]
        return result(stored.rows_entry.shard, entries, tried, stored.quarantine.rows, example)

    def _remake(self, fetched: Iterator[tuple[Sample, Any]]) -> Result:
        stored, key = self._shard, self._shard.rows_entry.shard
        tar_path = stored.tar.path if stored.tar else None
        with self.storage.scratch() as folder:
            local = folder / "shard.tar"
            with TarWriter(local) as tar, self.storage.open(tar_path) if tar_path else nullcontext() as old:
                rows, rejected, tried = self._write_rows(fetched, old, tar)
            media = artefact.place(self.storage, local, self._stem, tar.sha256) if tar.members or tar_path else None
        quarantine = place_rejected(self.storage, rejected, f"quarantine/shard/{self.corpus['name']}/{key}")
        example = f"{rejected[0]['field']} of {rejected[0]['id']!r}: {rejected[0]['detail']}" if rejected else ""
        footer = stored.footer | {
            "tried": tried_values(rows.select(list(self._stored.fields)).to_pylist()),
            "media": media,
            "quarantine": quarantine,
            "rejected": len(rejected),
            "example": example,
        }
        placed = artefact.place_table(self.storage, rows, self._stem, footer)
        lineage = json.dumps({**stored.rows_entry.info(), "tried": footer["tried"]}, sort_keys=True)
        return self._result(key, placed, footer, lineage)._replace(computed=tried)

    @property
    def _stem(self) -> str:
        return f"{self._folder}/{self._shard.rows_entry.shard}"

    def _write_rows(
        self, fetched: Iterator[tuple[Sample, Any]], old: IO[bytes] | None, tar: TarWriter
    ) -> tuple[pa.Table, list[dict[str, Any]], int]:
        """The shard's rows with what came in, what is still rejected, and how many values were tried; fills the tar."""
        table, fields, tried = self._shard.rows, list(self._stored.fields), 0
        columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in ("id", "etag", *fields)}
        measured: dict[str, list[Any]] = {}
        still = {(row["id"], row["field"]): row for row in _read(self.storage, self._shard.quarantine)}
        new = next(fetched, None)
        for row, sample_id in enumerate(columns["id"]):
            values: dict[str, Any] = {}
            if new is not None and new[0].id == sample_id:
                sample, values = new
                columns["etag"][row] = sample.etag if values else columns["etag"][row]
                tried, new = tried + len(values), next(fetched, None)
            for field in fields:
                if field not in values:
                    columns[field][row] = self._copy(old, sample_id, field, columns[field][row], tar)
                    continue
                value, outcome = values[field]
                member = columns[field][row] = self._member(sample_id, field, value, outcome, tar)
                del still[sample_id, field]
                if isinstance(outcome, DecodeError):
                    still[sample_id, field] = rejection(sample_id, field, "shard", outcome, member["source"])
                for name in sample.about.get(field, ()):
                    measured.setdefault(name, table[name].to_pylist())[row] = sample.columns[name]
        for name, told in measured.items():
            table = table.set_column(table.schema.get_field_index(name), name, kept_column(told))
        for name in ("etag", *fields):
            column = pa.array(columns[name], pa.string() if name == "etag" else MEMBER)
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return table, [still[key] for key in sorted(still)], tried

    def _copy(
        self, old: IO[bytes] | None, sample_id: str, field: str, member: dict[str, Any], tar: TarWriter
    ) -> dict[str, Any]:
        """A value that is not tried, proven, in its new place in the tar."""
        if not member["present"] or member["uri"] is not None:
            return member
        assert old is not None
        header = member_header(sample_id, field, member["ext"], member["size"])
        old.seek(max(0, member["offset"] - len(header)))
        stored = old.read(len(header) + member["size"])
        raw = stored[len(header) :]
        if not stored.startswith(header) or input_digest(raw) != member["digest"]:
            raise AlignmentError(
                f"shard {self._shard.rows_entry.shard}: the {field} of {sample_id!r} is not the value that was stored; run "
                "`braid verify`, and put the tar back from a copy"
            )
        return member | {"offset": tar.add(header, raw)}


def _differs(outcome: Fetch, rejected: dict[str, Any]) -> bool:
    return isinstance(outcome, Fetched) or outcome.reason != rejected["reason"]


def _read(storage: Storage, quarantine: Entry) -> list[dict[str, Any]]:
    table = artefact.read_table(artefact.read_checked(storage, quarantine.path, quarantine.sha256))
    return list(table.to_pylist())


class RetryWork(NamedTuple):
    """What a worker does with the shards of a corpus: ShardTask -> Result."""

    storage: str
    corpus: str
    version: int

    def open(self, threads: int) -> ShardRetrier:
        """The source, and the store at the version."""
        return ShardRetrier(Storage.from_json(self.storage), json.loads(self.corpus), self.version)

    def do(self, retrier: ShardRetrier, task: ShardTask) -> Result:
        """One shard."""
        return retrier.retry(task)


class _RenewIds(beam.DoFn):
    """The Results of one range's shards -> the same; the first brings the range's id index with the etags of now."""

    def __init__(self, storage: str, corpus: str, version: int) -> None:
        self._storage, self._corpus, self._version = storage, corpus, version

    def process(self, element: tuple[int, Iterable[Result]]) -> Iterator[tuple[int, Result]]:
        storage = Storage.from_json(self._storage)
        snapshot = Catalog(storage).snapshot(self._version)
        # A bundle that was done twice has given its Results twice.
        first, *rest = sorted({each.shard: each for each in sorted(element[1], reverse=True)}.values())
        stem, etags = _range(first), dict[int, tuple[list[int], list[int]]]()
        old = snapshot.entries(ROWS, self._corpus)
        for each in (first, *rest):
            (rows,) = (entry for entry in map(Entry._make, json.loads(each.entries)) if entry.kind == ROWS)
            if rows != (before := old.find(each.shard)):
                assert before is not None
                was, now = (read_rows(storage, entry)["etag"].to_pylist() for entry in (before, rows))
                other = [row for row, etag in enumerate(now) if etag != was[row]]
                etags[int(each.shard.rpartition("-")[2])] = other, ids.hashes([now[row] for row in other]).tolist()
        entry = snapshot.entries(IDS, self._corpus).find(f"{stem}-00000")
        assert entry is not None
        if etags:
            entry = ids.place(storage, self._corpus, stem, ids.renewed(ids.read(storage, entry), etags))
        # Named where it is the old one too: it is called after a shard whose entries the commit replaces.
        yield from map(keyed, (with_entries(first, json.dumps([entry])), *rest))


def _range(made: Result) -> str:
    return made.shard.rpartition("-")[0]


def _by_range(element: tuple[int, Result]) -> tuple[int, Result]:
    return hash64(_range(element[1])) >> 1, element[1]


def build(job: Job, storage: Storage, corpus: dict[str, Any], version: int, shards: Iterable[str]) -> None:
    """Puts the job of one corpus into a pipeline: try what is rejected of some shards, then one commit."""
    name, to_workers = corpus["name"], (storage.to_json(), json.dumps(corpus, sort_keys=True), version)
    scopes = [Scope(kind, name, "") for kind in (ROWS, MEDIA, IDS)] + [Scope(QUARANTINE, f"shard/{name}", "")]
    stored = Corpus(Catalog(storage).snapshot(version), name)
    rows, in_flight = (
        sum(stored.shard(key).rows for key in shards),
        InFlight(f"retry {name}", RetryWork(*to_workers), job.workers),
    )
    renew = _RenewIds(storage.to_json(), name, version)
    (
        job.pipeline
        | "Start" >> beam.Create([0])
        | "FindSamples" >> beam.ParDo(_FindSamples(*to_workers)).with_output_types(tuple[int, ShardTask])
        | "Spread" >> beam.GroupByKey()
        | "RetryShards" >> beam.ParDo(in_flight).with_output_types(tuple[int, Result])
        | "ByRange" >> beam.Map(_by_range).with_output_types(tuple[int, Result])
        | "GroupByRange" >> beam.GroupByKey()
        | "RenewIds" >> beam.ParDo(renew).with_output_types(tuple[int, Result])
        | "Commit" >> Commit(storage, f"retry {name}", scopes, corpus["failure_budget"], rows, version)
    )


class ViewRetrier(ShardEncoder):
    """Gives the encoder what it rejected of a view's shards again, and what is new in them."""

    def encode(self, task: EncodeTask) -> Result:
        """The shard with what came in, or as it is; `computed` counts the values that were tried."""
        earlier = self.earlier(task)
        gone = {int(row) for row in self._gone.get(task.shard, ())}
        ids = self._rows(task)["id"].to_pylist()
        again = {row for row, sample_id in enumerate(ids) if sample_id in earlier.rejected} - gone
        with DecodeApart(self.plan.encoder, self.plan.options) as apart:
            careful = copy.copy(self)
            careful._apart = apart
            return self.counted(task, careful.make_from(task, earlier.without(again)))


class RetryViewWork(NamedTuple):
    """What a worker does with the shards of a view: EncodeTask -> Result. Of the `accelerator` see EncodeWork."""

    storage: str
    plan: ViewPlan
    version: int
    accelerator: str | None = None

    def open(self, threads: int) -> ViewRetrier:
        """The encoder, loaded."""
        runtime.check_gpu(f"encode {self.plan.name}", self.accelerator)
        retrier = ViewRetrier(Storage.from_json(self.storage), self.plan, threads, self.version)
        retrier.load()
        return retrier

    def do(self, retrier: ViewRetrier, task: EncodeTask) -> Result:
        """One shard."""
        return retrier.encode(task)


def build_view(
    job: Job,
    storage: Storage,
    plan: ViewPlan,
    tasks: list[EncodeTask],
    budget: float,
    version: int,
    rented: Rented = Rented(),  # noqa: B008
) -> None:
    """Puts the job of one view into a pipeline: encode what is new or was rejected in `tasks`, then one commit."""
    scopes = [Scope(views.VIEW, plan.name, plan.recipe), Scope(QUARANTINE, f"encode/{plan.name}", plan.recipe)]
    work = RetryViewWork(storage.to_json(), plan, version, rented.accelerator)
    rows = sum(task.rows for task in tasks)
    (
        job.pipeline
        | "Tasks" >> beam.Create(list(enumerate(tasks)), reshuffle=False).with_output_types(tuple[int, EncodeTask])
        | "Encode" >> Encode(plan.name, work, job.workers, rented.hints)
        | "Commit" >> Commit(storage, f"encode {plan.name}", scopes, budget, rows, version)
    )
