"""Bytes of files at any address: whole ones and ranges of them, on a disk, in an object store or on a web server.

What a web server may mend by itself (an error 500 to 599, 429, a time limit, a connection that drops half way) is tried again
after a while; what it will not (404, 403) is not. Object stores' clients try such errors again themselves, five
times or six, before they tell them: those are not tried anew.

What is raised is what the clients raise, of five packages, none of them ours to import here; `reason` has the words for it.
"""

import errno
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import fsspec

from featurestore import http
from featurestore.addresses import HOW_ELSE, has_credentials
from featurestore.errors import DecodeError

__all__ = [
    "MAX_VALUE_BYTES",
    "NoFile",
    "check_file",
    "filesystem",
    "may_pass",
    "part",
    "reason",
    "too_large",
    "tried",
    "whole",
]

MAX_VALUE_BYTES = 256 << 20
"""A value larger than this is refused before it is read."""

PROTOCOLS = ("file", "local", "s3", "gs", "http", "https")
PAUSES_S = (0.2, 0.8, 3.2)
"""How long to wait before each further try."""

_Got = TypeVar("_Got")


class NoFile(ValueError):
    """What is at an address is a folder, a device or a pipe."""


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The client for an address, and its path there.

    Raises:
        ValueError: an address of a kind that is not read, or one with a user's name or password.
        ImportError: its client is not installed.
    """
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    if protocol not in PROTOCOLS:
        raise ValueError(f"addresses of this kind are not read; allowed: {', '.join(PROTOCOLS)}")
    if protocol in ("file", "local"):
        # As below, at a third of the time: planning asks for it once a value.
        return _disk(), _disk()._strip_protocol(uri)
    if has_credentials(uri):
        raise ValueError(f"the address holds a name or a password; {HOW_ELSE}")
    client = fsspec.get_filesystem_class(protocol)
    own = client._get_kwargs_from_urls(uri) | (http.options() if _is_web(uri) else {})
    # Not by fsspec's own `url_to_fs`, which reads `::` in a name as a chain of addresses.
    return fsspec.filesystem(protocol, **own), client._strip_protocol(uri)


@cache
def _disk() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("file")


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def whole(uri: str) -> bytes:
    """All of a file, read up to the limit where its size is not known.

    Raises:
        DecodeError: `too_large`.
        NoFile: it is none.
        Exception: what its client raises.
    """
    return tried(lambda: _whole(uri), uri)


def part(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file, or fewer where it ends before. Raises as `whole`, but never `too_large`."""
    return tried(lambda: _part(uri, offset, size), uri)


def _whole(uri: str) -> bytes:
    fs, path = filesystem(uri)
    if _is_web(uri):
        return http.get(fs, path, MAX_VALUE_BYTES)
    info = fs.info(path)
    check_file(info)
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


def _part(uri: str, offset: int, size: int) -> bytes:
    fs, path = filesystem(uri)
    if _is_web(uri):
        return http.get_part(fs, path, offset, size)
    if "file" in fs.protocol:
        # Before it is opened: a pipe would wait for its writer.
        check_file(fs.info(path))
    try:
        content: bytes = fs.cat_file(path, start=offset, end=offset + size)
    except OSError as error:
        # What begins past the end of a file S3 refuses, as an invalid argument.
        if error.errno != errno.EINVAL or offset < int(fs.info(path)["size"]):
            raise
        return b""
    return content


def check_file(info: Mapping[str, Any]) -> None:
    """Raises NoFile where a client's `info` is of something else."""
    if info["type"] != "file":
        raise NoFile(f"no file but a {info['type'] if info['type'] != 'other' else 'device or pipe'}")


def too_large(size: int) -> DecodeError:
    """The rejection of a value over the limit."""
    return DecodeError("too_large", f"{size} bytes; at most {MAX_VALUE_BYTES} are allowed")


def tried(get: Callable[[], _Got], uri: str) -> _Got:
    """What `get` gives of an address; asked again where a web server may have mended by then what it raised."""
    last_s = time.monotonic() + http.TIME_LIMIT_S
    for pause in PAUSES_S if _is_web(uri) else ():
        try:
            return get()
        except Exception as error:
            if not may_pass(error) or time.monotonic() + pause > last_s:
                raise
        time.sleep(pause)
    return get()


def may_pass(error: BaseException) -> bool:
    """Whether another try may go better: a server's fault, or a connection's."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec says so of a web server's file whatever has failed.
        return may_pass(error.__cause__)
    lost = isinstance(error, ConnectionError | TimeoutError)
    return lost or any(f"{kind.__module__}.{kind.__name__}" in _LOST for kind in type(error).__mro__)


_LOST = ("aiohttp.client_exceptions.ClientConnectionError", "aiohttp.client_exceptions.ClientPayloadError")


def reason(error: BaseException) -> str:
    """What kept a file from being read, without folders of this machine: equal corpora give equal quarantines anywhere."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(status := getattr(error, "status", None), int):
        return f"{type(error).__name__}: {status} {getattr(error, 'message', '')}" if status else type(error).__name__
    if isinstance(error, TimeoutError):
        return "it did not come in time"
    if isinstance(error, OSError):
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno
        return error.strerror or (os.strerror(number) if number else type(error).__name__)
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
