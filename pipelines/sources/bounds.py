"""Where the files may lie that a source's rows or folders name: rows are anybody's, and what they name is read and stored.

A file on a disk must lie in the folder of the manifest, or the Parquet file, that names it, links followed, or in a local
folder of `corpus.source.root`. Addresses of object stores and web servers are read with the reader's own credentials wherever
they lead, unless `root` names such prefixes too: then they must begin with one of these, or with the manifest's own folder.
"""

import os
import posixpath
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

from featurestore.errors import InputError
from featurestore.files import filesystem

__all__ = ["Bounds", "bounds_of", "is_far"]


class Bounds(NamedTuple):
    """Folders of a disk, absolute, and beginnings of addresses elsewhere; `far` is None where all of these are allowed."""

    near: tuple[str, ...] = ()
    far: tuple[str, ...] | None = None

    def name(self, uri: str) -> bool:
        """Whether an address lies within as it is written; looks at no disk."""
        if is_far(uri):
            return self.far is None or any(_below(uri, each) and _stays(uri) for each in self.far)
        return any(_below(os.path.normpath(_path(uri)), each) for each in self.near)

    def hold(self, uri: str) -> bool:
        """Whether a file lies within, links followed."""
        return self.name(uri) and (
            is_far(uri) or any(_below(os.path.realpath(_path(uri)), _real(x)) for x in self.near)
        )


def bounds_of(uri: str, roots: Iterable[str]) -> Bounds:
    """Of what a file names: its own folder, and some roots. InputError where a root is no address that is read."""
    fs, path = filesystem(uri)
    own = str(fs.unstrip_protocol(posixpath.dirname(path)))
    try:
        addresses = [_address(each) for each in roots]
    except (ValueError, ImportError) as error:
        raise InputError(f"corpus.source.root: {error}") from None
    far = [each for each in addresses if is_far(each)]
    near = [os.path.normpath(_path(each)) for each in (own, *addresses) if not is_far(each)]
    return Bounds(tuple(near), (*far, *([own] if is_far(own) else [])) if far else None)


def is_far(uri: str) -> bool:
    """Whether an address is not of this machine's disks."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def _address(root: str) -> str:
    fs, path = filesystem(root)
    # As it is written, where it is a web server's: fsspec knows no other form of it.
    return root if is_far(root) else str(fs.unstrip_protocol(path))


def _path(uri: str) -> str:
    path: Any = filesystem(uri)[1]
    return str(path)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder if folder.endswith("/") else f"{folder}/")


def _stays(uri: str) -> bool:
    # A web server may take %2e for a dot.
    return ".." not in unquote(uri).replace("\\", "/").split("/")


@lru_cache(64)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
