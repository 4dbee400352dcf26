"""Values in files, whole ones and ranges of them; a source's own files; and lists of files. `featurestore.files` reads them."""

import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import fsspec
from braceexpand import braceexpand

from featurestore import files
from featurestore.errors import DecodeError, InputError
from featurestore.files import filesystem
from pipelines.sources.bounds import Bounds

__all__ = ["FileValue", "Part", "change_of", "described", "expand", "opened"]

_MAGIC = "*?[{"

_Got = TypeVar("_Got")


class FileValue(NamedTuple):
    """A value in a file of its own; `source` is the path as the source gives it, `bounds` are where the file may lie."""

    uri: str
    source: str
    bounds: Bounds | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The file, from its beginning."""
        return self.uri, 0

    def stat(self) -> tuple[int, str]:
        """The file's size, and its etag or time of change."""
        return self.asking()()

    def asking(self) -> Callable[[], tuple[int, str]]:
        """`stat`, to be done in any thread by the client of this one: a client of its own would connect anew in each."""
        try:
            if self.bounds is not None and not self.bounds.name(self.uri):
                return lambda: (0, "outside")
            return partial(_stat, *filesystem(self.uri))
        except Exception:
            return lambda: _UNREADABLE

    def fetch(self) -> bytes:
        """The file's bytes; DecodeError `unreadable`, `too_large`, or `outside` of its bounds."""
        self._check_bounds()
        return _told(lambda: files.whole(self.uri), self.source)

    def open(self) -> io.BufferedReader:
        """The file, to be read in pieces; DecodeError `unreadable`, from its reads and seeks as well, or `outside`."""
        self._check_bounds()
        file = _told(lambda: files.tried(self._open, self.uri), self.source)
        return io.BufferedReader(_Steady(file, self.uri, self._unreadable))

    def _check_bounds(self) -> None:
        try:
            if self.bounds is None or self.bounds.hold(self.uri):
                return
        except (OSError, ValueError, ImportError):
            # What is no address is told where it is read.
            return
        raise DecodeError("outside", f"{self.source}: {self._outside}")

    @property
    def _outside(self) -> str:
        return "it leads out of the folder of what names it; name the folder that it is in as corpus.source.root"

    def _open(self) -> Any:
        fs, path = filesystem(self.uri)
        files.check_file(fs.info(path))
        return fs.open(path, "rb")

    def _unreadable(self, error: Exception, at: int) -> Exception:
        return DecodeError("unreadable", f"{self.source}: {files.reason(error)}")


_UNREADABLE = 0, "unreadable"


def _stat(fs: fsspec.AbstractFileSystem, path: str) -> tuple[int, str]:
    try:
        info = fs.info(path)
    except Exception:
        return _UNREADABLE
    return int(info.get("size") or 0), change_of(info)


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
        if self.size > files.MAX_VALUE_BYTES:
            raise files.too_large(self.size)
        if self.held is not None:
            return self.held
        content = _told(lambda: files.part(self.uri, self.offset, self.size), self.source)
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


def opened(uri: str, what: str) -> io.BufferedReader:
    """A file of the source's own, e.g. a manifest, open for reading. Raises InputError, which calls it `what`."""
    try:
        fs, path = filesystem(uri)
        file = files.tried(lambda: fs.open(path, "rb"), uri)
    except Exception as error:
        raise InputError(f"{what} {uri} cannot be read: {files.reason(error)}; correct corpus.source.path") from error

    def unreadable(error: Exception, at: int) -> Exception:
        return InputError(
            f"{what} {uri} cannot be read on from byte {at}: {files.reason(error)}; run it again, or copy it to a disk or an "
            "object store"
        )

    # Buffered, because an object store's files have no `readline` with a limit.
    return io.BufferedReader(_Steady(file, uri, unreadable))


class _Steady(io.RawIOBase):
    """A file that is tried again where it fails while it is read, and given up for good where that does not help.

    Args:
        file: as its client opened it.
        uri: its address.
        unreadable: (what the client raised, from which byte on) -> what is raised.
    """

    def __init__(self, file: Any, uri: str, unreadable: Callable[[Exception, int], Exception]) -> None:
        self._file, self._uri, self._unreadable = file, uri, unreadable
        self._failed: Exception | None = None

    def readinto(self, buffer: Any) -> int:
        # Who reads media asks again after an error, and would wait for each time.
        if self._failed is not None:
            raise self._failed
        at = self.tell()
        try:
            content = files.tried(lambda: self._read(at, len(buffer)), self._uri)
        except Exception as error:
            self._failed = self._unreadable(error, at)
            raise self._failed from error
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
            raise self._unreadable(error, offset) from error

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
        info = files.tried(lambda: _info(fs, path), uri)
        files.check_file(info)
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
        if isinstance(error.__cause__, Exception) and files.may_pass(error.__cause__):
            raise error.__cause__ from None
        raise
    return info


def change_of(info: dict[str, Any]) -> str:
    """Of what a client says of a file: the text that changes when the file does."""
    return str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("Last-Modified"))


def _told(fetch: Callable[[], _Got], source: str) -> _Got:
    try:
        return fetch()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # An object store's client raises classes of five packages, none of them ours to import here.
        raise DecodeError("unreadable", f"{source}: {files.reason(error)}") from error
