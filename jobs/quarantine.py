"""`braid quarantine`: every value that was rejected, those too of jobs that published nothing.

A job that passes its failure budget commits nothing, but what it rejected lies in the store beside what it wrote, and is what a
person wants to see. Which of these files count is a spec's to say: those of the shards that its next run takes up.
"""

from collections.abc import Iterator, Set
from typing import Any

import pyarrow as pa

from featurestore import artefact
from featurestore.catalog import Snapshot
from featurestore.corpora import ROWS
from featurestore.quarantine import rejections
from featurestore.storage import Storage
from jobs import plan
from jobs.spec import Spec
from pipelines import encode_plan

__all__ = ["listed"]


def listed(snapshot: Snapshot, spec: Spec | None = None) -> Iterator[dict[str, Any]]:
    """Rejected values, a dict each: first what the snapshot names, then what `spec` is still to publish.

    Args:
        snapshot: the store's newest where there is a spec.
        spec: without it, only what is committed is given.
    """
    yield from ({**row, "committed": True} for row in rejections(snapshot).to_pylist())
    if spec is not None:
        yield from _of_shard(spec, snapshot)
        for view in plan.view_plans(spec):
            if view.corpus in snapshot.names(ROWS):
                stale = encode_plan.stale_rows(snapshot, view, encode_plan.listed(snapshot.storage, view))
                stem = f"quarantine/encode/{view.name}/{view.recipe}"
                yield from _uncommitted(snapshot.storage, stem, {*stale["shard"].to_pylist()}, view.corpus, view.name)


def _of_shard(spec: Spec, snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """What was rejected of the ingest that the source now stands for; it is read only where there is any not committed."""
    corpus = spec.corpus.name
    stem = f"quarantine/shard/{corpus}"
    stored = set(snapshot.table(ROWS, corpus, None, ("shard",))["shard"].to_pylist())
    if waiting := {_shard_of(path) for path in snapshot.storage.list(stem)} - stored:
        key = plan.ingest(spec, snapshot).key
        own = {shard for shard in waiting if shard.startswith(f"{key}-")}
        yield from _uncommitted(snapshot.storage, stem, own, corpus, None)


def _uncommitted(
    storage: Storage, stem: str, shards: Set[str], corpus: str, view: str | None
) -> Iterator[dict[str, Any]]:
    # Of several files of a shard the first is taken up by the next run.
    files = {_shard_of(path): path for path in sorted(storage.list(stem), reverse=True)}
    for shard in sorted(files.keys() & shards):
        for row in _rows(storage, files[shard]).to_pylist():
            yield {**row, "corpus": corpus, "view": view, "committed": False}


def _rows(storage: Storage, path: str) -> pa.Table:
    with artefact.parsing(path):
        return artefact.read_table(storage.read(path))


def _shard_of(path: str) -> str:
    """The shard that a file's name stands for."""
    return path.rpartition("/")[2].rpartition("-")[0]
