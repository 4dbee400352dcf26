"""Carrying out a spec: every step that is not fresh, each its own Beam job that ends in one commit.

Any step that was cut off is gone on with by running the spec again: what lies finished in the store is taken up.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from featurestore.catalog import Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS
from featurestore.errors import InputError
from featurestore.ids import IDS
from featurestore.storage import Storage
from featurestore.views import VIEW
from jobs import forecast, plan
from jobs.progress import track
from jobs.sizes import settings_key
from jobs.spec import Spec
from pipelines import align, build_job, dataflow, encode, encode_plan, fuse, index, log, shard
from pipelines.ingest import Known
from pipelines.runner import Job, checked

_MAKERS = {"align": align.make, "index": index.make, "fuse": fuse.make}


class Done(NamedTuple):
    """A step that was carried out, and what it took; None where a figure is not of its stage or the runner does not tell it.

    From the catalog: `shards` that it published, and values of them that were `rejected`. From Beam: `values` computed now
    (those of shards taken up from an earlier run left out), `span_s` from its first shard's start to its last one's end (a
    model's loading left out), `shard_s` that its shards took, summed, and `longest_s` of them. Of encode, summed over workers:
    `worker_s` that they had shards to do, and `values_per_worker_s` in these; over their threads, `waiting_s` for data,
    `decoding_s`, `model_s` and `writing_s`; and `stall`, the share of `worker_s` in which the model, or its GPU, had no batch.
    `read_bytes` are of raw values, from Beam, or of the views that a build was made from; `written_bytes` are those of the
    files that it published. `predicted` is what `braid plan --sample` said of it.
    """

    stage: str
    name: str
    seconds: float
    values: int | None = None
    span_s: float | None = None
    shards: int | None = None
    rejected: int | None = None
    shard_s: float | None = None
    longest_s: float | None = None
    worker_s: float | None = None
    values_per_worker_s: float | None = None
    waiting_s: float | None = None
    decoding_s: float | None = None
    model_s: float | None = None
    writing_s: float | None = None
    stall: float | None = None
    rows: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    predicted: dict[str, Any] | None = None

    def measured(self) -> dict[str, Any]:
        """The figures, without those that are not known."""
        told = self._asdict()
        return {
            name: told[name] for name in told if name not in ("stage", "name", "predicted") and told[name] is not None
        }


class Work(NamedTuple):
    """How much a job has to do, in samples, how much of it is done now (where that can be told before its end), whether a shard
    is one of its own, and what it is of, as a forecast says it.
    """

    total: int
    done: Callable[[], int] | None
    own: Callable[[str], bool]
    key: str = ""


class Runner:
    """Runs stages of one spec, on `workers` processes of this machine or on the runner that Beam's options name."""

    def __init__(self, spec: Spec, console: Console, beam_args: Sequence[str] = (), workers: int = 1) -> None:
        self.spec, self.console, self.beam_args, self.workers = spec, console, beam_args, workers
        self.storage: Storage = spec.store
        self.done: list[Done] = []

    def run(self, stages: Sequence[str] = plan.STAGES, only: str | None = None) -> list[Done]:
        """Runs what is not fresh of some stages (of one named view, space, index or set where `only` says so).

        Raises:
            InputError: Beam's options are wrong, whether there is anything to run or not.
        """
        checked(self._args("shard", self.spec.corpus.name), self.workers)
        self.storage.clean_scratch()
        for stage in stages:
            if stage == "shard":
                self._shard()
            elif stage == "encode":
                self._encode(only)
            else:
                self._build(stage, only)
        if not self.done:
            self.console.print("Everything is fresh: nothing was computed.")
        return self.done

    def _snapshot(self) -> Snapshot:
        return plan.open_catalog(self.storage)

    def _args(self, stage: str, name: str, shards: int = 1) -> list[str]:
        resources = self._resources(name) if stage == "encode" else dataflow.Resources()
        # Every image holds all of Braid: one view's serves where none is named.
        images = [view.resources.image for view in self.spec.views.values() if view.resources.image]
        return dataflow.job_args(
            self.beam_args, stage, name, self.storage, resources, shards, spare_image=next(iter(images), None)
        )

    def _job(self, stage: str, name: str, shards: int = 1) -> Job:
        args = self._args(stage, name, shards)
        if self.done and dataflow.template(args):
            raise InputError(
                f"--template_location holds one job, which is {self.done[0].stage} {self.done[0].name} now; {stage} {name} is "
                "to do too: name one stage and one view, space, index or set"
            )
        return Job(args, self.workers)

    def _resources(self, view: str) -> dataflow.Resources:
        return dataflow.Resources(**self.spec.views[view].resources.model_dump())

    def _carry_out(self, job: Job, stage: str, name: str, begun: float, work: Work | None = None) -> None:
        told = f"{stage} {name}"
        log.event(told, "job begin")
        total, done = (work.total, work.done) if work else (None, None)
        try:
            with track(self.console, told, total, done):
                outcome = job.run()
        except BaseException:
            log.event(told, "job failed", seconds=time.monotonic() - begun, level=logging.ERROR)
            raise
        step = Done(stage, name, time.monotonic() - begun)
        if getattr(outcome, "has_job", True):  # else a template was written: nothing ran
            step = self._measured(step, outcome, work)
        log.event(told, "job end", values=step.values, rejected=step.rejected, seconds=step.seconds)
        self.done.append(step)

    def _measured(self, step: Done, outcome: Any, work: Work | None) -> Done:
        """With what it took, beside what was predicted of it."""
        if work:
            step, key = (
                step._replace(**self._published(step.stage, step.name, work), **_beam_metrics(outcome)),
                work.key,
            )
        else:
            settings = plan.build_settings(self.spec, step.stage)[step.name]
            step, key = step._replace(**self._built(step.stage, step.name, settings)), settings_key(settings)
        return step._replace(predicted=forecast.keep(self.storage, step.stage, step.name, key, step.measured()))

    def _published(self, stage: str, name: str, work: Work) -> dict[str, Any]:
        """What the catalog says of a job's own shards: right on every runner."""
        snapshot = self._snapshot()
        kinds, scope = ((VIEW,), "encode") if stage == "encode" else ((ROWS, MEDIA, IDS), "shard")
        columns = ("shard", "rows", "bytes")
        made, *others, bad = (
            [each for each in snapshot.table(*of, None, columns).to_pylist() if work.own(each["shard"])]
            for of in (*((kind, name) for kind in kinds), (QUARANTINE, f"{scope}/{name}"))
        )
        return {
            "shards": len(made),
            "rows": sum(each["rows"] for each in made),
            "rejected": sum(each["rows"] for each in bad),
            "written_bytes": sum(each["bytes"] for files in (made, *others, bad) for each in files),
        }

    def _built(self, stage: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What the catalog says of a build, and of the views that it was made from."""
        snapshot = self._snapshot()
        files = snapshot.table(plan.BUILD_STAGES[stage], name, None, ("bytes",))
        views = [snapshot.table(VIEW, view, None, ("bytes",))["bytes"] for view in settings["views"]]
        read, written = (pc.sum(each).as_py() or 0 for each in (pa.chunked_array(views, pa.int64()), files["bytes"]))
        return {"read_bytes": read, "written_bytes": written}

    def _shard(self) -> None:
        snapshot = self._snapshot()
        known = Known(snapshot, self.spec.corpus.name)
        found, corpus = plan.ingest(self.spec, snapshot, known), plan.corpus_dict(self.spec)
        for remark in found.remarks:
            log.event(f"shard {corpus['name']}", "source read", detail=remark)
            self.console.print(remark, markup=False)
        if not found.samples + found.gone + found.touched:
            return
        for path in self.spec.corpus.source.path:
            dataflow.check_source(self.beam_args, path)
        job, begun, folder = self._job("shard", corpus["name"]), time.monotonic(), f"corpora/{corpus['name']}"
        renewed = shard.renew(self.storage, corpus["name"], known)
        shard.build(job, self.storage, corpus, found, snapshot.version, renewed)

        def done() -> int:
            names = [key for key in self.storage.list(folder) if key.startswith(f"{folder}/{found.key}-")]
            written = sum(key.endswith(".parquet") for key in names)
            return min(found.samples, written * int(corpus["shard_rows"]))

        work = Work(found.samples, done, lambda key: key.startswith(f"{found.key}-"), found.key)
        self._carry_out(job, "shard", corpus["name"], begun, work)

    def _encode(self, only: str | None) -> None:
        for planned in plan.view_plans(self.spec):
            if only not in (None, planned.name):
                continue
            snapshot = self._snapshot()
            tasks = encode_plan.stale(snapshot, planned, encode_plan.listed(self.storage, planned))
            if tasks:
                self._encode_view(planned, tasks, snapshot.version)

    def _encode_view(self, planned: encode_plan.ViewPlan, tasks: list[encode_plan.EncodeTask], version: int) -> None:
        job, begun, rows = (
            self._job("encode", planned.name, len(tasks)),
            time.monotonic(),
            {task.shard: task.rows for task in tasks},
        )
        hints = dataflow.hints(self.beam_args, self._resources(planned.name))
        encode.build(job, self.storage, planned, tasks, self.spec.corpus.failure_budget, version, hints)

        def done() -> int:
            stems = {
                key.rpartition("/")[2].rpartition("-")[0] for key in self.storage.list(encode_plan.folder(planned))
            }
            return sum(count for shard_key, count in rows.items() if shard_key in stems)

        work = Work(sum(rows.values()), done, rows.__contains__, planned.recipe)
        self._carry_out(job, "encode", planned.name, begun, work)

    def _build(self, stage: str, only: str | None) -> None:
        for name, settings in plan.build_settings(self.spec, stage).items():
            snapshot = self._snapshot()
            planned = plan.planned_build(snapshot, stage, name, settings) if only in (None, name) else None
            if planned is None:
                continue
            job, begun = self._job(stage, name), time.monotonic()
            build_job.build(job, stage, _MAKERS[stage], self.storage, planned, snapshot.version)
            self._carry_out(job, stage, name, begun)


def _beam_metrics(outcome: Any) -> dict[str, Any]:
    """What Beam counted of a job's shards; nothing where the runner carries no metrics back."""
    found = outcome.metrics().query()
    counts: Counter[str] = Counter()
    for each in found["counters"]:
        counts[each.key.metric.name] += each.committed
    spans = [each.committed for each in found["distributions"] if each.key.metric.name == "span_ms"]
    took = [each.committed for each in found["distributions"] if each.key.metric.name == "shard_ms"]
    if not spans or not took:
        return {}
    return {
        "values": counts["values"],
        "read_bytes": counts["read_bytes"],
        "span_s": (max(span.max for span in spans) - min(span.min for span in spans)) / 1000,
        "shard_s": sum(each.sum for each in took) / 1000,
        "longest_s": max(each.max for each in took) / 1000,
        **_spent(counts),
    }


def _spent(counts: Mapping[str, int]) -> dict[str, float]:
    """Of a stage whose workers tell what their time went to."""
    worker_ms = counts.get("open_ms", 0)
    if not worker_ms:
        return {}
    return {
        "worker_s": worker_ms / 1000,
        "values_per_worker_s": 1000 * counts["values"] / worker_ms,
        **{f"{step}_s": counts[f"{step}_ms"] / 1000 for step in ("waiting", "decoding", "model", "writing")},
        "stall": max(0.0, 1 - counts["computing_ms"] / worker_ms),
    }
