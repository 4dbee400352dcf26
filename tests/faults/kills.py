"""Kills drawn from the progress of `braid run`, chained on one store, and what must hold after each.

Each run is killed once, at a point drawn for the step that it is at, and the next run is killed further on; a last run is let
through. The reference is an uninterrupted run of the same spec: it says which files each step places, under which names.
"""

import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import ROWS
from featurestore.ids import IDS
from featurestore.store import FeatureStore
from featurestore.views import VIEW
from pipelines.runner import InFlight
from tests.faults.runs import Run, start_server, store_of

__all__ = ["COMMIT", "Kills", "Tally"]

COMMIT = "commit"
"""The kills between the last file of a job and its commit; the others go by their stage."""

_POLL_S = 0.001
_SPARE_STORES = 6

Stats = dict[str, tuple[int, int]]
"""Path in the store -> (inode, time of change in ns): equal as long as a file was not written again."""


class Step(NamedTuple):
    """One job of the reference: what it published, and how long it took.

    `work_s` is from the first file that the job opened to its commit, `gap_s` from its last file to its commit.
    """

    job: str
    files: dict[str, Entry]
    work_s: float
    gap_s: float

    @property
    def stage(self) -> str:
        """The stage that the job is of."""
        return self.job.partition(" ")[0]

    @property
    def sharded(self) -> bool:
        """Whether the job goes on from the shards that are done; a build is made as a whole."""
        return self.stage in ("shard", "encode")

    def unit(self, path: str) -> str:
        """What is done again together: a shard, or a whole build."""
        return self.files[path].shard if self.sharded else self.job

    def done(self, placed: Iterable[str]) -> set[str]:
        """The shards of which the file that means done is placed; none of a build."""
        return {self.unit(path) for path in placed if self.sharded and self.files[path].kind in (ROWS, VIEW)}


class Reference(NamedTuple):
    """An uninterrupted run: its store, its steps in order, and the catalog at each version."""

    store: Path
    steps: list[Step]
    versions: list[Snapshot]


class Aim(NamedTuple):
    """Where a kill is drawn: when the run has placed so many files of the step, and a little later."""

    bucket: str
    files: int
    delay_s: float


class Tally:
    """Kills by where they were drawn, and by where they hit a job at work."""

    def __init__(self) -> None:
        self.drawn: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()

    def lines(self) -> Iterator[str]:
        """A table for a person."""
        yield f"{'killed in':10} {'counted':>8} {'drawn':>6}"
        for bucket in self.drawn | self.counted:
            yield f"{bucket:10} {self.counted[bucket]:8} {self.drawn[bucket]:6}"
        yield f"{'all':10} {self.counted.total():8} {self.drawn.total():6}"


class Kills:
    """Kills runs of one spec.

    Args:
        spec: its text, with `{store}` where the store's address stands.
        folder: where the stores are made.
        imports: modules that the runs import besides those of every run.
    """

    def __init__(self, spec: str, folder: Path, *imports: str) -> None:
        self._spec, self._folder, self._server = spec, folder, start_server(*imports)
        self.tally = Tally()
        self.reference = _reference(self._server, self._write_spec("whole"))

    def run(self, want: Mapping[str, int], seed: int, stores: int = 1) -> None:
        """Kills until so many of each stage, and of `COMMIT`, have counted, on so many stores or a few more."""
        for number in range(stores + _SPARE_STORES):
            left = {bucket: wanted - self.tally.counted[bucket] for bucket, wanted in want.items()}
            quota = {bucket: math.ceil(each / max(1, stores - number)) for bucket, each in left.items() if each > 0}
            if not quota:
                break
            rng = random.Random(f"{seed} {number}")
            _Chain(self._server, self.reference, self._write_spec(f"killed-{number}"), quota, rng, self.tally).run()

    def _write_spec(self, name: str) -> Path:
        path = self._folder / f"{name}.yaml"
        path.write_text(self._spec.replace("{store}", str(self._folder / name)))
        return path


