"""Parquet files whose columns hold the values themselves: bytes, texts, or the `{bytes, path}` of Hugging Face's datasets.

A field's `from` is a column: binary or large_binary; string, of texts or, with `read: file`, of paths; or a struct
`{bytes: binary, path: string}`, where a null in `bytes` means the file at `path`. Paths are relative to the Parquet file, or
absolute, or URIs, within what bounds.py allows. A null, and an empty text or path, mean that the value is absent. Columns that
hold bytes and are no field's are left out; all others are kept.

Planning reads no column of bytes: a sample's etag is of its other columns, its row's number, and its file's size and etag or
time of change; the size of a value is its share of a mean row of its row group. (Of `{bytes, path}` it reads both where a row
is small, so that files that such rows name are known to have changed.) A reference is a row's number, with length 0.

Shards are cut in the files' order, so a worker reads the row groups of one stretch, once, and only the fields' and the kept
columns: a row group is read again for each further shard that it reaches into, up to that shard's last row. A worker keeps the
shard's values on its disk while they are fetched; in memory are one page of each column and a batch of rows of about 16 MB, or
one row where that is larger.

Values of a page that is broken, or does not come, are rejected, and so are those after it in their column of the row group.
Where columns of no values cannot be read that is an error: nobody knows then which samples these are.
"""

import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import DecodeError, InputError
from featurestore.files import MAX_VALUE_BYTES, filesystem, too_large
from featurestore.row_order import BY_SOURCE
from pipelines.sources import SampleRef, Source, Value, parquet_rows
from pipelines.sources.files import change_of, expand
from pipelines.sources.manifest import Named
from pipelines.sources.parquet_rows import (
    Meanings,
    Spool,
    batches,
    by_group,
    content,
    holds_bytes,
    is_binary,
    is_text,
    parquet_file,
    parquet_values,
    row_bytes,
    rows,
)
from pipelines.sources.rows import Row, RowSource, Spoiled, inline


def open_source(corpus: dict[str, Any]) -> Source:
    """The Parquet files that a corpus's `source.path` names."""
    return Parquet(corpus)


_SMALL_ROW_BYTES = 2048
"""Rows of `{bytes, path}` smaller than this are read whole when planned."""


class Cell(NamedTuple):
    """A value that stands in a column. Planning knows its `size` roughly, and has not read it: `spool` is None."""

    size: int
    change: str
    source: str
    spool: Spool | None = None
    offset: int = 0

    def stat(self) -> tuple[int, str]:
        """Its size, and a text that changes when its file or its row's number does."""
        return self.size, self.change

    def fetch(self) -> bytes:
        """Its bytes; DecodeError `too_large`."""
        if self.size > MAX_VALUE_BYTES:
            raise too_large(self.size)
        if self.spool is None:
            raise RuntimeError(f"{self.source}: only values of samples() are fetched")
        return self.spool.read(self.offset, self.size)


class _Opened(NamedTuple):
    """A file with what its schema means: the columns without bytes, and each field's column of bytes."""

    uri: str
    file: pq.ParquetFile
    plain: list[str]
    cells: dict[str, str]
    change: str

    def whole(self, group: int) -> list[str]:
        """What a worker reads."""
        return [*self.plain, *sorted({each for name in self.cells.values() for each in self.of(name)})]

    def of(self, name: str) -> list[str]:
        """What a worker reads of a column of values."""
        path = [f"{name}.path"] if self.has_paths(name) else []
        return [f"{name}.bytes", *path] if self.is_struct(name) else [name]

    def planned(self, group: int) -> list[str]:
        """What planning reads."""
        small = row_bytes(self.file, group) < _SMALL_ROW_BYTES
        known = {f"{name}.bytes" for name in self.cells.values() if self.has_paths(name)} if small else ()
        return [*self.plain, *sorted(known), *self._paths()]

    def _paths(self) -> list[str]:
        return sorted({f"{name}.path" for name in self.cells.values() if self.has_paths(name)})

    def is_struct(self, name: str) -> bool:
        return bool(pa.types.is_struct(self.file.schema_arrow.field(name).type))

    def has_paths(self, name: str) -> bool:
        return self.is_struct(name) and self.file.schema_arrow.field(name).type.get_field_index("path") >= 0

    def value_bytes(self, group: int) -> int:
        """About how large a value is: columns of bytes share a row equally."""
        sharing = sum(holds_bytes(kind) for kind in self.file.schema_arrow.types)
        return row_bytes(self.file, group) // max(1, sharing)


