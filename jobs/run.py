"""Carrying out a spec: every step that is not fresh, each its own Beam job that ends in one commit.

Any step that was cut off is gone on with by running the spec again: what lies finished in the store is taken up.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from featurestore.catalog import Snapshot
from featurestore.errors import InputError
from featurestore.storage import Storage
from jobs import plan
from jobs.progress import track
from jobs.spec import Spec
from pipelines import align, dataflow, encode, fuse, index, shard
from pipelines.runner import Job

_BUILDERS = {"align": align.build, "index": index.build, "fuse": fuse.build}


class Done(NamedTuple):
    """A step that was carried out: what it took, and of encode the values and the span of work in seconds."""

    stage: str
    name: str
    seconds: float
    values: int = 0
    span_s: float = 0.0


class Runner:
    """Runs stages of one spec, on `workers` processes of this machine or on the runner that Beam's options name."""

    def __init__(self, spec: Spec, console: Console, beam_args: Sequence[str] = (), workers: int = 1) -> None:
        self.spec, self.console, self.beam_args, self.workers = spec, console, beam_args, workers
        self.storage: Storage = spec.store
        self.done: list[Done] = []

    def run(self, stages: Sequence[str] = plan.STAGES, only: str | None = None) -> list[Done]:
        """Runs what is not fresh of some stages (of one named view, space, index or set where `only` says so)."""
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

    def _job(self, stage: str, name: str, shards: int = 1) -> Job:
        resources = self._resources(name) if stage == "encode" else dataflow.Resources()
        # Every image holds all of Braid: one view's serves where none is named.
        images = [view.resources.image for view in self.spec.views.values() if view.resources.image]
        args = dataflow.job_args(
            self.beam_args, stage, name, self.storage, resources, shards, spare_image=next(iter(images), None)
        )
        if self.done and dataflow.template(args):
            raise InputError(
                f"--template_location holds one job, which is {self.done[0].stage} {self.done[0].name} now; {stage} {name} is "
                "to do too: name one stage and one view, space, index or set"
            )
        return Job(args, self.workers)

    def _resources(self, view: str) -> dataflow.Resources:
        return dataflow.Resources(**self.spec.views[view].resources.model_dump())

    def _finish(self, stage: str, name: str, begun: float, outcome: Any = None) -> None:
        values, span = _encode_metrics(outcome) if stage == "encode" else (0, 0.0)
        self.done.append(Done(stage, name, time.monotonic() - begun, values, span))

    def _shard(self) -> None:
        snapshot = self._snapshot()
        found, corpus = plan.ingest(self.spec, snapshot), plan.corpus_dict(self.spec)
        if not found.samples:
            return
        dataflow.check_source(self.beam_args, self.spec.corpus.source.path)
        job, begun, folder = self._job("shard", corpus["name"]), time.monotonic(), f"corpora/{corpus['name']}"
        shard.build(job, self.storage, corpus, found, snapshot.version)

        def done() -> int:
            names = [key for key in self.storage.list(folder) if key.startswith(f"{folder}/{found.key}-")]
            written = sum(key.endswith(".parquet") for key in names)
            return min(found.samples, written * int(corpus["shard_rows"]))

        with track(self.console, f"shard {corpus['name']}", found.samples, done):
            self._finish("shard", corpus["name"], begun, job.run())

    def _encode(self, only: str | None) -> None:
        for planned in plan.view_plans(self.spec):
            if only not in (None, planned.name):
                continue
            tasks = encode.stale(self._snapshot(), planned, encode.listed(self.storage, planned))
            if tasks:
                self._encode_view(planned, tasks)

    def _encode_view(self, planned: encode.ViewPlan, tasks: list[encode.EncodeTask]) -> None:
        job, begun, rows = (
            self._job("encode", planned.name, len(tasks)),
            time.monotonic(),
            {task.shard: task.rows for task in tasks},
        )
        hints = dataflow.hints(self.beam_args, self._resources(planned.name))
        encode.build(job, self.storage, planned, tasks, self.spec.corpus.failure_budget, hints)

        def done() -> int:
            stems = {key.rpartition("/")[2].rpartition("-")[0] for key in self.storage.list(encode.folder(planned))}
            return sum(count for shard_key, count in rows.items() if shard_key in stems)

        with track(self.console, f"encode {planned.name}", sum(rows.values()), done):
            self._finish("encode", planned.name, begun, job.run())

    def _build(self, stage: str, only: str | None) -> None:
        for name, settings in plan.build_settings(self.spec, stage).items():
            snapshot = self._snapshot()
            planned = plan.planned_build(snapshot, stage, name, settings) if only in (None, name) else None
            if planned is None:
                continue
            job, begun = self._job(stage, name), time.monotonic()
            _BUILDERS[stage](job, self.storage, planned, snapshot.version)
            with track(self.console, f"{stage} {name}", None):
                self._finish(stage, name, begun, job.run())


def _encode_metrics(outcome: Any) -> tuple[int, float]:
    """Values encoded, and seconds from the first shard's start to the last one's end; model loading left out."""
    if not getattr(outcome, "has_job", True):
        return 0, 0.0  # a template was written: nothing ran
    found = outcome.metrics().query()
    values = sum(counter.committed for counter in found["counters"] if counter.key.metric.name == "values")
    spans = [each.committed for each in found["distributions"] if each.key.metric.name == "span_ms"]
    return values, (max(span.max for span in spans) - min(span.min for span in spans)) / 1000 if spans else 0.0
