"""Compacting a corpus: small shards become full ones, and rows whose samples are gone go; nothing is encoded again.

The shards that are small or hold what is gone are a source (sources/stored.py) whose samples are cut and written as those of
any ingest are. A view's rows are copied to where their samples stand now: a vector is bound to its sample and its input, not
to its place. One commit takes the old shards out and brings the new ones in, of the corpus and of all its views; spaces,
indexes and training sets are older than that, and `braid run` makes them again.

Shards in the order of the source are merged in the order of their keys, and their rows keep theirs. A shard that is an adopted
tar is merged with none, however small it is: where it holds what is gone, its rows are written anew without it. The tar itself
is its owner's, and is never touched.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, vectors
from featurestore.catalog import Catalog, Change, Entries, Entry, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus, read_rows
from featurestore.identity import digest_of
from featurestore.ids import IDS
from featurestore.row_order import AS_STORED, BY_ID, BY_TAR, order_of
from featurestore.storage import Storage
from featurestore.tombstones import TOMBSTONES
from featurestore.views import VIEW, View, whole
from featurestore.views import schema as view_schema
from pipelines import shard
from pipelines.ingest import Ingest
from pipelines.runner import InFlight, Job, Result, check_complete
from pipelines.shard_writer import ShardTask, ShardWriter, read_plan
from pipelines.view_writer import Beside, ViewWriter

SMALL = 0.5
"""A shard that is less full than this, by rows and by bytes, is merged with others of its kind."""


class Compaction(NamedTuple):
    """What is to be compacted: the key of the new shards, the old ones, and how many samples and bytes of them stay.

    `order` is that of the new shards.
    """

    key: str
    shards: tuple[str, ...]
    samples: int
    bytes: int
    gone: int
    order: str


def plan(snapshot: Snapshot, corpus: dict[str, Any]) -> Compaction | None:
    """The shards that are small or hold what is gone, of those that are no adopted tars; None where nothing is to gain."""
    opened = Corpus(snapshot, corpus["name"])
    tars = _tar_bytes(opened)
    small, holed = [], []
    for entry in opened.shards:
        if _order(entry) == BY_TAR:
            continue
        full = entry.rows / corpus["shard_rows"]
        if full < SMALL:
            full = max(full, (tars.get(entry.shard, 0) + _outside(opened, entry)) / (corpus["shard_mb"] << 20))
        if entry.shard in opened.gone:
            holed.append(entry)
        elif full < SMALL:
            small.append(entry)
    chosen = [*holed, *small] if holed or len(small) > 1 else []
    return _compaction(snapshot, opened, chosen, BY_ID if {*map(_order, chosen)} <= {BY_ID} else AS_STORED)


def plan_of_tars(snapshot: Snapshot, corpus: dict[str, Any]) -> Compaction | None:
    """The adopted tars that hold what is gone; None where none does."""
    opened = Corpus(snapshot, corpus["name"])
    holed = [entry for entry in opened.shards if _order(entry) == BY_TAR and entry.shard in opened.gone]
    return _compaction(snapshot, opened, holed, BY_TAR)


def _order(entry: Entry) -> str:
    return order_of(entry.info()["settings"])


def _tar_bytes(corpus: Corpus) -> dict[str, int]:
    return {entry.shard: entry.bytes for entry in corpus.tars}


def _compaction(snapshot: Snapshot, opened: Corpus, chosen: list[Entry], order: str) -> Compaction | None:
    if not chosen:
        return None
    chosen, tars = sorted(chosen, key=lambda entry: entry.shard), _tar_bytes(opened)
    gone = sum(len(opened.gone.get(entry.shard, ())) for entry in chosen)
    tombstones = sorted(entry.sha256 for entry in snapshot.entries(TOMBSTONES, opened.name))
    return Compaction(
        digest_of("compact", [(entry.shard, entry.sha256) for entry in chosen], tombstones)[:12],
        tuple(entry.shard for entry in chosen),
        sum(entry.rows for entry in chosen) - gone,
        sum(tars.get(entry.shard, 0) + _outside(opened, entry) for entry in chosen),
        gone,
        order,
    )


def _outside(corpus: Corpus, entry: Entry) -> int:
    """Bytes that a shard refers to outside the store."""
    if entry.info()["settings"]["media"] == "copy":
        return 0
    fields = [read_rows(corpus.storage, entry)[name] for name in corpus.fields]
    sizes = (pc.if_else(pc.is_null(pc.struct_field(each, "uri")), 0, pc.struct_field(each, "size")) for each in fields)
    return sum(int(pc.sum(each).as_py() or 0) for each in sizes)


class Compactor:
    """Writes new shards of one corpus, and the parts of its views beside them."""

    def __init__(self, storage: Storage, corpus: dict[str, Any], version: int) -> None:
        self._storage, self._writer = storage, ShardWriter(storage, corpus)
        snapshot = Catalog(storage).snapshot(version)
        self._views: list[tuple[View, ViewWriter, Entries, Entries]] = []
        for name in snapshot.names(VIEW):
            stored = snapshot.entries(VIEW, name)
            about = stored[0].info()
            if about["corpus"] == corpus["name"]:
                about = {key: about[key] for key in ("corpus", "field", "encoder")}
                writer = ViewWriter(storage, name, stored[0].recipe, about)
                quarantine = snapshot.entries(QUARANTINE, f"encode/{name}", stored[0].recipe)
                self._views.append((whole(snapshot, [name])[name], writer, stored, quarantine))

    def write(self, task: ShardTask) -> Result:
        """One shard and its part of every view; the Result has the entries of all."""
        made = self._writer.write(task)
        entries = [Entry(*each) for each in json.loads(made.entries)]
        (rows,) = (entry for entry in entries if entry.kind == ROWS)
        beside = Beside(rows.shard, rows.rows, rows.ids_sha256, rows.sha256)
        plan = read_plan(self._storage, task)
        places = [(reference.uri, reference.offset) for reference in plan]
        ids = {(reference.uri, reference.id) for reference in plan}
        for view, writer, stored, quarantine in self._views:
            table, tried = _copied(view, places)
            halved = _halved(stored, {shard_key for shard_key, _ in places})
            copied = writer.write(beside, table, _rejected(self._storage, quarantine, ids), tried, halved)
            entries += [Entry(*each) for each in json.loads(copied.entries)]
        return made._replace(entries=json.dumps(entries))


class CompactWork(NamedTuple):
    """What a worker of a compaction does: ShardTask -> Result."""

    storage: str
    corpus: str
    version: int

    def open(self, threads: int) -> Compactor:
        """The writer of shards and views."""
        return Compactor(Storage.from_json(self.storage), json.loads(self.corpus), self.version)

    def do(self, compactor: Compactor, task: ShardTask) -> Result:
        """One shard."""
        return compactor.write(task)


def _copied(view: View, places: list[tuple[str, int]]) -> tuple[pa.Table, int]:
    """A view's rows at some places of its old shards, and how many values of them were given to the encoder."""
    tables = {shard: view.read(shard) for shard in sorted({shard for shard, _ in places})}
    starts = dict(zip(tables, np.cumsum([0, *map(len, tables.values())]).tolist(), strict=False))
    whole = pa.concat_tables(tables.values())
    at = pa.array([starts[shard] + row for shard, row in places], pa.int64())
    columns = {name: whole[name].take(at).combine_chunks() for name in whole.column_names if name != "embedding"}
    columns["embedding"] = vectors.column(vectors.matrix(whole["embedding"])[np.asarray(at)])
    rows = pa.concat_tables(view.corpus.read(shard).select(view.fields) for shard in tables).take(at)
    given = sum(pc.sum(pc.struct_field(rows[field], "present")).as_py() or 0 for field in view.fields)
    return pa.table(columns, schema=view_schema(view.dim)), given


