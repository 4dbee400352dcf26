"""What the steps of a plan take, told from a sample: it is sharded and encoded aside, as the run would do it, and projected.

The sample is of the samples whose ids have the smallest hashes, so the same every time; of a source that is dear to read here
and there (Parquet, tars), of the stretches that begin with some of them. Where few of it have a value for a view it is drawn
anew, larger, and of the other views as many values are encoded as were asked for. Its shards are cut, fetched, written and
encoded by the workers that a run has, with as many threads and batches at once, in a folder that is gone afterwards: what is
told of bytes is of files that were written, what is told of time was measured, the model's loading left out.
"""

import itertools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, ids, training
from featurestore.catalog import Catalog, Entry
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.encoders import BaseEncoder, runtime
from featurestore.errors import InputError
from featurestore.identity import DIGEST_BYTES
from featurestore.storage import Storage
from featurestore.views import VIEW
from jobs import plan
from jobs.report import counted
from jobs.sample import Line, chosen, line_of, parquet, tar
from jobs.sizes import Size, Sizes
from pipelines import encode, encode_plan, fuse, index
from pipelines.cuts import SHARDS_PER_RANGE, Cut
from pipelines.runner import InFlight, Result, Scope, changes
from pipelines.shard import ShardWork
from pipelines.shard_writer import ShardTask, write_plan
from pipelines.sources import Measuring, open_source

__all__ = ["cores", "measured"]

WIDEST = 4
"""So many times as large a sample is drawn where few have a value for a view."""

ROUNDS = 4
"""So many batches go through each thread, or the last ones, behind which threads are idle, would tell too much."""

CARD_BYTES = {"align": 1_800, "index": 500, "fuse": 4_500}
"""Of a build's card, about."""


def measured(todo: Sizes, made: list[Size], count: int) -> tuple[list[Size], list[str]]:
    """The sizes with all that a sample of `count` samples tells, and what else a person should know.

    Raises:
        InputError: none of the sampled windows of recordings has a value for a view.
    """
    with tempfile.TemporaryDirectory(prefix="braid-sample-") as folder:
        trial = _Trial(todo, _storage(todo, f"{folder}/first"), count, count)
        if (rarest := trial.rarest()) < 1 / 2 and len(trial.rows) == count:
            drawn = math.ceil(count / max(rarest, 1 / WIDEST))
            trial = _Trial(todo, _storage(todo, f"{folder}/wider"), count, drawn)
        told = [getattr(trial, size.stage)(size) for size in made]
    return told, trial.remarks


def _storage(todo: Sizes, folder: str) -> Storage:
    return Storage(uri=folder, media_root=todo.spec.store.media_root)


def cores() -> int:
    """That this process may run on, and the run would."""
    return len(os.sched_getaffinity(0))


