"""The orders that rows of a corpus shard may stand in, and what of each can be seen in the rows themselves.

A shard's settings, in its footer and in the catalog, name its order; without a word it is that of the ids. Whatever the order,
`ids_sha256` in the catalog proves it. That the fields stand at their ids too is seen where values have places that ascend with
the rows: in the shard's own tar always, in files of the source where the rows are in the source's order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["AS_STORED", "BY_ID", "BY_SOURCE", "BY_TAR", "order_of", "out_of_order"]

BY_ID = "id"
"""Ascending by id, as text."""

BY_SOURCE = "source"
"""As samples stand in the source: by file, then by place in it. A shard is one stretch of it."""

BY_TAR = "tar"
"""BY_SOURCE, and the shard is one tar of the source, whose values stay there."""

AS_STORED = "stored"
"""As in the shards that were compacted, shard by shard in the order of their keys."""

Members = Sequence[Mapping[str, Any]]
"""A field's column of corpora.MEMBER, as dicts."""


def order_of(settings: Mapping[str, Any]) -> str:
    """The order that a shard's settings name."""
    return str(settings.get("order", BY_ID))


def out_of_order(ids: Sequence[str], fields: Mapping[str, Members], order: str) -> Iterator[tuple[int, str]]:
    """(row, what does not hold) of every row that stands out of order: by ids in order first, then by values in order.

    An order that is none of the above is taken for BY_ID, the strictest.
    """
    yield from _repeated(ids) if order in (BY_SOURCE, BY_TAR, AS_STORED) else _descending(ids)
    end, parts = 0, _Parts()
    for row, members in enumerate(zip(*fields.values(), strict=True)):
        for field, member in zip(fields, members, strict=True):
            if not member["present"]:
                continue
            if member["uri"] is not None:
                if order in (BY_SOURCE, BY_TAR) and (problem := parts.problem(member)):
                    yield row, f"its {field} is said to stand {problem}"
                continue
            if member["offset"] < end:
                yield (
                    row,
                    f"its {field} is said to stand at {member['offset']} of the tar, before the value ahead of it",
                )
            end = member["offset"] + member["size"]
        parts.end_row()


def _descending(ids: Sequence[str]) -> Iterator[tuple[int, str]]:
    for row in range(1, len(ids)):
        if ids[row] <= ids[row - 1]:
            yield row, f"stands behind {ids[row - 1]!r}: rows are not in the order of their ids"


def _repeated(ids: Sequence[str]) -> Iterator[tuple[int, str]]:
    seen: dict[str, int] = {}
    for row, sample_id in enumerate(ids):
        if (first := seen.setdefault(sample_id, row)) != row:
            yield row, f"its id stands in row {first} too"


class _Parts:
    """The parts of files that rows refer to: each file's are in one run of rows, and ascend from row to row.

    Within a row they stand as the file has them. What stands at 0 is a whole file (a tar's first value has a header before it),
    and any row may name it.
    """

    def __init__(self) -> None:
        self._uri, self._end, self._top = "", 0, 0
        self._left: set[str] = set()

    def problem(self, member: Mapping[str, Any]) -> str:
        """Takes a value of the row; what does not hold of it, or nothing."""
        uri, offset = member["uri"], member["offset"]
        if offset == 0:
            return ""
        if uri != self._uri:
            self._left.add(self._uri)
            self._uri, self._end, self._top = uri, 0, 0
        self._top = max(self._top, offset + member["size"])
        if uri in self._left:
            return f"in {uri}, which rows before have left for another file"
        return f"at {offset} of {uri}, before a value of an earlier row" if offset < self._end else ""

    def end_row(self) -> None:
        """The next value is of the next row."""
        self._end = self._top
