"""The store's table of contents: a Delta table with one row per artefact file. What it does not name does not exist.

One Delta commit publishes all the files of a job. A reader holds one `Snapshot`, whose version never changes under it.

A commit states the whole content of each (kind, name) that it touches, through the snapshot that it was computed from:
deltalake refuses it when another job has changed the same rows since, and then it is computed again from the newer
snapshot. Plain appends would duplicate rows on a retry, and deltalake's `app_transactions` does not prevent that (tried).
"""

import hashlib
import itertools
import json
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from featurestore.arguments import whole_number
from featurestore.errors import InputError, NotFound, StoreError
from featurestore.storage import Storage

FOLDER = "catalog"
_COMMIT_ATTEMPTS = 30
_DESCRIPTION = "Braid store, format 2"
"""Stands in the table's metadata: what another version of Braid wrote in another way is told, not misread."""


class Entry(NamedTuple):
    """One artefact file.

    `shard` is the file's place within its recipe: a corpus shard's key, or for builds the file's name without digest.
    `lineage` is JSON: what the artefact was made from. It holds no clock: equal inputs give equal entries.
    """

    kind: str
    name: str
    recipe: str
    shard: str
    path: str
    rows: int
    bytes: int
    sha256: str
    ids_sha256: str = ""
    input_sha256: str = ""
    event_min_ns: int | None = None
    event_max_ns: int | None = None
    lineage: str = "{}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What may stand once in a catalog."""
        return (self.kind, self.name, self.recipe, self.shard)

    def info(self) -> dict[str, Any]:
        """The lineage as a dict."""
        return dict(json.loads(self.lineage or "{}"))


_TYPES = {str: pa.string(), int: pa.int64(), int | None: pa.int64()}
SCHEMA = pa.schema([pa.field(name, _TYPES[kind]) for name, kind in Entry.__annotations__.items()])
# A view's lineage is a kilobyte and hardly differs from shard to shard: in memory a text stands once.
_HELD = SCHEMA.set(SCHEMA.get_field_index("lineage"), pa.field("lineage", pa.dictionary(pa.int32(), pa.string())))
_KEY = ("kind", "name", "recipe", "shard")
# A file of the catalog up to this size is kept once read; of a larger one the columns asked for are read each time.
_KEPT_BYTES = 8 << 20
_BATCH_ROWS = 8192
_LOOKED_BACK = 100
"""So many versions are opened to find the last at which something held: a run of a spec commits one a step."""


class Entries(Sequence[Entry]):
    """Entries in the order of their keys, held as Arrow columns: a million Python objects would take a gigabyte.

    An `Entry` is made when it is asked for.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Entry]:
        for batch in self.table.to_batches(max_chunksize=_BATCH_ROWS):
            yield from map(Entry._make, zip(*map(_values, batch.columns), strict=True))

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...
    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(at, slice):
            return [self[place] for place in range(len(self))[at]]
        return Entry(*(column[at].as_py() for column in self.table.columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Entry.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def find(self, shard: str) -> Entry | None:
        """The entry of a shard, among entries of one name and recipe."""
        shards = self.table["shard"]
        at = bisect_left(range(len(self)), shard, key=lambda place: str(shards[place]))
        return self[at] if at < len(self) and str(shards[at]) == shard else None


def _values(column: pa.Array) -> list[Any]:
    if not isinstance(column, pa.DictionaryArray):
        return list(column.to_pylist())
    texts = column.dictionary.to_pylist()
    return [texts[index] for index in column.indices.to_pylist()]


def _where(table: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """The table's rows where the mask is true; the table itself, not a copy, where that is all of it."""
    return table if pc.all(mask, min_count=0).as_py() else table.filter(mask)


def lost(entries: pa.Table, listing: Mapping[str, int]) -> pa.Table:
    """Rows with a `path` that is not in the listing (key -> bytes), or stands there with other `bytes`."""
    sizes = pa.array((listing.get(str(path), -1) for path in entries["path"]), pa.int64())
    return entries.filter(pc.not_equal(entries["bytes"], sizes))


