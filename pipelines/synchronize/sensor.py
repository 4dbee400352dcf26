"""Sensors: readings of channels over time, from a CSV, TSV or Parquet file with a column of times, read in blocks.

Times must ascend; equal ones are kept in the order of the file. A time that goes back or cannot be read ends the stream with
a DecodeError that names the row: sorting needs all of a recording in memory, and which of two orders is right the file alone
knows. What stands before it is good.
"""

import decimal
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore.errors import DecodeError
from pipelines.sources.files import FileValue
from pipelines.synchronize import TIME_LIMIT_NS, Events

__all__ = ["UNITS", "Array", "Layout", "Readings", "Rows", "events", "held", "hold", "magnitude", "readings"]

UNITS = {"ns": 0, "us": 3, "ms": 6, "s": 9}
"""Unit of a column of times -> the power of ten of nanoseconds that it is."""

BLOCK_BYTES = 1 << 18
"""Of a CSV, and the most that a line may have. Arrow reads 32 blocks ahead, in each pass over a file."""

BLOCK_ROWS = 1 << 16

_NO_ROW = 1 << 62


class Layout(NamedTuple):
    """Which columns of a file are what: the time, its unit, and the channels (none named: all others, as they stand)."""

    time: str
    unit: str
    channels: tuple[str, ...] = ()


class Readings(NamedTuple):
    """Some rows: times in ns int64 [N], which ascend, values float64 [N, C], NaN where a cell is empty."""

    time_ns: NDArray[np.int64]
    values: NDArray[np.float64]


def readings(file: FileValue, layout: Layout) -> Iterator[Readings]:
    """All rows in blocks.

    Raises:
        DecodeError: `unreadable`; `decode_error` where a column is missing, or a cell is no number; `unsorted_times`.
    """
    return _readings(file, layout, with_values=True)


def _readings(file: FileValue, layout: Layout, with_values: bool) -> Iterator[Readings]:
    number, last = 0, -TIME_LIMIT_NS
    for _, _, table in _blocks(file, layout, [layout.time], with_values):
        if isinstance(table, DecodeError):
            raise table
        with _told(file.source):
            times = _times(table, layout, file.source, number)
            values = _values(table, layout) if with_values else np.empty((len(times), 0))
        before = np.concatenate([[last], times[:-1]])[: len(times)]
        good = len(times) if (times >= before).all() else int(np.argmax(times < before))
        yield Readings(times[:good], values[:good])
        if good < len(times):
            raise DecodeError(
                "unsorted_times",
                f"{file.source}, row {number + good + 1}: {times[good]} ns after {before[good]} ns; sort the file "
                f"by {layout.time!r}",
            )
        number, last = number + len(times), int(times[-1]) if len(times) else last


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Makes DecodeErrors of what Arrow raises; what a file does is one already."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DecodeError("decode_error", f"{source}: {(str(error).splitlines() or [''])[0][:300]}") from None


_Block = tuple[int, int, pa.Table | DecodeError]
"""The number of its first row, that of the row after its last, and the rows, or why these cannot be read."""


def _blocks(file: FileValue, layout: Layout, always: list[str], with_values: bool, first: int = 0) -> Iterator[_Block]:
    """The columns `always`, and the channels; of a Parquet file from the row group on that holds row `first`.

    A row group that cannot be read costs its own rows, from the bad block on; a CSV file all that follow.
    """
    with file.open() as opened, _told(file.source):
        for number, beyond, tables in _tables(opened, file.source, layout, always, with_values, first):
            try:
                with _told(file.source):
                    for table in tables:
                        yield number, number + len(table), table
                        number += len(table)
            except DecodeError as error:
                yield number, beyond, error


