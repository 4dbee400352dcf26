"""Rows of Parquet files as plain values: all of a file's, or some of them again.

Only the columns that are asked for are read, and only row groups that hold a row that is. In memory are one page of each such
column, decompressed, and a batch of about `BATCH_BYTES`.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import DecodeError, InputError, StoreError
from featurestore.times import TIMESTAMPS
from pipelines.sources.files import FileValue, opened
from pipelines.sources.rows import Record

__all__ = [
    "Batch",
    "Meanings",
    "ParquetRows",
    "Spool",
    "batches",
    "by_group",
    "content",
    "holds_bytes",
    "parquet_file",
    "parquet_values",
    "plain_columns",
    "row_bytes",
    "rows",
]

BATCH_ROWS = 8192
BATCH_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20
"""A column is read through a buffer of this size; without one all of its bytes in a row group would be in memory."""


class Meanings(NamedTuple):
    """Columns with a meaning to Braid: ids and groups, of texts or whole numbers, become texts; times nanoseconds."""

    texts: frozenset[str]
    times: frozenset[str]

    @classmethod
    def of(cls, columns: dict[str, str | None]) -> "Meanings":
        """From the columns of a corpus."""
        texts = {columns.get(key) for key in ("id", "group")}
        times = {columns.get(key) for key in TIMESTAMPS}
        return cls(frozenset(name for name in texts if name), frozenset(name for name in times if name))


class Batch(NamedTuple):
    """Some rows of one row group: their numbers in the file, from 0, and their columns."""

    group: int
    numbers: list[int]
    columns: pa.RecordBatch


class Spool:
    """What a shard has of bytes on this machine's disk, for as long as one of them may be fetched."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._size = 0

    def __del__(self) -> None:
        self._file.close()

    def add(self, raw: pa.Buffer | bytes) -> int:
        """Takes a value; returns its offset."""
        offset, left = self._size, memoryview(raw)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise StoreError(
                f"{tempfile.gettempdir()} cannot hold the values of a shard: {error.strerror}; make room, name another folder "
                "in TMPDIR, or make shards smaller (corpus.shard_mb)"
            ) from error
        self._size += len(raw)
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """A value again; from any thread."""
        return os.pread(self._file.fileno(), size, offset)


class ParquetRows:
    """A manifest in Parquet: one row a sample, of texts, numbers, truths, times and what is nested of them.

    Columns that hold bytes are left out. `fields` are columns that are read as fields, which must not be of bytes.
    """

    def __init__(self, columns: dict[str, str | None], fields: Sequence[str]) -> None:
        self._meanings, self._fields = Meanings.of(columns), fields

    def records(self, uri: str) -> Iterator[Record]:
        """Every row; InputError names a file that is no Parquet, or a column of a wrong type."""
        yield from self._records(uri, None)

    def reread(self, uri: str, places: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The rows whose numbers are the places' offsets again, in the order given."""
        numbers = [offset for offset, _ in places]
        spool, found = Spool(), dict[int, tuple[int, int]]()
        for record in self._records(uri, numbers):
            found[record.offset] = spool.add(record.content), len(record.content)
        for number in numbers:
            # Where the file was longer, a row without an id says so.
            row = spool.read(*found[number]) if number in found else b"{}"
            yield Record(json.loads(row), row, number, 0, place(uri, number))

    def place(self, uri: str, offset: int) -> str:
        """The file and the row, counted from 1."""
        return place(uri, offset)

    def _records(self, uri: str, wanted: Sequence[int] | None) -> Iterator[Record]:
        with parquet_file(uri) as file:
            names = plain_columns(file, uri, self._meanings)
            for name in self._fields:
                if name in file.schema_arrow.names and name not in names:
                    raise InputError(
                        f"{uri}: column {name!r} is {file.schema_arrow.field(name).type}; a manifest's fields are texts or "
                        "paths: say `type: parquet` in corpus.source, which reads values out of columns"
                    )
            for batch in batches(file, lambda _: names, wanted):
                for number, columns in zip(batch.numbers, rows(batch, names, self._meanings), strict=True):
                    yield Record(columns, content(columns), number, 0, place(uri, number))


@contextmanager
def parquet_file(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, open. What goes wrong with it, at once or while it is read, is an InputError that names it."""

    def told(why: str) -> InputError:
        return InputError(
            f"{uri}: no Parquet file, or one that is cut off or broken: {why}; write it again, or leave it out of "
            "corpus.source.path"
        )

    with opened(uri, "Parquet file") as raw, _opened(raw, told) as file:
        yield file


@contextmanager
def parquet_values(uri: str, source: str) -> Iterator[pq.ParquetFile]:
    """The same, to read values of it: what goes wrong is a DecodeError, `unreadable` or `decode_error`."""
    with (
        FileValue(uri, source).open() as raw,
        _opened(raw, lambda why: DecodeError("decode_error", f"{source}: {why}")) as file,
    ):
        yield file


@contextmanager
def _opened(raw: io.BufferedReader, told: Callable[[str], Exception]) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise told(" ".join(str(error).split())[:300]) from error


def plain_columns(file: pq.ParquetFile, uri: str, meanings: Meanings) -> list[str]:
    """Names of the columns that hold no bytes. InputError where ids or groups are neither texts nor whole numbers."""
    schema = file.schema_arrow
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise InputError(f"{uri}: column {twice[0]!r} stands twice; rename one")
    for name in sorted(meanings.texts & {*schema.names}):
        kind = _inner(schema.field(name).type)
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise InputError(
                f"{uri}: column {name!r} (corpus.columns) is {kind}; allowed: string, large_string, or integers; cast it"
            )
    return [name for name in schema.names if not holds_bytes(schema.field(name).type)]


def by_group(file: pq.ParquetFile, wanted: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows, ascending, of one row group after the other."""
    numbers, first = np.unique(np.array(wanted, np.int64)), 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        if len(here := numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, end)]):
            yield here.tolist()
        first = end