def _reference(server: ForkServerContext, spec: Path) -> Reference:
    with Run(server, spec) as run:
        while run.is_alive():
            time.sleep(_POLL_S)
        run.check_ended_well()
    store = store_of(spec)
    newest = FeatureStore(store)
    jobs = [commit["job"] for commit in reversed(newest.history())]
    assert len(set(jobs)) == len(jobs), f"a job is one commit: {jobs}"
    versions = [FeatureStore(store, version).snapshot for version in range(len(jobs))]
    steps = []
    for version in range(1, len(jobs)):
        new = set(versions[version].all()) - set(versions[version - 1].all())
        # A range's id index is written with its plan: that no shard is done, and none done again.
        files = {entry.path: entry for entry in new if entry.kind != IDS}
        committed = _commit_file(store, version).stat().st_mtime
        last = max((store / path).stat().st_mtime for path in files)
        steps.append(Step(jobs[version], files, committed - run.opened[jobs[version]][0][0], committed - last))
    return Reference(store, steps, versions)


class _Chain:
    """One store, made by runs that are killed one after the other until one is let through."""

    def __init__(
        self,
        server: ForkServerContext,
        made: Reference,
        spec: Path,
        quota: Mapping[str, int],
        rng: random.Random,
        tally: Tally,
    ) -> None:
        self._server, self._made, self._spec, self._rng, self._tally = server, made, spec, rng, tally
        self._store = store_of(spec)
        self._todo = self._spread(quota)
        # A draw that hits nothing is made again, but not for ever.
        self._draws = Counter({key: 3 * number for key, number in self._todo.items()})

    def _spread(self, quota: Mapping[str, int]) -> Counter[tuple[str, str]]:
        """(Job, bucket) -> kills to make: those of a stage over its jobs; of commits one a job at most."""
        todo: Counter[tuple[str, str]] = Counter()
        for bucket, number in quota.items():
            jobs = [step.job for step in self._made.steps if bucket in (COMMIT, step.stage)]
            self._rng.shuffle(jobs)
            for turn in range(min(number, len(jobs)) if bucket == COMMIT else number):
                todo[jobs[turn % len(jobs)], bucket] += 1
        return todo

    def run(self) -> None:
        """Runs, kills and checks until a run ends by itself; then checks the whole."""
        killed = True
        while killed:
            before, version = self._stats(), self._version()
            with Run(self._server, self._spec) as run:
                killed = self._strike(run, before)
                if not killed:
                    run.check_ended_well()
                self._check_lost(run)
            self._count(run, before)
            self._check_kept(before, version)
            self._check_readers()
        self._check_whole()

    def _strike(self, run: Run, before: Stats) -> bool:
        """Watches a run and kills it at the point drawn for the step it is at; False where it ended first."""
        aims: dict[str, Aim | None] = {}
        while run.is_alive():
            step = self._step()
            if step is not None and step.job in run.opened:
                if step.job not in aims:
                    aims[step.job] = self._draw(step, before)
                aim = aims[step.job]
                if aim and len(self._written(step, before)) >= aim.files:
                    time.sleep(aim.delay_s)
                    run.kill()
                    self._draws[step.job, aim.bucket] -= 1
                    self._tally.drawn[aim.bucket] += 1
                    return True
            time.sleep(_POLL_S)
        return False

    def _draw(self, step: Step, before: Stats) -> Aim | None:
        """The next kill of a step: those within its work first, the one between write and commit last."""
        missing = len(step.files.keys() - before.keys() if step.sharded else step.files)
        for bucket in (step.stage, COMMIT):
            todo = self._todo[step.job, bucket]
            if todo <= 0 or self._draws[step.job, bucket] <= 0 or not missing:
                continue
            if bucket == COMMIT:
                return Aim(bucket, missing, self._rng.uniform(0, 0.8 * step.gap_s))
            if step.sharded:
                # Leaves something to do for the kills that are still to come.
                files = self._rng.randint(0, max(1, (missing - 2) // todo))
                return Aim(bucket, files, self._rng.uniform(0, step.work_s / len(step.files)))
            return Aim(bucket, 0, self._rng.uniform(0, 0.9 * step.work_s))
        return None

    def _count(self, run: Run, before: Stats) -> None:
        """Counts a kill where it hit a job at work: one that has opened a file, and whose commit is not there."""
        step = self._step()
        if step is None or step.job not in run.opened:
            return
        written = self._written(step, before)
        placed = written | (before.keys() & step.files.keys() if step.sharded else set())
        bucket = COMMIT if written and len(placed) == len(step.files) else step.stage
        self._todo[step.job, bucket] -= 1
        self._tally.counted[bucket] += 1

    def _version(self) -> int:
        """The newest version, seen without opening the catalog; -1 where there is no store yet."""
        versions = reversed(range(len(self._made.versions)))
        return next((version for version in versions if _commit_file(self._store, version).exists()), -1)

    def _step(self) -> Step | None:
        """The step whose commit comes next; None before there is a store and where all is done."""
        version = self._version()
        return self._made.steps[version] if 0 <= version < len(self._made.steps) else None

    def _stats(self) -> Stats:
        return _stats(self._store, (path for step in self._made.steps for path in step.files))

    def _written(self, step: Step, before: Stats) -> set[str]:
        """The files of a step that the run has placed, for the first time or again."""
        return {path for path, stat in _stats(self._store, step.files).items() if before.get(path) != stat}

    def _check_lost(self, run: Run) -> None:
        """A run loses no more shards than it may have in flight: of those it read, or has in scratch, all others are done."""
        step = self._step()
        if step is None or not step.sharded:
            return
        shards = {path: entry.shard for path, entry in self._made.steps[0].files.items()}
        read = {shards[key] for _, key in run.opened.get(step.job, ()) if key in shards}
        lost = read - step.done(_stats(self._store, step.files))
        scratch = list(self._store.glob(f".tmp/*-{run.pid}-*"))
        assert max(len(lost), len(scratch)) <= InFlight.SHARDS_IN_FLIGHT, f"{step.job}: {sorted(lost)}, {scratch}"

    def _check_kept(self, before: Stats, version: int) -> None:
        """A run does nothing again that was committed or done before it; of the rest, only what was in flight."""
        now = self._stats()
        again = {path for path, stat in before.items() if now.get(path) != stat}
        for number, step in enumerate(self._made.steps):
            redone = {step.unit(path) for path in again & step.files.keys()}
            kept = {step.unit(path) for path in step.files} if number < version else set()
            kept |= step.done(before.keys() & step.files.keys())
            assert not redone & kept, f"{step.job}: was done before, and done again: {sorted(redone & kept)}"
            assert len(redone) <= (InFlight.SHARDS_IN_FLIGHT if step.sharded else 1), f"{step.job}: {sorted(redone)}"

    def _check_readers(self) -> None:
        """A reader between two runs sees a version of the reference, whole, and nothing of what was cut off."""
        version = self._version()
        if version < 0:
            return
        seen = FeatureStore(self._store)
        assert (seen.version, seen.snapshot.all()) == (version, self._made.versions[version].all())
        for name in seen.views():
            view = seen.view(name)
            assert len(view.to_arrow()) == len(view.corpus.to_arrow())
        for opened, names in ((seen.index, seen.indexes()), (seen.training_set, seen.training_sets())):
            for name in names:
                opened(name)

    def _check_whole(self) -> None:
        """The store is the reference's: the same digest, the same files and no other, and no scratch."""
        assert FeatureStore(self._store).digest() == self._made.versions[-1].digest()
        assert _listing(self._store) == _listing(self._made.store)
        assert not list(self._store.glob(".tmp/*"))


def _commit_file(store: Path, version: int) -> Path:
    return store / "catalog" / "_delta_log" / f"{version:020}.json"


def _stats(store: Path, paths: Iterable[str]) -> Stats:
    found = {}
    for path in paths:
        try:
            stat = os.stat(store / path)
        except FileNotFoundError:
            continue
        found[path] = (stat.st_ino, stat.st_mtime_ns)
    return found


def _listing(store: Path) -> dict[str, int]:
    return {key: size for key, size in FeatureStore(store).storage.list().items() if not key.startswith("catalog/")}