class Change(NamedTuple):
    """What a job publishes under one (kind, name).

    Rows of another recipe go: a view has one recipe at a time. Of the same recipe, the rows whose shard is in `covers`
    are replaced by `entries` (a shard that has nothing to show any more goes), or all of them where `covers` is None.
    """

    kind: str
    name: str
    recipe: str
    entries: tuple[Entry, ...]
    covers: frozenset[str] | None = None


class _File(NamedTuple):
    """A file of the catalog's table: between which kinds and names its rows lie."""

    key: str
    bytes: int
    kinds: tuple[str, str]
    names: tuple[str, str]

    def may_hold(self, kind: str, name: str | None = None) -> bool:
        return self.kinds[0] <= kind <= self.kinds[1] and (name is None or self.names[0] <= name <= self.names[1])


class Snapshot:
    """The catalog at one version. A file of it is read when something is asked for that it may hold."""

    def __init__(self, storage: Storage, files: Sequence[_File], version: int) -> None:
        self.storage = storage
        self.version = version
        self._files = files
        self._kept: dict[str, pa.Table] = {}

    def entries(self, kind: str, name: str | None = None, recipe: str | None = None) -> Entries:
        """Entries of a kind (and a name, and a recipe), sorted by name, recipe and shard."""
        return Entries(self.table(kind, name, recipe))

    def table(
        self, kind: str, name: str | None = None, recipe: str | None = None, columns: Sequence[str] = Entry._fields
    ) -> pa.Table:
        """Columns of what `entries` gives: what is asked of a million shards is asked of these."""
        names = self.names(kind) if name is None else [name]
        needed = [column for column in Entry._fields if column in {*_KEY, *columns}]
        found = pa.concat_tables([self._scope(kind, each, needed) for each in names] or [_HELD.empty_table()])
        return (found if recipe is None else _where(found, pc.equal(found["recipe"], recipe))).select(columns)

    def names(self, kind: str) -> list[str]:
        """The names under a kind, sorted."""
        found: set[str] = set()
        for file in self._files:
            if file.kinds == (kind, kind) and file.names[0] == file.names[1]:
                found.add(file.names[0])
            elif file.may_hold(kind):
                table = self._table(file, _KEY)
                found.update(pc.unique(table.filter(pc.equal(table["kind"], kind))["name"]).to_pylist())
        return sorted(found)

    def all(self) -> list[Entry]:
        """Every entry, sorted by key."""
        return list(self._all())

    def last(self, holds: "Callable[[Snapshot], bool]") -> "Snapshot | None":
        """The newest version, this one or one of the `_LOOKED_BACK` before it, at which something holds."""
        catalog, first = Catalog(self.storage), max(0, self.version - _LOOKED_BACK)
        earlier = (catalog.snapshot(version) for version in range(self.version - 1, first - 1, -1))
        return next((each for each in itertools.chain([self], earlier) if holds(each)), None)

    def digest(self) -> str:
        """sha256 over every entry in order: equal stores have equal digests, whenever and however they were made."""
        digest = hashlib.sha256()
        for entry in self._all():
            digest.update(json.dumps(entry, ensure_ascii=False).encode())
        return digest.hexdigest()

    def _all(self) -> Iterator[Entry]:
        kinds = {kind for file in self._files for kind in pc.unique(self._table(file, _KEY)["kind"]).to_pylist()}
        return (entry for kind in sorted(kinds) for entry in self.entries(kind))

    def _scope(self, kind: str, name: str, columns: Sequence[str]) -> pa.Table:
        """A name's rows, sorted; as its last commit wrote them they are, and are not copied."""
        tables = [self._table(file, columns) for file in self._files if file.may_hold(kind, name)]
        own = [_where(each, pc.and_(pc.equal(each["kind"], kind), pc.equal(each["name"], name))) for each in tables]
        table = pa.concat_tables([_HELD.empty_table().select(columns), *own])
        keys = pc.binary_join_element_wise(table["recipe"], table["shard"], "\0")
        in_order = pc.all(pc.less_equal(keys[:-1], keys[1:]), min_count=0).as_py()
        return table if in_order else table.take(pc.sort_indices(keys))

    def _table(self, file: _File, columns: Sequence[str]) -> pa.Table:
        """Columns of a file, through our own client.

        Not deltalake's reader: its threads outlive the call, and about one process in three that ended soon after died with
        SIGABRT (deltalake 1.6.6, pyarrow 25).
        """
        if file.key in self._kept:
            return self._kept[file.key].select(columns)
        small = file.bytes <= _KEPT_BYTES
        try:
            with pa.BufferReader(self.storage.read(file.key)) if small else self.storage.open(file.key) as content:
                stored = pq.ParquetFile(content, read_dictionary=["lineage"])
                table = stored.read(list(Entry._fields if small else columns))
            table = table.cast(pa.schema([_HELD.field(name) for name in table.column_names]))
        except (NotFound, pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{self.storage.uri}: a file of the catalog is gone or damaged ({error}); restore {FOLDER}/ from a copy, or "
                "open an earlier version"
            ) from error
        if small:
            self._kept[file.key] = table
        else:
            # Arrow's allocator holds on to what decoding took: half a gigabyte for half a million entries.
            pa.default_memory_pool().release_unused()
        return table.select(columns)


