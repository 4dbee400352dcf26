"""Values in files: whole ones and ranges of them, on a disk, in an object store or on a web server; and lists of files.

What a server may mend by itself (an error 500 to 599, 429, a time limit, a connection that drops half way) is tried again
after a while; what it will not (404, 403) is not.
"""

import io
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import fsspec
from braceexpand import braceexpand

from featurestore.errors import DecodeError, InputError
from pipelines.sources import MAX_VALUE_BYTES

__all__ = ["FileValue", "Part", "change_of", "expand", "filesystem", "opened", "too_large"]

PROTOCOLS = ("file", "local", "s3", "gs", "http", "https")
PAUSES_S = (0.2, 0.8, 3.2)
"""How long to wait before each further try."""

_MAGIC = "*?[{"

_Got = TypeVar("_Got")


class FileValue(NamedTuple):
    """A value in a file of its own; `source` is the path as the source gives it."""

    uri: str
    source: str

    def stat(self) -> tuple[int, str]:
        """The file's size, and its etag or time of change."""
        try:
            fs, path = filesystem(self.uri)
            info = fs.info(path)
        except Exception:
            return 0, "unreadable"
        return int(info.get("size") or 0), change_of(info)

    def fetch(self) -> bytes:
        """The file's bytes; DecodeError `unreadable` or `too_large`."""
        return _told(lambda: _tried(self._content), self.source)

    def open(self) -> io.BufferedReader:
        """The file, to be read in pieces; DecodeError `unreadable`."""
        return _told(lambda: _tried(self._open), self.source)

    def _open(self) -> io.BufferedReader:
        fs, path = filesystem(self.uri)
        if (kind := fs.info(path)["type"]) != "file":
            raise ValueError(f"no file but a {kind if kind != 'other' else 'device or pipe'}")
        return io.BufferedReader(fs.open(path, "rb"))

    def _content(self) -> bytes:
        """All of the file, read up to the limit where its size is not known."""
        fs, path = filesystem(self.uri)
        info = fs.info(path)
        if info["type"] != "file":
            raise ValueError(f"no file but a {info['type'] if info['type'] != 'other' else 'device or pipe'}")
        if size := int(info.get("size") or 0):
            if size > MAX_VALUE_BYTES:
                raise too_large(size)
            content: bytes = fs.cat_file(path)
            if len(content) < size:
                raise ConnectionError(f"{len(content)} of {size} bytes came")
            return content
        with fs.open(path, "rb") as file:
            content = file.read(MAX_VALUE_BYTES + 1)
        if len(content) > MAX_VALUE_BYTES:
            raise too_large(len(content))
        return content


class Part(NamedTuple):
    """A value that is a range of a file: a member of a tar. `change` is the file's, `source` says which value it is."""

    uri: str
    offset: int
    size: int
    change: str
    source: str

    def stat(self) -> tuple[int, str]:
        """Its size, and the file's etag or time of change."""
        return self.size, self.change

    def fetch(self) -> bytes:
        """Its bytes; DecodeError `unreadable`, `truncated` (the file ends before it does) or `too_large`."""
        if self.size > MAX_VALUE_BYTES:
            raise too_large(self.size)
        return _told(lambda: _tried(self._content), self.source)

    def _content(self) -> bytes:
        fs, path = filesystem(self.uri)
        content: bytes = fs.cat_file(path, self.offset, self.offset + self.size)
        if len(content) < self.size:
            raise DecodeError("truncated", f"{self.source}: {self.size} bytes are named, {len(content)} are there")
        return content


def expand(paths: Iterable[str]) -> list[str]:
    """The files that paths name, sorted: `{000..999}` and `{a,b}` are lists, `*`, `?`, `[]` and `**` patterns.

    A file that is so called itself is meant before any pattern.

    Raises:
        InputError: a pattern that names nothing, braces that do not close, or an address of a kind that is not read.
    """
    found: set[str] = set()
    for path in paths:
        try:
            for each in [path] if _is_there(path) else braceexpand(path):
                found |= _matches(each)
        except ValueError as error:
            raise InputError(f"corpus.source.path {path!r}: {error}; write {{00..99}} or {{a,b}} for a list") from None
    return sorted(found)


def _is_there(path: str) -> bool:
    return not any(magic in path for magic in _MAGIC) or ("://" not in path and os.path.exists(path))


def _matches(path: str) -> set[str]:
    if _is_there(path) or not any(magic in path for magic in "*?["):
        return {path}
    fs, pattern = filesystem(path)
    names = {str(fs.unstrip_protocol(name)) if "://" in path else str(name) for name in fs.glob(pattern)}
    if not names:
        raise InputError(f"corpus.source.path {path!r} names no file; correct the pattern")
    # What fsspec makes absolute is told, and stored, as it was given.
    here = f"{os.getcwd()}/"
    return names if "://" in path or os.path.isabs(path) else {name.removeprefix(here) for name in names}


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The client for an address, and its path there. Raises ValueError on an address of a kind that is not read."""
    if "://" in uri and uri.partition("://")[0] not in PROTOCOLS:
        raise ValueError(f"addresses of this kind are not read; allowed: {', '.join(PROTOCOLS)}")
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def opened(uri: str, what: str) -> io.BufferedReader:
    """A file of the source's own, e.g. a manifest, open for reading. Raises InputError, which calls it `what`."""
    try:
        fs, path = filesystem(uri)
        # Buffered, because an object store's files have no `readline` with a limit.
        return io.BufferedReader(_tried(lambda: fs.open(path, "rb")))
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {uri} cannot be read: {why}; correct corpus.source.path") from error


def change_of(info: dict[str, Any]) -> str:
    """Of what a client says of a file: the text that changes when the file does."""
    return str(info.get("ETag") or info.get("etag") or info.get("mtime"))


def too_large(size: int) -> DecodeError:
    """The rejection of a value over the limit."""
    return DecodeError("too_large", f"{size} bytes; at most {MAX_VALUE_BYTES} are allowed")


def _told(fetch: Callable[[], _Got], source: str) -> _Got:
    try:
        return fetch()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # An object store's client raises classes of five packages, none of them ours to import here.
        raise DecodeError("unreadable", f"{source}: {_reason(error)}") from error


def _tried(get: Callable[[], _Got]) -> _Got:
    for pause in PAUSES_S:
        try:
            return get()
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return get()


def _may_pass(error: Exception) -> bool:
    """Whether another try may go better: a server's fault, or a connection's."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    lost = isinstance(error, ConnectionError | TimeoutError)
    return lost or any(kind.__module__.startswith("aiohttp") for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    """What kept a file from being read, without folders of this machine: equal corpora give equal quarantines anywhere."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
