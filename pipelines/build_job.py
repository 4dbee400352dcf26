"""The Beam job of a build: a space, an index or a training set, made by one worker of one element, and one commit."""

import json
from collections.abc import Callable, Iterator

import apache_beam as beam

from featurestore.builds import Build
from featurestore.storage import Storage
from pipelines.runner import Commit, Job, Result, Scope, keyed

Make = Callable[[Storage, Build, int], Result]
"""Makes a build from a version of the store, and places its files: `make` of align, index and fuse."""


class _Make(beam.DoFn):
    def __init__(self, make: Make, storage: str, version: int) -> None:
        self._make, self._storage, self._version = make, storage, version

    def process(self, element: str) -> Iterator[tuple[int, Result]]:
        yield keyed(self._make(Storage.from_json(self._storage), Build(*json.loads(element)), self._version))


def build(job: Job, stage: str, make: Make, storage: Storage, planned: Build, version: int) -> None:
    """Puts the job of one build into a pipeline: make it, then one commit."""
    (
        job.pipeline
        | "Build" >> beam.Create([json.dumps(planned)]).with_output_types(str)
        | "Make" >> beam.ParDo(_Make(make, storage.to_json(), version)).with_output_types(tuple[int, Result])
        | "Commit" >> Commit(storage, f"{stage} {planned.name}", [Scope(*planned[:2], planned.key)])
    )
