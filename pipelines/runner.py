"""Running one stage's Beam job: typed elements, one commit at its end, and the runner named.

`DirectRunner` tries to fetch a runner binary and may run a job twice, so the local runner is FnApiRunner by name.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry
from apache_beam.coders.row_coder import RowCoder
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import GlobalWindows

from featurestore.catalog import Catalog, Change, Entry, Snapshot
from featurestore.corpora import QUARANTINE
from featurestore.errors import BraidError, BudgetExceeded
from featurestore.storage import Storage

_EXAMPLE_LENGTH = 300
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


class Result(NamedTuple):
    """What a worker made of one shard (or of one build): the entries to publish, and what it rejected.

    `entries` is a JSON list of catalog entries; `tried` and `rejected` count values; `example` is one rejection in words.
    """

    shard: str
    entries: str
    tried: int
    rejected: int
    example: str


def result(shard: str, entries: Sequence[Entry], tried: int = 0, rejected: int = 0, example: str = "") -> Result:
    """A Result of catalog entries; the example is cut, so that a Result stays a descriptor."""
    return Result(shard, json.dumps(entries), tried, rejected, example[:_EXAMPLE_LENGTH])


class Scope(NamedTuple):
    """A (kind, name) that a job publishes under, and the recipe it publishes."""

    kind: str
    name: str
    recipe: str


def typed(row: type[Any]) -> type[Any]:
    """Registers the row coder for a NamedTuple, so that no element of it is pickled; returns it."""
    registry.register_coder(row, RowCoder)
    return row


typed(Result)


class InFlight(beam.DoFn):
    """Runs `work(task)` for the tasks of a bundle, `SHARDS_IN_FLIGHT` at once; Results leave in the order of the tasks.

    So reading, computing and writing of neighbours overlap.
    """

    SHARDS_IN_FLIGHT = 2

    def work(self, task: Any) -> Result:
        """What is done with one task; called from several threads."""
        raise NotImplementedError

    def setup(self) -> None:
        """Makes the threads."""
        self._threads = ThreadPoolExecutor(self.SHARDS_IN_FLIGHT)

    def teardown(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    def start_bundle(self) -> None:
        """Begins with nothing in flight."""
        self._flight: deque[Future[Result]] = deque()

    def process(self, task: Any) -> Iterator[Result]:
        """Starts a task; waits for the oldest where enough are in flight."""
        self._flight.append(self._threads.submit(self.work, task))
        if len(self._flight) > self.SHARDS_IN_FLIGHT:
            yield self._flight.popleft().result()

    def finish_bundle(self) -> Iterator[Any]:
        """Waits for the rest."""
        while self._flight:
            yield GlobalWindows.windowed_value(self._flight.popleft().result())


class Commit(beam.PTransform):
    """Publishes all Results of a job in one catalog commit: the job's last step, run by one worker on one element.

    Runs again harmlessly. Where more than `budget` of the values tried were rejected it publishes nothing and raises
    BudgetExceeded; what the workers wrote stays, and a run with a larger budget goes on from it.
    """

    def __init__(
        self, storage: Storage, job: str, scopes: Sequence[Scope], budget: float = 0.0, whole: bool = False
    ) -> None:
        super().__init__()
        self._do_fn = _CommitFn(storage.to_json(), job, [tuple(scope) for scope in scopes], budget, whole)

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        """PCollection of Result -> PCollection of the version committed."""
        return (
            results
            | "Key" >> beam.Map(lambda each: (0, each)).with_output_types(tuple[int, Result])
            | "Gather" >> beam.GroupByKey()
            | "Publish" >> beam.ParDo(self._do_fn).with_output_types(int)
        )


class _CommitFn(beam.DoFn):
    def __init__(self, storage: str, job: str, scopes: list[Any], budget: float, whole: bool) -> None:
        self._storage, self._job, self._scopes, self._budget, self._whole = (
            storage,
            job,
            scopes,
            budget,
            whole,
        )

    def process(self, element: tuple[int, Iterable[Result]]) -> Iterable[int]:
        results = sorted(element[1], key=lambda each: each.shard)
        catalog, scopes = Catalog(Storage.from_json(self._storage)), [Scope(*scope) for scope in self._scopes]
        check_budget(self._job, results, self._budget, before(catalog.snapshot(), scopes, results))
        yield catalog.commit(self._job, changes(results, scopes, self._whole))


def before(snapshot: Snapshot, scopes: Iterable[Scope], results: Iterable[Result]) -> tuple[int, int]:
    """(values tried, values rejected) of the shards that are published already and not made again by these results."""
    again, tried, rejected = {each.shard for each in results}, 0, 0
    for scope in scopes:
        for entry in snapshot.entries(*scope):
            if entry.shard not in again:
                tried += entry.info().get("tried", 0)
                rejected += entry.rows if entry.kind == QUARANTINE else 0
    return tried, rejected


def check_budget(job: str, results: Iterable[Result], budget: float, published: tuple[int, int] = (0, 0)) -> None:
    """Raises BudgetExceeded where more than `budget` (a share of the values tried) was rejected.

    The corpus or the view is judged as a whole, with what is `published` of it: a lost shard with one bad value can be made
    again however small it is.
    """
    results = list(results)
    tried = published[0] + sum(each.tried for each in results)
    rejected = published[1] + sum(each.rejected for each in results)
    if rejected > budget * tried:
        example = next((each.example for each in results if each.rejected), "see quarantine/")
        raise BudgetExceeded(
            f"{job}: {rejected} of {tried} values were rejected ({rejected / tried:.2%}), more than the failure budget of "
            f"{budget:.2%}; e.g. {example}. Nothing was published and nothing is lost: mend the values, or raise "
            f"corpus.failure_budget in the spec above {rejected / tried:.2%}, and run it again (what is done is kept)"
        )


def changes(results: Iterable[Result], scopes: Iterable[Scope], whole: bool) -> list[Change]:
    """The catalog changes of a job. `whole`: the results are all there is of each recipe (a build)."""
    results = list(results)
    entries = [Entry(*fields) for each in results for fields in json.loads(each.entries)]
    covers = None if whole else frozenset(each.shard for each in results)
    made = []
    for scope in scopes:
        own = tuple(entry for entry in entries if entry.key[:3] == tuple(scope))
        made.append(Change(scope.kind, scope.name, scope.recipe, own, covers))
    return made


class Job:
    """One Beam pipeline, built by a stage and run here."""

    def __init__(self, beam_args: Sequence[str] = ()) -> None:
        args = list(beam_args)
        if not any(arg == "--runner" or arg.startswith("--runner=") for arg in args):
            args += [f"--runner={LOCAL_RUNNER}"]
        self.pipeline = beam.Pipeline(options=PipelineOptions(args))

    def run(self) -> Any:
        """Runs to the end and returns Beam's result; a BraidError of a worker is raised as itself."""
        try:
            outcome = self.pipeline.run()
            outcome.wait_until_finish()
        except BraidError as error:
            raise _without_step(error) from error.__cause__
        return outcome


def _without_step(error: BraidError) -> BraidError:
    """Beam appends ` [while running 'Step']` to messages; a person does not need it."""
    text = re.sub(r" \[while running '[^']*'\]", "", str(error))
    return type(error)(text)
