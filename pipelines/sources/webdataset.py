"""WebDataset tars, also as img2dataset writes them: a sample is the adjacent members of one key.

A member's name is cut as WebDataset cuts it: at the first dot behind the last slash into the key and the extension, which is
small letters here (`photos/7.seg.PNG`: key `photos/7`, extension `seg.png`). A field's `from` is an extension, or a list of
them, of which the first that a sample has is taken. Members of other extensions are not read.

The columns are those of the sample's `json` member, an object, and of a Parquet file beside the tar (`00000.parquet` beside
`00000.tar`), joined by its column `key`; where both have one, the member's counts. `id` (or `__key__`) is the sample's key. A
column that is called so itself, or like another of Braid's own columns or like a field, goes by the name `json.<column>`; so
does any column that the spec calls so: `from: json.caption` reads a text field from a column. A row beside the tar whose
sample the tar has not (img2dataset's failed downloads) is no sample. Columns of bytes there are not kept.

Where each tar counts its keys anew, `id: __row__` calls a sample by its tar too, by its path below the folder that all are in,
without `.tar`: `00017/0042`. The key stays a column, `__key__`. Tars that are added change no such id.

Planning reads headers and `json` members. Tars are anybody's: a link, a pipe or a device is no value (`no_file`), and is
followed nowhere; two members of one name are none (`ambiguous`), nor is a column's list or object a text (`not_text`). Of a
tar that is cut off comes in what is whole: the value that the cut went through is rejected as `truncated`, and so is what its
sample lacks; `remarks()` tells of it. A value that its server does not give is rejected as `unreadable`. Where it does not give
headers or a `json` member, in planning or later, that is an error: nobody knows then which samples there are, or what they are.

Shards are cut in the tars' order, so that a worker reads one stretch of them. With `adopt: true` each tar is a shard as it is,
however large, and must be as adopted.py says.
"""

import json
import posixpath
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from featurestore.errors import InputError
from featurestore.row_order import BY_SOURCE, BY_TAR
from pipelines.sources import SampleRef, Source, Value
from pipelines.sources.adopted import Rules
from pipelines.sources.files import Part, expand
from pipelines.sources.rows import ROW, Row, RowSource, Spoiled, as_read, inline
from pipelines.sources.sidecar import Sidecar
from pipelines.sources.tar_members import MAX_AT_ONCE, CutOff, Member, Tar, members

MAX_JSON_BYTES = 16 << 20
_KEY, _JSON = "__key__", "json."
_AHEAD = 16
"""So many requests, of a sample or of some that stand side by side, are begun ahead of the one that is asked for."""

_SIDECARS = 4
_CUT = "tars that are cut off"
# What WebDataset passes over.
_META = re.compile(r"__[^/]*__($|/)")


def open_source(corpus: dict[str, Any]) -> Source:
    """The tars that a corpus's `source.path` names."""
    return WebDataset(corpus)


