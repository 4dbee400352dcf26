"""Headers of tars that anybody wrote: where each member stands, its data never read.

ustar, GNU (long names, base-256 sizes) and PAX (`path`, `size`). Python's `tarfile` is not used for it: it takes a damaged
header for the end of the tar, reads as much as a header claims, recurses once for each extended header, and reads 34,000
members a second where this reads 150,000 (members of 100 bytes, one core).
"""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

from featurestore.errors import DecodeError, InputError
from featurestore.files import filesystem
from pipelines.sources.files import Part, described, opened

__all__ = ["BLOCK", "MAX_AT_ONCE", "CutOff", "Member", "Tar", "members"]

BLOCK = 512
MAX_NAME_BYTES = 4096
_MAX_EXTENDED_BYTES = 1 << 20
MAX_AT_ONCE = 4 << 20
"""Samples up to this size are fetched whole, with those that stand beside them; of a larger one the first MiB."""

_MIN_WINDOW, _MAX_WINDOW, _MAX_AHEAD = 64 << 10, 16 << 20, 1 << 20
_SHRINK = 16
"""So much smaller the next window is where one cannot be read: each has been tried several times."""
_ZEROS = bytes(BLOCK)
_GZIP = b"\x1f\x8b"
_FILES = b"\0" + b"07"
_WITHOUT_DATA = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("3"): "a device",
    ord("4"): "a device",
    ord("5"): "a folder",
    ord("6"): "a pipe",
}
_NAME, _LINK_NAME, _PAX, _GLOBAL_PAX, _SPARSE = ord("L"), ord("K"), b"xX", ord("g"), ord("S")


