"""Rows of text files: JSON Lines, CSV and TSV. Both are UTF-8, and a byte order mark is no part of them.

Bytes that are not UTF-8 spoil only the value they stand in: they stand for themselves in it, as lone surrogates.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import Any

from featurestore.errors import InputError
from pipelines.sources.files import opened
from pipelines.sources.rows import Record

__all__ = ["Delimited", "JsonLines"]

MAX_ROW_BYTES = 16 << 20

_TOO_LONG = f"longer than {MAX_ROW_BYTES} bytes; put large texts in files (read: file)"
_QUOTED = re.compile(rb'"(?:[^"]|"")*+"')


class JsonLines:
    """One JSON object a line. Empty lines are no rows."""

    def records(self, uri: str) -> Iterator[Record]:
        """Every line; InputError names the line of one that is no JSON object."""
        with opened(uri, "manifest") as file:
            offset = _after_mark(file)
            for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
                where = f"{uri}, line {number}"
                if len(line) > MAX_ROW_BYTES:
                    raise InputError(f"{where}: {_TOO_LONG}")
                if line.strip():
                    yield Record(_object(line, where), line.strip(), offset, len(line), where)
                offset += len(line)

    def reread(self, uri: str, places: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The lines at some (offset, length) again, in the order given."""
        with opened(uri, "manifest") as file:
            for offset, length in places:
                file.seek(offset)
                line = file.read(length)
                where = f"{uri}, byte {offset}"
                try:
                    columns = _object(line, where)
                except InputError:
                    # Another line stands there now: a row without an id says so.
                    columns = {}
                yield Record(columns, line.strip(), offset, length, where)

    def place(self, uri: str, offset: int) -> str:
        """The file and the line."""
        return _line_at(uri, offset)


class Delimited:
    """Rows of cells under a line of names (RFC 4180): CSV, or with tabs TSV.

    A cell in quotes may hold delimiters, line ends and doubled quotes. Every value is a text, whatever it looks like: a row's
    type would else depend on the others'. An empty cell is absent. Empty lines are no rows.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def records(self, uri: str) -> Iterator[Record]:
        """Every row; InputError names the line of one that is none, has too many cells or too few."""
        with opened(uri, "manifest") as file:
            lines = _Lines(file, uri, _after_mark(file))
            names, heading = self._names(lines)
            for cells in self._parsed(lines):
                where = f"{uri}, line {lines.first}"
                if cells:
                    yield Record(
                        _cells(names, cells, where),
                        heading + lines.row().rstrip(b"\r\n"),
                        lines.begin,
                        lines.size,
                        where,
                    )
                lines.next_row()

    def reread(self, uri: str, places: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The rows at some (offset, length) again, in the order given."""
        with opened(uri, "manifest") as file:
            names, heading = self._names(_Lines(file, uri, _after_mark(file)))
            for offset, length in places:
                file.seek(offset)
                row = file.read(length)
                where = f"{uri}, byte {offset}"
                try:
                    (cells,) = csv.reader([_text(row)], delimiter=self._delimiter, strict=True)
                    columns = _cells(names, cells, where)
                except (csv.Error, ValueError, InputError):
                    # Another row stands there now: one without an id says so.
                    columns = {}
                yield Record(columns, heading + row.rstrip(b"\r\n"), offset, length, where)

    def place(self, uri: str, offset: int) -> str:
        """The file and the line that a row begins in."""
        return _line_at(uri, offset)

    def _names(self, lines: "_Lines") -> tuple[list[str], bytes]:
        """The columns' names, and what they are written as: a part of what each row's etag is of."""
        names = next(self._parsed(lines), [])
        where = f"{lines.uri}, line 1"
        if any("\0" in name for name in names) or lines.row().startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{where}: these are no columns' names; save the file as UTF-8")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{where}: column {twice[0]!r} stands twice; rename one")
        heading = lines.row().rstrip(b"\r\n") + b"\n"
        lines.next_row()
        return names, heading

    def _parsed(self, lines: "_Lines") -> Iterator[list[str]]:
        # A limit of the whole process, by default of 131,072: a row's own is below it.
        csv.field_size_limit(MAX_ROW_BYTES)
        try:
            yield from csv.reader(lines, delimiter=self._delimiter, strict=True)
        except csv.Error as error:
            raise lines.mistake(error) from None


class _Lines:
    """Lines of a file as csv.reader takes them, one at a time; and where the row begins that it is in."""

    def __init__(self, file: BufferedReader, uri: str, begin: int) -> None:
        self._file, self.uri, self.begin, self.size = file, uri, begin, 0
        self.first, self._lines = 1, list[bytes]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self._lines.append(line)
        self.size += len(line)
        if self.size > MAX_ROW_BYTES:
            raise self.mistake(None)
        return _text(line)

    def row(self) -> bytes:
        """The row's bytes so far."""
        return b"".join(self._lines)

    def next_row(self) -> None:
        """Begins the next row."""
        self.begin, self.size, self.first = self.begin + self.size, 0, self.first + len(self._lines)
        self._lines.clear()

    def mistake(self, error: csv.Error | None) -> InputError:
        """What is wrong with the row."""
        row = self.row()
        position = 0
        while (position := row.find(b'"', position)) >= 0:
            closed = _QUOTED.match(row, position)
            if closed is None:
                line = self.first + row.count(b"\n", 0, position)
                return InputError(
                    f'{self.uri}, line {line}: the quote that begins here is never closed; close it, or double each " inside '
                    "a quoted cell"
                )
            position = closed.end()
        where = f"{self.uri}, line {self.first}"
        if error is None:
            return InputError(f"{where}: {_TOO_LONG}")
        return InputError(
            f"{where}: no row of cells: {error}; write a cell that holds a quote, a delimiter or a line end in quotes, with "
            'each " inside it doubled'
        )


def _cells(names: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        shown = ", ".join(names)[:200].encode("utf-8", "replace").decode()
        raise InputError(
            f"{where}: {len(cells)} cells under {len(names)} columns ({shown}); give every row as many cells "
            "as there are columns, and put a cell that holds a delimiter in quotes"
        )
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _object(line: bytes, where: str) -> dict[str, Any]:
    text = _text(line).strip()
    mend = 'a manifest is JSON Lines in UTF-8, one object a line, e.g. {"id": "a/1", "file": "a/1.jpg"}'
    if not text.startswith("{"):
        shown = repr(text[:60].encode("utf-8", "replace").decode())
        raise InputError(
            f"{where}: {shown} is no JSON object; {mend}; name a CSV .csv, a table of tabs .tsv; convert a JSON array or "
            "UTF-16 first"
        )
    try:
        row: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}; {mend}: correct the line") from None
    return row


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _after_mark(file: BufferedReader) -> int:
    """Skips a byte order mark; returns how long it is."""
    size = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(size)
    return size


def _line_at(uri: str, offset: int) -> str:
    number, left = 1, offset
    with opened(uri, "manifest") as file:
        while block := file.read(min(left, MAX_ROW_BYTES)):
            number, left = number + block.count(b"\n"), left - len(block)
    return f"{uri}, line {number}"
