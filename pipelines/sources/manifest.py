"""Manifests: JSON Lines, one sample a line, with paths or inline text per field, plus labels and columns.

A byte order mark is no part of it. Paths are relative to the manifest's own folder, or absolute, or URIs. `null`, an absent
key and `""` mean that the value is absent. Bytes that are not UTF-8 spoil only the value they stand in: they reach
quarantine as they are.
"""

import codecs
import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import fsspec

from featurestore.errors import DecodeError, InputError
from featurestore.identity import check_id
from featurestore.times import RESERVED, TIMESTAMPS, timestamp_ns
from pipelines.sources import (
    MAX_VALUE_BYTES,
    Sample,
    SampleRef,
    Source,
    Value,
    too_large,
)

PROTOCOLS = ("file", "local", "s3", "gs", "http", "https")
MAX_LINE_BYTES = 16 << 20


class InlineText(NamedTuple):
    """Text that stands in the manifest itself."""

    text: str
    source: str

    def fetch(self) -> bytes:
        """Its bytes as they stood in the manifest, valid UTF-8 or not."""
        return _as_read(self.text)


class FileValue(NamedTuple):
    """A value in a file of its own; `source` is the path as the manifest gives it."""

    uri: str
    source: str

    def fetch(self) -> bytes:
        """The file's bytes; DecodeError `unreadable` or `too_large`."""
        try:
            fs, path = _filesystem(self.uri)
            content = _content(fs, path)
        except (DecodeError, MemoryError):
            raise
        except Exception as error:
            # An object store's client raises classes of five packages, none of them ours to import here.
            raise DecodeError("unreadable", f"{self.source}: {_reason(error)}") from error
        return content


def open_source(corpus: dict[str, Any]) -> Source:
    """The manifest that a corpus's `source.path` names."""
    return Manifest(corpus)


