"""Where shards begin and end: pure functions of references, whatever the order in which these come.

In the order of ids a range is a slice of hash(group). It is sorted by (hash(group), group, id) and cut when rows or bytes
would overflow, also inside a group.

In an order of places (the source's, or the store's own) samples are counted as the source gives them: shards are stretches of
it, and a range is about 32 shards that follow each other. Behind the shuffle it is sorted again, by (uri, offset), and cut by
the same count from its first sample on: the same cuts, since a range begins where a shard does. A worker then reads its
shard's stretch, where in the order of ids each shard has samples in all files.

In the order of ids a range may hold any number of samples, since no group is in two: a recording's windows are one. So it is
sorted in runs, which are held as packed as they came, and merged.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from featurestore.identity import hash64
from featurestore.row_order import BY_ID, BY_TAR
from pipelines.reference_blocks import packed, unpacked
from pipelines.sources import SampleRef

__all__ = ["SHARDS_PER_RANGE", "Cut", "range_of"]

SHARDS_PER_RANGE = 32

_RUN = 8_192
"""So many references are sorted at once: at 400 bytes, where packed ones are about 25."""


def range_of(group: str, ranges: int) -> int:
    """The range that a group falls into: equal slices of the 64-bit hashes."""
    return hash64(group) * ranges >> 64


class Cut:
    """How a corpus is cut: in which order, and how large a shard may be. A sample that is larger is a shard alone.

    Args:
        order: one of featurestore.row_order. BY_TAR: a shard is what comes of one file, whatever its size.
        max_rows: of a shard.
        max_bytes: of a shard's values.
    """

    def __init__(self, order: str, max_rows: int, max_bytes: int) -> None:
        self.order, self._max_rows, self._max_bytes = order, max_rows, max_bytes

    def ranges(self, references: Iterable[SampleRef], ranges: int) -> Iterator[tuple[int, SampleRef]]:
        """Every reference with the number of its range; the references must come in the source's order.

        Args:
            references: all that are to be cut.
            ranges: how many there are to be, in the order of ids; in others a range is full or begins with a shard.
        """
        if self.order == BY_ID:
            yield from ((range_of(reference.group, ranges), reference) for reference in references)
            return
        number, shards, rows = -1, SHARDS_PER_RANGE, 0
        for reference, begins in self._begins(references):
            if begins:
                # Of a tar's samples there may be any number: a range is held in memory.
                if shards >= SHARDS_PER_RANGE or rows >= SHARDS_PER_RANGE * self._max_rows:
                    number, shards, rows = number + 1, 0, 0
                shards += 1
            rows += 1
            yield number, reference

    def shards(self, references: Iterable[SampleRef]) -> Iterator[list[SampleRef]]:
        """One range's references, in any order, as shards; each has its rows in the shards' order."""
        key = _by_group if self.order == BY_ID else _by_place
        shard: list[SampleRef] = []
        for reference, begins in self._begins(_sorted(references, key)):
            if begins and shard:
                yield self._in_order(shard)
                shard = []
            shard.append(reference)
        if shard:
            yield self._in_order(shard)

    def _in_order(self, shard: list[SampleRef]) -> list[SampleRef]:
        return sorted(shard, key=lambda each: each.id) if self.order == BY_ID else shard

    def _begins(self, references: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, bool]]:
        """Each reference, and whether a shard begins with it."""
        rows, size, uri = 0, 0, ""
        for reference in references:
            if self.order == BY_TAR:
                begins = reference.uri != uri
            else:
                begins = not rows or rows >= self._max_rows or size + reference.bytes > self._max_bytes
            if begins:
                rows, size, uri = 0, 0, reference.uri
            rows, size = rows + 1, size + reference.bytes
            yield reference, begins


def _sorted(references: Iterable[SampleRef], key: Callable[[SampleRef], Any]) -> Iterator[SampleRef]:
    references, runs = iter(references), []
    while run := sorted(islice(references, _RUN), key=key):
        runs.append([block for _, block in packed((0, reference) for reference in run)])
    return heapq.merge(*map(unpacked, runs), key=key)


def _by_group(reference: SampleRef) -> tuple[int, str, str]:
    return hash64(reference.group), reference.group, reference.id


def _by_place(reference: SampleRef) -> tuple[str, int]:
    return reference.uri, reference.offset
