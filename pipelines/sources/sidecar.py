"""Columns in a Parquet file beside a tar, as img2dataset writes them: a row for each sample, found by its column `key`."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import DecodeError, InputError
from pipelines.sources.files import FileValue, described

__all__ = ["Sidecar"]

MAX_ROWS = 1_000_000
MAX_BYTES = 1 << 30
_BATCH_ROWS = 1024
_KEY = "key"
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


class Sidecar:
    """The rows beside one tar; without a file there, none. Columns of bytes are left out; times are ISO 8601 texts.

    Raises:
        InputError: the file is damaged, larger than `MAX_BYTES` in memory, or its keys are none; its text names it.
    """

    def __init__(self, tar: str) -> None:
        self._uri = tar.removesuffix(".tar") + ".parquet"
        self._columns: dict[str, pa.Array] = {}
        self._row_of: dict[str, int] = {}
        if tar.endswith(".tar") and described(self._uri, "the Parquet file beside a tar"):
            try:
                table = self._read()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._wrong(f"it cannot be read: {error}") from error
            self._columns = {name: table[name].combine_chunks() for name in table.column_names}
            self._row_of = self._keys(table)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: str) -> bool:
        return key in self._row_of

    def row(self, key: str) -> dict[str, Any]:
        """The columns of a sample; empty where it has no row."""
        row = self._row_of.get(key)
        if row is None:
            return {}
        try:
            return {name: _plain(column[row].as_py()) for name, column in self._columns.items()}
        except (ValueError, OverflowError) as error:
            raise self._wrong(f"row {row} (key {key!r}) cannot be read: {error}") from error

    def _read(self) -> pa.Table:
        try:
            content = FileValue(self._uri, self._uri).fetch()
        except DecodeError as error:
            raise self._wrong(error.detail) from None
        file = pq.ParquetFile(pa.BufferReader(content))
        if file.metadata.num_rows > MAX_ROWS:
            raise self._wrong(f"it has {file.metadata.num_rows} rows; at most {MAX_ROWS} are read beside one tar")
        schema, names = file.schema_arrow, file.schema_arrow.names
        if names.count(_KEY) != 1 or len(set(names)) < len(names):
            raise self._wrong(f"it has no column {_KEY!r} of the samples' keys, or two columns of one name")
        kept = [field.name for field in schema if not any(of(field.type) for of in _BYTES)]
        batches, size = [], 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=kept):
            size += batch.nbytes
            if size > MAX_BYTES:
                raise self._wrong(f"it takes more than {MAX_BYTES} bytes of memory")
            batches.append(batch)
        schema = pa.schema([schema.field(name) for name in kept])
        table = pa.Table.from_batches(batches, schema)
        return pa.table({field.name: _simple(table[field.name]) for field in schema})

    def _keys(self, table: pa.Table) -> dict[str, int]:
        if _KEY not in table.column_names or not pa.types.is_string(table.schema.field(_KEY).type):
            raise self._wrong(f"its column {_KEY!r} holds no texts")
        found: dict[str, int] = {}
        for row, key in enumerate(table[_KEY].to_pylist()):
            if key is not None and found.setdefault(key, row) != row:
                raise self._wrong(f"key {key!r} stands twice: rows {found[key]} and {row}")
        return found

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self._uri}, beside a tar: {what}; correct it, or take it away from there")


def _simple(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionaries, times as texts in UTC."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _simple(column.cast(kind.value_type))
    if pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if not pa.types.is_timestamp(kind):
        return column
    return (column.cast(pa.timestamp(kind.unit, "UTC")) if kind.tz else column).cast(pa.string())


def _plain(value: Any) -> Any:
    """A cell as JSON could have it."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json.loads(json.dumps(value, default=str))
