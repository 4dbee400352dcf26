"""Manifests: one sample a row, with paths or inline text per field, plus labels and columns.

A file's ending says what it is: JSON Lines (.jsonl, .ndjson, .json); a table of cells under a line of names (.csv, .tsv), whose
values are all texts; or Parquet (.parquet). Paths are relative to the manifest's own folder, or absolute, or URIs; where they
may lead bounds.py says, and what leads elsewhere goes to quarantine as `outside`. `null`, an absent key or cell and `""` mean
that the value is absent. Bytes that are not UTF-8 spoil only the value they stand in: they
reach quarantine as they are. A text may be a number or a truth; a list or an object goes to quarantine as `not_text`.

Rows without ids of their own can be called by their place, with `id: __row__`: `a.parquet#17` is its eighteenth row,
`a.csv#812` the row of its byte 812. Such ids stay as long as the file does: a row put in before others makes all of these other
samples.

A line is read again alone, but a row of a Parquet file only with its row group: where all paths end in .parquet, shards are cut
in the order of the rows.
"""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from featurestore.addresses import redacted
from featurestore.errors import InputError
from featurestore.files import filesystem
from featurestore.row_order import BY_ID, BY_SOURCE
from pipelines.sources import SampleRef, Source, Value
from pipelines.sources.bounds import Bounds, bounds_of
from pipelines.sources.files import FileValue, expand
from pipelines.sources.parquet_rows import ParquetRows
from pipelines.sources.rows import Record, Row, RowSource, inline
from pipelines.sources.text_rows import Delimited, JsonLines

COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


class Format(Protocol):
    """How the rows of a file are read. InputError names the place of what is wrong."""

    def records(self, uri: str) -> Iterator[Record]:
        """Every row."""
        ...

    def reread(self, uri: str, places: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The rows at some (offset, length) again, in the order given; one without columns where another stands there now."""
        ...

    def place(self, uri: str, offset: int) -> str:
        """Where a person finds a row."""
        ...


def open_source(corpus: dict[str, Any]) -> Source:
    """The manifests that a corpus's `source.path` names."""
    return Manifest(corpus)


class Manifest(RowSource):
    """Files of rows, of one format or several."""

    numbers_rows = True

    def __init__(self, corpus: dict[str, Any]) -> None:
        fields = [field["from"] for field in corpus["fields"].values()]
        super().__init__(corpus, fields)
        self.order = BY_SOURCE if all(path.lower().endswith(".parquet") for path in self.paths) else BY_ID
        self._named = Named(corpus["source"])
        json_lines = JsonLines()
        self._formats: dict[str, Format] = {
            ".jsonl": json_lines,
            ".ndjson": json_lines,
            ".json": json_lines,
            ".csv": Delimited(","),
            ".tsv": Delimited("\t"),
            ".parquet": ParquetRows(corpus["columns"], fields),
        }

    def rows(self) -> Iterator[Row]:
        """Every row of every file."""
        for uri in expand(self.paths):
            for record in self._format(uri).records(uri):
                yield self._row(uri, record)

    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Some rows again."""
        references = list(references)
        places: dict[str, list[tuple[int, int]]] = {}
        for reference in references:
            places.setdefault(reference.uri, []).append((reference.offset, reference.length))
        records = {uri: self._format(uri).reread(uri, own) for uri, own in places.items()}
        for reference in references:
            yield self._row(reference.uri, next(records[reference.uri]))

    def place(self, reference: SampleRef) -> str:
        """The file and the line, or the row."""
        return self._format(reference.uri).place(reference.uri, reference.offset)

    def _format(self, uri: str) -> Format:
        path = uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri
        ending = posixpath.splitext(path)[1].lower()
        if ending in COMPRESSED:
            raise InputError(
                f"{uri}: compressed manifests are not read, because a row could not be found again without reading all before "
                "it; unpack it, or convert it to Parquet, which is compressed inside"
            )
        if ending not in self._formats:
            raise InputError(
                f"{uri}: {ending or 'no ending'!r} does not say what this manifest is; allowed: {', '.join(self._formats)}; "
                "rename it, or correct corpus.source.path"
            )
        return self._formats[ending]

    def _row(self, uri: str, record: Record) -> Row:
        columns, content, offset, length, where = record
        return Row(columns, self._values(columns, uri), content, uri, offset, length, where)

    def _values(self, columns: dict[str, Any], uri: str) -> dict[str, Value | None]:
        values: dict[str, Value | None] = {}
        for name, field in self.fields.items():
            given = columns.get(field["from"])
            if given is None or given == "":
                values[name] = None
            elif isinstance(given, list | dict) or self._is_inline(field):  # those are no paths either
                values[name] = inline(given, posixpath.basename(uri))
            else:
                values[name] = self._named.file(uri, str(given))
        return values

    def _is_inline(self, field: dict[str, Any]) -> bool:
        return bool((field["read"] or ("inline" if field["modality"] == "text" else "file")) == "inline")


class Named:
    """Files that the rows of a source's files name.

    Args:
        source: the source part of a corpus; its `root` are folders and beginnings of addresses that they may also lie in.
    """

    def __init__(self, source: dict[str, Any]) -> None:
        self._roots = source.get("root") or ()
        self._homes: dict[str, tuple[Any, str, Bounds]] = {}

    def file(self, uri: str, path: str) -> FileValue:
        """The file of a path that stands in `uri`: relative to its folder, absolute, or an address."""
        if uri not in self._homes:
            fs, own = filesystem(uri)
            self._homes[uri] = fs, posixpath.dirname(own), bounds_of(uri, self._roots)
        fs, folder, bounds = self._homes[uri]
        source = redacted(path.encode("utf-8", "replace").decode())
        if "://" in path:
            return FileValue(path, source, bounds)
        whole = path if path.startswith("/") else posixpath.join(folder, path)
        return FileValue(str(fs.unstrip_protocol(whole)), source, bounds)
