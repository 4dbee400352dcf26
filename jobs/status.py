"""How far a store is, read from its catalog and one listing a folder: the same on every runner, and from any machine.

No shard is read. What is not in the catalog yet is told by names alone: a shard's file means that the shard is done, and the
plans of an ingest say, in their footers, how many shards it has.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.text import Text

from featurestore import artefact, builds
from featurestore.catalog import Catalog, Snapshot, lost
from featurestore.corpora import QUARANTINE, ROWS
from featurestore.errors import BraidError, NotFound
from featurestore.storage import Storage
from featurestore.views import VIEW
from jobs.report import prefix, rejection_lines, tried
from jobs.spec import Spec
from pipelines import encode_plan

_READS = 16
_BUILD_STAGES = {builds.SPACE: "align", builds.INDEX: "index", builds.TRAINING: "fuse"}


class Progress(NamedTuple):
    """How far one step is: shards in the catalog, shards of it that lie written beside, and how many it will have.

    A build is one; `note` says what it waits for. `total` is None where nothing in the store says it yet.
    """

    stage: str
    name: str
    committed: int
    written: int
    total: int | None
    note: str = ""

    @property
    def complete(self) -> bool:
        """Whether all of it is in the catalog."""
        return self.committed == self.total

    @property
    def cut_off(self) -> bool:
        """Whether shards lie written that no commit has published: a run is at work, or was cut off."""
        return self.written > 0

    def __str__(self) -> str:
        if self.stage not in ("shard", "encode"):
            return "committed" if self.complete else self.note
        if self.total is None and not self.written:
            return "not planned yet"
        total = "?" if self.total is None else self.total
        what = "committed" if not self.written else "written, not committed"
        if self.written and self.committed:
            return f"{self.committed + self.written} of {total} shards written, {self.committed} of them committed"
        return f"{self.committed or self.written} of {total} shards {what}"


class Rejections(NamedTuple):
    """What was rejected of a corpus or a view: (field, reason, source prefix) -> values, of so many tried.

    `tried` is None while shards of it are not committed: their files were not read.
    """

    stage: str
    name: str
    counts: Counter[tuple[str, str, str]]
    tried: int | None


class Seen(NamedTuple):
    """A store at one moment; `complete` where all that its spec names is in the catalog (never of a bare address)."""

    uri: str
    version: int
    steps: list[Progress]
    rejections: list[Rejections]
    complete: bool

    def lines(self, spec: str = "SPEC") -> Iterator[str]:
        """In words, for a person."""
        yield f"{self.uri}, " + (f"version {self.version}" if self.version >= 0 else "nothing committed yet")
        width = max((len(step.name) for step in self.steps), default=0)
        for step in self.steps:
            yield f"{step.stage:6}  {step.name:{width}}  {step}"
        for step in self.steps:
            if step.cut_off:
                yield (
                    f"{step.stage} {step.name}: {step.committed + step.written} of {step.total or '?'} shards written, not "
                    f"committed: if no run is at it now, continue with `braid run {spec}` (on any runner)"
                )
        for rejected in self.rejections:
            yield from rejection_lines(f"{rejected.stage} {rejected.name}", rejected.counts, rejected.tried)
        if self.complete:
            yield "all that the spec names is committed"


class Status:
    """Looks at a store again and again; what cannot have changed since is not read twice.

    Args:
        storage: the store.
        spec: what it shall hold. Without it the store is told by what lies in it, and is never `complete`.
    """

    def __init__(self, storage: Storage, spec: Spec | None = None) -> None:
        self._storage, self._spec = storage, spec
        self._catalog = Catalog(storage)
        self._snapshot: Snapshot | None = None
        self._planned: dict[str, int] = {}
        self._rejected: dict[str, Counter[tuple[str, str, str]]] = {}
        self._current: dict[tuple[int, frozenset[str]], frozenset[str]] = {}
        if spec is not None:
            from jobs import plan

            self._views = plan.view_plans(spec)

    def look(self) -> Seen:
        """What is there now. NotFound where there is nothing at all, and no spec."""
        snapshot = self._newest()
        quarantine = self._storage.list("quarantine")
        if self._spec is not None:
            steps = self._of_spec(self._spec, snapshot)
            complete = all(step.complete for step in steps)
            scopes = [("shard", self._spec.corpus.name, ""), *(("encode", v.name, v.recipe) for v in self._views)]
        else:
            steps, complete = self._of_store(snapshot), False
            if snapshot.version < 0 and not steps:
                self._catalog.snapshot()
            scopes = _scopes(snapshot, quarantine)
        rejections = [self._rejections(snapshot, quarantine, *scope) for scope in scopes]
        found = [each for each in rejections if each.counts]
        return Seen(self._storage.uri, snapshot.version, steps, found, complete)

    def _newest(self) -> Snapshot:
        newest = self._catalog.peek()
        # The older one has read what it needs already.
        if self._snapshot is None or self._snapshot.version != newest.version:
            self._snapshot = newest
        return self._snapshot

    def _of_spec(self, spec: Spec, snapshot: Snapshot) -> list[Progress]:
        from jobs import plan

        corpus = spec.corpus.name
        first = self._shard(snapshot, corpus, self._storage.list(f"corpora/{corpus}"))
        steps = [first, *(self._encode(snapshot, view, first) for view in self._views)]
        behind = {step.name for step in steps[1:] if not step.complete}
        behind_spaces: set[str] = set()
        for kind, stage in _BUILD_STAGES.items():
            for name, settings in plan.build_settings(spec, stage).items():
                waits = sorted(behind & {*settings["views"]} | behind_spaces & {settings.get("space", "")})
                note = f"waits for {', '.join(waits)}" if waits else "" if first.complete else f"waits for {corpus}"
                if not note:
                    try:
                        note = "not made yet" if plan.planned_build(snapshot, stage, name, settings) else ""
                    except NotFound as missing:
                        note = f"waits: {missing}"
                if note and kind == builds.SPACE:
                    behind_spaces.add(name)
                steps.append(Progress(stage, name, int(not note), 0, 1, note))
        return steps

    def _of_store(self, snapshot: Snapshot) -> list[Progress]:
        corpora, views = self._storage.list("corpora"), self._storage.list("views")
        names = sorted({*snapshot.names(ROWS), *(parts[1] for parts in map(_parts, corpora) if len(parts) > 2)})
        shards = {name: self._shard(snapshot, name, corpora) for name in names}
        steps = list(shards.values())
        recipes = defaultdict(set)
        for parts in map(_parts, views):
            if len(parts) == 4:
                recipes[parts[1]].add(parts[2])
        for name in sorted({*snapshot.names(VIEW), *recipes}):
            steps += self._view(snapshot, name, recipes[name], views, shards)
        for kind, stage in _BUILD_STAGES.items():
            steps += [Progress(stage, name, 1, 0, 1) for name in snapshot.names(kind)]
        return steps

    def _shard(self, snapshot: Snapshot, corpus: str, listing: dict[str, int]) -> Progress:
        rows = snapshot.table(ROWS, corpus, None, ("shard", "path", "bytes"))
        published = set(rows["shard"].to_pylist())
        ingests = {shard.partition("-")[0] for shard in published}
        written, plans = set(), []
        for path in listing:
            folder, _, name = path.rpartition("/")
            if name.partition("-")[0] in ingests or not name.endswith(".parquet"):
                continue
            if folder == f"corpora/{corpus}":
                written.add(_shard_of(path))
            elif folder == f"corpora/{corpus}/plans":
                plans.append(path)
        current = self._wanted(snapshot, corpus, frozenset(path.rpartition("/")[2].partition("-")[0] for path in plans))
        written = {shard for shard in written if shard.partition("-")[0] in current}
        ranges = {_shard_of(path): path for path in plans if _shard_of(path).partition("-")[0] in current}
        self._read_footers(ranges.values())
        planned = sum(self._planned[path] for path in ranges.values())
        total = len(published) + max(planned, len(written)) or None
        return Progress("shard", corpus, len(published) - len(lost(rows, listing)), len(written), total)

    def _wanted(self, snapshot: Snapshot, corpus: str, ingests: frozenset[str]) -> frozenset[str]:
        """Of ingests that are not committed, the one that the source now stands for; all of them where nobody can say.

        One that was cut off before the source changed stays unpublished for ever. Only to tell it from one that is at work
        beside a committed corpus, or beside another, the source is read, once for a version of the store.
        """
        if self._spec is None or not ingests or (len(ingests) == 1 and corpus not in snapshot.names(ROWS)):
            return ingests
        key = (snapshot.version, ingests)
        if key not in self._current:
            from jobs import plan

            try:
                self._current[key] = ingests & {plan.ingest(self._spec, snapshot).key}
            except BraidError:
                self._current[key] = ingests
        return self._current[key]

    def _read_footers(self, plans: Iterable[str]) -> None:
        new = [path for path in plans if path not in self._planned]
        with ThreadPoolExecutor(_READS) as pool:
            self._planned.update(zip(new, pool.map(self._row_groups, new), strict=True))

    def _row_groups(self, path: str) -> int:
        with self._storage.open(path) as file, artefact.parsing(path):
            return int(pq.read_metadata(file).num_row_groups)

    def _encode(self, snapshot: Snapshot, view: Any, shards: Progress) -> Progress:

        listing, folder = encode_plan.listed(self._storage, view), encode_plan.folder(view)
        named = set(snapshot.table(VIEW, view.name, view.recipe, ("path",))["path"].to_pylist())
        written = {_shard_of(path) for path in listing if path.startswith(f"{folder}/") and path not in named}
        if view.corpus not in snapshot.names(ROWS):
            return Progress("encode", view.name, 0, len(written), shards.total)
        todo = {*encode_plan.stale_rows(snapshot, view, listing)["shard"].to_pylist()}
        committed = len(snapshot.table(ROWS, view.corpus, None, ("shard",))) - len(todo)
        return Progress("encode", view.name, committed, len(written & todo), shards.total)

    def _view(
        self, snapshot: Snapshot, name: str, recipes: set[str], listing: dict[str, int], shards: dict[str, Progress]
    ) -> Iterator[Progress]:
        """A view as the catalog has it, and each recipe of it that lies in the store and is in no catalog."""
        table = snapshot.table(VIEW, name, None, ("recipe", "shard", "path", "bytes"))
        entries = snapshot.entries(VIEW, name)
        corpus = entries[0].info()["corpus"] if len(entries) else next(iter(shards)) if len(shards) == 1 else ""
        total = shards[corpus].total if corpus in shards else None
        for recipe in sorted({*table["recipe"].to_pylist(), *recipes}):
            own = table.filter(pc.equal(table["recipe"], recipe))
            published = set(own["shard"].to_pylist())
            stem = f"views/{name}/{recipe}/"
            written = {_shard_of(path) for path in listing if path.startswith(stem)} - published
            other = f" (recipe {recipe})" if len(table) and not published else ""
            yield Progress("encode", name + other, len(published) - len(lost(own, listing)), len(written), total)

    def _rejections(
        self, snapshot: Snapshot, listing: dict[str, int], stage: str, name: str, recipe: str
    ) -> Rejections:
        made = snapshot.table(ROWS if stage == "shard" else VIEW, name, recipe, ("shard", "lineage"))
        published = set(made["shard"].to_pylist())
        named = snapshot.table(QUARANTINE, f"{stage}/{name}", recipe, ("path",))["path"].to_pylist()
        stem = "/".join(["quarantine", stage, name, *filter(None, [recipe])]) + "/"
        # Of several files of a shard the first is taken up by the next run.
        others = {_shard_of(path): path for path in reversed(listing) if path.startswith(stem)}
        unpublished = [path for shard, path in others.items() if shard not in published]
        paths = [path for path in named if path in listing] + unpublished
        new = [path for path in paths if path not in self._rejected]
        with ThreadPoolExecutor(_READS) as pool:
            self._rejected.update(zip(new, pool.map(self._count, new), strict=True))
        counts = sum((self._rejected[path] for path in paths), Counter[tuple[str, str, str]]())
        return Rejections(stage, name, counts, None if unpublished else tried(made["lineage"]))

    def _count(self, path: str) -> Counter[tuple[str, str, str]]:
        with artefact.parsing(path):
            rows = artefact.read_table(self._storage.read(path)).select(["field", "reason", "source"])
        columns = (column.to_pylist() for column in rows.columns)
        return Counter((field, reason, prefix(source)) for field, reason, source in zip(*columns, strict=True))


def _parts(path: str) -> list[str]:
    return path.split("/")


def _shard_of(path: str) -> str:
    """The shard (of a plan: ingest and range) that a file's name stands for."""
    return path.rpartition("/")[2].rpartition("-")[0]


