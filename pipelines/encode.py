"""Stage 3: turn the values of a field into vectors, one element per shard.

A worker reads a shard's values from its tar, or where its rows refer to, decodes and encodes them in batches, and writes the
view's shard. The unit of parallelism is the batch: each of the process's threads decodes a batch and runs the model on it with
one thread of its own, and two shards are in flight, so that reading and writing overlap with the model and no core waits for a
shard's end. Values outside the store are fetched ahead in threads of their own. An encoder that waits for a network says how
many batches are encoded at once (`concurrency`), whatever the number of cores.

Where the catalog has a view's shard of the same ids that was made from earlier rows (`braid retry-quarantined` remakes shards),
vectors of values that are the same now are copied, and only the others are encoded.

Batches form from the data alone (by size of the raw value, then id; images by row), so the same shard gives the same bytes
on one kind of device, whatever the number of threads and workers. A bad value goes to quarantine without its batch; so does
one outside the store that is `gone` or `changed` since it was sharded, and one whose vector is none: `nan_output`, or
`zero_output` where the encoder says length 1. A batch that does not fit into memory is halved, which may move the last bits of
its vectors: the shard's footer and its catalog row say how often, as `batches_halved`.

A view of several fields has a vector of each sample that has a value of any of them which can be decoded: the encoder is
told which are missing (what it gives its model for those is its own to say), and rejected values are missing too. Where the
model fails on a sample, each of its values is rejected for that.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import IO, Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, encoders, views
from featurestore.catalog import Catalog, Entry
from featurestore.corpora import QUARANTINE, ROWS, member_header, read_rows
from featurestore.encoders import runtime
from featurestore.errors import AlignmentError, DecodeError, NotFound
from featurestore.identity import input_digest, joined_digest
from featurestore.references import read_value
from featurestore.storage import Storage
from featurestore.tombstones import gone_rows
from pipelines.attempts import attempt, forget
from pipelines.decode_apart import DecodeApart, ForwardApart
from pipelines.encode_plan import EncodeTask, ViewPlan, folder
from pipelines.forward import forward
from pipelines.quarantine import rejection
from pipelines.runner import Commit, InFlight, Job, Result, Scope, typed
from pipelines.tally import Busy, Tally
from pipelines.view_writer import Beside, Earlier, ViewWriter, read_earlier, view_table
from pipelines.workers import Work

_FETCH_THREADS = 16
_FETCH_AHEAD_BYTES = 64 << 20
"""Values outside the store are fetched ahead of the model, many at a time, up to so many bytes and at least a batch."""


typed(EncodeTask)


def _beside(task: EncodeTask) -> Beside:
    return Beside(task.shard, task.rows, task.ids_sha256, task.sha256)


class Value(NamedTuple):
    """A value of a sample: its field, and what the corpus says of it."""

    field: str
    offset: int
    size: int
    digest: bytes
    ext: str
    source: str | None
    uri: str | None = None


class Row(NamedTuple):
    """One sample to encode: its row in the shard, and its values in the order of the view's fields, None where it has none."""

    row: int
    id: str
    values: tuple[Value | None, ...]

    def present(self) -> list[Value]:
        """The values that it has."""
        return [value for value in self.values if value is not None]


class Outcome(NamedTuple):
    """What came of a sample: its vector, or None; of each of its values the digest of its bytes, and why it was rejected."""

    vector: np.ndarray | None
    digests: tuple[bytes | None, ...]
    errors: tuple[DecodeError | None, ...]


