"""What must hold for the files of one shard, as functions that find and never raise: what `verify` is made of.

A unit of inspection is the files that must agree with each other: a corpus shard's rows, tar and quarantine, or a view's
shard with the rows that it stands beside. One unit is in memory at a time, and units know nothing of each other.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore import artefact, views
from featurestore.catalog import Entry
from featurestore.corpora import MEDIA, MEMBER, MISSES, QUARANTINE, REJECTED, ROWS, disordered, member_name, read_rows
from featurestore.errors import BraidError, NotFound
from featurestore.identity import from_tar_key, ids_sha256, input_digest
from featurestore.ids import IDS
from featurestore.references import read_value
from featurestore.row_order import order_of
from featurestore.storage import Storage
from featurestore.tombstones import TOMBSTONES

LEVELS = ("footers", "rows", "bytes")
MOST_NAMED = 20
"""Rows of one file that are named one by one; of the others the number is told."""

_FETCH_THREADS = 8
_READ_BYTES = 1 << 20
# tarfile copies what is left of its buffer at every read: a large one is slow.
_TAR_BYTES = 1 << 15

_RUN = "`braid run` makes it again"
_DELETE = "delete {path}, and `braid run` makes it again"
_RESTORE = "put the file back from a copy, or shard the corpus into a new store"
_SHARD_AGAIN = "put the file back as it was, or `braid shard` takes it in as it is now"
_NAME_ROOT = "name the spec in place of the store, or the values' folder as store.media_root"
INPUT_FIRST = "mend that first: with its old bytes back, this one needs nothing"
"""The mend of what cannot be proven because what it was made from is damaged: a remade shard has the bytes it had."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold: in which artefact, at which row where that can be known, and the mend."""

    kind: str
    name: str
    shard: str
    path: str
    problem: str
    mend: str
    row: int | None = None
    id: str | None = None

    def __str__(self) -> str:
        where = [f"{self.kind} {self.name}"] + ([f"shard {self.shard}"] if self.shard else [])
        where += [f"row {self.row}"] if self.row is not None else []
        where += [f"id {self.id!r}"] if self.id is not None else []
        return f"{', '.join(where)}: {self.problem} ({self.path}); mend: {self.mend}"


