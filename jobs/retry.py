"""`braid retry-quarantined`: tries the quarantined values again, and says what came in and what is still rejected."""

import time
from collections import Counter
from collections.abc import Iterator

from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import ROWS
from featurestore.errors import NotFound
from featurestore.views import VIEW
from jobs import plan
from jobs.report import counted
from jobs.run import Runner, Work
from pipelines import dataflow, encode_plan
from pipelines import retry as pipeline


class Retrier(Runner):
    """Tries the quarantined values of one spec again: a job for the corpus, then one for each view."""

    def retry(self, spec: str) -> None:
        """Tries what the shard stage rejected, then what the encoders did and what came in. `spec` is what it is called.

        Run twice it does nothing the second time; cut off between two jobs, `braid run` does what is left of it.

        Raises:
            NotFound: the store has no such corpus.
            InputError: the corpus's fields changed since it was stored.
            StoreError: a file of the corpus is gone.
        """
        self.storage.clean_scratch()
        catalog, corpus = Catalog(self.storage), self.spec.corpus.name
        before = catalog.snapshot()
        if corpus not in before.names(ROWS):
            raise NotFound(f"no corpus {corpus!r} in {self.storage.uri}: `braid shard` brings one in")
        plan.check_settings(before, plan.corpus_dict(self.spec))
        plan.check_whole(before, corpus)
        self._retry_corpus(before)
        for planned in plan.view_plans(self.spec):
            self._retry_view(catalog.snapshot(), planned)
        if not self.done:
            self.console.print(f"Nothing of {corpus} is in quarantine: there is nothing to try again.")
        elif catalog.snapshot().version == before.version:
            self.console.print("Nothing came in: the store is as it was.")
        else:
            self.console.print(
                f"Spaces, indexes and sets are made from what came in by: braid run {spec}", markup=False
            )

    def _retry_corpus(self, before: Snapshot) -> None:
        corpus = plan.corpus_dict(self.spec)
        name, rejected = corpus["name"], pipeline.rejections(before, corpus["name"])
        if not rejected:
            return
        for path in self.spec.corpus.source.path:
            dataflow.check_source(self.beam_args, path)
        job, begun = self._job("retry", name), time.monotonic()
        pipeline.build(job, self.storage, corpus, before.version, list(rejected))
        total = _values(rejected)
        self._carry_out(job, "retry", name, begun, Work(total, None, rejected.__contains__))
        after = pipeline.rejections(self._snapshot(), name)
        self._tell(f"shard {name}", self.done[-1].values, total - _values(after), after)
        left = total - (total if self.done[-1].values is None else self.done[-1].values)
        if left:
            self.console.print(
                f"  {left} of them not tried: their samples are gone from the source, or changed in more than what was "
                "rejected; `braid run` takes that in as a change of the source"
            )

    def _retry_view(self, before: Snapshot, planned: encode_plan.ViewPlan) -> None:
        if planned.recipe not in before.table(VIEW, planned.name, None, ("recipe",))["recipe"].to_pylist():
            # Not encoded, or by another encoder: to be encoded as a whole.
            return
        rejected = pipeline.view_rejections(before, planned)
        tasks = encode_plan.remakes(before, planned, encode_plan.listed(self.storage, planned), list(rejected))
        if not tasks:
            return
        job, begun = self._job("encode", planned.name, len(tasks)), time.monotonic()
        hints = dataflow.hints(self.beam_args, self._resources(planned.name))
        budget, shards = self.spec.corpus.failure_budget, {task.shard for task in tasks}
        pipeline.build_view(job, self.storage, planned, tasks, budget, before.version, hints)
        total = sum(task.rows for task in tasks)
        self._carry_out(job, "encode", planned.name, begun, Work(total, None, shards.__contains__))
        after, tried = pipeline.view_rejections(self._snapshot(), planned), self.done[-1].values
        still = _values({shard: rows for shard, rows in after.items() if shard in shards})
        self._tell(f"encode {planned.name}", tried, None if tried is None else tried - still, after)

    def _tell(self, job: str, tried: int | None, came: int | None, after: pipeline.Rejections) -> None:
        tried_told = "" if tried is None else f"{counted(tried, 'value')} tried, "
        came_told = "" if came is None else f"{came} in now, "
        self.console.print(f"{job}: {tried_told}{came_told}{_values(after)} in quarantine", markup=False)
        for line in _reasons(after):
            self.console.print(line, markup=False)


def _values(rejected: pipeline.Rejections) -> int:
    return sum(map(len, rejected.values()))


def _reasons(rejected: pipeline.Rejections) -> Iterator[str]:
    counts = Counter((row["field"], row["reason"]) for rows in rejected.values() for row in rows)
    for (field, reason), count in sorted(counts.items()):
        yield f"  {field}, {reason}: {count}"