class Catalog:
    """Opens, reads and commits to a store's catalog."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._uri, self._options = storage.delta_uri(FOLDER)

    def create(self) -> None:
        """Creates the catalog where there is none; nothing happens where there is one.

        Log clean-up is off and retention is 100 years: otherwise pinned versions would die after 30 days.
        """
        if self.exists():
            return
        # Says what is wrong with the address in our own words before deltalake does in its.
        with self.storage.scratch():
            pass
        try:
            DeltaTable.create(
                self._uri,
                SCHEMA,
                mode="ignore",
                description=_DESCRIPTION,
                storage_options=self._options,
                configuration={
                    "delta.enableExpiredLogCleanup": "false",
                    "delta.logRetentionDuration": "interval 36500 days",
                    "delta.deletedFileRetentionDuration": "interval 36500 days",
                },
            )
        except (DeltaError, OSError) as error:
            raise StoreError(f"{self.storage.uri}: cannot make a catalog: {self.storage.client_says(error)}") from error

    def exists(self) -> bool:
        """Whether the store has a catalog."""
        try:
            return bool(DeltaTable.is_deltatable(self._uri, self._options))
        except (DeltaError, OSError) as error:
            raise StoreError(
                f"{self.storage.uri}: cannot look for a catalog: {self.storage.client_says(error)}"
            ) from error

    def snapshot(self, version: int | None = None) -> Snapshot:
        """The catalog at a version, or the newest. InputError where the version is no whole number."""
        return self._load(self._open(None if version is None else whole_number("version", version)))

    def peek(self) -> Snapshot:
        """The newest snapshot, or an empty one of version -1 where there is no catalog yet: for planning."""
        return self.snapshot() if self.exists() else Snapshot(self.storage, [], -1)

    def _load(self, delta: DeltaTable) -> Snapshot:
        actions = pa.table(delta.get_add_actions(flatten=True))
        wanted = ("path", "size_bytes", "min.kind", "max.kind", "min.name", "max.name")
        rows = sorted(zip(*(actions[each].to_pylist() for each in wanted), strict=True))
        files = [
            _File(f"{FOLDER}/{path}", size, (kind, last), (name, end)) for path, size, kind, last, name, end in rows
        ]
        return Snapshot(self.storage, files, delta.version())

    def _open(self, version: int | None = None) -> DeltaTable:
        try:
            table = DeltaTable(self._uri, version=version, storage_options=self._options)
            if (found := table.metadata().description) != _DESCRIPTION:
                raise StoreError(
                    f"{self.storage.uri}: its catalog says {found!r}, this Braid reads {_DESCRIPTION!r}: read it with the "
                    "version that wrote it, or name another store and run the spec again"
                )
            return table
        except TableNotFoundError:
            raise NotFound(
                f"{self.storage.uri} holds no Braid store; `braid run SPEC` makes one, or correct the address"
            ) from None
        # A version below 0 is an OverflowError of Rust's.
        except (DeltaError, OSError, OverflowError) as error:
            if version is not None and self.exists():
                raise NotFound(
                    f"{self.storage.uri} has no version {version}; it has 0 to {self._open().version()}"
                ) from None
            raise StoreError(
                f"{self.storage.uri}: cannot open the catalog: {self.storage.client_says(error)}"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        """One dict per version, newest first: version, timestamp (ms since 1970), job and what it published."""
        return [
            {
                "version": commit["version"],
                "timestamp_ms": commit.get("timestamp"),
                "job": commit.get("job", "create"),
                "files": int(commit.get("files", 0)),
            }
            for commit in self._open().history()
        ]

    def commit(
        self, job: str, changes: Iterable[Change], check: Callable[[Snapshot], None] = lambda snapshot: None
    ) -> int:
        """Publishes the changes of one job in one commit and returns the version that holds them.

        Running it twice commits once. A race with another job is settled by computing the commit again from what the
        other left; `check` raises where that is nothing that these changes may be made to.
        """
        changes = tuple(changes)
        for change in changes:
            _check(change)
        for attempt in range(_COMMIT_ATTEMPTS):
            delta = self._open()
            snapshot = self._load(delta)
            check(snapshot)
            new = _applied(changes, snapshot)
            if new is None:
                return snapshot.version
            try:
                self._overwrite(delta, job, changes, new)
            except CommitFailedError:
                # Another job won; wait a little so that many losers do not meet again at once.
                time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
                continue
            return int(self._open().version())
        raise StoreError(
            f"{self.storage.uri}: {_COMMIT_ATTEMPTS} attempts to commit {job!r} all lost to other jobs; run it again"
        )

    def _overwrite(self, delta: DeltaTable, job: str, changes: tuple[Change, ...], table: pa.Table) -> None:
        scopes = (f"(kind = '{_quoted(kind)}' AND name = '{_quoted(name)}')" for kind, name in _scopes(changes))
        files = sum(len(change.entries) for change in changes)
        # deltalake has an allocator of its own: what sorting took is given back to it.
        pa.default_memory_pool().release_unused()
        write_deltalake(
            delta,
            # In batches: deltalake spells out the lineage of each at once.
            table.to_reader(_BATCH_ROWS),
            mode="overwrite",
            predicate=" OR ".join(scopes),
            commit_properties=CommitProperties(custom_metadata={"job": job, "files": str(files)}, max_commit_retries=0),
        )


def _scopes(changes: tuple[Change, ...]) -> list[tuple[str, str]]:
    return sorted({(change.kind, change.name) for change in changes})


def _applied(changes: tuple[Change, ...], snapshot: Snapshot) -> pa.Table | None:
    """What the names that the changes touch hold after them, sorted by key; None where they hold it already."""
    old = {scope: snapshot.table(*scope) for scope in _scopes(changes)}
    tables = [_HELD.empty_table()]
    for change in changes:
        columns = zip(*change.entries, strict=True) if change.entries else [()] * len(_HELD)
        tables.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, _HELD, strict=True)], schema=_HELD))
        if change.covers is not None:
            rows = old[change.kind, change.name]
            kept = pc.invert(pc.is_in(rows["shard"], pa.array(change.covers, pa.string())))
            tables.append(_where(rows, pc.and_(kept, pc.equal(rows["recipe"], change.recipe))))
    table = pa.concat_tables(tables)
    new = table.take(pc.sort_indices(table.select(_KEY), [(name, "ascending") for name in _KEY]))
    return None if Entries(new) == Entries(pa.concat_tables([_HELD.empty_table(), *old.values()])) else new


def _check(change: Change) -> None:
    keys = [entry.key for entry in change.entries]
    strange = [key for key in keys if key[:3] != (change.kind, change.name, change.recipe)]
    uncovered = [] if change.covers is None else [key for key in keys if key[3] not in change.covers]
    if strange or uncovered or len(set(keys)) != len(keys):
        raise InputError(
            f"a change of {change.kind} {change.name!r} holds entries of others, of shards it does not cover, or one "
            f"twice: {(strange + uncovered + keys)[:3]}"
        )


def _quoted(text: str) -> str:
    return text.replace("'", "''")
