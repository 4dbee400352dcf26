"""Folders: files that belong together by their names, e.g. `a/7.png`, `a/7.txt` and `a/7_desc.ogg`.

A field's `from` is a pattern relative to the folder, or a list of patterns: text with `{id}` once in it, which stands for the
sample's id and may hold slashes. `{id}.png` and `{id}_desc.ogg` find both files of sample `a/7`; `images/{id}.png` and
`texts/{id}.txt` those of one in folders beside each other. Small and capital letters differ. Where patterns of different
lengths match one file, the longest takes it: `{id}.ogg` does not get `7_desc.ogg`. The samples are the union of the ids
that any pattern finds, in the order of their ids. A field of text is its file's text.

Two files for one field of a sample (`7.jpg` and `7.png`) are no reason to hold up a million others: the value goes to
quarantine as `ambiguous`, which names both, and the rest of the sample comes in.

A sample's columns are `id`, `folder` (the id up to its last slash; null at the top) and `name` (the rest). A folder that is
the group groups the samples in it; those at the top are a group each.

Files and folders whose name begins with a dot are left out, and so are files that no pattern takes, of which `remarks()` tells.
A symbolic link to a file is that file where it is in the folder too, else its value goes to quarantine as `outside`; links to
folders are not followed.

Several folders, of a list of paths, a pattern `f/*` or a list `f/{a,b}`, each have all of the fields' patterns. Ids are then
relative to the folder that all of them are in: of a pattern or a list in braces that is the one before it, however many folders
it names, so that `f/*` gives `a/1` and one folder more changes no id. None may lie in another: a file would be two samples.

Planning lists each folder once and opens no file. It holds about 50 bytes and the id, twice at most, of every sample (of every
file, where a sample's are listed far from each other), on a disk the names in the folder being listed too (60 bytes each), and
on gs:// all that the client tells of each object (2 kB).
"""

import os
import posixpath
import re
import stat
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import groupby, islice, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from featurestore.errors import DecodeError, InputError
from featurestore.files import filesystem
from featurestore.identity import check_id, hash64
from pipelines.sources import SampleRef, Source, Value
from pipelines.sources.bounds import Bounds
from pipelines.sources.files import FileValue, change_of, expand
from pipelines.sources.rows import Row, RowSource, printable

__all__ = ["COLUMNS", "MAX_PATTERNS", "Folder", "Listed", "Patterns", "listing", "mistakes"]

COLUMNS = ("id", "folder", "name")
"""The columns of a folder's samples."""

MAX_PATTERNS = 62
"""Of all fields together: which of them found a file of a sample is one int64 in its reference."""

_ID = "{id}"
_BATCH = 4_096

_TOLD_LEFT = 3
_MAX_ENDINGS = 100
"""Of files that no pattern takes so many endings are counted apart, and so many told."""

_FILES = pa.schema([("id", pa.large_string()), ("patterns", pa.int64()), ("size", pa.int64()), ("change", pa.uint64())])

_Files = tuple[str, int, int, int]
"""Of a sample: id, the patterns that found a file as bits, bytes in all, and a sum of hashes of paths, sizes and changes."""


def open_source(corpus: dict[str, Any]) -> Source:
    """The folders that a corpus's `source.path` names."""
    return Folder(corpus)


class Listed(NamedTuple):
    """A file as a listing tells of it: its path below the folder, its size in bytes, a text that changes when it does."""

    path: str
    size: int
    change: str


class Pattern(NamedTuple):
    """A pattern of a field: what stands before and after the id."""

    field: str
    before: str
    after: str

    def path(self, sample_id: str) -> str:
        """The path below the folder of a sample's file."""
        return f"{self.before}{sample_id}{self.after}"

    def __str__(self) -> str:
        return self.path(_ID)


class Patterns:
    """Says which field of which sample a file is.

    Args:
        fields: field -> its pattern, or a list of them.

    Raises:
        InputError: a pattern that cannot be one, or stands twice.
    """

    def __init__(self, fields: Mapping[str, str | Iterable[str]]) -> None:
        for field, told in mistakes(fields):
            raise InputError(f"corpus.fields.{field}: {told}")
        # By name, because workers get a spec's fields in another order than planning does.
        self.all = [_pattern(field, text) for field, given in sorted(fields.items()) for text in _texts(given)]
        self._by_length = sorted(
            ((len(each.before) + len(each.after), number, each) for number, each in enumerate(self.all)),
            key=lambda ranked: (-ranked[0], ranked[1]),
        )

    def match(self, path: str) -> tuple[int, str] | None:
        """The number of the pattern that takes a file, and its sample's id; None where no pattern does.

        Raises:
            InputError: patterns of equal length match the file, and no other.
        """
        taken: tuple[int, int, str] | None = None
        for length, number, (_, before, after) in self._by_length:
            if taken is not None and length < taken[0]:
                break
            if len(path) > length and path.startswith(before) and path.endswith(after):
                sample_id = path[len(before) : len(path) - len(after)]
                if sample_id[0] == "/" or sample_id[-1] == "/":
                    continue
                if taken is not None:
                    first, second = self.all[taken[1]], self.all[number]
                    raise InputError(
                        f"{path!r} matches {str(first)!r} of field {first.field!r} and {str(second)!r} of field "
                        f"{second.field!r}, which are equally long; make one longer, so that it is clear whose file it is"
                    )
                taken = length, number, sample_id
        return None if taken is None else taken[1:]