def _tables(
    opened: io.BufferedIOBase, source: str, layout: Layout, always: list[str], with_values: bool, first: int
) -> Iterator[tuple[int, int, Iterator[pa.Table]]]:
    """(number of the first row, one that none of its rows reaches, blocks) of each part of a file."""
    if opened.read(4) == b"PAR1":
        opened.seek(0)
        parquet, number = pq.ParquetFile(opened), 0
        wanted = always + _columns(parquet.schema_arrow.names, layout, source)[: None if with_values else 0]
        for group in range(parquet.num_row_groups):
            beyond = number + parquet.metadata.row_group(group).num_rows
            if beyond > first:
                found = parquet.iter_batches(BLOCK_ROWS, row_groups=[group], columns=wanted, use_threads=False)
                yield number, beyond, (pa.Table.from_batches([batch]).select(wanted) for batch in found)
            number = beyond
        return
    opened.seek(0)
    head = opened.readline(BLOCK_BYTES).decode("utf-8-sig", "replace")
    opened.seek(0)
    parse = pyarrow.csv.ParseOptions(delimiter=max(",;\t", key=head.count), newlines_in_values=False)
    names = pyarrow.csv.read_csv(pa.BufferReader(head.encode()), parse_options=parse).column_names
    wanted = always + _columns(names, layout, source)[: None if with_values else 0]
    types = {name: pa.string() if name == layout.time else pa.float64() for name in wanted}
    batches = pyarrow.csv.open_csv(
        opened,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse,
        pyarrow.csv.ConvertOptions(column_types=types, include_columns=wanted, strings_can_be_null=True),
    )
    yield 0, _NO_ROW, (pa.Table.from_batches([batch]) for batch in batches)


def _columns(names: Sequence[str], layout: Layout, source: str) -> list[str]:
    """The channels of a file with these columns."""
    channels = list(layout.channels) or [name for name in names if name != layout.time]
    for name in [layout.time, *channels]:
        if list(names).count(name) != 1:
            raise DecodeError(
                "decode_error",
                f"{source}: column {name!r} is there {list(names).count(name)} times; columns: {list(names)}",
            )
    if not channels:
        raise DecodeError("decode_error", f"{source}: no column beside {layout.time!r}")
    return channels


def _values(table: pa.Table, layout: Layout) -> NDArray[np.float64]:
    return np.stack([_floats(table[name]) for name in table.column_names if name != layout.time], axis=1)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    found: NDArray[np.float64] = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
    return found


def _times(table: pa.Table, layout: Layout, source: str, number: int) -> NDArray[np.int64]:
    """Nanoseconds, exactly; where a text has more digits than that, rounded."""
    column = table[layout.time].combine_chunks()
    if column.null_count:
        row = number + pc.index(column.is_null(), True).as_py() + 1
        raise DecodeError("decode_error", f"{source}, row {row}: no time")
    kind, power = column.type, UNITS[layout.unit]
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        target = pa.timestamp("ns", kind.tz) if pa.types.is_timestamp(kind) else pa.duration("ns")
        return np.asarray(column.cast(target).cast(pa.int64()))
    if pa.types.is_integer(kind):
        return np.asarray(pc.multiply_checked(column.cast(pa.int64()), 10**power))
    if pa.types.is_floating(kind):
        values = np.asarray(column.cast(pa.float64()))
        whole = np.floor(values)
        # Apart: the product of a time since 1970 would be rounded to 256 ns.
        times = whole * 10.0**power + np.rint((values - whole) * 10.0**power)
        if not (np.abs(times) <= TIME_LIMIT_NS).all():
            raise DecodeError("decode_error", f"{source}: a time that is not finite, or past what is allowed")
        exact: NDArray[np.int64] = whole.astype(np.int64) * 10**power + np.rint((values - whole) * 10.0**power).astype(
            np.int64
        )
        return exact
    return _of_texts(column.cast(pa.string()), power, source, number)


def _of_texts(column: pa.Array, power: int, source: str, number: int) -> NDArray[np.int64]:
    column = pc.utf8_trim_whitespace(column)
    try:
        # The unscaled integers of decimals with so many digits are nanoseconds: 16 bytes each, the lower half first.
        fixed = column.cast(pa.decimal128(38, power))
        halves = np.frombuffer(fixed.buffers()[1], np.int64).reshape(-1, 2)[fixed.offset : fixed.offset + len(fixed)]
        if np.array_equal(halves[:, 0] >> 63, halves[:, 1]):
            return halves[:, 0].copy()
    except pa.ArrowInvalid:
        pass
    times = []
    for row, text in enumerate(column.to_pylist(), number + 1):
        try:
            time = int(decimal.Decimal(text).scaleb(power).to_integral_value(decimal.ROUND_HALF_EVEN))
        except (decimal.DecimalException, ValueError, OverflowError):
            time = TIME_LIMIT_NS + 1
        if abs(time) > TIME_LIMIT_NS:
            raise DecodeError("decode_error", f"{source}, row {row}: {text[:40]!r} is no time in numbers")
        times.append(time)
    return np.array(times, np.int64)


