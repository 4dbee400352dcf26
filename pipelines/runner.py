"""Running one stage's Beam job: typed elements, one commit at its end, and the runner named.

`DirectRunner` tries to fetch a runner binary and may run a job twice, so the local runner is FnApiRunner by name. It has one
process; more are ours (pipelines/workers.py), because Beam's own local multi-processing hangs for good where a worker is
killed, and deals the shards out before it starts: whoever gets the largest one also keeps its share of the others.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry
from apache_beam.coders.row_coder import RowCoder
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.shared import Shared

from featurestore import artefact
from featurestore.catalog import Catalog, Change, Entry, Snapshot
from featurestore.corpora import QUARANTINE
from featurestore.errors import AlignmentError, BraidError, BudgetExceeded, InputError
from featurestore.storage import Storage
from pipelines import dataflow, log, portable_runner
from pipelines.beam_options import check_files, given
from pipelines.tally import Spent
from pipelines.workers import Work, Workers

_EXAMPLE_LENGTH = 300
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


_RUNNERS = {"FnApiRunner": LOCAL_RUNNER, "DaskRunner": "pipelines.dask_runner.DaskRunner"}


class Result(NamedTuple):
    """What a worker made of one shard (or of one build): the entries to publish, and what it rejected.

    `entries` is a JSON list of catalog entries, or the object of the arguments by which a file that holds that list is read
    (`listed_in_file`); `tried` and `rejected` count values; `example` is one rejection in words;
    `computed` counts the values that were worked on just now, none of a shard that an earlier run finished; `read_bytes` is the
    size of those that could be read; `spent` is what that took, where the stage tells it.
    """

    shard: str
    entries: str
    tried: int
    rejected: int
    example: str
    computed: int = 0
    read_bytes: int = 0
    spent: Spent = Spent()


def result(shard: str, entries: Sequence[Entry], tried: int = 0, rejected: int = 0, example: str = "") -> Result:
    """A Result of catalog entries; the example is cut, so that a Result stays a descriptor."""
    return Result(shard, json.dumps(entries), tried, rejected, example[:_EXAMPLE_LENGTH])


def listed_in_file(storage: Storage, made: Result, stem: str) -> Result:
    """The same Result with its list of entries in a file of the store: a descriptor, however many files a build has."""
    placed = artefact.place_bytes(storage, made.entries.encode(), f"{stem}/entries", ".json")
    return made._replace(entries=json.dumps({"path": placed.path, "sha256": placed.sha256}))


def listed(storage: Storage, made: Result) -> Result:
    """A Result with its list of entries itself, wherever that is. AlignmentError where its file is gone or another."""
    entries = json.loads(made.entries)
    if isinstance(entries, list):
        return made
    return made._replace(entries=artefact.read_checked(storage, **entries).decode())


def keyed(made: Result) -> tuple[int, Result]:
    """A Result as Commit takes it: all of a job's under one key."""
    return 0, made


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
    """(key, its tasks) -> Results, keyed for Commit as they are done: a stage's work on the tasks of a bundle, several at once.

    It takes what a GroupByKey gives and gives what one takes, so that nothing else is fused to it. That GroupByKey, with a key
    for each task, is what spreads tasks over workers: Beam's own Reshuffle would code their times by pickle.

    `SHARDS_IN_FLIGHT` in a process, so that reading, computing and writing of neighbours overlap. With more than one process
    here, whichever is free takes the next task: a large shard holds up nothing but itself.

    Metrics, in the stage's namespace: counters `shards` and `rejected` (of all, those taken up from an earlier run too),
    `values` (computed now) and `read_bytes` (of those), and what `Spent` holds, by its names; distributions `shard_ms` (what
    each took) and `span_ms` (times at which they begin and end).

    Args:
        job: stage and name, as in `encode image`.
        work: what is done; opened once a process, however many copies of this DoFn the runner makes.
        processes: worker processes of this machine to do it in; 1 is the runner's own.
    """

    SHARDS_IN_FLIGHT = 2

    def __init__(self, job: str, work: Work, processes: int = 1) -> None:
        self._work, self._processes = work, processes
        self._event = partial(log.event, job, as_json=log.started())
        self._shared = Shared()
        stage = job.partition(" ")[0]
        self._values = Metrics.counter(stage, "values")
        self._read_bytes = Metrics.counter(stage, "read_bytes")
        self._shards = Metrics.counter(stage, "shards")
        self._rejected = Metrics.counter(stage, "rejected")
        self._spent = {name: Metrics.counter(stage, name) for name in Spent._fields}
        self._shard_ms = Metrics.distribution(stage, "shard_ms")
        self._span_ms = Metrics.distribution(stage, "span_ms")

    def setup(self) -> None:
        """Opens the work, here or in processes of its own."""
        cores = len(os.sched_getaffinity(0))
        if self._processes == 1:
            self._opened = self._shared.acquire(lambda: self._work.open(cores))
        else:
            self._opened = Workers(self._work, self._processes, self.SHARDS_IN_FLIGHT, max(1, cores // self._processes))
        self._at_once = self._processes * self.SHARDS_IN_FLIGHT
        self._threads = ThreadPoolExecutor(self._at_once)

    def teardown(self) -> None:
        """Ends the threads and processes."""
        self._threads.shutdown()
        if isinstance(self._opened, Workers):
            self._opened.close()

    def start_bundle(self) -> None:
        """Begins with nothing in flight."""
        self._flight: set[Future[tuple[Result, float]]] = set()

    def process(self, element: tuple[int, Iterable[Any]]) -> Iterator[tuple[int, Result]]:
        """Starts tasks; waits where enough are in flight."""
        for task in element[1]:
            self._span_ms.update(_now_ms())
            self._flight.add(self._threads.submit(self._do, task))
            if len(self._flight) > self._at_once:
                yield from self._landed()

    def finish_bundle(self) -> Iterator[Any]:
        """Waits for the rest."""
        while self._flight:
            for done in self._landed():
                yield GlobalWindows.windowed_value(done)

    def _do(self, task: Any) -> tuple[Result, float]:
        begun = time.monotonic()
        try:
            opened = self._opened
            made: Result = opened.do(task) if isinstance(opened, Workers) else self._work.do(opened, task)
        except Exception as error:
            took, shard = time.monotonic() - begun, getattr(task, "shard", getattr(task, "key", None))
            self._event("shard failed", shard=shard, seconds=took, level=logging.ERROR, detail=error)
            raise
        took = time.monotonic() - begun
        what = "shard adopted" if made.tried and not made.computed else "shard done"
        self._event(what, shard=made.shard, values=made.computed, rejected=made.rejected, seconds=took)
        return made, took

    def _landed(self) -> Iterator[tuple[int, Result]]:
        done, self._flight = wait(self._flight, return_when=FIRST_COMPLETED)
        # Counted here: a thread of our own has no metrics of Beam's.
        for each in done:
            made, took = each.result()
            self._values.inc(made.computed)
            self._read_bytes.inc(made.read_bytes)
            self._shards.inc()
            self._rejected.inc(made.rejected)
            for name, counter in self._spent.items():
                counter.inc(getattr(made.spent, name))
            self._shard_ms.update(round(took * 1000))
            self._span_ms.update(_now_ms())
            yield keyed(made)


def _now_ms() -> int:
    return int(time.time() * 1000)


class Commit(beam.PTransform):
    """Publishes all Results of a job in one catalog commit: the job's last step, run by one worker on one element.

    Runs again harmlessly. Where more than `budget` of the values tried were rejected it publishes nothing and raises
    BudgetExceeded; what the workers wrote stays, and a run with a larger budget goes on from it. Whatever the runner did with
    the Results on their way, it publishes each shard once and all of them or none: `rows` is how many rows of the first scope
    the job was planned for (None: a build, which is one Result). Metric of every stage: counter `published`, catalog rows.

    A job that remakes shards names the version that it has them from as `remakes`: where another job took one of them out or
    remade it since, nothing is published.
    """

    def __init__(
        self,
        storage: Storage,
        job: str,
        scopes: Sequence[Scope],
        budget: float = 0.0,
        rows: int | None = None,
        remakes: int | None = None,
    ) -> None:
        super().__init__()
        self._do_fn = _CommitFn(storage.to_json(), job, [tuple(scope) for scope in scopes], budget, rows, remakes)

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        """PCollection of keyed Results -> PCollection of the version committed."""
        return results | "Gather" >> beam.GroupByKey() | "Publish" >> beam.ParDo(self._do_fn).with_output_types(int)


class _CommitFn(beam.DoFn):
    def __init__(
        self, storage: str, job: str, scopes: list[Any], budget: float, rows: int | None, remakes: int | None
    ) -> None:
        self._storage, self._job, self._scopes, self._budget = storage, job, scopes, budget
        self._rows, self._remakes = rows, remakes
        self._event = partial(log.event, job, as_json=log.started())
        self._published = Metrics.counter(job.partition(" ")[0], "published")

    def process(self, element: tuple[int, Iterable[Result]]) -> Iterable[int]:
        begun = time.monotonic()
        # A bundle that was done twice has given its Results twice.
        given = list({each.shard: each for each in sorted(element[1], reverse=True)}.values())[::-1]
        storage, scopes = Storage.from_json(self._storage), [Scope(*scope) for scope in self._scopes]
        catalog, results = Catalog(storage), [listed(storage, each) for each in given]
        check_budget(self._job, results, self._budget, before(catalog.snapshot(), scopes, results))
        made = changes(results, scopes, whole=self._rows is None)
        check_complete(self._job, made[0], self._rows)
        old = None if self._remakes is None else catalog.snapshot(self._remakes)
        version = catalog.commit(self._job, made, lambda now: check_remakes(self._job, made, old, now) if old else None)
        self._published.inc(sum(len(change.entries) for change in made))
        self._event(
            "commit",
            values=sum(each.tried for each in results),
            rejected=sum(each.rejected for each in results),
            seconds=time.monotonic() - begun,
            detail=f"version {version}",
        )
        yield version


def check_complete(job: str, change: Change, rows: int | None) -> None:
    """Raises AlignmentError where what would be published has another number of rows than the job was planned for."""
    found = sum(entry.rows for entry in change.entries)
    if rows is not None and found != rows:
        raise AlignmentError(
            f"{job}: {found} rows in {len(change.entries)} shards reached the commit, {rows} were planned: the source changed "
            "meanwhile, or the runner lost results; nothing was published; run it again (what is done is kept)"
        )


def check_remakes(job: str, changes: Iterable[Change], old: Snapshot, now: Snapshot) -> None:
    """Raises AlignmentError where a shard, or what goes with it, is not what it was any more when it was made again."""
    for change in changes:
        was, there = old.entries(*change[:3]), now.entries(*change[:3])
        for entry in change.entries:
            if there.find(entry.shard) not in (was.find(entry.shard), entry):
                raise AlignmentError(
                    f"{job}: another job took shard {entry.shard} of {change.name!r} out of the store, or made it again, since "
                    f"version {old.version}; nothing was published; run it again"
                )


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
            f"{budget:.2%}; e.g. {example}; `braid quarantine SPEC` lists all of them. Nothing was published and nothing is "
            f"lost: mend the values, or raise corpus.failure_budget in the spec above {rejected / tried:.2%}, and run it again "
            "(what is done is kept)"
        )


def changes(results: Iterable[Result], scopes: Iterable[Scope], whole: bool) -> list[Change]:
    """The catalog changes of a job. `whole`: the results are all there is of each recipe (a build)."""
    results = list(results)
    entries = [Entry(*fields) for each in results for fields in json.loads(each.entries)]
    covers = None if whole else frozenset(each.shard for each in results)
    made = []
    for scope in scopes:
        own = tuple(entry for entry in entries if entry.key[:3] == tuple(scope))
        # An id index is called after the first shard of its range, which may be none of the results.
        covered = None if covers is None else covers | {entry.shard for entry in own}
        made.append(Change(scope.kind, scope.name, scope.recipe, own, covered))
    return made


class Job:
    """One Beam pipeline, built by a stage and run here.

    Args:
        beam_args: Beam's own options.
        workers: worker processes of this machine; for the local runner alone.
    """

    def __init__(self, beam_args: Sequence[str] = (), workers: int = 1) -> None:
        self._args, self.workers = checked(beam_args, workers), workers
        with _told_of_options():
            self.pipeline = beam.Pipeline(options=PipelineOptions(self._args))
        portable_runner.check(self.pipeline)

    def run(self) -> Any:
        """Runs to the end and returns Beam's result; a BraidError of a worker is raised as itself."""
        try:
            outcome = self.pipeline.run()
            outcome.wait_until_finish()
        except BraidError as error:
            raise _without_step(error) from error.__cause__
        except Exception as error:
            told = dataflow.told(error, self._args) or portable_runner.told(error)
            if told is None:
                raise
            raise told from error
        return outcome


def checked(beam_args: Sequence[str], workers: int = 1) -> list[str]:
    """Beam's options with the runner last and in full; InputError where they are wrong, job or no job."""
    args = _named_in_full(beam_args)
    if workers < 1 or (workers > 1 and args[-1] != f"--runner={LOCAL_RUNNER}"):
        raise InputError(
            f"--workers {workers}: at least 1, and only without --runner: they are processes of this machine; another "
            "runner has options of its own for its workers"
        )
    check_files(given(args))
    with _told_of_options():
        create_runner(args[-1].removeprefix("--runner="))
    return args


@contextmanager
def _told_of_options() -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        # Of options that do not go together, of no runner, or of one whose packages are not installed.
        raise InputError(f"Beam's options after --: {' '.join(str(error).split())}") from error


def _named_in_full(beam_args: Sequence[str]) -> list[str]:
    """Beam's options with the runner last, under the full name of the class that is meant."""
    args, runner = [], LOCAL_RUNNER
    rest = iter(beam_args)
    for arg in rest:
        if arg == "--runner":
            runner = next(rest, "")
        elif arg.startswith("--runner="):
            runner = arg.removeprefix("--runner=")
        else:
            args.append(arg)
    # Beam takes any case, and leaves the last word out.
    if runner.rpartition(".")[2].lower().removesuffix("runner") in ("direct", "switchingdirect"):
        raise InputError(
            f"--runner={runner} fetches a runner's program over the network, and may run a job twice; leave --runner out for "
            "the local runner, with --workers N for several processes"
        )
    return [*args, f"--runner={_RUNNERS.get(runner, runner)}"]


def _without_step(error: BraidError) -> BraidError:
    """Beam appends ` [while running 'Step']` to messages; a person does not need it."""
    text = re.sub(r" \[while running '[^']*'\]", "", str(error))
    return type(error)(text)
