"""Values that a corpus refers to: bytes of files outside the store, below the one root that its reader names.

A reference is a path relative to the root, so that a store is the same wherever its corpus lies, and finds it where it was
moved to. The root is never read from the store, which may be anybody's: it is the spec's, or `Storage.media_root`. A path that
leads out of it is not followed; symbolic links below a local root are the root's owner's, and are.
"""

import posixpath
from urllib.parse import unquote

from featurestore import files
from featurestore.errors import AlignmentError, InputError, MissingExtra, NotFound, StoreError
from featurestore.files import MAX_VALUE_BYTES, NoFile
from featurestore.identity import input_digest
from featurestore.storage import Storage

__all__ = ["from_root", "read_value", "relative"]


def relative(storage: Storage, uri: str) -> str | None:
    """The reference to a file, relative to the root; None where the file has a name that none can have.

    Raises:
        StoreError: no root is named.
        InputError: the file lies outside of the root.
    """
    root = _root(storage)
    path = uri
    for prefix in ("file://", "local://"):
        path = path.removeprefix(prefix)
    if "://" not in path:
        path = posixpath.normpath(path)
    reference = path.removeprefix(f"{root.rstrip('/')}/")
    if reference == path:
        raise InputError(
            f"{uri} is to be referred to and lies outside of {root}; name a folder or bucket that holds all values in "
            "store.media_root, or write media: copy"
        )
    return reference if _is_inside(reference) and _is_text(reference) else None


def from_root(storage: Storage, path: str) -> str:
    """Where a file of the source lies, from the root; the root itself where they are in places of two kinds."""
    root = _root(storage)
    (kind, _, start), (other, _, rest) = root.rpartition("://"), path.removeprefix("file://").rpartition("://")
    if kind != other:
        return root
    return posixpath.relpath(*((f"/{rest}", f"/{start}") if kind else (posixpath.abspath(rest), start)))


def read_value(storage: Storage, reference: str, offset: int, size: int, digest: bytes) -> bytes:
    """The bytes of a reference, proven; may be called from many threads at once.

    Raises:
        NotFound: the file is gone.
        AlignmentError: it is not the value that was stored, or the reference leads out of the root.
        StoreError: no root is named, or it cannot be read now.
    """
    root = _root(storage)
    where = f"{root.rstrip('/')}/{reference}"
    if not _is_inside(reference) or offset < 0 or not 0 < size <= MAX_VALUE_BYTES:
        raise AlignmentError(
            f"{reference!r}, {size} bytes at {offset}: no reference to a value below {root} of at most {MAX_VALUE_BYTES} "
            "bytes; the store was changed, run `braid verify`"
        )
    raw = _read(root, where, offset, size)
    if input_digest(raw) != digest:
        raise AlignmentError(f"{where}: not the value that was stored: the file changed, was cut or was swapped")
    return raw


def _root(storage: Storage) -> str:
    if storage.media_root is None:
        raise StoreError(
            f"{storage.uri}: its corpus refers to values outside the store, and nothing says where: name the spec in place of "
            "the store, or the folder or bucket of the source as media_root (of Storage, or of the spec's store)"
        )
    return storage.media_root


def _is_inside(reference: str) -> bool:
    # A web server may take %2e for a dot.
    return ".." not in unquote(reference).replace("\\", "/").split("/") and "\0" not in reference


def _is_text(reference: str) -> bool:
    try:
        return bool(reference.encode())
    except UnicodeEncodeError:
        return False


def _read(root: str, where: str, offset: int, size: int) -> bytes:
    try:
        # A reference to a local file may look like an address itself.
        return files.part(where if "://" in root else f"file://{where}", offset, size)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NoFile) as error:
        raise NotFound(f"{where}: gone since it was stored") from error
    except ImportError as error:
        raise MissingExtra(f"{where} needs a package that is not installed here: {error}") from error
    except Exception as error:
        # An object store's client raises classes of five packages, none of them ours to import here.
        raise StoreError(f"{where}: cannot be read now: {files.reason(error)}; mend that, and run it again") from error