def mistakes(fields: Mapping[str, str | Iterable[str]]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with its patterns), one for each mistake."""
    seen: dict[str, str] = {}
    for field, given in fields.items():
        if field in COLUMNS:
            yield field, f"every sample of a folder has a column {field!r}; rename the field"
        for text in _texts(given):
            if text.count(_ID) != 1:
                yield field, f"pattern {text!r} must have {_ID} in it once, e.g. '{{id}}.png', for the sample's id"
            elif any(not part or part.startswith(".") for part in text.split("/")):
                yield (
                    field,
                    (
                        f"pattern {text!r} must be a path below the folder, e.g. 'images/{{id}}.png', without empty parts and "
                        "parts that begin with a dot: hidden files are left out"
                    ),
                )
            elif text in seen:
                yield field, f"pattern {text!r} is one of field {seen[text]!r} already; a file has one field"
            seen.setdefault(text, field)
    if len(seen) > MAX_PATTERNS:
        yield field, f"{len(seen)} patterns in all; at most {MAX_PATTERNS} are allowed"


def _texts(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _pattern(field: str, text: str) -> Pattern:
    before, _, after = text.partition(_ID)
    return Pattern(field, before, after)


class _Place(NamedTuple):
    """One of the folders: as it is named, its address, and what the ids of its samples begin with."""

    prefix: str
    path: str
    base: str


class Folder(RowSource):
    """Folders on a disk or in an object store."""

    def __init__(self, corpus: dict[str, Any]) -> None:
        super().__init__(corpus)
        self._places = _places(self.paths)
        self._prefixes = [place.prefix for place in self._places]
        self._patterns = Patterns({name: field["from"] for name, field in self.fields.items()})
        self._left: dict[str, tuple[int, str]] = {}

    def unmatched(self) -> dict[str, str]:
        """Field -> its patterns, of the fields that no file matches."""
        return {
            name: ", ".join(_texts(field["from"])) for name, field in self.fields.items() if name not in self._found
        }

    def references(self) -> Iterator[SampleRef]:
        """Every sample, by its id. Raises InputError where no file matches, or one has a name that is no id."""
        for sample_id, mask, size, change in _sorted(_joined(self._matched())):
            row = self._row(sample_id, mask, f"{change:x}".encode())
            # Of its files the listing has told all.
            found = [(field, (0, "")) for field, value in row.values.items() if value is not None]
            yield self._reference(row, found)._replace(bytes=size)

    def remarks(self) -> list[str]:
        """How many files no pattern took, by their endings, with an example of each: a README, or pictures `.JPG`."""
        if not self._left:
            return []
        most = sorted(self._left.items(), key=lambda each: (-each[1][0], each[0]))
        count, told = sum(each for _, (each, _) in most), most[:_TOLD_LEFT]
        by_ending = ", ".join([*(f"{own} {ending}" for ending, (own, _) in told), *["…"][: len(most) - len(told)]])
        examples = ", ".join(repr(path) for _, (_, path) in told)
        return [f"files that no pattern takes, left out: {count} ({by_ending}), e.g. {examples}"]

    def rows(self) -> Iterator[Row]:
        """Every sample, by its id."""
        return self.read(self.references())

    def _matched(self) -> Iterator[_Files]:
        """Every file that a pattern takes."""
        listed, taken, self._left = 0, 0, {}
        for place, file in ((each, file) for each in self._places for file in listing(each.path)):
            listed += 1
            if (matched := self._patterns.match(file.path)) is not None:
                taken, (number, sample_id) = taken + 1, matched
                sample_id = check_id(f"{place.prefix}{sample_id}", printable(f"{place.path}/{file.path}"))
                yield sample_id, 1 << number, file.size, hash64(f"{file.path}\n{file.size}\n{file.change}")
            else:
                self._leave(f"{place.prefix}{file.path}")
        if not taken:
            example = next((f", e.g. {path!r}" for _, path in self._left.values()), "")
            raise InputError(
                f"{', '.join(each.path for each in self._places[:5])} has no file that matches "
                f"{', '.join(map(repr, map(str, self._patterns.all)))}; files there: "
                f"{listed}{example}; correct corpus.source.path or the fields' patterns, or let `braid init FOLDER` write them"
            )

    def _leave(self, path: str) -> None:
        stem, dot, last = posixpath.basename(path).rpartition(".")
        ending = f".{last}" if stem and dot and last.isalnum() else "without an ending"
        if ending not in self._left and len(self._left) >= _MAX_ENDINGS:
            ending = "of other endings"
        count, first = self._left.get(ending, (0, path))
        self._left[ending] = count + 1, first

    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Samples again, without a look at the folder: a reference says which patterns found a file."""
        for reference in references:
            yield self._row(reference.id, reference.offset, b"")

    def place(self, reference: SampleRef) -> str:
        """The folder and the id."""
        return f"{self._place_of(reference.id).path}, sample {reference.id!r}"

    def _place_of(self, sample_id: str) -> _Place:
        """None of the prefixes, which are sorted, begins another: a sample's own is the last that is not behind its id."""
        return self._places[max(0, bisect_right(self._prefixes, sample_id) - 1)]

    def _row(self, sample_id: str, mask: int, content: bytes) -> Row:
        place = self._place_of(sample_id)
        if not sample_id.startswith(place.prefix):
            # Its folder is none of the source's any more: a row without an id says so.
            return Row({}, {}, content, place.path, mask, 0, f"{place.path}, sample {sample_id!r}")
        bounds = Bounds((os.path.normpath(place.base.removeprefix("file://")),))
        found: dict[str, list[FolderFile]] = {field: [] for field in self.fields}
        for number, pattern in enumerate(self._patterns.all):
            if mask >> number & 1:
                path = pattern.path(sample_id.removeprefix(place.prefix))
                found[pattern.field].append(FolderFile(f"{place.base}/{path}", f"{place.prefix}{path}", bounds))
        values: dict[str, Value | None] = {
            field: Ambiguous(tuple(files)) if len(files) > 1 else next(iter(files), None)
            for field, files in found.items()
        }
        folder, _, name = sample_id.rpartition("/")
        columns = {"id": sample_id, "folder": folder or None, "name": name}
        return Row(columns, values, content, place.path, mask, 0, f"{place.path}, sample {sample_id!r}")


