"""Before shards are written: what a source measures once for many samples, one element each, e.g. the clocks of a recording.

It is kept in the store, where those find it who write the shards. So it is measured once in a job, however many shards share it
and whatever worker writes them, and not again in a job that goes on after a kill.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam

from featurestore.encoders.runtime import keep_freed_memory
from featurestore.identity import hash64
from pipelines.reference_blocks import packed, unpacked
from pipelines.runner import InFlight, Result, result
from pipelines.shard_writer import ShardTask
from pipelines.sources import Measuring, open_source

__all__ = ["Measure", "MeasureWork", "measuring"]


def measuring(corpus: dict[str, Any]) -> Measuring | None:
    """The source of a corpus, where it has something to measure."""
    source = open_source(corpus)
    return source if isinstance(source, Measuring) and source.measures() else None


class MeasureWork(NamedTuple):
    """What a worker does: a block of one reference of `to_measure` -> a Result that publishes nothing."""

    corpus: str

    def open(self, threads: int) -> Measuring:
        """The source, and the allocator set."""
        keep_freed_memory()
        source = measuring(json.loads(self.corpus))
        assert source is not None
        return source

    def do(self, source: Measuring, task: bytes) -> Result:
        """One."""
        (reference,) = unpacked([task])
        source.measure(reference)
        return result(reference.id, [])


class _Find(beam.DoFn):
    """(range, block of references) -> (key, block of one) for each that is to be measured."""

    def __init__(self, corpus: str) -> None:
        self._corpus = corpus

    def setup(self) -> None:
        self._source = measuring(json.loads(self._corpus))

    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
        assert self._source is not None
        for reference in self._source.to_measure(unpacked([element[1]])):
            yield from packed([(hash64(reference.id) >> 1, reference)])


def _once(key: int, blocks: Iterable[bytes]) -> tuple[int, list[bytes]]:
    return key, sorted({*blocks})


def _nothing(_: Any) -> list[tuple[int, ShardTask]]:
    return []


class Measure(beam.PTransform):
    """Blocks of references -> a PCollection of ShardTasks that is empty, and so when all is measured that they need.

    Who groups it together with what else it waits for comes after it: a GroupByKey begins when all of its input is there.
    """

    def __init__(self, corpus: str, in_flight: InFlight) -> None:
        super().__init__()
        self._find, self._do_fn = _Find(corpus), in_flight

    def expand(self, blocks: beam.PCollection) -> beam.PCollection:
        """PCollection of (range, block) -> empty PCollection of (key, ShardTask)."""
        return (
            blocks
            | "Find" >> beam.ParDo(self._find).with_output_types(tuple[int, bytes])
            | "Group" >> beam.GroupByKey()
            | "Once" >> beam.MapTuple(_once).with_output_types(tuple[int, Iterable[bytes]])
            | "Measure" >> beam.ParDo(self._do_fn).with_output_types(tuple[int, Result])
            | "Done" >> beam.FlatMap(_nothing).with_output_types(tuple[int, ShardTask])
        )