class Inspection:
    """Reads the files of one unit and collects what does not hold."""

    def __init__(self, storage: Storage, level: str) -> None:
        self.storage = storage
        self.depth = LEVELS.index(level)
        self.findings: list[Finding] = []
        self.files = self.rows = self.file_bytes = 0
        self._named: Counter[str] = Counter()
        self._gone: set[str] = set()

    def reads(self, level: str) -> bool:
        """Whether the inspection goes as deep as `level`."""
        return self.depth >= LEVELS.index(level)

    def say(
        self, entry: Entry, problem: str, row: int | None = None, sample_id: str | None = None, mend: str = ""
    ) -> None:
        """Adds a finding; past `MOST_NAMED` rows of a file only their number."""
        mend = mend or self._mend(entry)
        self._named[entry.path] += row is not None
        more = self._named[entry.path] - MOST_NAMED
        if row is not None and more > 0:
            if more > 1:
                self.findings.remove(self._rest(entry, more - 1, mend))
            self.findings.append(self._rest(entry, more, mend))
            return
        self.findings.append(Finding(entry.kind, entry.name, entry.shard, entry.path, problem, mend, row, sample_id))

    def _mend(self, entry: Entry) -> str:
        """What brings a file back: Braid makes again what it made, but has a corpus's raw data from nowhere else."""
        if entry.kind in (ROWS, MEDIA, IDS, TOMBSTONES) or (
            entry.kind == QUARANTINE and entry.name.startswith("shard/")
        ):
            return _RESTORE
        return _RUN if entry.path in self._gone else _DELETE.format(path=entry.path)

    def _rest(self, entry: Entry, more: int, mend: str) -> Finding:
        return Finding(entry.kind, entry.name, entry.shard, entry.path, f"… and {more} more of its rows", mend)

    @contextmanager
    def guard(self, entry: Entry, mend: str = "") -> Iterator[None]:
        """Makes a finding of whatever reading a broken file raises; `mend` where the file that is read is another's."""
        try:
            yield
        except BraidError as error:
            self.say(entry, f"cannot be proven: {error}", mend=mend)
        except Exception as error:
            # Bytes that are anything at all: Arrow, tarfile, JSON and NumPy raise classes of their own.
            self.say(entry, f"cannot be read: {type(error).__name__}: {error}")

    def sized(self, entry: Entry) -> bool:
        """Whether the file is there; says so where it is not, or has another size."""
        self.files += 1
        self.file_bytes += entry.bytes
        try:
            size = self.storage.size(entry.path)
        except NotFound:
            self._gone.add(entry.path)
            self.say(entry, "the catalog names this file, and it is gone")
            return False
        if size != entry.bytes:
            self.say(entry, f"{size} bytes where the catalog says {entry.bytes}")
        return True

    def content(self, entry: Entry) -> bytes:
        """A file's bytes; at the deepest level their sha256 is compared."""
        content = self.storage.read(entry.path)
        self.compare_sha256(entry, hashlib.sha256(content).hexdigest() if self.reads("bytes") else entry.sha256)
        return content

    def compare_sha256(self, entry: Entry, found: str) -> None:
        """Says where a file's sha256 is not the catalog's."""
        if found != entry.sha256:
            self.say(entry, f"sha256 {found[:16]}… where the catalog says {entry.sha256[:16]}…: its bytes were changed")

    def whole(self, entry: Entry) -> None:
        """Proves of a file of any kind that it is there, and whole."""
        with self.guard(entry):
            if self.sized(entry) and self.reads("bytes"):
                with self.storage.open(entry.path) as file:
                    self.compare_sha256(entry, _Hashing(file).rest())

    def parquet(self, entry: Entry) -> tuple[pa.Schema, int, pa.Table | None]:
        """A Parquet file's schema with its footer, its number of rows and, from level `rows` on, its table."""
        if not self.reads("rows"):
            with self.storage.open(entry.path) as file:
                opened = pq.ParquetFile(file)
                return opened.schema_arrow, opened.metadata.num_rows, None
        content = self.content(entry)
        try:
            table = artefact.read_table(content)
        except (pa.ArrowException, OSError) as error:
            self.say(entry, f"its pages are damaged: {str(error).splitlines()[0]}")
            # Once more without the checksums: the rows' own digests then tell which row it is.
            table = pq.read_table(pa.BufferReader(content))
        self.rows += len(table)
        return table.schema, len(table), table

    def members(self, entry: Entry) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
        """A tar's members in order with their bytes (None of what is no regular file), read once."""
        with self.storage.open(entry.path) as file:
            source = _Hashing(file)
            with (
                self.guard(entry),
                tarfile.open(fileobj=cast(IO[bytes], source), mode="r|", bufsize=_TAR_BYTES) as tar,
            ):
                for info in tar:
                    member = tar.extractfile(info)
                    yield info, member.read() if member is not None else None
            if self.reads("bytes"):
                self.compare_sha256(entry, source.rest())

    def claims(self, entry: Entry, footer: dict[str, Any], claims: dict[str, Sequence[Any]]) -> None:
        """Says which footer's claims the catalog (and the file) do not bear out."""
        for name, others in claims.items():
            values = [footer.get(name), *others]
            if any(value != values[0] for value in values):
                shown = " / ".join(str(value)[:48] for value in values)
                self.say(entry, f"{name} does not hold: {shown} (footer / catalog, file)")


def corpus_shard(
    look: Inspection, rows: Entry, media: Entry | None, quarantine: Entry | None, gone: Set[int] = frozenset()
) -> list[str]:
    """Inspects a corpus shard's rows, tar and quarantine, and returns its ids (none where rows are not read).

    Values that the rows refer to outside the store are read at the deepest level, save those of the rows in `gone`.
    """
    table = None
    with look.guard(rows):
        if look.sized(rows):
            table = _corpus_rows(look, rows, media, quarantine)
    if media is not None:
        with look.guard(media):
            if look.sized(media) and table is not None:
                _tar(look, media, table, list(rows.info()["fields"]))
            elif look.reads("bytes"):
                with look.storage.open(media.path) as file:
                    look.compare_sha256(media, _Hashing(file).rest())
    elif table is not None and any(value.uri is None for value in _values(table, list(rows.info()["fields"]))):
        look.say(rows, "values of it are said to be in a tar, and it has none")
    if table is not None and look.reads("bytes"):
        with look.guard(rows):
            _referenced(look, rows, [v for v in _values(table, list(rows.info()["fields"])) if v.row not in gone])
    rejected: _Rejected | None = None
    with look.guard(rows):
        rejected = None if table is None else _rejected(table, list(rows.info()["fields"]))
    _quarantine(look, rows, quarantine, rejected)
    return [] if table is None else [str(each) for each in table["id"].to_pylist()]


