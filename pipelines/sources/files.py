"""Values in files: whole ones and ranges of them, on a disk, in an object store or on a web server; and lists of files.

What a web server may mend by itself (an error 500 to 599, 429, a time limit, a connection that drops half way) is tried again
after a while; what it will not (404, 403) is not. Object stores' clients try such errors again themselves, five
times or six, before they tell them: those are not tried anew.
"""

import errno
import io
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import fsspec
from braceexpand import braceexpand

from featurestore.errors import DecodeError, InputError
from pipelines.sources import MAX_VALUE_BYTES, http

__all__ = ["FileValue", "Part", "change_of", "described", "expand", "filesystem", "opened", "too_large"]

PROTOCOLS = ("file", "local", "s3", "gs", "http", "https")
PAUSES_S = (0.2, 0.8, 3.2)
"""How long to wait before each further try."""

_MAGIC = "*?[{"

_Got = TypeVar("_Got")


class FileValue(NamedTuple):
    """A value in a file of its own; `source` is the path as the source gives it."""

    uri: str
    source: str

    @property
    def address(self) -> tuple[str, int]:
        """The file, from its beginning."""
        return self.uri, 0

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
        return _told(lambda: _tried(self._content, self.uri), self.source)

    def open(self) -> io.BufferedReader:
        """The file, to be read in pieces; DecodeError `unreadable`."""
        return _told(lambda: _tried(self._open, self.uri), self.source)

    def _open(self) -> io.BufferedReader:
        fs, path = filesystem(self.uri)
        if (kind := fs.info(path)["type"]) != "file":
            raise ValueError(f"no file but a {kind if kind != 'other' else 'device or pipe'}")
        return io.BufferedReader(fs.open(path, "rb"))

    def _content(self) -> bytes:
        """All of the file, read up to the limit where its size is not known."""
        fs, path = filesystem(self.uri)
        if _is_web(self.uri):
            return http.get(fs, path, MAX_VALUE_BYTES)
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
    """A value that is a range of a file: a member of a tar. `change` is the file's, `source` says which value it is.

    `held` are its bytes, where they came along with others.
    """

    uri: str
    offset: int
    size: int
    change: str
    source: str
    held: bytes | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The file and where the range begins."""
        return self.uri, self.offset

    def stat(self) -> tuple[int, str]:
        """Its size, and the file's etag or time of change."""
        return self.size, self.change

    def fetch(self) -> bytes:
        """Its bytes; DecodeError `unreadable`, `truncated` (the file ends before it does) or `too_large`."""
        if self.size > MAX_VALUE_BYTES:
            raise too_large(self.size)
        if self.held is not None:
            return self.held
        return _told(lambda: _tried(self._content, self.uri), self.source)

    def _content(self) -> bytes:
        fs, path = filesystem(self.uri)
        content: bytes
        if _is_web(self.uri):
            content = http.get_part(fs, path, self.offset, self.size)
        else:
            content = fs.cat_file(path, start=self.offset, end=self.offset + self.size)
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
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    if protocol not in PROTOCOLS:
        raise ValueError(f"addresses of this kind are not read; allowed: {', '.join(PROTOCOLS)}")
    client = fsspec.get_filesystem_class(protocol)
    own = client._get_kwargs_from_urls(uri) | (http.options() if _is_web(uri) else {})
    # Not by fsspec's own `url_to_fs`, which reads `::` in a name as a chain of addresses.
    return fsspec.filesystem(protocol, **own), client._strip_protocol(uri)


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def opened(uri: str, what: str) -> io.BufferedReader:
    """A file of the source's own, e.g. a manifest, open for reading. Raises InputError, which calls it `what`."""
    try:
        fs, path = filesystem(uri)
        file = _tried(lambda: fs.open(path, "rb"), uri)
    except Exception as error:
        raise InputError(f"{what} {uri} cannot be read: {_reason(error)}; correct corpus.source.path") from error
    # Buffered, because an object store's files have no `readline` with a limit.
    return io.BufferedReader(_Steady(file, uri, f"{what} {uri}"))


_AGAIN = "run it again, or copy it to a disk or an object store"


class _Steady(io.RawIOBase):
    """A file of the source's own that is tried again, and told, where it fails while it is read."""

    def __init__(self, file: Any, uri: str, name: str) -> None:
        self._file, self._uri, self._name = file, uri, name

    def readinto(self, buffer: Any) -> int:
        try:
            at = self._file.tell()
            content = _tried(lambda: self._read(at, len(buffer)), self._uri)
        except Exception as error:
            raise InputError(f"{self._name} cannot be read on from byte {at}: {_reason(error)}; {_AGAIN}") from error
        buffer[: len(content)] = content
        return len(content)

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        content: bytes = self._file.read(size)
        return content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._file.seek(offset, whence))
        except ValueError as error:
            raise InputError(f"{self._name} cannot be read from byte {offset} on: {error}; {_AGAIN}") from error

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def described(uri: str, what: str) -> tuple[int, str] | None:
    """A file's size in bytes, and a text that changes when it does; None where it is not there.

    Raises InputError, which calls it `what`, where nobody can say: it is no file, is kept from us, or its server tells no size.
    """
    try:
        fs, path = filesystem(uri)
        info = _tried(lambda: _info(fs, path), uri)
        if info["type"] != "file":
            raise ValueError(f"it is a {info['type'] if info['type'] != 'other' else 'device or pipe'}")
        if info.get("size") is None:
            raise ValueError("its server does not tell its size")
    except FileNotFoundError:
        return None
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {uri} cannot be read: {why}; correct corpus.source.path") from error
    return int(info["size"]), change_of(info)


def _info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        # An http client calls it so too where a server failed, or a connection.
        if isinstance(error.__cause__, Exception) and _may_pass(error.__cause__):
            raise error.__cause__ from None
        raise
    return info


def change_of(info: dict[str, Any]) -> str:
    """Of what a client says of a file: the text that changes when the file does."""
    return str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("Last-Modified"))


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


def _tried(get: Callable[[], _Got], uri: str) -> _Got:
    last_s = time.monotonic() + http.TIME_LIMIT_S
    for pause in PAUSES_S if _is_web(uri) else ():
        try:
            return get()
        except Exception as error:
            if not _may_pass(error) or time.monotonic() + pause > last_s:
                raise
        time.sleep(pause)
    return get()


def _may_pass(error: BaseException) -> bool:
    """Whether another try may go better: a server's fault, or a connection's."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec says so of a web server's file whatever has failed.
        return _may_pass(error.__cause__)
    lost = isinstance(error, ConnectionError | TimeoutError)
    return lost or any(f"{kind.__module__}.{kind.__name__}" in _LOST for kind in type(error).__mro__)


_LOST = ("aiohttp.client_exceptions.ClientConnectionError", "aiohttp.client_exceptions.ClientPayloadError")


def _reason(error: BaseException) -> str:
    """What kept a file from being read, without folders of this machine: equal corpora give equal quarantines anywhere."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    if isinstance(status := getattr(error, "status", None), int):
        return f"{type(error).__name__}: {status} {getattr(error, 'message', '')}" if status else type(error).__name__
    if isinstance(error, TimeoutError):
        return "it did not come in time"
    if isinstance(error, OSError):
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno
        return error.strerror or (os.strerror(number) if number else type(error).__name__)
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
