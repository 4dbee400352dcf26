"""Sources whose samples are rows of named columns: what they share, which is all but the reading of their files."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from featurestore.errors import DecodeError, InputError
from featurestore.files import MAX_VALUE_BYTES
from featurestore.identity import check_id
from featurestore.row_order import BY_ID
from featurestore.times import RESERVED, TIMESTAMPS, timestamp_ns
from pipelines.ahead import ahead
from pipelines.sources import Sample, SampleRef, Value
from pipelines.sources.bounds import is_far
from pipelines.sources.files import FileValue

__all__ = ["ROW", "InlineText", "Record", "Row", "RowSource", "Spoiled", "inline"]

ROW = "__row__"
"""A column that a manifest and a Parquet file have without a word: where a row stands, for corpora without ids."""

_SHOWN = 80
_STATS = 32
"""So many rows' values are asked for at once, where they are on servers: 500 at 30 ms each take 0.6 s, not 15 s."""


class InlineText(NamedTuple):
    """Text that stands in the source itself."""

    text: str
    source: str

    def stat(self) -> tuple[int, str]:
        """Its size; it changes with its row."""
        return len(as_read(self.text)), ""

    def fetch(self) -> bytes:
        """Its bytes as they stood in the source, valid UTF-8 or not; DecodeError `too_large`."""
        if len(self.text) > MAX_VALUE_BYTES:
            raise DecodeError("too_large", f"{len(self.text)} characters; at most {MAX_VALUE_BYTES} bytes are allowed")
        return as_read(self.text)


class Spoiled(NamedTuple):
    """A value that its source shows to be none, before it is read."""

    reason: str
    detail: str
    source: str

    def stat(self) -> tuple[int, str]:
        """No size; what is wrong with it."""
        return 0, f"{self.reason}: {self.detail}"

    def fetch(self) -> bytes:
        """Raises DecodeError."""
        raise DecodeError(self.reason, self.detail)


class Record(NamedTuple):
    """A row as a file has it: Row without what its columns mean to fields."""

    columns: dict[str, Any]
    content: bytes
    offset: int
    length: int
    where: str


class Row(NamedTuple):
    """One sample as it stands in a source.

    Args:
        columns: all of its named columns, those too that fields are read from.
        values: field -> value, None where it is absent.
        content: what the etag is a digest of, besides each value's `stat()`: changes where a column does.
        uri: the file it stands in; offset and length are SampleRef's.
        where: the file and the line, or the like, for a person.
    """

    columns: dict[str, Any]
    values: dict[str, Value | None]
    content: bytes
    uri: str
    offset: int
    length: int
    where: str


