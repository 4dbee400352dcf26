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
`zero_output` where the encoder says length 1.
"""

import copy
import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Semaphore
from typing import IO, Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, encoders, views
from featurestore.catalog import Entry, Snapshot, lost
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus, member_header, read_rows
from featurestore.errors import AlignmentError, DecodeError, NotFound
from featurestore.identity import input_digest
from featurestore.references import read_value
from featurestore.storage import Storage
from pipelines.attempts import attempt, forget
from pipelines.decode_apart import DecodeApart, ForwardApart
from pipelines.forward import forward
from pipelines.quarantine import rejection
from pipelines.runner import Commit, InFlight, Job, Result, Scope, typed
from pipelines.view_writer import Beside, Earlier, ViewWriter, read_earlier, view_table
from pipelines.workers import Work

_ON_GPU = 2
"""Batches on a GPU at once: one computes while the other is copied there; more would only hold its memory."""

_FETCH_THREADS = 16
_FETCH_AHEAD_BYTES = 64 << 20
"""Values outside the store are fetched ahead of the model, many at a time, up to so many bytes and at least a batch."""


class ViewPlan(NamedTuple):
    """What every shard of a view is made with."""

    name: str
    corpus: str
    field: str
    encoder: str
    options: dict[str, Any]
    recipe: str


def view_plan(name: str, corpus: str, field: str, encoder: str, options: dict[str, Any], modality: str) -> ViewPlan:
    """Completes a view of the spec, on a field of a modality, with its recipe: hashes the weights, loads nothing."""
    made = encoders.find_for(encoder, options, modality)
    given = made.options.model_dump(mode="json", exclude_unset=True)
    return ViewPlan(name, corpus, field, encoder, given, views.recipe(field, made.fingerprint()))


@typed
class EncodeTask(NamedTuple):
    """A descriptor of one shard to encode: where its rows and its tar (empty where it has none) are.

    `earlier_path` is the view's file of the same recipe, shard and ids that the catalog has, `rejected_path` that one's
    quarantine; empty where there is none.
    """

    shard: str
    rows_path: str
    rows: int
    sha256: str
    ids_sha256: str
    tar_path: str
    tar_sha256: str
    earlier_path: str = ""
    earlier_sha256: str = ""
    rejected_path: str = ""
    rejected_sha256: str = ""


def stale(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int]) -> list[EncodeTask]:
    """The shards of the corpus that the view lacks, or of which a file (its quarantine too) is gone or has another size.

    The largest tar comes first, of those without one that with most rows: a large shard that begins last is waited for alone.

    Args:
        snapshot: the catalog.
        plan: the view.
        listing: key -> bytes of what lies in the view's folders, as `listed` gives it.
    """
    have, rows = _have(snapshot, plan, listing), _rows_of(snapshot, plan)
    return _tasks(snapshot, plan, have, rows.filter(_is_stale(have, rows)))


def remakes(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int], shards: Collection[str]) -> list[EncodeTask]:
    """As `stale`, of the shards that the view has: those made from earlier rows, and some more that are to be made again."""
    have, rows = _have(snapshot, plan, listing), _rows_of(snapshot, plan)
    again = pc.or_(_is_stale(have, rows), pc.is_in(rows["shard"], pa.array(shards, pa.string())))
    return [task for task in _tasks(snapshot, plan, have, rows.filter(again)) if task.earlier_path]


def _tasks(snapshot: Snapshot, plan: ViewPlan, have: pa.Table, todo: pa.Table) -> list[EncodeTask]:
    corpus = Corpus(snapshot, plan.corpus)
    tars = snapshot.table(MEDIA, plan.corpus, None, ("shard", "path", "sha256", "bytes"))
    tars = tars.take(pc.index_in(todo["shard"], tars["shard"]))
    for shard in todo["shard"].filter(pc.and_(pc.is_null(tars["shard"]), pc.not_equal(todo["input_sha256"], ""))):
        corpus.media(shard.as_py())
    sizes = pa.table({"bytes": pc.fill_null(tars["bytes"], 0), "rows": todo["rows"]})
    order = pc.sort_indices(sizes, [("bytes", "descending"), ("rows", "descending")])
    earlier = have.take(pc.index_in(todo["shard"], have["shard"]))
    copied = pc.fill_null(pc.equal(earlier["ids_sha256"], todo["ids_sha256"]), False)
    rejected = snapshot.table(QUARANTINE, f"encode/{plan.name}", plan.recipe, ("shard", "path", "sha256"))
    rejected = rejected.take(pc.index_in(todo["shard"], rejected["shard"]))
    files = [tars[name] for name in ("path", "sha256")]
    files += [pc.if_else(copied, each[name], "") for each in (earlier, rejected) for name in ("path", "sha256")]
    todo = todo.drop_columns(["input_sha256"])
    columns = [column.take(order) for column in (*todo.columns, *(pc.fill_null(each, "") for each in files))]
    return [EncodeTask(*task) for task in zip(*(column.to_pylist() for column in columns), strict=True)]


def _rows_of(snapshot: Snapshot, plan: ViewPlan) -> pa.Table:
    columns = ("shard", "path", "rows", "sha256", "ids_sha256", "input_sha256")
    return snapshot.table(ROWS, plan.corpus, None, columns)


def _have(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int]) -> pa.Table:
    """The view's shards of which no file (its quarantine too) is lost: by columns, as there may be a million."""
    scopes = ((views.VIEW, plan.name, plan.recipe), (QUARANTINE, f"encode/{plan.name}", plan.recipe))
    gone = [lost(snapshot.table(*scope, ("shard", "path", "bytes")), listing)["shard"] for scope in scopes]
    have = snapshot.table(*scopes[0], ("shard", "path", "sha256", "ids_sha256", "input_sha256"))
    for shards in gone:
        have = have.filter(pc.invert(pc.is_in(have["shard"], shards)))
    return have