def batches(
    file: pq.ParquetFile, columns: Callable[[int], list[str]], wanted: Sequence[int] | None, most_rows: int = BATCH_ROWS
) -> Iterator[Batch]:
    """All rows, or those of some numbers, in the file's order.

    Args:
        file: an open file.
        columns: of a row group, those to read: top-level columns, or `column.child` of a struct.
        wanted: numbers of rows, from 0, in any order; None: all.
        most_rows: in a batch.
    """
    numbers, first = None if wanted is None else np.unique(np.array(wanted, np.int64)), 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        here = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, end)] if numbers is not None else None
        if here is None or len(here):
            yield from _of_group(file, columns(group), (group, first, end), here, most_rows)
        first = end


def _of_group(
    file: pq.ParquetFile, columns: list[str], span: tuple[int, int, int], wanted: np.ndarray | None, most_rows: int
) -> Iterator[Batch]:
    group, begin, end = span
    batch_rows = max(1, min(most_rows, BATCH_BYTES // max(1, row_bytes(file, group))))
    for batch in file.iter_batches(batch_rows, [group], columns):
        after = begin + len(batch)
        if wanted is None:
            yield Batch(group, list(range(begin, after)), batch)
        else:
            mine = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, after)]
            if len(mine):
                yield Batch(group, mine.tolist(), _takeable(batch).take(pa.array(mine - begin)))
            if after > wanted[-1]:
                return
        begin = after
    if begin != end:
        raise pa.ArrowInvalid(f"row group {group} has another number of rows than the file says")


def _takeable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch without views of bytes and texts, which pyarrow cannot pick rows of."""
    for number, kind in enumerate(batch.schema.types):
        if pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
            whole = pa.large_binary() if pa.types.is_binary_view(kind) else pa.large_string()
            batch = batch.set_column(number, batch.schema.names[number], batch.column(number).cast(whole))
    return batch


def row_bytes(file: pq.ParquetFile, group: int) -> int:
    """About how many bytes a row of a row group has in all of its columns, as the file tells.

    pyarrow tells a column's bytes too, and whether it is all nulls, but ends the process where a broken file has those wrong.
    """
    meta = file.metadata.row_group(group)
    return int(max(0, meta.total_byte_size) // max(1, meta.num_rows))


def rows(batch: Batch, names: Sequence[str], meanings: Meanings) -> Iterator[dict[str, Any]]:
    """Rows of columns that hold no bytes, as plain values: what JSON has."""
    values = []
    for name in names:
        column = plain(batch.columns[name], as_ns=name in meanings.times)
        if name in meanings.texts:
            column = [str(value) if isinstance(value, int) else value for value in column]
        values.append(column)
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True))


def content(columns: dict[str, Any]) -> bytes:
    """What changes where one of a row's columns does."""
    return json.dumps(columns, sort_keys=True).encode()


def place(uri: str, number: int) -> str:
    """Where a person finds a row, counted from 1."""
    return f"{uri}, row {number + 1}"


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a type is of bytes, or has them somewhere in it."""
    kind = _inner(kind)
    if is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return pa.types.is_nested(kind) and any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type is bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, in a dictionary or not."""
    return _is_text(_inner(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _inner(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _inner(kind.storage_type)
    return _inner(kind.value_type) if pa.types.is_dictionary(kind) else kind


def plain(array: pa.Array, as_ns: bool = False) -> list[Any]:
    """A column that holds no bytes as texts, numbers, truths, and lists and dicts of them; times as ISO 8601 texts or as ns."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage, as_ns)
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode(), as_ns)
    if pa.types.is_timestamp(kind):
        return _times(array, as_ns)
    if _is_text(kind):
        return _texts(array)
    if pa.types.is_float16(kind):
        return plain(array.cast(pa.float32()))
    if pa.types.is_duration(kind):
        return [None if value is None else f"{value}{kind.unit}" for value in array.cast(pa.int64()).to_pylist()]
    if pa.types.is_decimal(kind) or pa.types.is_temporal(kind):
        return list(array.cast(pa.string()).to_pylist())
    if pa.types.is_nested(kind):
        try:
            return [
                None if value is None else json.loads(json.dumps(value, default=str)) for value in array.to_pylist()
            ]
        except (ValueError, OverflowError) as error:
            raise pa.ArrowInvalid(f"a value of {kind} cannot be kept as JSON: {error}") from None
    return list(array.to_pylist())


def _times(array: pa.Array, as_ns: bool) -> list[Any]:
    """ISO 8601 texts, in UTC where the type has a zone; or nanoseconds."""
    kind = array.type
    # Without the zone: an instant is UTC already, and no zone has to be looked up.
    moments = array.cast(pa.int64()).cast(pa.timestamp(kind.unit))
    if as_ns:
        return list(moments.cast(pa.timestamp("ns")).cast(pa.int64()).to_pylist())
    zone = "Z" if kind.tz else ""
    texts = pc.replace_substring(moments.cast(pa.string()), " ", "T").to_pylist()
    return [None if text is None else f"{text}{zone}" for text in texts]


def _texts(array: pa.Array) -> list[str | None]:
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        raw = array.cast(pa.large_binary()).to_pylist()
        return [None if each is None else each.decode("utf-8", "surrogateescape") for each in raw]