class FolderFile(FileValue):
    """A value in a file of a folder; `source` is its path below the folder that ids are relative to."""

    def stat(self) -> tuple[int, str]:
        """Nothing: the listing told its size and its change, which are in its sample's reference."""
        return 0, ""

    @property
    def _outside(self) -> str:
        return "a link that leads out of the corpus's folder"


class Ambiguous(NamedTuple):
    """Several files where a sample can have one."""

    values: tuple[Value, ...]

    @property
    def source(self) -> str:
        """All of them."""
        return ", ".join(value.source for value in self.values)

    def stat(self) -> tuple[int, str]:
        """Nothing, as FolderFile's."""
        return 0, ""

    def fetch(self) -> bytes:
        """DecodeError `ambiguous`."""
        raise DecodeError(
            "ambiguous",
            f"{self.source}: {len(self.values)} files for one value; keep one, or make them fields of their own",
        )


def _joined(files: Iterator[_Files]) -> Iterator[_Files]:
    """Files of a sample that are listed near each other, as one: most samples' are, and are held once."""
    while batch := list(islice(files, _BATCH)):
        joined: dict[str, _Files] = {}
        for each in batch:
            joined[each[0]] = _join(joined[each[0]], each) if each[0] in joined else each
        yield from joined.values()


def _join(one: _Files, other: _Files) -> _Files:
    return one[0], one[1] | other[1], one[2] + other[2], (one[3] + other[3]) % 2**64


def _sorted(files: Iterator[_Files]) -> Iterator[_Files]:
    """Every sample once, by its id in code points, as Python compares texts."""
    chunks: list[list[pa.Array]] = [[] for _ in _FILES]
    while batch := list(islice(files, _BATCH)):
        for chunk, column, field in zip(chunks, zip(*batch, strict=True), _FILES, strict=True):
            chunk.append(pa.array(list(column), field.type))
    columns = []
    for chunk in chunks:
        # One column after the other, so that no more than one is held twice.
        columns.append(pa.concat_arrays(chunk))
        chunk.clear()
    table = pa.table(columns, schema=_FILES)
    order = pc.sort_indices(table, sort_keys=[("id", "ascending")])
    parts = (table.take(order[start : start + _BATCH]) for start in range(0, len(order), _BATCH))
    rows = (row for part in parts for row in zip(*(part[name].to_pylist() for name in _FILES.names), strict=True))
    for _, its in groupby(rows, key=itemgetter(0)):
        yield reduce(_join, its)