class RowSource(ABC):
    """Ids, groups, times, etags and kept columns of samples that a subclass reads as rows.

    Args:
        corpus: the corpus part of a spec.
        used: columns that are read as fields, and are not kept beside them; nor are those of ids and times.
    """

    order = BY_ID
    numbers_rows = False

    def __init__(self, corpus: dict[str, Any], used: Iterable[str] = ()) -> None:
        self.paths: list[str] = corpus["source"]["path"]
        self.fields: dict[str, dict[str, Any]] = corpus["fields"]
        self._names: dict[str, str] = {key: column for key, column in corpus["columns"].items() if column}
        fields = {*used}
        self._taken = {*self._names.values(), *fields}
        own = {*RESERVED, *self.fields}
        self._reserved = own - self._taken
        # Who groups by albums may want to learn them, or search in one: a group's column is kept beside `group`.
        renamed = {column for key, column in self._names.items() if key != "group"}
        self._left_out = {*renamed, *fields, *(own & self._taken)}
        self._numbered = self.numbers_rows and self._names["id"] == ROW
        self._top = _top(self.paths) if self._numbered else []
        self._columns: set[str] = {ROW} if self._numbered else set()
        self._found: set[str] = set()

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Every sample, in the source's order. Raises InputError, which names the place, on one that cannot be read."""

    @abstractmethod
    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Rows read again, in the order given."""

    @abstractmethod
    def place(self, reference: SampleRef) -> str:
        """Where a person finds a sample."""

    def columns(self) -> set[str]:
        """Names of all columns of the rows that `references()` has read so far."""
        return self._columns

    def kept(self) -> set[str]:
        """Names of the columns that samples have of these rows."""
        times = self._names.keys() & {*TIMESTAMPS}
        return {"id", "group", *times, *(printable(name) for name in self._columns - self._left_out)}

    def unmatched(self) -> dict[str, str]:
        """Field -> its `from`, of the fields that no row read so far has a column or a value of."""
        return {
            name: str(field["from"])
            for name, field in self.fields.items()
            if name not in self._found and field["from"] not in self._columns
        }

    def remarks(self) -> list[str]:
        """Nothing to tell."""
        return []

    def whole(self) -> bool:
        """Whether all was read."""
        return True

    def references(self) -> Iterator[SampleRef]:
        """Every row as a reference; InputError names the place of one without an id, or without a right time.

        Values on servers are asked for their `stat()` ahead, of `_STATS` rows at once.
        """
        rows = iter(self.rows())
        for row in rows:
            there = _there(row)
            yield self._reference(row, [(field, value.stat()) for field, value in there])
            # The first alone, so that its client is connected when threads share it.
            if any(isinstance(value, FileValue) and is_far(value.uri) for _, value in there):
                break
        for (row, _), stats in ahead(_asked, ((row, _asking(row)) for row in rows), _STATS, 2 * _STATS):
            yield self._reference(row, stats)

    def _reference(self, row: Row, stats: Iterable[tuple[str, tuple[int, str]]]) -> SampleRef:
        """`stats` are by field, in the order of their names: workers get a spec's fields in another one than planning does."""
        sample_id, group = self._id_and_group(row)
        self._times(row)
        if not row.columns.keys() <= self._columns:
            self._add_columns(row)
        digest, size = hashlib.sha256(row.content), 0
        for field, (value_bytes, changed) in stats:
            self._found.add(field)
            size += value_bytes
            if changed:
                digest.update(f"{value_bytes},{changed};".encode())
        return SampleRef(sample_id, group, digest.hexdigest()[:16], size, row.uri, row.offset, row.length)

    def _add_columns(self, row: Row) -> None:
        if clash := sorted(self._reserved & row.columns.keys()):
            raise InputError(
                f"{row.where}: column {clash[0]!r} would be kept beside Braid's own column of that name; rename it in the "
                f"source, or say in the spec what it is, e.g. corpus.columns: {{group: group}}"
            )
        self._columns |= row.columns.keys()

    def _id_and_group(self, row: Row) -> tuple[str, str]:
        given = row.columns.get(self._names["id"])
        sample_id = check_id(self._row_id(row) if given is None and self._numbered else given, row.where)
        group = row.columns.get(self._names["group"]) if "group" in self._names else None
        return sample_id, check_id(group, f"{row.where}: group") if group is not None else sample_id

    def _row_id(self, row: Row) -> str | None:
        """Its file, below the folder that all are in, and its number there, of a line its first byte; None of no row."""
        if not row.columns:
            return None
        path = row.uri.partition("?")[0] if is_far(row.uri) else row.uri
        return f"{'/'.join(path.split('/')[len(self._top) :])}#{row.offset}"

    def _times(self, row: Row) -> dict[str, int | None]:
        return {
            name: timestamp_ns(row.columns.get(self._names[name]), row.where)
            for name in TIMESTAMPS
            if name in self._names
        }

    def samples(self, references: Iterable[SampleRef]) -> Iterator[Sample]:
        """Reads some rows again, in the order given."""
        references = list(references)
        for reference, row in zip(references, self.read(references), strict=True):
            try:
                sample_id, group = self._id_and_group(row)
            except InputError:
                sample_id = group = ""
            if (sample_id, group) != (reference.id, reference.group):
                raise InputError(
                    f"{row.where}: found {sample_id!r} where planning saw {reference.id!r}: the source changed "
                    "while the job ran; run it again"
                )
            kept = {name: value for name, value in row.columns.items() if name not in self._left_out}
            columns = {printable(name): printable(value) for name, value in kept.items()} | self._times(row)
            yield Sample(sample_id, group, reference.etag, columns, dict(row.values))


def _top(paths: Iterable[str]) -> list[str]:
    """The folder that all files of some paths, patterns and lists are in, by its parts: more files there do not change it."""
    folders = (re.split(r"[*?\[{]", path, maxsplit=1)[0].split("/")[:-1] for path in paths)
    return [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, zip(*folders, strict=False))]


def _there(row: Row) -> list[tuple[str, Value]]:
    """The values that a row has, by the names of their fields."""
    return [(field, value) for field, value in sorted(row.values.items()) if value is not None]


_Asking = list[tuple[str, Callable[[], tuple[int, str]]]]


def _asking(row: Row) -> _Asking:
    return [(field, value.asking() if isinstance(value, FileValue) else value.stat) for field, value in _there(row)]


def _asked(asking: tuple[Row, _Asking]) -> list[tuple[str, tuple[int, str]]]:
    return [(field, stat()) for field, stat in asking[1]]


def inline(value: Any, source: str) -> InlineText | Spoiled:
    """A column's value as a text: itself, or a number's or a truth's. A list or an object is none (`not_text`)."""
    if isinstance(value, list | dict):
        kind, shown = "a list" if isinstance(value, list) else "an object", json.dumps(value, ensure_ascii=False)
        more = "…" if len(shown) > _SHOWN else ""
        return Spoiled("not_text", f"{shown[:_SHOWN]}{more} is {kind}; make it a text in the source", source)
    return InlineText(value if isinstance(value, str) else json.dumps(value), source)


def printable(value: Any) -> Any:
    """A kept column's value; bytes of a text that are not UTF-8 become U+FFFD, since a table cannot hold them."""
    return as_read(value).decode("utf-8", "replace") if isinstance(value, str) else value


def as_read(text: str) -> bytes:
    """A text of the source in the bytes that it stood there in, valid UTF-8 or not."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Half a pair, as JSON's escapes may write one: no UTF-8 either.
        return text.encode("utf-8", "surrogatepass")