class Member(NamedTuple):
    """A member: its headers begin at byte `start`, `size` bytes of data stand at `offset`.

    `kind` says what it is where it is no file: a link, a folder, a pipe, a device. Names that are not UTF-8 hold surrogates.
    """

    name: str
    start: int
    offset: int
    size: int
    kind: str

    @property
    def end(self) -> int:
        """Where the next member's headers begin."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class CutOff(Exception):
    """The tar ends before its end mark: what came after is lost. Its text says where and how."""


class Tar(AbstractContextManager["Tar"]):
    """A tar of `size` bytes to be read here and there. `change` is a text that changes when it does.

    On a disk it is read where a header stands. From elsewhere windows of it are read, from 64 KiB to 16 MiB: they grow while
    the next header is nearer than a window and shrink where it is not, so that small members are streamed over and large ones
    are left out. (Over http with 30 ms to the first byte and 100 MB/s, samples a second by windows and by ranges of single
    headers: of 100 KB 511 and 6, of 2 MB 28 and 5, of 20 MB 21 and 4.) Where a window cannot be read, smaller ones are, down to
    the header alone: what does not come may be data, which is rejected where it is fetched.
    """

    def __init__(self, uri: str, known: tuple[int, str] | None = None) -> None:
        """Of known size and change or not; InputError where it is not there. A file is opened when it is read first."""
        known = known or described(uri, "tar")
        if known is None:
            raise InputError(f"tar {uri} is not there; correct corpus.source.path")
        self.uri, (self.size, self.change) = uri, known
        self._window, self._at, self._step, self._alone_to = b"", 0, _MIN_WINDOW, 0
        self._on_disk = "file" in filesystem(uri)[0].protocol
        self._file: io.BufferedReader | None = None

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes, fewer where it ends. Raises InputError where they cannot be read."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if self._on_disk:
            if self._file is None:
                self._file = opened(self.uri, "tar")
            self._file.seek(offset)
            return self._file.read(size)
        begin = offset - self._at
        if not 0 <= begin <= len(self._window) - size:
            self._next_window(offset, size)
            begin = 0
        return self._window[begin : begin + size]

    def begin(self, offset: int, size: int) -> None:
        """Fetches the bytes of samples side by side, of more than MAX_AT_ONCE the first MiB, where they are not on a disk.

        What cannot be fetched so may be in parts.
        """
        if not self._on_disk:
            self._step = size if size <= MAX_AT_ONCE else _MAX_AHEAD
            with suppress(InputError):
                self._fetch(offset, self._step)

    def held(self, offset: int, size: int) -> bytes | None:
        """Bytes that have come already, from elsewhere than a disk; None where they have not."""
        begin = offset - self._at
        whole = not self._on_disk and 0 <= begin <= len(self._window) - size
        return self._window[begin : begin + size] if whole else None

    def _next_window(self, offset: int, size: int) -> None:
        if offset >= self._alone_to:
            near = 0 <= offset - self._at - len(self._window) < self._step
            self._step = min(self._step * 2, _MAX_WINDOW) if near else max(self._step // 2, _MIN_WINDOW)
        while offset >= self._alone_to and self._step > size:
            try:
                return self._fetch(offset, self._step)
            except InputError:
                if self._step == _MIN_WINDOW:
                    self._alone_to = offset + _MIN_WINDOW
                self._step = max(self._step // _SHRINK, _MIN_WINDOW)
        return self._fetch(offset, size)

    def _fetch(self, offset: int, size: int) -> None:
        size = min(size, self.size - offset)
        try:
            self._window, self._at = Part(self.uri, offset, size, "", self.uri).fetch(), offset
        except DecodeError as error:
            raise InputError(
                f"tar {self.uri} cannot be read: {error.detail}, at byte {offset}: so what is in it is not known; run it again"
            ) from None


def members(tar: Tar, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members whose headers stand from `start` on, in order, up to `end` or to the tar's end mark.

    A member whose data the tar does not hold is the last; its `size` is what its header claims.

    Raises:
        CutOff: after the last member, where the tar is cut off.
        InputError: a header is damaged, or says what no tar may say.
    """
    offset = first = start
    path, size = "", -1
    stop = tar.size if end is None else min(end, tar.size)
    while offset < stop:
        block = tar.read(offset, BLOCK)
        if len(block) < BLOCK:
            raise CutOff(f"it is cut off in the header at byte {offset}")
        if block == _ZEROS:
            return _check_end(tar, offset)
        kind = block[156]
        claimed = _checked_size(block, tar, offset)
        if kind in _PAX or kind in (_NAME, _LINK_NAME, _GLOBAL_PAX):
            content = _extended(tar, offset, claimed)
            offset += BLOCK + -(-claimed // BLOCK) * BLOCK
            if kind == _NAME:
                path = _text(content)
            elif kind != _LINK_NAME:
                path, size = _pax(content, path, size, kind == _GLOBAL_PAX, f"{tar.uri}, byte {offset}")
            continue
        member = _member(block, first, offset, path, claimed if size < 0 else size, tar)
        yield member
        if member.offset + member.size > tar.size:
            raise CutOff(
                f"it is cut off in {member.name!r}: {member.size} bytes are named, {tar.size - member.offset} are there"
            )
        offset = first = member.end
        path, size = "", -1
    if stop == tar.size:
        raise CutOff(f"it ends at byte {tar.size} without an end mark")


def _member(block: bytes, start: int, offset: int, path: str, size: int, tar: Tar) -> Member:
    kind = block[156]
    name = path or _own_name(block)
    if len(name) > MAX_NAME_BYTES:
        raise _damaged(tar, offset, f"a name of {len(name)} characters (at most {MAX_NAME_BYTES})")
    if kind in _FILES:
        what = "a folder" if kind == 0 and name.endswith("/") else ""
    elif kind == _SPARSE:
        raise _damaged(tar, offset, f"{name!r} is stored with holes; make it again without --sparse:")
    else:
        what = _WITHOUT_DATA.get(kind, f"a member of type {chr(kind)!r}")
    return Member(name, start, offset + BLOCK, 0 if kind in _WITHOUT_DATA else size, what)


def _own_name(block: bytes) -> str:
    name = _text(block[:100])
    # In GNU's own headers other things stand where ustar has the prefix.
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _checked_size(block: bytes, tar: Tar, offset: int) -> int:
    """The size that a header claims, once its checksum is found right: of unsigned bytes, or of signed as old tars have it."""
    difference = sum(block) - sum(block[148:156]) + 256 - _number(block[148:156])
    if difference and difference != sum(byte >= 128 for byte in block[:148] + block[156:]) * 256:
        if offset == 0:
            compressed = tar.read(0, 2) == _GZIP
            raise InputError(_gzipped(tar.uri) if compressed else f"{tar.uri} is no tar; correct corpus.source.path")
        raise _damaged(tar, offset, "a wrong checksum")
    size = _number(block[124:136])
    if size < 0:
        raise _damaged(tar, offset, f"the size {block[124:136]!r}")
    return size


def _gzipped(uri: str) -> str:
    return (
        f"{uri} is compressed with gzip: its members cannot be read one by one; unpack it "
        f"(gunzip {uri.rpartition('/')[2]}) and name the .tar in corpus.source.path (images gain nothing by gzip)"
    )


def _number(field: bytes) -> int:
    """An octal or base-256 number; -1 where it is none or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8) if not digits or digits.isdigit() else -1
    except ValueError:
        return -1


def _extended(tar: Tar, offset: int, size: int) -> bytes:
    if size > _MAX_EXTENDED_BYTES:
        raise _damaged(tar, offset, f"an extended header of {size} bytes (at most {_MAX_EXTENDED_BYTES})")
    content = tar.read(offset + BLOCK, size)
    if len(content) < size:
        raise CutOff(f"it is cut off in the header at byte {offset}")
    return content


def _pax(content: bytes, path: str, size: int, of_all: bool, where: str) -> tuple[str, int]:
    """The path and the size that PAX records give the next member, or those that it has already."""
    stream = io.BytesIO(content)
    while (at := stream.tell()) < len(content) and content[at]:
        length, space, _ = content[at : at + 8].partition(b" ")
        record = stream.read(int(length)) if space and length.isdigit() else b""
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(length):
            raise InputError(f"{where}: an extended header that is none; {_MEND}")
        value = value[:-1]
        if key.startswith(b"GNU.sparse."):
            raise InputError(f"{where}: the next member is stored with holes; make the tar again without --sparse")
        if key in (b"path", b"size") and of_all:
            raise InputError(f"{where}: one {key.decode()} for all members, which no tar has; {_MEND}")
        if key == b"path":
            path = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise InputError(f"{where}: the size {value[:40]!r} is no number; {_MEND}")
            size = int(value)
    return path, size


_MEND = "the tar is damaged: bring it again, or take it out of corpus.source.path"


def _damaged(tar: Tar, offset: int, what: str) -> InputError:
    return InputError(f"{tar.uri}, byte {offset}: {what} in a header; {_MEND}")


def _check_end(tar: Tar, offset: int) -> None:
    """InputError where something stands behind the end mark: other readers lose it without a word."""
    while block := tar.read(offset, _MIN_WINDOW):
        if block.count(0) != len(block):
            raise InputError(
                f"{tar.uri}: members stand behind its end mark at byte {offset}, where tars were joined with `cat`; join them "
                f"with `tar --concatenate`, or keep them apart"
            )
        offset += len(block)