def view_shard(look: Inspection, view: Entry, rows: Entry, quarantine: Entry | None) -> None:
    """Inspects a view's shard against the rows that it stands beside, and its quarantine."""
    rejected: _Rejected | None = None
    with look.guard(view):
        if look.sized(view):
            stored, count, table = look.parquet(view)
            for problem in views.unmet(stored, count, view, rows):
                look.say(view, problem)
            look.claims(view, artefact.footer_of(stored), {"quarantine": [_placed(quarantine)]})
            if table is not None:
                with look.guard(view, INPUT_FIRST):
                    rejected = _view_rows(look, view, table, read_rows(look.storage, rows))
    _quarantine(look, view, quarantine, rejected)


def _corpus_rows(look: Inspection, rows: Entry, media: Entry | None, quarantine: Entry | None) -> pa.Table | None:
    stored, count, table = look.parquet(rows)
    claims: dict[str, Sequence[Any]] = {
        "kind": [ROWS],
        "name": [rows.name],
        "shard": [rows.shard],
        "rows": [rows.rows, count],
        "ids_sha256": [rows.ids_sha256],
        "settings": [rows.info()["settings"]],
        "media": _placed(media) or [None],
        "quarantine": [_placed(quarantine)],
    }
    look.claims(rows, artefact.footer_of(stored), claims)
    fields = rows.info()["fields"]
    wrong = [field for field in fields if field not in stored.names or stored.field(field).type != MEMBER]
    if wrong:
        look.say(rows, f"column {wrong[0]!r} is not that of a field")
    if table is None or wrong:
        return None
    ids = table["id"].to_pylist()
    if ids_sha256(ids) != rows.ids_sha256:
        look.say(rows, "its ids, or their order, are not those of the catalog's ids_sha256")
    for row, problem in disordered(table, order_of(rows.info()["settings"])):
        look.say(rows, problem, row, ids[row])
    return table


def _placed(entry: Entry | None) -> list[Any]:
    """How a footer names a file that was written before it; nothing where there is none."""
    return [] if entry is None else [[entry.path, entry.bytes, entry.sha256]]


class _Value(NamedTuple):
    """A value that a shard's tar must hold, or the file outside the store that `uri` names."""

    row: int
    id: str
    field: str
    name: str
    offset: int
    size: int
    digest: bytes
    uri: str | None


def _values(table: pa.Table, fields: list[str]) -> Iterator[_Value]:
    columns = [table[field].to_pylist() for field in fields]
    for row, (sample_id, *members) in enumerate(zip(table["id"].to_pylist(), *columns, strict=True)):
        for field, member in zip(fields, members, strict=True):
            if member["present"]:
                name = member_name(sample_id, field, member["ext"])
                place = member["offset"], member["size"], member["digest"], member["uri"]
                yield _Value(row, sample_id, field, name, *place)


def _tar(look: Inspection, media: Entry, table: pa.Table, fields: list[str]) -> None:
    """Reads a tar once, in order: its members must be the rows' values, each in its place, and nothing else."""
    expected = [value for value in _values(table, fields) if value.uri is None]
    places = {value.name: place for place, value in enumerate(expected)}
    found: set[int] = set()
    last = -1
    for info, raw in look.members(media):
        place = places.get(info.name)
        if place is None or place in found:
            problem = "belongs to no row" if place is None else "stands twice"
            look.say(media, f"member {info.name!r} {problem}", sample_id=id_of(info.name))
            continue
        for problem in _misplaced(expected[place], info, raw, place > last):
            look.say(media, f"{expected[place].field}: {problem}", expected[place].row, expected[place].id)
        found.add(place)
        last = max(last, place)
    for place, value in enumerate(expected):
        if place not in found:
            look.say(media, f"{value.field}: its member {value.name!r} is not in the tar", value.row, value.id)


def _referenced(look: Inspection, rows: Entry, values: list[_Value]) -> None:
    """Reads what the rows refer to, several at a time, and says which is gone or another."""

    def problem(value: _Value) -> str:
        try:
            read_value(look.storage, str(value.uri), value.offset, value.size, value.digest)
        except BraidError as error:
            return str(error)
        return ""

    values = [value for value in values if value.uri is not None]
    if values and look.storage.media_root is None:
        look.say(rows, "it refers to values outside the store, which cannot be proven", mend=_NAME_ROOT)
        return
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        for value, told in zip(values, pool.map(problem, values), strict=True):
            look.file_bytes += value.size
            if told:
                look.say(rows, f"{value.field}: {told}", value.row, value.id, _SHARD_AGAIN)