def split_name(name: str) -> tuple[str, str]:
    """The key and the extension of a member as WebDataset cuts its name; both empty where it belongs to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not dot or not (stem or (slash and "." not in folder.rpartition("/")[2])):
        return "", ""
    return folder + slash + stem, extension.lower()


@dataclass
class _Group:
    """Adjacent members of one key: by extension those that are asked for; `cut` says how the tar is cut off behind it."""

    key: str
    start: int
    end: int = 0
    found: dict[str, list[Member]] = field(default_factory=dict)
    cut: str = ""


class WebDataset(RowSource):
    """Tars of samples."""

    numbers_rows = True

    def __init__(self, corpus: dict[str, Any]) -> None:
        self._from = {name: _wanted(name, each) for name, each in corpus["fields"].items()}
        wanted = {each for names in self._from.values() for each in names}
        super().__init__(corpus, (each for each in wanted if each.startswith(_JSON)))
        self.order = BY_TAR if corpus["source"].get("adopt") else BY_SOURCE
        self._extensions = {"json"} | {each for each in wanted if not each.startswith(_JSON)}
        # A column of the source's own that is called like the key is not the key.
        self._own = self._reserved | {"id", _KEY} | ({ROW} if self._numbered else set())
        self._known: dict[str, tuple[int, str]] = {}
        self._sidecars: OrderedDict[str, Sidecar] = OrderedDict()
        self._told: dict[str, tuple[int, str]] = {}

    def rows(self) -> Iterator[Row]:
        """Every sample; InputError names the tar and the byte of what is no tar, not adopted, or a `json` that is no object."""
        self._told = {}
        for uri in expand(self.paths):
            with Tar(uri) as tar:
                self._known[uri] = tar.size, tar.change
                beside, met = self._sidecar(uri), 0
                rules = Rules(uri, self._names["id"] in ("id", _KEY, ROW)) if self.order == BY_TAR else None
                for group in self._groups(tar, 0, None, self._remark, rules):
                    met += group.key in beside
                    row = self._row(tar, group)
                    if rules is not None:
                        rules.sample(sum(value is not None for value in row.values.values()))
                    if group.cut and (lacking := [each for each in self._names.values() if each not in row.columns]):
                        # Nobody knows the group, or the time, that it had.
                        self._remark("samples cut off before their columns, left out", f"{row.where}: {lacking[0]!r}")
                    else:
                        yield row
                if rules is not None:
                    rules.end()
                if met < len(beside):
                    self._remark("tars with fewer samples than rows beside them", f"{uri}: {met} of {len(beside)}")

    def remarks(self) -> list[str]:
        """Tars that are cut off, and what of the tars that `references()` has read was left out."""
        return [f"{what}: {count}, e.g. {first}" for what, (count, first) in self._told.items()]

    def whole(self) -> bool:
        """Whether no tar that was read is cut off."""
        return _CUT not in self._told

    def _remark(self, what: str, example: str) -> None:
        count, first = self._told.get(what, (0, example))
        self._told[what] = count + 1, first

    def read(self, references: Iterable[SampleRef]) -> Iterator[Row]:
        """Samples again: from elsewhere than a disk those that stand side by side come together, 16 requests ahead."""
        waiting: deque[tuple[list[SampleRef], Future[Tar]]] = deque()
        with ThreadPoolExecutor(_AHEAD) as pool:
            for run in _runs(references):
                waiting.append((run, pool.submit(self._begin, run)))
                if len(waiting) >= _AHEAD:
                    yield from self._again(*waiting.popleft())
            while waiting:
                yield from self._again(*waiting.popleft())

    def _begin(self, run: Sequence[SampleRef]) -> Tar:
        first = run[0]
        tar = Tar(first.uri, self._known.get(first.uri))
        self._known[first.uri] = tar.size, tar.change
        tar.begin(first.offset, sum(reference.length for reference in run))
        return tar

    def _again(self, run: Sequence[SampleRef], begun: Future[Tar]) -> Iterator[Row]:
        with begun.result() as tar:
            for reference in run:
                end = reference.offset + reference.length
                group = next(self._groups(tar, reference.offset, end, _ignore), None)
                if group is None:
                    # Nothing stands there now: a row without an id says so.
                    where = _where(tar, reference.offset)
                    yield Row({}, {}, b"", tar.uri, reference.offset, reference.length, where)
                else:
                    yield self._row(tar, group)

    def place(self, reference: SampleRef) -> str:
        """The tar, and the byte where the sample begins."""
        return f"{reference.uri}, byte {reference.offset}"

    def unmatched(self) -> dict[str, str]:
        """Field -> its `from`, of the fields that no sample read so far has a value of."""
        return {name: ", ".join(each) for name, each in self._from.items() if name not in self._found}

    def _groups(
        self,
        tar: Tar,
        start: int,
        end: int | None,
        remark: Callable[[str, str], None],
        rules: Rules | None = None,
    ) -> Iterator[_Group]:
        group = None
        try:
            for member in members(tar, start, end):
                key, extension = split_name(member.name)
                if member.kind == "a folder" or _META.match(member.name):
                    continue
                if rules is not None:
                    rules.take(member, key, extension)
                if not key:
                    remark("members without an extension, left out", f"{tar.uri}: {_printable(member.name)!r}")
                    continue
                if group is None or key != group.key:
                    if group is not None:
                        yield group
                    group = _Group(key, member.start)
                group.end = min(member.end, tar.size)
                if extension in self._extensions:
                    group.found.setdefault(extension, []).append(member)
        except CutOff as cut:
            if rules is not None:
                raise rules.cut_off(tar.size, cut) from None
            remark(_CUT, f"{tar.uri}: {cut}")
            if group is not None:
                # The rest belongs to it: so it is seen to be the last also when it is read again.
                group.end, group.cut = tar.size, str(cut)
                if any(each.offset + each.size > tar.size for each in group.found.get("json", [])):
                    del group.found["json"]
        if group is not None:
            yield group

    def _row(self, tar: Tar, group: _Group) -> Row:
        where = _where(tar, group.start)
        own, raw = self._own_columns(tar, group)
        beside = self._sidecar(tar.uri).row(group.key)
        columns = {self._called(name): value for name, value in (beside | own).items()}
        columns |= {name: group.key for name in ("id", _KEY) if name in self._taken}
        if "id" not in self._taken:
            columns[_KEY] = group.key
        if self._numbered:
            columns[ROW] = f"{self._below_top(tar.uri).removesuffix('.tar')}/{group.key}"
        values = {name: self._value(tar, group, wanted, columns) for name, wanted in self._from.items()}
        content = raw + json.dumps(beside, sort_keys=True).encode() if beside else raw
        return Row(columns, values, content, tar.uri, group.start, group.end - group.start, where)

    def _called(self, column: str) -> str:
        return f"{_JSON}{column}" if column in self._own or f"{_JSON}{column}" in self._taken else column

    def _sidecar(self, uri: str) -> Sidecar:
        if uri not in self._sidecars:
            self._sidecars[uri] = Sidecar(uri)
            if len(self._sidecars) > _SIDECARS:
                self._sidecars.popitem(last=False)
        self._sidecars.move_to_end(uri)
        return self._sidecars[uri]

    def _own_columns(self, tar: Tar, group: _Group) -> tuple[dict[str, Any], bytes]:
        """The columns of the sample's `json` member, and its bytes."""
        if not (found := group.found.get("json")):
            return {}, b""
        (member, *more), where = found, f"{_where(tar, found[0].start)}, {_printable(found[0].name)!r}"
        try:
            if more or member.kind:
                raise ValueError("it stands twice" if more else f"it is {member.kind}")
            if member.size > MAX_JSON_BYTES:
                raise ValueError(f"it has {member.size} bytes, at most {MAX_JSON_BYTES} are allowed")
            raw = tar.read(member.offset, member.size)
            columns = json.loads(raw.decode("utf-8", "surrogateescape"))
            if not isinstance(columns, dict):
                raise ValueError(f"{str(columns)[:40]!r} is no object")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: no JSON object of columns: {error}; correct it, or take the tar out of corpus.source.path"
            ) from None
        return columns, raw

    def _value(self, tar: Tar, group: _Group, wanted: tuple[str, ...], columns: dict[str, Any]) -> Value | None:
        for each in wanted:
            if each.startswith(_JSON):
                if columns.get(each) not in (None, ""):
                    return inline(columns[each], _source(tar.uri, f"{group.key}.json"))
            elif each in group.found:
                return _part(tar, group.found[each])
        if group.cut and ("json" not in group.found or not all(each.startswith(_JSON) for each in wanted)):
            source = _source(tar.uri, group.key)
            return Spoiled("truncated", f"{source}: the tar is not whole: {group.cut}", source)
        return None


