"""The store's table of contents: a Delta table with one row per artefact file. What it does not name does not exist.

One Delta commit publishes all the files of a job. A reader holds one `Snapshot`, whose version never changes under it.

A commit states the whole content of each (kind, name) that it touches, through the snapshot that it was computed from:
deltalake refuses it when another job has changed the same rows since, and then it is computed again from the newer
snapshot. Plain appends would duplicate rows on a retry, and deltalake's `app_transactions` does not prevent that (tried).
"""

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from featurestore.errors import InputError, NotFound, StoreError
from featurestore.storage import Storage

FOLDER = "catalog"
_COMMIT_ATTEMPTS = 30


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


class Snapshot:
    """The catalog at one version."""

    def __init__(self, storage: Storage, table: pa.Table, version: int) -> None:
        self.storage = storage
        self.version = version
        self._table = table

    def entries(self, kind: str, name: str | None = None, recipe: str | None = None) -> list[Entry]:
        """Entries of a kind (and a name, and a recipe), sorted by name and shard."""
        mask = pc.equal(self._table["kind"], kind)
        for column, value in (("name", name), ("recipe", recipe)):
            if value is not None:
                mask = pc.and_(mask, pc.equal(self._table[column], value))
        return sorted(_entries(self._table.filter(mask)), key=lambda entry: entry.key)

    def names(self, kind: str) -> list[str]:
        """The names under a kind, sorted."""
        return sorted(pc.unique(self._table.filter(pc.equal(self._table["kind"], kind))["name"]).to_pylist())

    def all(self) -> list[Entry]:
        """Every entry, sorted by key."""
        return sorted(_entries(self._table), key=lambda entry: entry.key)

    def digest(self) -> str:
        """sha256 over every entry in order: equal stores have equal digests, whenever and however they were made."""
        digest = hashlib.sha256()
        for entry in self.all():
            digest.update(json.dumps(entry, ensure_ascii=False).encode())
        return digest.hexdigest()


def _entries(table: pa.Table) -> Iterator[Entry]:
    columns = [table[name].to_pylist() for name in Entry._fields]
    return (Entry(*values) for values in zip(*columns, strict=True))


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
        """The catalog at a version, or the newest."""
        delta = self._open(version)
        return self._load(delta)

    def peek(self) -> Snapshot:
        """The newest snapshot, or an empty one of version -1 where there is no catalog yet: for planning."""
        return self.snapshot() if self.exists() else Snapshot(self.storage, SCHEMA.empty_table(), -1)

    def _load(self, delta: DeltaTable) -> Snapshot:
        return Snapshot(self.storage, self._read(delta), delta.version())

    def _read(self, delta: DeltaTable) -> pa.Table:
        """The table's rows, file by file through our own client.

        Not `to_pyarrow_table`: its reader's threads outlive the call, and about one process in three that ended soon after
        died with SIGABRT (deltalake 1.6.6, pyarrow 25).
        """
        names = sorted(uri.rpartition("/")[2] for uri in delta.file_uris())
        try:
            files = [self.storage.read(f"{FOLDER}/{name}") for name in names]
            tables = [pq.ParquetFile(pa.BufferReader(each)).read(list(Entry._fields)).cast(SCHEMA) for each in files]
        except (NotFound, pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{self.storage.uri}: a file of the catalog is gone or damaged ({error}); restore {FOLDER}/ from a copy, or "
                "open an earlier version"
            ) from error
        return pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()

    def _open(self, version: int | None = None) -> DeltaTable:
        try:
            return DeltaTable(self._uri, version=version, storage_options=self._options)
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

    def commit(self, job: str, changes: Iterable[Change]) -> int:
        """Publishes the changes of one job in one commit and returns the version that holds them.

        Running it twice commits once. A race with another job is settled by computing the commit again from what the
        other left.
        """
        changes = tuple(changes)
        for change in changes:
            _check(change)
        for attempt in range(_COMMIT_ATTEMPTS):
            delta = self._open()
            snapshot = self._load(delta)
            old = {entry for change in changes for entry in snapshot.entries(change.kind, change.name)}
            new = _apply(changes, snapshot)
            if new == old:
                return snapshot.version
            try:
                self._overwrite(delta, job, changes, sorted(new, key=lambda entry: entry.key))
            except CommitFailedError:
                # Another job won; wait a little so that many losers do not meet again at once.
                time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
                continue
            return self.snapshot().version
        raise StoreError(
            f"{self.storage.uri}: {_COMMIT_ATTEMPTS} attempts to commit {job!r} all lost to other jobs; run it again"
        )

    def _overwrite(self, delta: DeltaTable, job: str, changes: tuple[Change, ...], entries: list[Entry]) -> None:
        columns = zip(*entries, strict=True) if entries else [()] * len(SCHEMA)
        table = pa.table([pa.array(list(c), f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        scopes = sorted({(change.kind, change.name) for change in changes})
        predicate = " OR ".join(f"(kind = '{_quoted(kind)}' AND name = '{_quoted(name)}')" for kind, name in scopes)
        files = sum(len(change.entries) for change in changes)
        write_deltalake(
            delta,
            table,
            mode="overwrite",
            predicate=predicate,
            commit_properties=CommitProperties(custom_metadata={"job": job, "files": str(files)}, max_commit_retries=0),
        )


def _apply(changes: tuple[Change, ...], snapshot: Snapshot) -> set[Entry]:
    new: set[Entry] = set()
    for change in changes:
        new.update(change.entries)
        if change.covers is not None:
            for entry in snapshot.entries(change.kind, change.name, change.recipe):
                if entry.shard not in change.covers:
                    new.add(entry)
    return new


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