class _Trial:
    """The sample, sharded; each stage's method gives the Size of a step with what the sample tells of it."""

    def __init__(self, todo: Sizes, storage: Storage, count: int, drawn: int) -> None:
        self.todo, self.spec, self.storage, self._count = todo, todo.spec, storage, count
        self.remarks: list[str] = []
        self._written: dict[str, Line] = {}
        self._shares: dict[str, float] = {}
        corpus = plan.corpus_dict(self.spec)
        # Where a source that measures something keeps it.
        self._corpus = {**corpus, "source": {**corpus["source"], "store": storage.to_json()}}
        self._shard_all(drawn)

    def _shard_all(self, drawn: int) -> None:
        source, name = open_source(self._corpus), self.spec.corpus.name
        references = chosen(source, drawn)
        if isinstance(source, Measuring) and source.measures():
            for each in dict.fromkeys(source.to_measure(sorted(references))):
                source.measure(each)
        cut = Cut(source.order, min(self._corpus["shard_rows"], self._count), self._corpus["shard_mb"] << 20)
        shards = cut.shards(references)
        with self.storage.scratch() as scratch:
            local = scratch / "plan.parquet"
            write_plan(local, shards)
            placed = artefact.place(self.storage, local, f"corpora/{name}/plans/sample")
        tasks = [ShardTask(f"sample-00000-{part:05d}", placed.path, placed.sha256, part) for part in range(len(shards))]
        work = ShardWork(self.storage.to_json(), json.dumps(self._corpus, sort_keys=True))
        writer = work.open(cores())
        # What is done first is slower than what follows.
        writer.write(tasks[0])
        self._shard_s, results = _timed(lambda task: work.do(writer, task), tasks, InFlight.SHARDS_IN_FLIGHT)
        self._results = results
        catalog = Catalog(self.storage)
        catalog.create()
        scopes = [Scope(kind, name, "") for kind in (ROWS, MEDIA)]
        catalog.commit("sample", changes(results, scopes, whole=False))
        self.snapshot = catalog.snapshot()
        opened = Corpus(self.snapshot, name)
        tables = {each.shard: opened.read(each.shard) for each in opened.shards}
        self.rows = pa.concat_tables(tables.values(), promote_options="permissive")
        ends = itertools.accumulate(map(len, tables.values()))
        self._places = {shard: slice(end - len(tables[shard]), end) for shard, end in zip(tables, ends, strict=True)}
        self._parts = {
            part: ([r.id for r in own], ids.hashes([r.etag for r in own])) for part, own in enumerate(shards)
        }

    def rarest(self) -> float:
        """Of the samples, the fewest that have a value for a view that is to be encoded; 1 where there is none."""
        views = [step.name for step in self.todo.steps if step.stage == "encode"]
        return min((float(self._given(view).mean()) for view in views), default=1.0)

    def _entries(self, results: Iterable[Result], kind: str) -> Iterator[Entry]:
        entries = (Entry(*each) for result in results for each in json.loads(result.entries))
        return (entry for entry in entries if entry.kind == kind)

    def _line_of(self, results: list[Result], kind: str, rows: int) -> Line:
        """What the files of a kind take; of what is rejected all is a share of the rows."""
        files = [
            tar(each.bytes)
            if kind == MEDIA
            else (each.bytes, 0)
            if kind == QUARANTINE
            else parquet(self.storage.read(each.path))
            for each in self._entries(results, kind)
        ]
        return line_of(files, rows)

    def shard(self, size: Size) -> Size:
        """Rows, tars and ids; values are read once."""
        rows, sampled = size.rows or 0, len(self.rows)
        shards, ranges = size.shards or 0, -(-(size.shards or 0) // SHARDS_PER_RANGE)
        placed = artefact.place_table(self.storage, ids.table(self._parts), "corpora/ids/sample", {"kind": ids.IDS})
        written = line_of([parquet(self.storage.read(placed.path))], sampled).at(ranges, rows)
        for kind in (ROWS, MEDIA, QUARANTINE):
            written += self._line_of(self._results, kind, sampled).at(shards, rows)
        read = sum(self._bytes(field) for field in self.spec.corpus.fields)
        seconds = self._shard_s * rows / sampled
        tried, rejected = (sum(getattr(each, name) for each in self._results) for name in ("tried", "rejected"))
        self._tell_rejected("corpus.failure_budget", tried, rejected, Counter())
        return self._timed(size, seconds, "cpu")._replace(
            read_bytes=round(read * rows / sampled), written_bytes=written
        )

    def _bytes(self, field: str) -> int:
        return pc.sum(pc.struct_field(self.rows[field], "size")).as_py() or 0

    def _given(self, view: str) -> np.ndarray:
        """Bool [sampled]: whether a sample has a value of any of the view's fields."""
        fields = self.todo.views[view].field.split("+")
        present = [np.asarray(pc.struct_field(self.rows[field], "present")) for field in fields]
        given: np.ndarray = np.logical_or.reduce(present)
        return given

    def encode(self, size: Size) -> Size:
        """A view: encodes values of the sample as often as it takes to keep all threads at work."""
        planned, encoder = self.todo.views[size.name], self.todo.encoders[size.name]
        share = float(self._given(size.name).mean())
        if not share:
            self._refuse_windows(size.name)
            told = f"none of {counted(len(self.rows), 'sample')} has a value of {planned.field}: not measured"
            self.remarks.append(f"views.{size.name}: {told}")
            return size
        tasks, sampled, values = self._enough(size.name, encode_plan.stale(self.snapshot, planned, {}))
        opened = encode.EncodeWork(self.storage.to_json(), planned, self.snapshot.version).open(cores())
        at_once, repeats = self._fill(size, encoder, tasks, values / sampled)
        if not encoder.concurrency:
            # What is done first is slower than what follows; an endpoint is asked, and paid, for each value once.
            opened.make(tasks[0])
        seconds, made = _timed(opened.make, tasks * repeats, at_once)
        results, rows, shards = made[: len(tasks)], size.rows or 0, size.shards or 0
        rejected = sum(result.rejected for result in results)
        self._tell_rejected(f"views.{size.name}", values, rejected, self._reasons(results))
        self._shares[size.name] = share * (1 - rejected / values)
        line = self._written[size.name] = self._line_of(results, VIEW, sampled)
        read = sum(self._bytes(field) for field in planned.field.split("+"))
        device = self._device(size.name, encoder)
        return self._timed(size, seconds / repeats / values * share * rows, device)._replace(
            read_bytes=round(read * rows / len(self.rows)),
            written_bytes=line.at(shards, rows) + self._line_of(results, QUARANTINE, sampled).at(0, rows),
        )

    def _enough(self, view: str, tasks: list[Any]) -> tuple[list[Any], int, int]:
        """Of the sample's shards as many as have the values that were asked for; how many rows and values these have."""
        taken, values, given = [], 0, self._given(view)
        for task in sorted(tasks):
            taken.append(task)
            values += int(given[self._places[task.shard]].sum())
            if values >= self._count:
                break
        return taken, sum(task.rows for task in taken), values

    def _fill(self, size: Size, encoder: BaseEncoder, tasks: list[Any], share: float) -> tuple[int, int]:
        """How many tasks of the sample to do at once, and how often each: for as many batches at once as a run has."""

        def batches(rows: float) -> int:
            return max(1, math.ceil(rows * share / encoder.batch_size))

        shard = (size.rows or 1) / (size.shards or 1)
        busy = min(encoder.concurrency or cores(), InFlight.SHARDS_IN_FLIGHT * batches(shard))
        total = sum(batches(task.rows) for task in tasks)
        at_once = max(InFlight.SHARDS_IN_FLIGHT, math.ceil(busy * len(tasks) / total))
        return at_once, 1 if encoder.concurrency else max(1, math.ceil(ROUNDS * busy / total))

    def _refuse_windows(self, view: str) -> None:
        if self.spec.corpus.source.type != "streams":
            return
        for field in self.todo.views[view].field.split("+"):
            reasons = Counter(pc.struct_field(self.rows[field], "miss_reason").to_pylist())
            told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason)
            raise InputError(
                f"corpus.source.windows: none of {counted(len(self.rows), 'sampled window')} holds a value of {field} ({told}) "
                f"for views.{view}; make windows longer, or widen the field's tolerance"
            )

    def _reasons(self, results: Iterable[Result]) -> Counter[str]:
        tables = [artefact.read_table(self.storage.read(each.path)) for each in self._entries(results, QUARANTINE)]
        return Counter(reason for table in tables for reason in table["reason"].to_pylist())

    def _tell_rejected(self, place: str, tried: int, rejected: int, reasons: Counter[str]) -> None:
        budget = self.spec.corpus.failure_budget
        if rejected > budget * tried:
            told = (
                f" ({', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items()))})" if reasons else ""
            )
            self.remarks.append(
                f"{place}: {rejected} of {tried} sampled values are rejected{told}; the failure budget is {budget:.2%}"
            )

    def _device(self, view: str, encoder: BaseEncoder) -> str:
        """What is paid for by the hour; nothing where an endpoint does the work."""
        wanted = self.spec.views[view].resources.accelerator
        if encoder.concurrency:
            return ""
        if runtime.device() != "cpu":
            return wanted or "gpu"
        if wanted:
            self.remarks.append(
                f"views.{view}: there is no {wanted} here, so its time and its price are those of this machine's cores"
            )
        return "cpu"

    def _timed(self, size: Size, seconds: float, device: str) -> Size:
        hours = seconds * (cores() if device == "cpu" else 1) / 3600 if device else None
        return size._replace(seconds=seconds, device=device, hours=hours)

    def _share(self, view: str) -> float:
        """Of the samples, those that the view has a vector of."""
        return self._shares.get(view, float(self._given(view).mean()))

    def _view_bytes(self, views: Iterable[str]) -> int:
        """What a build reads: the views' files, those to be written and those that are there."""
        total = 0
        for view in views:
            there = pc.sum(self.todo.snapshot.table(VIEW, view, None, ("bytes",))["bytes"]).as_py() or 0
            line = self._written.get(view)
            total += there if line is None else line.at(self.todo.corpus_shards, self.todo.corpus_rows)
        return total

    def _dim(self, space: str) -> tuple[int, int]:
        """Pairs that a space is learned from, and its dimensions: no more than its views have unlike values."""
        views = self.spec.spaces[space].views
        both = np.logical_and.reduce([self._given(view) for view in views])
        unlike = [len({*itertools.compress(self._digests(view), both)}) for view in views]
        scale = self.todo.corpus_rows / len(self.rows)
        return round(scale * both.sum()), self.todo.space_dim(space, round(scale * min(unlike)))

    def _digests(self, view: str) -> list[Any]:
        fields = self.todo.views[view].field.split("+")
        return list(zip(*(pc.struct_field(self.rows[field], "digest").to_pylist() for field in fields), strict=True))

    def align(self, size: Size) -> Size:
        """A space: a mean and a matrix of each of its views."""
        views = self.spec.spaces[size.name].views
        pairs, dim = self._dim(size.name)
        weights = sum(4 * self.todo.encoders[view].dim * (1 + dim) for view in views)
        return size._replace(
            rows=pairs, read_bytes=self._view_bytes(views), written_bytes=weights + CARD_BYTES["align"]
        )

    def index(self, size: Size) -> Size:
        """An index of the vectors that there will be, and the table that says whose they are."""
        chosen, rows = self.spec.indexes[size.name], len(self.rows)
        vectors = {view: round(self.todo.corpus_rows * self._share(view)) for view in chosen.views}
        made, views = self.todo.index(size.name, vectors, self._dim(chosen.space)[1]), chosen.views
        digests = np.random.default_rng(0).bytes(rows * DIGEST_BYTES)
        columns = [
            *([views[0]] * rows, ["0123456789ab-00000-00000"] * rows, range(rows), self.rows["id"].to_pylist()),
            [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)],
        ]
        table = pa.table(
            [pa.array(each, field.type) for each, field in zip(columns, index.ROWS_SCHEMA, strict=True)],
            schema=index.ROWS_SCHEMA,
        )
        placed = artefact.place_table(self.storage, table, "sample", {})
        line = line_of([parquet(self.storage.read(placed.path))], rows)
        return made._replace(
            read_bytes=self._view_bytes(views),
            written_bytes=(made.written_bytes or 0) + line.at(1, made.rows or 0) + CARD_BYTES["index"],
        )

    def fuse(self, size: Size) -> Size:
        """A training set: the sample's rows are written as one of its splits."""
        chosen = self.spec.training_sets[size.name]
        if chosen.label not in self.rows.column_names:  # a column that few samples have, and none of these
            return size
        labels = self.rows[chosen.label].cast(pa.string()).to_pylist()
        kept = np.flatnonzero([label is not None for label in labels])
        if not len(kept):
            return size
        table = self._training_table(chosen.views, kept, labels)
        with self.storage.scratch() as folder:
            paths = training.write_split(table, folder, fuse.TRAIN, len(table))
            lines = [
                line_of(
                    [parquet(path.read_bytes()) if path.suffix == ".parquet" else tar(path.stat().st_size)], len(kept)
                )
                for path in paths
            ]
        rows = round(self.todo.corpus_rows * len(kept) / len(self.rows))
        files = sum(max(1, math.ceil(rows * share / fuse.ROWS_PER_FILE)) for share in chosen.splits.values())
        written = sum(line.at(files, rows) for line in lines) + CARD_BYTES["fuse"]
        return size._replace(rows=rows, read_bytes=self._view_bytes(chosen.views), written_bytes=written)

    def _training_table(self, views: Iterable[str], kept: np.ndarray, labels: list[Any]) -> pa.Table:
        """The sample's rows as a training set has them, with vectors of ones."""
        count, classes = len(kept), len({labels[row] for row in kept})
        embeddings, reasons = {}, {}
        for view in views:
            given = self._given(view)[kept]
            embeddings[view] = np.where(given[:, None], np.ones((1, self.todo.encoders[view].dim), np.float32), np.nan)
            reasons[view] = [None if each else "absent" for each in given]
        scalars = {
            "id": [self.rows["id"][row].as_py() for row in kept],
            "group": [self.rows["group"][row].as_py() for row in kept],
            "label": [labels[row] for row in kept],
            "split": [fuse.TRAIN] * count,
            "fold": np.zeros(count, np.int8),
            "weight": np.ones(count, np.float32),
        }
        predictions = {view: np.zeros((count, classes), np.float32) for view in embeddings}
        return training.training_table(
            scalars, {view: np.asarray(each, np.float32) for view, each in embeddings.items()}, reasons, predictions
        )


def _timed(do: Callable[[Any], Result], tasks: list[Any], at_once: int) -> tuple[float, list[Result]]:
    """Seconds that tasks take, so many at once, and what they give."""
    with ThreadPoolExecutor(at_once) as pool:
        begun = time.monotonic()
        results = list(pool.map(do, tasks))
        return time.monotonic() - begun, results