class Manifest:
    """One JSONL file."""

    def __init__(self, corpus: dict[str, Any]) -> None:
        self.uri: str = corpus["source"]["path"]
        self._names = {key: column for key, column in corpus["columns"].items() if column}
        self._fields: dict[str, dict[str, Any]] = corpus["fields"]
        self._taken = {*self._names.values(), *(field["from"] for field in self._fields.values())}
        self._seen: set[str] = set()
        self._reserved = {*RESERVED, *self._fields} - self._taken
        self._fs, self._path = fsspec.core.url_to_fs(self.uri)
        self._folder = posixpath.dirname(self._path)

    def references(self) -> Iterator[SampleRef]:
        """Every line as a reference; InputError names the line of one that is no JSON object, has no id or no right time."""
        try:
            # Buffered, because an object store's files have no `readline` with a limit.
            file = io.BufferedReader(self._fs.open(self._path, "rb"))
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"manifest {self.uri} cannot be read: {why}; correct corpus.source.path") from error
        with file:
            offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            file.seek(offset)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                where = f"{self.uri}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{where}: longer than {MAX_LINE_BYTES} bytes; put large texts in files (read: file)"
                    )
                if line.strip():
                    yield self._reference(line, offset, where)
                offset += len(line)

    def _reference(self, line: bytes, offset: int, where: str) -> SampleRef:
        row = _parse(line, where)
        sample_id, group = self._id_and_group(row, where)
        self._times(row, where)
        self._seen |= row.keys()
        if clash := sorted(self._reserved & row.keys()):
            raise InputError(
                f"{where}: column {clash[0]!r} would be kept beside Braid's own column of that name; rename it in the "
                f"manifest, or say in the spec what it is, e.g. corpus.columns: {{group: group}}"
            )
        digest = hashlib.sha256(line.strip())
        size = 0
        for value in self._values(row).values():
            if isinstance(value, FileValue):
                file_bytes, changed = self._stat(value.uri)
                digest.update(f"{file_bytes},{changed};".encode())
                size += file_bytes
            elif value is not None:
                size += len(value.fetch())
        return SampleRef(sample_id, group, digest.hexdigest()[:16], size, self.uri, offset, len(line))

    def _id_and_group(self, row: dict[str, Any], where: str) -> tuple[str, str]:
        sample_id = check_id(row.get(self._names["id"]), where)
        group = row.get(self._names["group"]) if "group" in self._names else None
        return sample_id, check_id(group, f"{where}: group") if group is not None else sample_id

    def _times(self, row: dict[str, Any], where: str) -> dict[str, int | None]:
        return {name: timestamp_ns(row.get(self._names[name]), where) for name in TIMESTAMPS if name in self._names}

    def _stat(self, uri: str) -> tuple[int, str]:
        try:
            fs, path = _filesystem(uri)
            info = fs.info(path)
        except Exception:
            return 0, "unreadable"
        return int(info.get("size") or 0), str(info.get("ETag") or info.get("etag") or info.get("mtime"))

    def columns(self) -> set[str]:
        """Names of all columns of the lines that `references()` has read so far."""
        return self._seen

    def place(self, reference: SampleRef) -> str:
        """The manifest and the line, counted by reading up to it."""
        number, left = 1, reference.offset
        with self._fs.open(self._path, "rb") as file:
            while block := file.read(min(left, MAX_LINE_BYTES)):
                number, left = number + block.count(b"\n"), left - len(block)
        return f"{self.uri}, line {number}"

    def samples(self, references: Iterable[SampleRef]) -> Iterator[Sample]:
        """Reads the lines of some references again, in the order given."""
        with self._fs.open(self._path, "rb") as file:
            for reference in references:
                file.seek(reference.offset)
                where = f"{self.uri}, byte {reference.offset}"
                try:
                    row = _parse(file.read(reference.length), where)
                    sample_id, group = self._id_and_group(row, where)
                except InputError:
                    sample_id = group = ""
                if (sample_id, group) != (reference.id, reference.group):
                    raise InputError(
                        f"{where}: found {sample_id!r} where planning saw {reference.id!r}: the manifest changed "
                        "while the job ran; run it again"
                    )
                columns = {
                    _printable(name): _printable(value) for name, value in row.items() if name not in self._taken
                }
                columns |= self._times(row, where)
                yield Sample(sample_id, group, reference.etag, columns, self._values(row))

    def _values(self, row: dict[str, Any]) -> dict[str, Value | None]:
        values: dict[str, Value | None] = {}
        for name, field in self._fields.items():
            given = row.get(field["from"])
            if given is None or given == "":
                values[name] = None
            elif field["read"] == "inline":
                values[name] = InlineText(
                    given if isinstance(given, str) else json.dumps(given), posixpath.basename(self.uri)
                )
            else:
                values[name] = FileValue(self._resolve(str(given)), str(given).encode("utf-8", "replace").decode())
        return values

    def _resolve(self, path: str) -> str:
        if "://" in path:
            return path
        joined = path if path.startswith("/") else posixpath.join(self._folder, path)
        return str(self._fs.unstrip_protocol(joined))


def _printable(value: Any) -> Any:
    """A kept column's value; bytes of a text that are not UTF-8 become U+FFFD, since a table cannot hold them."""
    return _as_read(value).decode("utf-8", "replace") if isinstance(value, str) else value


def _as_read(text: str) -> bytes:
    """A text of the manifest in the bytes that it stood there in, valid UTF-8 or not."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Half a pair, as JSON's escapes may write one: no UTF-8 either.
        return text.encode("utf-8", "surrogatepass")


def _content(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """All of a file, read up to the limit where its size is not known."""
    info = fs.info(path)
    if info["type"] != "file":
        raise ValueError(f"no file but a {info['type'] if info['type'] != 'other' else 'device or pipe'}")
    if size := int(info.get("size") or 0):
        if size > MAX_VALUE_BYTES:
            raise too_large(size)
        content: bytes = fs.cat_file(path)
        return content
    with fs.open(path, "rb") as file:
        content = file.read(MAX_VALUE_BYTES + 1)
    if len(content) > MAX_VALUE_BYTES:
        raise too_large(len(content))
    return content


def _reason(error: Exception) -> str:
    """What kept a file from being read, without folders of this machine: equal corpora give equal quarantines anywhere."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if uri.partition("://")[0] not in PROTOCOLS:
        raise ValueError(f"addresses of this kind are not read; allowed: {', '.join(PROTOCOLS)}")
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


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