def _is_stale(have: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Bool [shards of the corpus]: whether the view has no file made from these bytes."""
    made_from = have["input_sha256"].take(pc.index_in(rows["shard"], have["shard"]))
    return pc.invert(pc.fill_null(pc.equal(made_from, rows["sha256"]), False))


def folder(plan: ViewPlan) -> str:
    """Where the view's shards are."""
    return f"views/{plan.name}/{plan.recipe}"


def listed(storage: Storage, plan: ViewPlan) -> dict[str, int]:
    """Key -> bytes of every file that the view's recipe has, one listing for each of its two folders."""
    return storage.list(folder(plan)) | storage.list(f"quarantine/encode/{plan.name}/{plan.recipe}")


def _beside(task: EncodeTask) -> Beside:
    return Beside(task.shard, task.rows, task.ids_sha256, task.sha256)


class Row(NamedTuple):
    """One value to encode: its row in the shard, and what the corpus says of it."""

    row: int
    id: str
    offset: int
    size: int
    digest: bytes
    ext: str
    source: str | None
    uri: str | None = None


class ShardEncoder:
    """Encodes shards of one view. Safe to call from several threads: one copy of the model serves them all."""

    def __init__(self, storage: Storage, plan: ViewPlan, threads: int) -> None:
        self.storage, self.plan = storage, plan
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
        self._turn: AbstractContextManager[Any] = nullcontext()
        self._pool = ThreadPoolExecutor(self.encoder.concurrency or threads)
        self._fetchers = ThreadPoolExecutor(_FETCH_THREADS)
        self._done = storage.list(folder(plan))

    def load(self) -> None:
        """Loads the model and fixes the process's allocator and torch threads."""
        from featurestore.encoders import runtime

        runtime.tune_process()
        if runtime.device() == "cuda":
            self._turn = Semaphore(_ON_GPU)
        self.encoder.load()

    def encode(self, task: EncodeTask) -> Result:
        """The shard's quarantine and view file; one that an earlier run finished is taken as it is.

        Where an earlier attempt was cut off, values are decoded in another process: one that kills it is quarantined as
        `killed_decoder`, or as `decoder_timeout` where it comes to no end. Where two were, so is the model run: a value that
        kills its forward is quarantined as `killed_encoder`, or as `encoder_timeout`.
        """
        receipt = f"attempts/encode/{self.plan.name}/{self.plan.recipe}/{task.shard}"
        done = self.adopt(task)
        if done is not None:
            forget(self.storage, receipt)
            return done
        with attempt(self.storage, receipt) as cut:
            if not cut:
                return self.make(task)
            careful, who = copy.copy(self), (self.plan.encoder, self.plan.options)
            with (
                DecodeApart(*who) as careful._apart,
                ForwardApart(*who) if cut > 1 else nullcontext() as careful._forward_apart,
            ):
                return careful.make(task)

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
            told = footer.get("tried", 0), footer.get("example", "")
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
        rows = self._rows(task)
        field = rows[self.plan.field].to_pylist()
        ids = rows["id"].to_pylist()
        matrix = np.full((task.rows, self.encoder.dim), np.nan, np.float32)
        digests: list[bytes | None] = [None] * task.rows
        reasons: list[str | None] = [None if m["present"] else m["miss_reason"] for m in field]
        kept: dict[int, dict[str, Any] | None] = {}
        if earlier is not None:
            kept = earlier.kept(ids, [m["digest"] for m in field])
            for row in kept:
                matrix[row], digests[row], reasons[row] = (
                    earlier.matrix[row],
                    earlier.digests[row],
                    earlier.reasons[row],
                )
        todo = [
            Row(row, sample_id, m["offset"], m["size"], m["digest"], m["ext"], m["source"], m["uri"])
            for row, (sample_id, m) in enumerate(zip(ids, field, strict=True))
            if m["present"] and row not in kept
        ]
        rejected = []
        for value, vector, digest in self._values(task, todo):
            digests[value.row] = digest
            if isinstance(vector, DecodeError):
                reasons[value.row] = vector.reason
                rejected.append(rejection(value.id, self.plan.field, "encode", vector, value.source))
            else:
                matrix[value.row] = vector
        if earlier and earlier.footer["input_sha256"] == task.sha256 and len(rejected) == len(todo):
            made = self._writer.result(_beside(task), earlier.placed, earlier.footer)
        else:
            rejected = [*filter(None, kept.values()), *rejected]
            tried = sum(m["present"] for m in field)
            made = self._writer.write(_beside(task), view_table(ids, matrix, digests, reasons), rejected, tried)
        return made._replace(computed=len(todo), read_bytes=sum(value.size for value in todo))

    def _rows(self, task: EncodeTask) -> pa.Table:
        entry = Entry(ROWS, "", "", task.shard, task.rows_path, task.rows, 0, task.sha256, task.ids_sha256)
        return read_rows(self.storage, entry).select(["id", self.plan.field])

    def _values(self, task: EncodeTask, todo: list[Row]) -> Iterator[tuple[Row, np.ndarray | DecodeError, bytes]]:
        """Every value with its vector, or with why it has none, and the digest of the bytes that were really read."""
        waiting: deque[tuple[list[Row], int, Future[list[tuple[np.ndarray | DecodeError, bytes]]]]] = deque()
        ahead = 0
        try:
            for batch in self._batches(todo):
                size = sum(value.size for value in batch if value.uri is not None)
                while waiting and size and ahead + size > _FETCH_AHEAD_BYTES:
                    first, fetched, outcome = waiting.popleft()
                    yield from self._proven(task, first, outcome.result())
                    ahead -= fetched
                raws = [None if value.uri is None else self._fetchers.submit(self._fetch, value) for value in batch]
                waiting.append((batch, size, self._pool.submit(self._batch, task.tar_path, batch, raws)))
                ahead += size
            while waiting:
                first, _, outcome = waiting.popleft()
                yield from self._proven(task, first, outcome.result())
        finally:
            # Of a shard that failed no more is begun: the process would not end before, and a remote model is paid for.
            for _, _, outcome in waiting:
                outcome.cancel()

    def _proven(
        self, task: EncodeTask, batch: list[Row], outcomes: list[tuple[np.ndarray | DecodeError, bytes]]
    ) -> Iterator[tuple[Row, np.ndarray | DecodeError, bytes]]:
        for value, (vector, digest) in zip(batch, outcomes, strict=True):
            if digest != value.digest:
                raise self._displaced(task.tar_path, value)
            yield value, vector, digest

    def _fetch(self, value: Row) -> bytes | DecodeError:
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

    def _displaced(self, tar_path: str, value: Row) -> AlignmentError:
        return AlignmentError(
            f"{tar_path}: the {self.plan.field} of {value.id!r} (row {value.row} of its shard) is not the value that was "
            "stored; run `braid verify`, and put the file back from a copy"
        )

    def _batches(self, todo: list[Row]) -> list[list[Row]]:
        if self.encoder.modality != "image":
            # Texts and sounds are padded to the longest of their batch: like with like wastes least.
            todo = sorted(todo, key=lambda value: (value.size, value.id))
        size = self.encoder.batch_size
        return [todo[start : start + size] for start in range(0, len(todo), size)]

    def _batch(
        self, tar_path: str, batch: list[Row], fetched: list[Future[bytes | DecodeError] | None]
    ) -> list[tuple[np.ndarray | DecodeError, bytes]]:
        outcomes: list[tuple[Any, bytes]] = []
        with self.storage.open(tar_path) if None in fetched else nullcontext() as tar:
            for value, future in zip(batch, fetched, strict=True):
                raw = self._member(tar, tar_path, value) if future is None else future.result()
                if isinstance(raw, DecodeError):
                    outcomes.append((raw, value.digest))
                else:
                    outcomes.append((self._decode(raw), input_digest(raw)))
        good = [position for position, (decoded, _) in enumerate(outcomes) if not isinstance(decoded, DecodeError)]
        for position, vector in zip(good, self._forward([outcomes[each][0] for each in good]), strict=True):
            outcomes[position] = (vector, outcomes[position][1])
        return outcomes

    def _member(self, tar: IO[bytes] | None, tar_path: str, value: Row) -> bytes:
        assert tar is not None
        header = member_header(value.id, self.plan.field, value.ext, value.size)
        tar.seek(max(0, value.offset - len(header)))
        stored = tar.read(len(header) + value.size)
        if not stored.startswith(header):
            raise self._displaced(tar_path, value)
        return stored[len(header) :]

    def _decode(self, raw: bytes) -> Any:
        try:
            return self.encoder.decode(raw) if self._apart is None else self._apart(raw)
        except DecodeError as error:
            return error

    def _forward(self, values: list[Any]) -> list[np.ndarray | DecodeError]:
        with self._turn:
            return forward(self.encoder, values) if self._forward_apart is None else self._forward_apart(values)


class EncodeWork(NamedTuple):
    """What a worker of the encode stage does: EncodeTask -> Result."""

    storage: str
    plan: ViewPlan

    def open(self, threads: int) -> ShardEncoder:
        """The encoder, loaded: one copy of the model a process."""
        encoder = ShardEncoder(Storage.from_json(self.storage), self.plan, threads)
        encoder.load()
        return encoder

    def do(self, encoder: ShardEncoder, task: EncodeTask) -> Result:
        """One shard."""
        return encoder.encode(task)


class Encode(beam.PTransform):
    """PCollection of (number, EncodeTask) -> PCollection of keyed Results."""

    def __init__(
        self,
        storage: Storage,
        plan: ViewPlan,
        processes: int = 1,
        hints: Mapping[str, str] | None = None,
        work: Work | None = None,
    ) -> None:
        super().__init__()
        self._hints = hints or {}
        self._do_fn = InFlight(f"encode {plan.name}", work or EncodeWork(storage.to_json(), plan), processes)

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
    hints: Mapping[str, str] | None = None,
) -> None:
    """Puts the encode job of one view into a pipeline: every stale shard, then one commit; hints are of the encode step."""
    scopes = [Scope(views.VIEW, plan.name, plan.recipe), Scope(QUARANTINE, f"encode/{plan.name}", plan.recipe)]
    (
        job.pipeline
        | "Tasks" >> beam.Create(list(enumerate(tasks)), reshuffle=False).with_output_types(tuple[int, EncodeTask])
        | "Encode" >> Encode(storage, plan, job.workers, hints)
        | "Commit" >> Commit(storage, f"encode {plan.name}", scopes, budget, sum(task.rows for task in tasks))
    )