class Parquet(RowSource):
    """Parquet files of values."""

    order, numbers_rows = BY_SOURCE, True

    def __init__(self, corpus: dict[str, Any]) -> None:
        super().__init__(corpus, (field["from"] for field in corpus["fields"].values()))
        self._meanings, self._named = Meanings.of(corpus["columns"]), Named(corpus["source"])

    def rows(self) -> Iterator[Row]:
        """Every row. InputError names a file that is no Parquet, or a column of a wrong type."""
        for uri in expand(self.paths):
            with parquet_file(uri) as file:
                opened = self._opened(uri, file)
                for batch in batches(file, opened.planned, None):
                    for row in self._rows(opened, batch, None):
                        yield self._with_texts(row)

    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Some rows again, in the order given: each file is read once, before the first is given."""
        references, spool = list(references), Spool()
        found: dict[tuple[str, int], tuple[Row, int, int]] = {}
        for uri in sorted({reference.uri for reference in references}):
            wanted = [reference.offset for reference in references if reference.uri == uri]
            for row in self._read(uri, wanted, spool):
                found[uri, row.offset] = (
                    row._replace(columns={}, content=b""),
                    spool.add(row.content),
                    len(row.content),
                )
        for reference in references:
            place = reference.uri, reference.offset
            if place in found:
                row, offset, size = found[place]
                yield self._with_texts(row._replace(columns=json.loads(spool.read(offset, size))))
            else:
                # The file was longer: a row without an id says so.
                yield Row({}, {}, b"", *place, 0, self.place(reference))

    def _read(self, uri: str, wanted: list[int], spool: Spool) -> Iterator[Row]:
        """Some rows of a file, in its order; and again, with all that can be read, where that is not everything."""
        try:
            with parquet_file(uri) as file:
                opened = self._opened(uri, file)
                for batch in batches(file, opened.whole, wanted):
                    yield from self._rows(opened, batch, spool)
            return
        except InputError:
            pass
        with parquet_file(uri) as file:
            opened = self._opened(uri, file)
            cells = {name: self._column(opened, name, wanted, spool) for name in {*opened.cells.values()}}
            for batch in batches(file, lambda _: opened.plain, wanted):
                for number, columns in zip(batch.numbers, rows(batch, opened.plain, self._meanings), strict=True):
                    values = {name: cells[column][number] for name, column in opened.cells.items()}
                    where = parquet_rows.place(uri, number)
                    yield Row(columns, values, content(columns), uri, number, 0, where)

    def _column(self, opened: _Opened, name: str, wanted: list[int], spool: Spool) -> dict[int, Value | None]:
        """A column's values by the numbers of their rows; what cannot be read costs those of a row group that come after it."""
        source, found = posixpath.basename(opened.uri), dict[int, Value | None]()
        for numbers in by_group(opened.file, wanted):
            try:
                with parquet_values(opened.uri, source) as file:
                    for batch in batches(file, lambda _: opened.of(name), numbers, most_rows=1):
                        paths = self._paths(opened, batch, name)
                        found |= zip(batch.numbers, self._cells(opened, batch, name, paths, spool), strict=True)
            except DecodeError as error:
                spoiled = Spoiled(error.reason, error.detail, source)
                found |= {number: spoiled for number in numbers if number not in found}
        return found

    def place(self, reference: SampleRef) -> str:
        """The file and the row, counted from 1."""
        return parquet_rows.place(reference.uri, reference.offset)

    def _opened(self, uri: str, file: pq.ParquetFile) -> _Opened:
        plain, cells = parquet_rows.plain_columns(file, uri, self._meanings), {}
        for name, field in self.fields.items():
            if field["from"] in file.schema_arrow.names:
                kind = file.schema_arrow.field(field["from"]).type
                _check(uri, name, field, kind)
                if not is_text(kind):
                    cells[name] = field["from"]
        fs, path = filesystem(uri)
        info = fs.info(path)
        return _Opened(uri, file, plain, cells, f"{info.get('size')},{change_of(info)}")

    def _rows(self, opened: _Opened, batch: parquet_rows.Batch, spool: Spool | None) -> Iterator[Row]:
        """A batch's rows, without the values of texts and paths; into the spool go those of bytes."""
        paths = {name: self._paths(opened, batch, name) for name in {*opened.cells.values()}}
        cells = {
            name: self._cells(opened, batch, column, paths[column], spool) for name, column in opened.cells.items()
        }
        for place, columns in enumerate(rows(batch, opened.plain, self._meanings)):
            number = batch.numbers[place]
            named = {f"{name}.path": column[place] for name, column in paths.items()} if spool is None else {}
            yield Row(
                columns,
                {name: column[place] for name, column in cells.items()},
                content(columns | named),
                opened.uri,
                number,
                0,
                parquet_rows.place(opened.uri, number),
            )

    def _with_texts(self, row: Row) -> Row:
        """A row with the values of columns of texts and of paths too."""
        values: dict[str, Value | None] = {}
        for name, field in self.fields.items():
            text = row.columns.get(field["from"])
            if name in row.values:
                values[name] = row.values[name]
            elif field["read"] == "file":
                values[name] = self._file(row.uri, text)
            else:
                values[name] = inline(text, posixpath.basename(row.uri)) if text else None
        return row._replace(values=values)

    def _file(self, uri: str, path: str | None) -> Value | None:
        return self._named.file(uri, path) if path else None

    def _paths(self, opened: _Opened, batch: parquet_rows.Batch, name: str) -> list[str | None]:
        """What stands in the `path` of a column of `{bytes, path}`."""
        if not opened.has_paths(name):
            return [None] * len(batch.numbers)
        return parquet_rows.plain(pc.struct_field(batch.columns[name], "path"))

    def _cells(
        self, opened: _Opened, batch: parquet_rows.Batch, name: str, paths: list[str | None], spool: Spool | None
    ) -> list[Value | None]:
        """The values of a column of bytes, or of `{bytes, path}`."""
        source, found = posixpath.basename(opened.uri), list[Value | None]()
        column = _bytes_in(batch.columns, name)
        if spool is None:
            size = opened.value_bytes(batch.group)
            for place, number in enumerate(batch.numbers):
                held = column is None or column[place].is_valid
                cell = Cell(size, f"{opened.change},{number}", source)
                found.append(cell if held else self._file(opened.uri, paths[place]))
            return found
        assert column is not None
        for scalar, path in zip(column, paths, strict=True):
            if scalar.is_valid:
                raw = scalar.as_buffer()
                offset = spool.add(raw) if raw.size <= MAX_VALUE_BYTES else 0
                found.append(Cell(raw.size, "", source, spool, offset))
            else:
                found.append(self._file(opened.uri, path))
        return found


def _bytes_in(columns: pa.RecordBatch, name: str) -> pa.Array | None:
    """The bytes of a column of values, or of its structs; None where they were not read."""
    column = columns[name] if name in columns.schema.names else None
    if column is None or not pa.types.is_struct(column.type):
        return column
    return pc.struct_field(column, "bytes") if column.type.get_field_index("bytes") >= 0 else None


def _check(uri: str, name: str, field: dict[str, Any], kind: pa.DataType) -> None:
    """InputError where a field's column has a type that is not read so."""
    if is_text(kind):
        if field["read"] == "file" or field["modality"] == "text":
            return
        mend = "a text is no value of this modality: say `read: file` where the column holds paths"
    elif field["read"] == "file":
        mend = "allowed with `read: file`: string, large_string"
    elif is_binary(kind) or _is_bytes_and_path(kind):
        return
    else:
        mend = "allowed: binary, large_binary, string, or a struct {bytes: binary, path: string}"
    raise InputError(f"{uri}: column {field['from']!r} (corpus.fields.{name}.from) is {kind}; {mend}")


def _is_bytes_and_path(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    children = {child.name: child.type for child in kind.fields}
    return "bytes" in children and is_binary(children["bytes"]) and is_text(children.get("path", pa.string()))