def _places(paths: Iterable[str]) -> list[_Place]:
    """The folders that paths name, by what ids begin with. InputError where there is none, or one lies in another."""
    tops, found = [], dict[str, str]()
    for path in paths:
        top, folders = _named(path.rstrip("/") or "/")
        tops.append(_base(top))
        found |= {_base(folder): folder for folder in folders}
    common = _common(tops)
    below = {base: base[len(common) + 1 :] for base in found}
    places = sorted(_Place(f"{below[base]}/" if below[base] else "", folder, base) for base, folder in found.items())
    for one, other in pairwise(places):
        if other.prefix.startswith(one.prefix):
            raise InputError(
                f"corpus.source.path: folder {other.path} lies in folder {one.path}, and its files would come in twice; name "
                "one of them"
            )
    return places


def _named(path: str) -> tuple[str, list[str]]:
    """The folder before the first pattern or list of a path, and the folders that it names; without one it is itself both."""
    each = expand([path])
    if each == [path]:
        return path, each
    if any(magic in path for magic in "*?["):
        # What a pattern finds may be files, and what is hidden.
        each = [one for one in each if not posixpath.basename(one).startswith(".") and _is_folder(one)]
    if not each:
        raise InputError(f"corpus.source.path {path!r} names no folder; correct the pattern")
    return posixpath.dirname(re.split(r"[*?\[{]", path, maxsplit=1)[0]) or ".", each


def _is_folder(path: str) -> bool:
    fs, there = _client(path)
    return bool(fs.isdir(there))


def _common(bases: list[str]) -> str:
    """The folder that folders are in, or the one that there is."""
    kinds = {base.partition("://")[0] for base in bases}
    if len(kinds) > 1:
        raise InputError(
            f"corpus.source.path: {bases[0]} and {bases[-1]} are in no one place; make them corpora of their own"
        )
    shared = posixpath.commonpath([base.partition("://")[2] for base in bases]).rstrip("/")
    return f"{kinds.pop()}://{shared}"


def _base(path: str) -> str:
    """The folder's address, absolute."""
    fs, root = _client(path)
    return str(fs.unstrip_protocol(root)).rstrip("/")


def _client(folder: str) -> tuple[Any, str]:
    try:
        fs, root = filesystem(folder)
    except (ValueError, ImportError) as error:
        raise InputError(f"folder {folder}: {error}") from None
    if "http" in fs.protocol:
        raise InputError(f"folder {folder}: a web server does not list its files; write a manifest of their addresses")
    return fs, root


def listing(folder: str) -> Iterator[Listed]:
    """Every file below a folder that is not hidden: on a disk level by level and sorted in each folder, else by its key.

    Raises:
        InputError: it is no folder, or cannot be read.
    """
    fs, root = _client(folder)
    try:
        if "file" in fs.protocol:
            found = _walk(root)
        else:
            found = _objects(fs, root) if "s3" in fs.protocol else _found(fs, root)
        for file in found:
            if not (file.path.startswith(".") or "/." in file.path):
                yield file
    except Exception as error:
        # An object store's client raises classes of five packages, none of them ours to import here.
        why = getattr(error, "strerror", None) or error
        where = str(getattr(error, "filename", None) or folder).rstrip("/")
        raise InputError(f"folder {where} cannot be read: {why}; correct the path, or the rights to it") from error


def _walk(root: str) -> Iterator[Listed]:
    waiting = deque([""])
    while waiting:
        below = waiting.popleft()
        # Popped, so that a million names are not held beside what is made of them.
        names = sorted(os.listdir(f"{root}/{below}"), reverse=True)
        while names:
            path = below + names.pop()
            try:
                info = os.lstat(f"{root}/{path}")
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(info.st_mode):
                if os.path.isdir(f"{root}/{path}"):
                    continue
                info = _target(f"{root}/{path}", info)
            if not stat.S_ISDIR(info.st_mode):
                yield Listed(path, info.st_size, str(info.st_mtime_ns))
            elif not path.rpartition("/")[2].startswith("."):
                waiting.append(f"{path}/")


def _target(path: str, link: os.stat_result) -> os.stat_result:
    """Of the file that a link leads to; of the link itself where it leads nowhere."""
    try:
        return os.stat(path)
    except OSError:
        return link


def _objects(fs: Any, root: str) -> Iterator[Listed]:
    """All objects of S3 under a prefix, a page at a time: the client's own listing holds all of it, and keeps it."""
    bucket, _, prefix = root.partition("/")
    more = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    while True:
        page = fs.call_s3("list_objects_v2", **more, **fs.req_kw)
        for each in page.get("Contents", ()):
            if not each["Key"].endswith("/"):
                yield Listed(each["Key"].removeprefix(more["Prefix"]), each["Size"], change_of(each))
        if not page.get("IsTruncated"):
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _found(fs: Any, root: str) -> Iterator[Listed]:
    for path, info in fs.find(root, detail=True).items():
        if not path.endswith("/"):
            yield Listed(path.removeprefix(f"{root}/"), int(info["size"]), change_of(info))
