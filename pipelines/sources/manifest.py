"""Manifests: JSON Lines, one sample a line, with paths or inline text per field, plus labels and columns.

A byte order mark is no part of it. Paths are relative to the manifest's own folder, or absolute, or URIs. `null`, an absent
key and `""` mean that the value is absent. Bytes that are not UTF-8 spoil only the value they stand in: they reach
quarantine as they are.
"""

import codecs
import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

from featurestore.errors import InputError
from pipelines.sources import SampleRef, Source, Value
from pipelines.sources.files import FileValue, expand, filesystem, opened
from pipelines.sources.rows import Row, RowSource, inline

MAX_LINE_BYTES = 16 << 20


def open_source(corpus: dict[str, Any]) -> Source:
    """The manifests that a corpus's `source.path` names."""
    return Manifest(corpus)


class Manifest(RowSource):
    """JSONL files."""

    def __init__(self, corpus: dict[str, Any]) -> None:
        super().__init__(corpus, (field["from"] for field in corpus["fields"].values()))

    def rows(self) -> Iterator[Row]:
        """Every line; InputError names the line of one that is no JSON object."""
        for uri in expand(self.paths):
            with opened(uri, "manifest") as file:
                offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
                file.seek(offset)
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                    where = f"{uri}, line {number}"
                    if len(line) > MAX_LINE_BYTES:
                        raise InputError(
                            f"{where}: longer than {MAX_LINE_BYTES} bytes; put large texts in files (read: file)"
                        )
                    if line.strip():
                        yield self._row(line, uri, offset, where)
                    offset += len(line)

    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Some lines again."""
        files: dict[str, Any] = {}
        try:
            for reference in references:
                uri = reference.uri
                if uri not in files:
                    files[uri] = opened(uri, "manifest")
                files[uri].seek(reference.offset)
                line = files[uri].read(reference.length)
                where = f"{uri}, byte {reference.offset}"
                try:
                    yield self._row(line, uri, reference.offset, where)
                except InputError:
                    # Another line stands there now: a row without an id says so.
                    yield Row({}, {}, line, uri, reference.offset, reference.length, where)
        finally:
            for file in files.values():
                file.close()

    def place(self, reference: SampleRef) -> str:
        """The manifest and the line, counted by reading up to it."""
        number, left = 1, reference.offset
        with opened(reference.uri, "manifest") as file:
            while block := file.read(min(left, MAX_LINE_BYTES)):
                number, left = number + block.count(b"\n"), left - len(block)
        return f"{reference.uri}, line {number}"

    def _row(self, line: bytes, uri: str, offset: int, where: str) -> Row:
        columns = _parse(line, where)
        return Row(columns, self._values(columns, uri), line.strip(), uri, offset, len(line), where)

    def _values(self, columns: dict[str, Any], uri: str) -> dict[str, Value | None]:
        values: dict[str, Value | None] = {}
        for name, field in self.fields.items():
            given = columns.get(field["from"])
            if given is None or given == "":
                values[name] = None
            elif (field["read"] or ("inline" if field["modality"] == "text" else "file")) == "inline":
                values[name] = inline(given, posixpath.basename(uri))
            else:
                values[name] = FileValue(beside(uri, str(given)), str(given).encode("utf-8", "replace").decode())
        return values


def beside(uri: str, path: str) -> str:
    """The address of a path that stands in a manifest: relative to the manifest's own folder, absolute, or a URI."""
    if "://" in path:
        return path
    fs, own = filesystem(uri)
    return str(fs.unstrip_protocol(path if path.startswith("/") else posixpath.join(posixpath.dirname(own), path)))


def _parse(line: bytes, where: str) -> dict[str, Any]:
    text = line.decode("utf-8", "surrogateescape").strip()
    mend = 'a manifest is JSON Lines in UTF-8, one object a line, e.g. {"id": "a/1", "file": "a/1.jpg"}'
    if not text.startswith("{"):
        shown = repr(text[:60].encode("utf-8", "replace").decode())
        raise InputError(f"{where}: {shown} is no JSON object; {mend}; convert a CSV, a JSON array or UTF-16 first")
    try:
        row: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}; {mend}: correct the line") from None
    return row