def _scopes(snapshot: Snapshot, quarantine: Iterable[str]) -> list[tuple[str, str, str]]:
    """(stage, name, recipe) of all that may have rejected: of a view the catalog's recipe, or all where it has none."""
    table = snapshot.table(VIEW, None, None, ("name", "recipe"))
    scopes = {("shard", name, "") for name in snapshot.names(ROWS)}
    scopes |= {
        ("encode", row["name"], row["recipe"]) for row in table.group_by(["name", "recipe"]).aggregate([]).to_pylist()
    }
    known = {scope[:2] for scope in scopes}
    for path in quarantine:
        parts = _parts(path)
        if tuple(parts[1:3]) not in known and (parts[1:2], len(parts)) in ((["shard"], 4), (["encode"], 5)):
            scopes.add((parts[1], parts[2], parts[3] if parts[1] == "encode" else ""))
    return sorted(scopes, key=lambda scope: (scope[0] != "shard", scope))


def watch(status: Status, console: Console, every_s: float, spec: str = "SPEC") -> None:
    """Shows a store anew every few seconds until all that its spec names is committed, or Ctrl-C.

    Where there is no terminal a line is printed when it is new.
    """
    before: set[str] = set()
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                seen = status.look()
                lines = list(seen.lines(spec))
                if console.is_terminal:
                    live.update(Text("\n".join(lines)), refresh=True)
                else:
                    for line in lines:
                        if line not in before:
                            console.print(line, markup=False)
                    before = set(lines)
                if seen.complete:
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return