def _misplaced(value: _Value, info: tarfile.TarInfo, raw: bytes | None, in_order: bool) -> Iterator[str]:
    if not in_order:
        yield "its member is not where the order of the rows puts it"
    if id_of(info.name) != value.id:
        yield f"the key of {info.name!r} does not restore to its id"
    if (info.offset_data, info.size) != (value.offset, value.size):
        yield f"at {info.offset_data} of {info.size} bytes where the rows say {value.offset} and {value.size}"
    if raw is None:
        yield "its member is not a regular file"
    elif (digest := input_digest(raw)) != value.digest:
        yield f"its bytes have digest {digest.hex()} where the rows say {value.digest.hex()}"


def id_of(member: str) -> str | None:
    """The id of the sample that a member's name belongs to; None where it is not a name of Braid's."""
    folder, slash, last = member.rpartition("/")
    try:
        return from_tar_key(folder + slash + last.partition(".")[0])
    except UnicodeDecodeError:
        return None


def _view_rows(look: Inspection, view: Entry, table: pa.Table, rows: pa.Table) -> "_Rejected | None":
    """Says which rows are not their samples'; returns what the encoder rejected, where all rows are there."""
    field, ids = view.info()["field"], rows["id"].to_pylist()
    both = min(len(table), len(ids))
    broken = views.misaligned(table.slice(0, both), ids[:both], rows.slice(0, both), field)
    if len(table) != len(ids):
        row, problem = next(broken, (both, "here they end, or go on where the samples have ended"))
        sample_id = ids[row] if row < len(ids) else None
        look.say(
            view, f"{len(table)} rows beside {len(ids)} samples; the first that is wrong: {problem}", row, sample_id
        )
        return None
    for row, problem in broken:
        look.say(view, problem, row, ids[row])
    names = views.fields_of(field)
    given = zip(*(pc.struct_field(rows[name], "present").to_pylist() for name in names), strict=True)
    sure: set[tuple[str, str, str]] = set()
    perhaps: set[tuple[str, str]] = set()
    for sample_id, there, reasons in zip(ids, given, table["miss_reason"].to_pylist(), strict=True):
        if reasons is not None:
            each = zip(names, there, reasons.split("+"), strict=True)
            sure |= {(sample_id, name, reason) for name, value, reason in each if value}
        elif len(names) > 1:
            perhaps |= {(sample_id, name) for name, value in zip(names, there, strict=True) if value}
    return _Rejected(sure, perhaps)


class _Rejected(NamedTuple):
    """What rows say was rejected: (id, field, reason).

    Where one of several fields has a vector without it, the row does not tell: (id, field) of what that may be is in `perhaps`.
    """

    sure: set[tuple[str, str, str]]
    perhaps: Set[tuple[str, str]] = frozenset()


def _rejected(table: pa.Table, fields: list[str]) -> _Rejected:
    ids = table["id"].to_pylist()
    sure = {
        (sample_id, field, member["miss_reason"])
        for field in fields
        for sample_id, member in zip(ids, table[field].to_pylist(), strict=True)
        if not member["present"] and member["miss_reason"] not in MISSES
    }
    return _Rejected(sure)


def _quarantine(look: Inspection, owner: Entry, quarantine: Entry | None, rejected: _Rejected | None) -> None:
    """The quarantine must hold what the rows say was rejected; `rejected` is None where that is not known."""
    if quarantine is None:
        for sample_id, field, reason in sorted(rejected.sure if rejected else ()):
            look.say(owner, f"{field} was rejected ({reason}), and no quarantine is there", sample_id=sample_id)
        return
    with look.guard(quarantine):
        if not look.sized(quarantine):
            return
        stored, count, table = look.parquet(quarantine)
        look.claims(quarantine, artefact.footer_of(stored), {"kind": [QUARANTINE], "rows": [quarantine.rows, count]})
        if not stored.equals(REJECTED):
            look.say(quarantine, "its columns are not those of a quarantine")
        elif table is not None and rejected is not None:
            listed = set(zip(*(table[name].to_pylist() for name in ("id", "field", "reason")), strict=True))
            listed = {each for each in listed if each[:2] not in rejected.perhaps}
            for sample_id, field, reason in sorted(listed ^ rejected.sure):
                where = "here only" if (sample_id, field, reason) in listed else "in the rows only"
                look.say(quarantine, f"{field} was rejected ({reason}) {where}", sample_id=sample_id)


class _Hashing:
    """A file that is hashed while it is read, for readers that go from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes more."""
        block = self._file.read(size)
        self._digest.update(block)
        return block

    def rest(self) -> str:
        """The sha256 of the whole file, in hex."""
        while self.read(_READ_BYTES):
            pass
        return self._digest.hexdigest()