class ShardEncoder:
    """Encodes shards of one view. Safe to call from several threads: one copy of the model serves them all."""

    def __init__(self, storage: Storage, plan: ViewPlan, threads: int, version: int) -> None:
        self.storage, self.plan = storage, plan
        self._gone = gone_rows(Catalog(storage).snapshot(version), plan.corpus)
        self.encoder = encoders.find(plan.encoder, plan.options)
        fingerprint = self.encoder.fingerprint()
        if views.recipe(plan.field, fingerprint) != plan.recipe:
            raise AlignmentError(
                f"encoder {plan.encoder} of view {plan.name!r} has another fingerprint on this worker ({fingerprint[:16]}…) "
                "than where the job was planned: install the same versions of its libraries and weights on both"
            )
        card = {**self.encoder.card(), "fingerprint": fingerprint}
        about = {"corpus": plan.corpus, "field": plan.field, "encoder": card}
        self._writer = ViewWriter(storage, plan.name, plan.recipe, about)
        self._apart: DecodeApart | None = None
        self._forward_apart: ForwardApart | None = None
        self._turn: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._tally, self._open, self._computing = Tally(), Busy(), Busy()
        self._pool = ThreadPoolExecutor(self.encoder.concurrency or threads)
        self._fetchers = ThreadPoolExecutor(_FETCH_THREADS)
        self._done = storage.list(folder(plan))

    def load(self) -> None:
        """Loads the model and fixes the process's allocator and torch threads."""
        runtime.tune_process()
        self.encoder.load()
        if self.encoder.concurrency is None:
            self._turn = runtime.turns()

    def encode(self, task: EncodeTask) -> Result:
        """The shard's quarantine and view file; one that an earlier run finished is taken as it is.

        Where an earlier attempt was cut off, at it or at one before it in its bundle, values are decoded in another process:
        one that kills it is quarantined as `killed_decoder`, or as `decoder_timeout` where it comes to no end. Where two were,
        so is the model run: a value that kills its forward is quarantined as `killed_encoder`, or as `encoder_timeout`.
        """
        receipt = f"attempts/encode/{self.plan.name}/{self.plan.recipe}/{task.shard}"
        done = self.adopt(task)
        if done is not None:
            forget(self.storage, receipt)
            return self.counted(task, done)
        with attempt(self.storage, receipt) as tried:
            if not tried.cut:
                return self.counted(task, self.make(task))
            careful, who = copy.copy(self), (self.plan.encoder, self.plan.options)
            with (
                DecodeApart(*who) as careful._apart,
                ForwardApart(*who) if tried.cut > 1 else nullcontext() as careful._forward_apart,
            ):
                made = careful.make(task)
                tried.found = any(each.lost for each in (careful._apart, careful._forward_apart) if each)
                return self.counted(task, made)

    def counted(self, task: EncodeTask, made: Result) -> Result:
        """A shard's Result without what was rejected of samples that are gone: nobody reads them, and no failure budget is
        theirs. A file outside the store that changed would else be counted against every later view.
        """
        if task.shard not in self._gone or not made.rejected:
            return made
        (quarantine,) = (entry for entry in map(Entry._make, json.loads(made.entries)) if entry.kind == QUARANTINE)
        ids = self._rows(task)["id"].take(self._gone[task.shard])
        table = artefact.read_table(artefact.read_checked(self.storage, quarantine.path, quarantine.sha256))
        left = table.filter(pc.invert(pc.is_in(table["id"], ids)))
        passed_over = len(table) - len(left)
        return made._replace(tried=made.tried - passed_over, rejected=len(left))

    def adopt(self, task: EncodeTask) -> Result | None:
        """The Result of a shard that an earlier run finished, or None."""
        for path in sorted(key for key in self._done if key.startswith(f"{folder(self.plan)}/{task.shard}-")):
            content = self.storage.read(path)
            sha256 = hashlib.sha256(content).hexdigest()
            if not artefact.is_named_for(path, sha256):
                continue
            footer = artefact.read_footer(content)
            quarantine = [artefact.Placed(*each) for each in footer.get("quarantine", [])]
            held = all(artefact.holds(self.storage, each) for each in quarantine)
            told = footer.get("tried", 0), footer.get("example", ""), footer.get("batches_halved", 0)
            if held and footer == self._writer.footer(_beside(task), quarantine, *told):
                return self._writer.result(_beside(task), artefact.Placed(path, len(content), sha256), footer)
        return None

    def make(self, task: EncodeTask) -> Result:
        """Encodes a shard: all its values, or those that are others than an earlier file was made from."""
        try:
            earlier = self.earlier(task) if task.earlier_path else None
        except AlignmentError:
            earlier = None  # damaged: nothing is copied from it
        return self.make_from(task, earlier)

    def earlier(self, task: EncodeTask) -> Earlier:
        """The file that the task names as made from earlier rows; AlignmentError where it, or its quarantine, is damaged."""
        rejected = (task.rejected_path, task.rejected_sha256) if task.rejected_path else None
        return read_earlier(self.storage, (task.earlier_path, task.earlier_sha256), rejected)

    def make_from(self, task: EncodeTask, earlier: Earlier | None) -> Result:
        """Encodes what an earlier file does not hold. It stays in its place where it has these rows, and none is gained."""
        own = copy.copy(self)
        own._tally = Tally()
        with self._open:
            made = own._make_from(task, earlier)
            return made._replace(spent=own._tally.spent(self._open, self._computing))

    def _make_from(self, task: EncodeTask, earlier: Earlier | None) -> Result:
        with self._tally.timed("waiting"):
            rows = self._rows(task)
        ids, fields = rows["id"].to_pylist(), views.fields_of(self.plan.field)
        members = list(zip(*(rows[field].to_pylist() for field in fields), strict=True))
        given, reasons, inputs = (list(each) for each in zip(*views.inputs(rows, self.plan.field), strict=True))
        matrix = np.full((task.rows, self.encoder.dim), np.nan, np.float32)
        digests: list[bytes | None] = [None] * task.rows
        kept: dict[int, list[dict[str, Any]]] = {}
        if earlier is not None:
            kept = earlier.kept(ids, inputs)
            for row in kept:
                matrix[row], digests[row], reasons[row] = (
                    earlier.matrix[row],
                    earlier.digests[row],
                    earlier.reasons[row],
                )
        todo = [
            Row(row, sample_id, tuple(map(_value, fields, members[row])))
            for row, sample_id in enumerate(ids)
            if given[row] and row not in kept
        ]
        rejected = []
        for (row, sample_id, _), outcome in self._outcomes(task, todo):
            digests[row] = joined_digest(outcome.digests)
            each = list(zip(fields, members[row], outcome.errors, strict=True))
            rejected += [rejection(sample_id, name, "encode", error, m["source"]) for name, m, error in each if error]
            if outcome.vector is None:
                reasons[row] = "+".join(error.reason if error else m["miss_reason"] for _, m, error in each)
            else:
                matrix[row] = outcome.vector
        if earlier and earlier.footer["input_sha256"] == task.sha256 and _same(rejected, earlier, todo):
            made = self._writer.result(_beside(task), earlier.placed, earlier.footer)
        else:
            rejected = [*chain.from_iterable(kept.values()), *rejected]
            tried = sum(m["present"] for m in chain.from_iterable(members))
            halved = self._tally.batches_halved + (earlier.footer.get("batches_halved", 0) if earlier and kept else 0)
            table = view_table(ids, matrix, digests, reasons)
            with self._tally.timed("writing"):
                made = self._writer.write(_beside(task), table, rejected, tried, halved)
        sizes = [value.size for row in todo for value in row.present()]
        return made._replace(computed=len(sizes), read_bytes=sum(sizes))

    def _rows(self, task: EncodeTask) -> pa.Table:
        entry = Entry(ROWS, "", "", task.shard, task.rows_path, task.rows, 0, task.sha256, task.ids_sha256)
        return read_rows(self.storage, entry).select(["id", *views.fields_of(self.plan.field)])

    def _outcomes(self, task: EncodeTask, todo: list[Row]) -> Iterator[tuple[Row, Outcome]]:
        """What came of every sample; the digests are of the bytes that were really read."""
        waiting: deque[tuple[list[Row], int, Future[list[Outcome]]]] = deque()
        ahead = 0
        try:
            for batch in self._batches(todo):
                size = sum(value.size for row in batch for value in row.present() if value.uri is not None)
                while waiting and size and ahead + size > _FETCH_AHEAD_BYTES:
                    first, fetched, outcome = waiting.popleft()
                    yield from self._proven(task, first, outcome.result())
                    ahead -= fetched
                raws = [[self._fetching(value) for value in row.values] for row in batch]
                waiting.append((batch, size, self._pool.submit(self._batch, task.tar_path, batch, raws)))
                ahead += size
            while waiting:
                first, _, outcome = waiting.popleft()
                yield from self._proven(task, first, outcome.result())
        finally:
            # Of a shard that failed no more is begun: the process would not end before, and a remote model is paid for.
            for _, _, outcome in waiting:
                outcome.cancel()

    def _proven(self, task: EncodeTask, batch: list[Row], outcomes: list[Outcome]) -> Iterator[tuple[Row, Outcome]]:
        for row, outcome in zip(batch, outcomes, strict=True):
            for value, digest in zip(row.values, outcome.digests, strict=True):
                if value is not None and digest != value.digest:
                    raise _displaced(task.tar_path, row, value)
            yield row, outcome

    def _fetching(self, value: Value | None) -> Future[bytes | DecodeError] | None:
        return None if value is None or value.uri is None else self._fetchers.submit(self._fetch, value)

    def _fetch(self, value: Value) -> bytes | DecodeError:
        """The bytes that a row refers to; StoreError where they cannot be read now, which another run may mend."""
        assert value.uri is not None
        try:
            return read_value(self.storage, value.uri, value.offset, value.size, value.digest)
        except NotFound:
            return DecodeError("gone", f"{value.source}: it was there when it was sharded")
        except AlignmentError:
            return DecodeError(
                "changed", f"{value.source}: it is not what was sharded; `braid shard` takes it in as it is now"
            )

    def _batches(self, todo: list[Row]) -> list[list[Row]]:
        padded = [place for place, modality in enumerate(self.encoder.reads) if modality != "image"]
        if padded:
            # Texts and sounds are padded to the longest of their batch: like with like wastes least.
            todo = sorted(todo, key=lambda row: (sum(v.size for at in padded if (v := row.values[at])), row.id))
        size = self.encoder.batch_size
        return [todo[start : start + size] for start in range(0, len(todo), size)]

    def _batch(
        self, tar_path: str, batch: list[Row], fetched: list[list[Future[bytes | DecodeError] | None]]
    ) -> list[Outcome]:
        in_tar = any(value.uri is None for row in batch for value in row.present())
        with self.storage.open(tar_path) if in_tar else nullcontext() as tar:
            read = [
                [self._read(tar, tar_path, row, *each) for each in enumerate(futures)]
                for row, futures in zip(batch, fetched, strict=True)
            ]
        parts = [[None if isinstance(part, DecodeError) else part for part, _ in each] for each in read]
        good = [place for place, each in enumerate(parts) if any(part is not None for part in each)]
        made = self._forward([self.encoder.joined(parts[place]) for place in good])
        vectors = dict(zip(good, made, strict=True))
        return [_outcome(each, vectors.get(place)) for place, each in enumerate(read)]

    def _read(
        self, tar: IO[bytes] | None, tar_path: str, row: Row, place: int, future: Future[bytes | DecodeError] | None
    ) -> tuple[Any, bytes | None]:
        """A value decoded, or why it cannot be, and the digest of its bytes; two of None where the sample has none."""
        value = row.values[place]
        if value is None:
            return None, None
        with self._tally.timed("waiting"):
            raw = self._member(tar, tar_path, row, value) if future is None else future.result()
        return (raw, value.digest) if isinstance(raw, DecodeError) else (self._decode(raw, place), input_digest(raw))

    def _member(self, tar: IO[bytes] | None, tar_path: str, row: Row, value: Value) -> bytes:
        assert tar is not None
        header = member_header(row.id, value.field, value.ext, value.size)
        tar.seek(max(0, value.offset - len(header)))
        stored = tar.read(len(header) + value.size)
        if not stored.startswith(header):
            raise _displaced(tar_path, row, value)
        return stored[len(header) :]

    def _decode(self, raw: bytes, place: int) -> Any:
        try:
            with self._tally.timed("decoding"):
                return (self.encoder.decode_field if self._apart is None else self._apart)(raw, place)
        except DecodeError as error:
            return error

    def _forward(self, values: list[Any]) -> list[np.ndarray | DecodeError]:
        with self._turn(), self._computing, self._tally.timed("model"):
            made = forward(self.encoder, values) if self._forward_apart is None else self._forward_apart(values)
        self._tally.halved(made.batches_halved)
        return made.vectors


