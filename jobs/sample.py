"""Which samples of a source a plan tries, and what files of them say of files of more.

A file's bytes are taken for a constant and a share of each row. The constant is what a Parquet file has beside its columns, or
what a tar has at its end.
"""

import heapq
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.identity import hash64
from featurestore.row_order import BY_ID
from pipelines.sources import SampleRef, Source

__all__ = ["MAX_BYTES", "STRETCHES", "Line", "chosen", "line_of", "parquet", "tar"]

MAX_BYTES = 1 << 30
"""Of a sample's values: of large ones fewer are taken."""

STRETCHES = 8
"""Of a source that is read by stretches: in so many places."""

TAR_END_BYTES = 1024 + 5120
"""Two blocks, filled up to a record of 10,240 bytes: half of one, on average."""


def chosen(source: Source, count: int) -> list[SampleRef]:
    """`count` of a source's samples, or all, or as many as have `MAX_BYTES`: the same every time."""
    if source.order == BY_ID:
        found = heapq.nsmallest(count, source.references(), key=lambda each: (hash64(each.id), each.id))
    else:
        found = _stretches(source.references(), max(1, -(-count // STRETCHES)))[:count]
    sizes = itertools.accumulate(each.bytes for each in found)
    return [
        each for number, (each, size) in enumerate(zip(found, sizes, strict=True)) if not number or size <= MAX_BYTES
    ]


def _stretches(references: Iterable[SampleRef], length: int) -> list[SampleRef]:
    """The `STRETCHES` samples whose ids have the smallest hashes, each with those that follow it, up to `length`."""
    begun: list[tuple[int, int, list[SampleRef]]] = []
    for number, reference in enumerate(references):
        for _, _, stretch in begun:
            if len(stretch) < length:
                stretch.append(reference)
        start = (-hash64(reference.id), number, [reference])
        if len(begun) < STRETCHES:
            heapq.heappush(begun, start)
        elif start > begun[0]:
            heapq.heapreplace(begun, start)
    found = {each.id: each for _, _, stretch in sorted(begun, reverse=True) for each in stretch}
    return list(found.values())


class Line(NamedTuple):
    """Bytes of files: so many each, and so many a row."""

    each: float
    per_row: float

    def at(self, files: float, rows: float) -> int:
        return round(files * self.each + rows * self.per_row)


def line_of(files: Iterable[tuple[int, int]], rows: int) -> Line:
    """Of files of some rows together, as (bytes, bytes beside the rows)."""
    sizes = list(files)
    beside = sum(each for _, each in sizes)
    return Line(beside / max(1, len(sizes)), (sum(size for size, _ in sizes) - beside) / max(1, rows))


def parquet(content: bytes) -> tuple[int, int]:
    """Bytes of a Parquet file, and of these what is beside its columns."""
    about = pq.read_metadata(pa.BufferReader(content))
    groups = (about.row_group(number) for number in range(about.num_row_groups))
    columns = (group.column(each).total_compressed_size for group in groups for each in range(about.num_columns))
    return len(content), len(content) - sum(columns)


def tar(size: int) -> tuple[int, int]:
    return size, min(size, TAR_END_BYTES)
