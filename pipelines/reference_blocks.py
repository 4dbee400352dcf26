"""References as they cross the shuffle: packed, some of one range together.

A runner holds every element of a shuffle as an object of its own, here and there twice.
"""

import json
import zlib
from collections.abc import Iterable, Iterator

from pipelines.sources import SampleRef

__all__ = ["packed", "unpacked"]

MAX_BLOCK_BYTES = 1900
"""Before it is compressed a block is no larger, unless it is one reference: a descriptor, like all that crosses Beam."""

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def packed(references: Iterable[tuple[int, SampleRef]]) -> Iterator[tuple[int, bytes]]:
    """(range, reference) -> (range, block), as blocks fill; what is left at the end."""
    blocks: dict[int, bytearray] = {}
    uris: dict[int, str] = {}
    for number, reference in references:
        block = blocks.setdefault(number, bytearray())
        row = _row(reference, uris.get(number))
        if block and len(block) + len(row) > MAX_BLOCK_BYTES:
            yield number, zlib.compress(block, 1)
            block.clear()
            row = _row(reference, None)
        block += b"," + row if block else row
        uris[number] = reference.uri
    for number, block in blocks.items():
        yield number, zlib.compress(block, 1)


def unpacked(blocks: Iterable[bytes]) -> Iterator[SampleRef]:
    """The references of blocks, in their order. Equal texts of neighbours are one object."""
    place = ""
    for block in blocks:
        for sample_id, group, etag, size, uri, offset, length in json.loads(b"[" + zlib.decompress(block) + b"]"):
            place = place if uri in ("", place) else uri
            yield SampleRef(sample_id, group or sample_id, etag, size, place, offset, length)


def _row(reference: SampleRef, uri: str | None) -> bytes:
    """A reference as JSON, without what is the same as before: its group where that is its id, its uri the last row's."""
    sample_id, group, etag, size, place, offset, length = reference
    fields = [sample_id, group if group != sample_id else "", etag, size, place if place != uri else "", offset, length]
    return _JSON.encode(fields).encode("utf-8", "surrogatepass")
