"""`braid compact`: fewer, fuller shards without what is gone; and, if asked, its erasure for good.

Of adopted tars the rows of what is gone go, and the tars stay as their owner has them, also where it is erased.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from featurestore import builds
from featurestore.catalog import Catalog, Change, Snapshot
from featurestore.corpora import ROWS
from featurestore.errors import NotFound
from featurestore.views import VIEW
from jobs.plan import corpus_dict
from jobs.progress import track
from jobs.report import counted
from jobs.spec import Spec
from pipelines import compact as pipeline
from pipelines import dataflow
from pipelines.runner import Job


def compact(spec: Spec, console: Console, beam_args: Sequence[str] = (), workers: int = 1, purge: bool = False) -> None:
    """Merges small shards and leaves out what is gone; `purge` deletes every file that is not of the newest version then.

    Raises:
        NotFound: the store has no such corpus.
    """
    storage, corpus = spec.store, corpus_dict(spec)
    catalog = Catalog(storage)
    snapshot = catalog.snapshot()
    if corpus["name"] not in snapshot.names(ROWS):
        raise NotFound(f"no corpus {corpus['name']!r} in {storage.uri}: `braid shard` brings one in")
    planned = [plan(snapshot, corpus) for plan in (pipeline.plan, pipeline.plan_of_tars)]
    for todo in filter(None, planned):
        _carry_out(catalog, corpus, todo, console, beam_args, workers)
    if not any(planned):
        console.print("No shard is small or holds what is gone: nothing to compact.")
    if purge:
        files, size = erase(catalog, corpus["name"])
        console.print(
            f"erased {counted(files, 'file')}, {size / 1e6:.1f} MB: earlier versions of {corpus['name']} are no more"
        )


def _carry_out(
    catalog: Catalog,
    corpus: dict[str, Any],
    todo: pipeline.Compaction,
    console: Console,
    beam_args: Sequence[str],
    workers: int,
) -> None:
    name, snapshot = corpus["name"], catalog.snapshot()
    job = Job(dataflow.job_args(beam_args, "compact", name, catalog.storage), workers)
    pipeline.build(job, catalog.storage, corpus, todo, snapshot.version)
    with track(console, f"compact {name}", todo.samples):
        job.run()
    before, after = (len(each.table(ROWS, name, None, ("shard",))) for each in (snapshot, catalog.snapshot()))
    console.print(f"{counted(before, 'shard')} are {after} now; left out: {counted(todo.gone, 'sample')}")


def erase(catalog: Catalog, name: str) -> tuple[int, int]:
    """Deletes every file of a corpus, and of what is made from it, that the newest version does not name.

    Spaces, indexes and training sets that were made from other rows than there are now go too: they hold vectors and ids of
    what is gone. No job may be at work on the store meanwhile.

    Returns:
        Number and bytes of the files.
    """
    before = catalog.snapshot()
    stale = {(entry.kind, entry.name, entry.recipe) for entry, _ in builds.stale(before)}
    own = [each for each in sorted(stale) if _corpus_of(before, *each[:2]) == name]
    if own:
        catalog.commit(f"purge {name}", [Change(*each, ()) for each in own])
    named = {entry.path for entry in catalog.snapshot().all()}
    files = size = 0
    for folder in _folders(before, name):
        for key, bytes_ in before.storage.list(folder).items():
            if key not in named:
                before.storage.delete(key)
                files, size = files + 1, size + bytes_
    return files, size


def _folders(snapshot: Snapshot, name: str) -> list[str]:
    """Where files of a corpus, of its views and of its builds lie, those of earlier recipes and builds too."""
    folders = [f"corpora/{name}", f"quarantine/shard/{name}", f"attempts/shard/{name}"]
    for kind in (VIEW, *builds.BUILDS):
        for each in snapshot.names(kind):
            if _corpus_of(snapshot, kind, each) == name:
                of_view = (f"views/{each}", f"quarantine/encode/{each}", f"attempts/encode/{each}")
                folders += of_view if kind == VIEW else [f"{builds.FOLDERS[kind]}/{each}"]
    return folders


def _corpus_of(snapshot: Snapshot, kind: str, name: str) -> str:
    info = snapshot.entries(kind, name)[0].info()
    return str((info if kind == VIEW else info["settings"])["corpus"])