def _value(field: str, member: Mapping[str, Any]) -> Value | None:
    columns = (member[name] for name in ("offset", "size", "digest", "ext", "source", "uri"))
    return Value(field, *columns) if member["present"] else None


def _outcome(read: list[tuple[Any, bytes | None]], vector: np.ndarray | DecodeError | None) -> Outcome:
    """Of what was read of a sample, and of what its forward gave, where there was one."""
    failed = vector if isinstance(vector, DecodeError) else None
    errors = (part if isinstance(part, DecodeError) else None if part is None else failed for part, _ in read)
    return Outcome(None if isinstance(vector, DecodeError) else vector, tuple(each for _, each in read), tuple(errors))


def _same(rejected: list[dict[str, Any]], earlier: Earlier, todo: list[Row]) -> bool:
    """Whether of some samples the same was rejected as before."""
    before = chain.from_iterable(earlier.rejected.get(row.id, ()) for row in todo)
    return {(each["id"], each["field"]) for each in rejected} == {(each["id"], each["field"]) for each in before}


def _displaced(tar_path: str, row: Row, value: Value) -> AlignmentError:
    return AlignmentError(
        f"{tar_path}: the {value.field} of {row.id!r} (row {row.row} of its shard) is not the value that was "
        "stored; run `braid verify`, and put the file back from a copy"
    )