def _halved(stored: Entries, shards: set[str]) -> int:
    """How many batches were halved for a view's old shards."""
    return sum(entry.info().get("batches_halved", 0) for each in shards if (entry := stored.find(each)))


def _rejected(storage: Storage, quarantine: Entries, ids: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """What an encoder rejected of some (old shard, id), as it stands in the old shards' quarantines."""
    found: list[dict[str, Any]] = []
    for shard_key in sorted({each for each, _ in ids}):
        entry = quarantine.find(shard_key)
        if entry is not None:
            table = artefact.read_table(artefact.read_checked(storage, entry.path, entry.sha256))
            found += [row for row in table.to_pylist() if (shard_key, row["id"]) in ids]
    return sorted(found, key=lambda row: (row["id"], row["field"]))


class _Publish(beam.DoFn):
    """The commit: old shards out, new ones in, of the corpus and of all its views at once."""

    def __init__(self, storage: str, corpus: str, todo: Compaction, version: int) -> None:
        self._storage, self._corpus, self._todo, self._version = storage, corpus, todo, version

    def process(self, element: tuple[int, Any]) -> Iterator[int]:
        storage, name = Storage.from_json(self._storage), json.loads(self._corpus)["name"]
        catalog = Catalog(storage)
        results = sorted({each.shard: each for each in element[1]}.values())
        snapshot = catalog.snapshot(self._version)
        left = [entry for each in snapshot.entries(TOMBSTONES, name) for entry in _left(storage, each, self._todo)]
        yield catalog.commit(f"compact {name}", changes(snapshot, name, self._todo, results, tuple(left)))


def _left(storage: Storage, entry: Entry, todo: Compaction) -> Iterator[Entry]:
    """What stays of a file of tombstones: those of shards that are not compacted."""
    table = artefact.read_table(artefact.read_checked(storage, entry.path, entry.sha256))
    left = table.filter(pc.invert(pc.is_in(table["shard"], pa.array(todo.shards, pa.string()))))
    if len(left) == len(table):
        yield entry
    elif len(left):
        footer = artefact.footer_of(table.schema) | {"rows": len(left)}
        placed = artefact.place_table(storage, left, f"corpora/{entry.name}/{entry.shard}", footer)
        yield entry._replace(path=placed.path, rows=len(left), bytes=placed.bytes, sha256=placed.sha256)


def changes(
    snapshot: Snapshot, name: str, todo: Compaction, results: list[Result], tombstones: tuple[Entry, ...] = ()
) -> list[Change]:
    """The catalog changes of a compaction after which `tombstones` are left. Raises AlignmentError where a row was lost."""
    entries = [Entry(*fields) for each in results for fields in json.loads(each.entries)]
    out = {*todo.shards, *(each.shard for each in results)}
    views = [view for view in snapshot.names(VIEW) if snapshot.entries(VIEW, view)[0].info()["corpus"] == name]
    scopes = [(kind, name, "") for kind in (ROWS, MEDIA)] + [(QUARANTINE, f"shard/{name}", "")]
    for view in views:
        recipe = snapshot.entries(VIEW, view)[0].recipe
        scopes += [(VIEW, view, recipe), (QUARANTINE, f"encode/{view}", recipe)]
    made = []
    for scope in scopes:
        own = tuple(entry for entry in entries if entry.key[:3] == scope)
        made.append(Change(*scope, own, frozenset(out)))
    check_complete(f"compact {name}", made[0], todo.samples)
    # An id index of whose shards some are left stays; the one that has none goes.
    stems = {entry.shard.rpartition("-")[0] for entry in snapshot.entries(ROWS, name) if entry.shard not in out}
    empty = {entry.shard for entry in snapshot.entries(IDS, name) if entry.shard.rpartition("-")[0] not in stems}
    ids = tuple(entry for entry in entries if entry.kind == IDS)
    made.append(Change(IDS, name, "", ids, frozenset(empty | {entry.shard for entry in ids})))
    made.append(Change(TOMBSTONES, name, "", tombstones))
    return made


def build(job: Job, storage: Storage, corpus: dict[str, Any], todo: Compaction, version: int) -> None:
    """Puts the compaction of one corpus into a pipeline: write the new shards and views, then one commit."""
    source = {"type": "stored", "store": storage.to_json(), "version": version, "shards": list(todo.shards)}
    stored = corpus | {"source": source | {"order": todo.order}}
    ingest = Ingest(todo.key, todo.samples, todo.bytes, 0, 0, 0)
    work = CompactWork(storage.to_json(), json.dumps(stored, sort_keys=True), version)
    in_flight = InFlight(f"compact {corpus['name']}", work, job.workers)
    if todo.samples:
        compacted = job.pipeline | "Compact" >> shard.Shard(storage, stored, ingest, -1, in_flight)
        gathered = compacted | "Gather" >> beam.GroupByKey()
    else:
        gathered = job.pipeline | "Nothing left" >> beam.Create([(0, list[Result]())], reshuffle=False)
    (
        gathered
        | "Publish" >> beam.ParDo(_Publish(storage.to_json(), json.dumps(corpus), todo, version)).with_output_types(int)
    )