def events(file: FileValue, layout: Layout) -> Iterator[Events]:
    """The rows as moments, in chunks; `index` counts them. Reads no channel, and raises as `readings` of the others."""
    number = 0
    for block in _readings(file, layout, with_values=False):
        yield Events(block.time_ns, block.time_ns, np.arange(number, number + len(block.time_ns), dtype=np.int64))
        number += len(block.time_ns)


def held(points: Iterable[Events], longest_ns: int | None) -> Iterator[Events]:
    """Readings as intervals: each holds until the next one's time, and for `longest_ns` at the most. The last is a moment."""
    waiting: Events | None = None
    for chunk in points:
        if len(chunk.start_ns):
            found = (
                chunk
                if waiting is None
                else Events(*(np.concatenate(pair) for pair in zip(waiting, chunk, strict=True)))
            )
            start, end = found.start_ns[:-1], found.start_ns[1:]
            yield Events(start, hold(start, end, longest_ns), found.index[:-1])
            waiting = Events(*(column[-1:] for column in found))
    if waiting is not None:
        yield waiting


def hold(start_ns: NDArray[np.int64], next_ns: NDArray[np.int64], longest_ns: int | None) -> NDArray[np.int64]:
    """Until when readings hold."""
    return next_ns if longest_ns is None else np.minimum(next_ns, start_ns + longest_ns)


class Array(NamedTuple):
    """Readings that can be fetched as a `.npy` file of float32 [rows, channels]."""

    values: NDArray[np.float64]
    source: str

    def stat(self) -> tuple[int, str]:
        """The size of its numbers."""
        return 4 * self.values.size, ""

    def fetch(self) -> bytes:
        """The file; `decode_error` where a cell is empty or not finite."""
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(self.values, np.float32)
        if not np.isfinite(values).all():
            row, channel = np.argwhere(~np.isfinite(values))[0]
            raise DecodeError(
                "decode_error",
                f"{self.source}: reading {row} of the window is empty or not finite in channel {channel}",
            )
        out = io.BytesIO()
        np.save(out, values, allow_pickle=False)
        return out.getvalue()


class Rows:
    """Rows by their index, in one pass as long as the first of each range stands in the blocks in hand, or after them; else in
    another. Times are read where they are asked for.

    Of a Parquet file the row groups before the first range are passed over; a CSV's rows must be counted.
    """

    def __init__(self, file: FileValue, layout: Layout, timed: bool = False) -> None:
        self._file, self._layout, self._timed = file, layout, timed
        self._blocks: Iterator[_Block] | None = None
        self._held: deque[tuple[int, int, Readings | DecodeError]] = deque()
        self._beyond = 0

    def get(self, first: int, last: int) -> Readings:
        """Rows `first` to `last`. Raises DecodeError as `readings`."""
        if first < (self._held[0][0] if self._held else self._beyond):
            self._blocks, self._beyond = None, 0
            self._held.clear()
        while self._held and self._held[0][1] <= first:
            self._held.popleft()
        while self._beyond <= last:
            self._read(first)
        parts = []
        for start, _, block in self._held:
            if start <= last:
                if isinstance(block, DecodeError):
                    raise block
                parts.append([column[max(0, first - start) : last + 1 - start] for column in block])
        found = Readings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        assert len(found.values) == last + 1 - first
        return found

    def _read(self, first: int) -> None:
        if self._blocks is None:
            time = [self._layout.time] if self._timed else []
            self._blocks = _blocks(self._file, self._layout, time, True, first)
        fewer = DecodeError("decode_error", f"{self._file.source}: fewer rows than it had a moment ago")
        try:
            number, self._beyond, table = next(self._blocks, (self._beyond, _NO_ROW, fewer))
        except DecodeError as error:
            number, self._beyond, table = self._beyond, _NO_ROW, error
        if self._beyond > first:
            self._held.append((number, self._beyond, self._block(table, number)))

    def _block(self, table: pa.Table | DecodeError, number: int) -> Readings | DecodeError:
        if isinstance(table, DecodeError):
            return table
        try:
            with _told(self._file.source):
                times = _times(table, self._layout, self._file.source, number) if self._timed else np.empty(0, np.int64)
                return Readings(times, _values(table, self._layout))
        except DecodeError as error:
            return error


def magnitude(file: FileValue, layout: Layout) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Chunks of (time in ns int64 [N], Euclidean norm of the channels float32 [N]); empty cells count as 0."""
    for block in readings(file, layout):
        norm: Any = np.sqrt(np.square(np.nan_to_num(block.values)).sum(axis=1))
        yield block.time_ns, norm.astype(np.float32)