class Rented(NamedTuple):
    """What an encode job's workers are, where its runner rents them: the GPU that is paid for, and Beam's resource hints."""

    accelerator: str | None = None
    hints: Mapping[str, str] | None = None


class EncodeWork(NamedTuple):
    """What a worker of the encode stage does: EncodeTask -> Result. With an `accelerator` it does so on a GPU or not at all."""

    storage: str
    plan: ViewPlan
    version: int
    accelerator: str | None = None

    def open(self, threads: int) -> ShardEncoder:
        """The encoder, loaded: one copy of the model a process."""
        runtime.check_gpu(f"encode {self.plan.name}", self.accelerator)
        encoder = ShardEncoder(Storage.from_json(self.storage), self.plan, threads, self.version)
        encoder.load()
        return encoder

    def do(self, encoder: ShardEncoder, task: EncodeTask) -> Result:
        """One shard."""
        return encoder.encode(task)


class Encode(beam.PTransform):
    """PCollection of (number, EncodeTask) -> PCollection of keyed Results."""

    def __init__(self, view: str, work: Work, processes: int = 1, hints: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._hints = hints or {}
        self._do_fn = InFlight(f"encode {view}", work, processes)

    def expand(self, tasks: beam.PCollection) -> beam.PCollection:
        """PCollection of (number, EncodeTask) -> PCollection of keyed Results."""
        encode = beam.ParDo(self._do_fn).with_output_types(tuple[int, Result]).with_resource_hints(**self._hints)
        return tasks | "Spread" >> beam.GroupByKey() | "EncodeShards" >> encode


def build(
    job: Job,
    storage: Storage,
    plan: ViewPlan,
    tasks: list[EncodeTask],
    budget: float,
    version: int,
    rented: Rented = Rented(),  # noqa: B008
) -> None:
    """Puts the encode job of one view into a pipeline: every stale shard of the store's version, then one commit."""
    scopes = [Scope(views.VIEW, plan.name, plan.recipe), Scope(QUARANTINE, f"encode/{plan.name}", plan.recipe)]
    work = EncodeWork(storage.to_json(), plan, version, rented.accelerator)
    (
        job.pipeline
        | "Tasks" >> beam.Create(list(enumerate(tasks)), reshuffle=False).with_output_types(tuple[int, EncodeTask])
        | "Encode" >> Encode(plan.name, work, job.workers, rented.hints)
        | "Commit" >> Commit(storage, f"encode {plan.name}", scopes, budget, sum(task.rows for task in tasks))
    )