def _runs(references: Iterable[SampleRef]) -> Iterator[list[SampleRef]]:
    """References of samples that stand side by side, together up to MAX_AT_ONCE bytes."""
    run: list[SampleRef] = []
    size = 0
    for reference in references:
        end = (run[-1].uri, run[-1].offset + run[-1].length) if run else None
        if run and (end != (reference.uri, reference.offset) or size + reference.length > MAX_AT_ONCE):
            yield run
            run, size = [], 0
        run.append(reference)
        size += reference.length
    if run:
        yield run


def _wanted(name: str, field: dict[str, Any]) -> tuple[str, ...]:
    """The extensions that a field is read from, in small letters, and the columns."""
    if field["read"] is not None:
        raise InputError(
            f"corpus.fields.{name}.read: {field['read']!r} says nothing where members are the values; leave it out"
        )
    given = [field["from"]] if isinstance(field["from"], str) else field["from"]
    for each in given:
        if each.startswith(_JSON) and field["modality"] != "text":
            raise InputError(f"corpus.fields.{name}.from: {each!r} is a column, which can be a text; name an extension")
    return tuple(each if each.startswith(_JSON) else each.lower().removeprefix(".") for each in given)


def _part(tar: Tar, found: list[Member]) -> Value:
    member, source = found[0], _source(tar.uri, found[0].name)
    if len(found) > 1:
        places = ", ".join(str(each.start) for each in found[:3])
        return Spoiled("ambiguous", f"{source} stands {len(found)} times, at bytes {places}", source)
    if member.kind:
        return Spoiled("no_file", f"{source} is {member.kind}, which is not followed", source)
    if member.offset + member.size > tar.size:
        there = max(0, tar.size - member.offset)
        return Spoiled("truncated", f"{source}: {member.size} bytes are named, {there} are there", source)
    return Part(tar.uri, member.offset, member.size, tar.change, source, tar.held(member.offset, member.size))


def _source(uri: str, name: str) -> str:
    # What follows a web address may be a key to it.
    address = uri.partition("?")[0] if uri.startswith("http") else uri
    return f"{posixpath.basename(address)}/{_printable(name)}"


def _where(tar: Tar, offset: int) -> str:
    return f"{tar.uri}, byte {offset}"


def _printable(name: str) -> str:
    return as_read(name).decode("utf-8", "replace")


def _ignore(what: str, example: str) -> None:
    pass
