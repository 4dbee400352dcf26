"""A small whole store to break, ways to break it, and what its readers may return once it is broken."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import artefact, builds, spaces
from featurestore import vectors as codec
from featurestore.catalog import Catalog, Change, Entry, Snapshot
from featurestore.corpora import QUARANTINE, Corpus
from featurestore.errors import NotFound, StoreError
from featurestore.storage import Storage
from featurestore.views import VIEW, View
from pipelines import align, encode, encode_plan, fuse, index, runner, shard
from pipelines.ingest import Known, scan
from pipelines.publish import card_bytes, place_build
from pipelines.sources import open_source
from tests.planted import SHARD_ROWS, write_planted

SAMPLES = 48
VIEWS = {"sound": "log-mel", "timbre": "mfcc"}
FIELDS = ("caption", "sound")


def corpus_settings(folder: Path, n: int = SAMPLES, bad: bool = True) -> dict[str, Any]:
    """The corpus part of a spec over `n` planted samples, 7 more and 10 bad values where `bad`."""
    manifest = write_planted(folder, n=n, bad=bad)
    return {
        "name": "planted",
        "source": {"type": "manifest", "path": [str(manifest)]},
        "columns": {"id": "id", "group": "group", "event_timestamp": "added"},
        "fields": {
            "caption": {"modality": "text", "from": "caption", "read": "inline"},
            "sound": {"modality": "audio", "from": "sound_path", "read": "file"},
        },
        "shard_rows": SHARD_ROWS,
        "shard_mb": 64,
        "failure_budget": 0.2,
    }


def shard_corpus(storage: Storage, corpus: dict[str, Any]) -> None:
    """The shard stage."""
    catalog = Catalog(storage)
    catalog.create()
    snapshot = catalog.snapshot()
    ingest = scan(open_source(corpus), Known(snapshot, corpus["name"]))
    job = runner.Job()
    shard.build(job, storage, corpus, ingest, snapshot.version)
    job.run()


def encode_view(storage: Storage, name: str, encoder: str, options: dict[str, Any] | None = None) -> None:
    """The encode stage of one view, its shards one after the other without Beam."""
    plan = encode_plan.view_plan(name, "planted", "sound", encoder, options or {}, "audio")
    snapshot = Catalog(storage).snapshot()
    tasks = encode_plan.stale(snapshot, plan, encode_plan.listed(storage, plan))
    worker = encode.ShardEncoder(storage, plan, threads=2, version=snapshot.version)
    scopes = [runner.Scope(VIEW, name, plan.recipe), runner.Scope(QUARANTINE, f"encode/{name}", plan.recipe)]
    publish(storage, [worker.encode(task) for task in tasks], scopes)


def build_index(storage: Storage) -> None:
    """A space of 8 dimensions, learned as the align stage learns one but not evaluated, and the index stage."""
    snapshot = Catalog(storage).snapshot()
    settings = {"corpus": "planted", "views": [*VIEWS], "method": "cca", "dim": 8, "equal": None}
    planned = builds.plan(snapshot, builds.SPACE, "heard", settings)
    found = align.pairs(snapshot, [*VIEWS], None)
    projections = dict(zip(VIEWS, spaces.fit_cca(found.x, found.y, 8, (1.0, 1.0), 1.0), strict=True))
    space = spaces.Space("heard", "cca", 8, projections, {})
    files = {"space.safetensors": space.to_bytes(), "card.json": card_bytes({"name": "heard"})}
    publish(
        storage,
        [place_build(storage, planned, files)],
        [runner.Scope(*planned[:2], planned.key)],
        whole=True,
    )
    snapshot = Catalog(storage).snapshot()
    settings = {"corpus": "planted", "space": "heard", "views": [*VIEWS], "recall": 1.0}
    planned = builds.plan(snapshot, builds.INDEX, "heard", settings)
    publish(
        storage, [index.make(storage, planned, snapshot.version)], [runner.Scope(*planned[:2], planned.key)], whole=True
    )


def build_training_set(storage: Storage) -> None:
    """The fuse stage."""
    snapshot = Catalog(storage).snapshot()
    chosen = {"views": [*VIEWS], "label": "label", "splits": {"train": 0.7, "val": 0.1, "test": 0.2}, "seed": 0}
    chosen["group_equal"] = []
    planned = builds.plan(snapshot, builds.TRAINING, "category", {"corpus": "planted", **chosen})
    made = fuse.make(storage, planned, snapshot.version)
    publish(storage, [made], [runner.Scope(*planned[:2], planned.key)], whole=True)


def publish(storage: Storage, results: list[runner.Result], scopes: list[runner.Scope], whole: bool = False) -> None:
    """Commits results as a job's last step does."""
    listed = [runner.listed(storage, each) for each in results]
    Catalog(storage).commit("test", runner.changes(listed, scopes, whole))


class Broken:
    """A copy of the store that can be broken, naively (a file changed on disk) or forged (the catalog changed with it)."""

    def __init__(self, whole: Storage, folder: Path) -> None:
        shutil.copytree(whole.root, folder)
        self.storage = Storage.of(folder)
        self.folder = folder
        self._snapshot: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """The newest that this has made."""
        if self._snapshot is None:
            self._snapshot = Catalog(self.storage).snapshot()
        return self._snapshot

    def entry(self, kind: str, name: str, position: int) -> Entry:
        """The entry of the shard at a position."""
        return self.snapshot().entries(kind, name)[position]

    def path(self, entry: Entry) -> Path:
        """A file on disk."""
        return self.folder / entry.path

    def read(self, entry: Entry) -> pa.Table:
        """A Parquet file as it is, its footer with it."""
        return pq.read_table(self.path(entry))

    def change(self, entry: Entry, content: bytes | None, forged: bool, rows: int | None = None, **claims: Any) -> None:
        """Gives a file other content (None: none), and where `forged` the catalog an entry that bears it out."""
        if not forged:
            self.path(entry).unlink()
            if content is not None:
                self.path(entry).write_bytes(content)
            return
        if content is None:
            return self.commit(entry, None)
        stem, ext = entry.path.rpartition("-")[0], Path(entry.path).suffix
        placed = artefact.place_bytes(self.storage, content, stem, ext)
        count = entry.rows if rows is None else rows
        claims = {"path": placed.path, "bytes": placed.bytes, "sha256": placed.sha256, "rows": count} | claims
        return self.commit(entry, entry._replace(**claims))

    def commit(self, old: Entry, new: Entry | None) -> None:
        """Replaces an entry of the catalog, or takes it away."""
        kept = [each for each in self.snapshot().entries(old.kind, old.name) if each != old]
        entries = tuple([*kept, new] if new is not None else kept)
        by_recipe = {old.recipe, *(entry.recipe for entry in entries)}
        changes = [
            Change(old.kind, old.name, recipe, tuple(entry for entry in entries if entry.recipe == recipe))
            for recipe in sorted(by_recipe)
        ]
        Catalog(self.storage).commit("break", changes)
        self._snapshot = None

    def rewrite(self, entry: Entry, table: pa.Table, forged: bool) -> None:
        """Gives a Parquet file another table; a forged one has a footer that bears out its number of rows."""
        footer = artefact.footer_of(table.schema)
        if forged:
            footer |= {"rows": len(table)}
        with self.storage.scratch() as folder:
            artefact.write_table(table, folder / "x.parquet", footer)
            content = (folder / "x.parquet").read_bytes()
        self.change(entry, content, forged, len(table))


def swap(table: pa.Table, first: int, second: int) -> pa.Table:
    """A table with two rows exchanged."""
    order = np.arange(len(table))
    order[[first, second]] = second, first
    return table.take(order)


def present_rows(table: pa.Table) -> list[int]:
    """The rows of a view's shard that have a vector."""
    return np.flatnonzero(np.asarray(table["present"])).tolist()


def set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """A table with other values in a column."""
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), values)


def flip(content: bytes, at: int) -> bytes:
    """Bytes with one bit changed."""
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def members(content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A tar's members."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def tar_of(contents: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of members, as Braid writes one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, raw in contents:
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()


class Truth(NamedTuple):
    """What the readers of the whole store give, by id, and the ids of each shard in order."""

    shards: dict[str, list[str]]
    raw: dict[tuple[str, str], bytes | None]
    rows: dict[str, Any]
    vectors: dict[str, dict[str, bytes | None]]


def truth(storage: Storage) -> Truth:
    """Reads a whole store."""
    snapshot = Catalog(storage).snapshot()
    corpus = Corpus(snapshot, "planted")
    shards = {entry.shard: corpus.ids(entry.shard) for entry in corpus.shards}
    raw = {
        (sample_id, field): corpus.value(shard_key, row, field)
        for shard_key, ids in shards.items()
        for row, sample_id in enumerate(ids)
        for field in FIELDS
    }
    vectors = {name: _vectors_by_id(View(snapshot, name).to_arrow()) for name in VIEWS}
    return Truth(shards, raw, _rows_by_id(corpus.to_arrow()), vectors)


def _vectors_by_id(table: pa.Table) -> dict[str, bytes | None]:
    matrix = codec.matrix(table["embedding"])
    here = zip(table["id"].to_pylist(), matrix, table["embedding"].is_valid().to_pylist(), strict=True)
    return {sample_id: vector.tobytes() if valid else None for sample_id, vector, valid in here}


def _rows_by_id(table: pa.Table) -> dict[str, Any]:
    return {
        each["id"]: [each["group"], each["label"], *(each[name]["digest"] for name in FIELDS)]
        for each in table.to_pylist()
    }


def misreadings(storage: Storage, right: Truth) -> list[str]:
    """Calls every reader: names those that return a row that is not its sample's. Refusing is allowed."""
    snapshot = Catalog(storage).snapshot()
    wrong: list[str] = []

    def call(what: str, read: Callable[[], dict[Any, Any]], of: dict[Any, Any]) -> None:
        try:
            found = read()
        except (StoreError, NotFound):
            return
        if any(of.get(key, "no such sample") != value for key, value in found.items()):
            wrong.append(what)

    corpus = Corpus(snapshot, "planted")
    call("Corpus.to_arrow", lambda: _rows_by_id(corpus.to_arrow()), right.rows)
    for entry in corpus.shards:
        call(f"Corpus.read({entry.shard})", lambda key=entry.shard: _rows_by_id(corpus.read(key)), right.rows)
        for row in range(entry.rows):
            for field in FIELDS:

                def value(key: str = entry.shard, row: int = row, field: str = field) -> dict[Any, Any]:
                    return {(corpus.ids(key)[row], field): corpus.value(key, row, field)}

                call(f"Corpus.value({entry.shard}, {row}, {field})", value, right.raw)
    for name, of in right.vectors.items():
        try:
            view = View(snapshot, name)
        except (StoreError, NotFound):
            continue
        call(f"View.to_arrow of {name}", lambda view=view: _vectors_by_id(view.to_arrow()), of)
        call(f"View.matrix of {name}", lambda view=view: _matrix(view, right), of)
        call(f"View.take of {name}, by row", lambda view=view: _vectors_by_id(view.take(range(view.rows))), of)
        for key, ids in right.shards.items():
            call(f"View.take of {name}, {key}", lambda view=view, ids=ids: _vectors_by_id(view.take(ids)), of)
    return wrong


def _matrix(view: View, right: Truth) -> dict[str, bytes | None]:
    vectors, present = view.matrix()
    ids = [sample_id for entry in view.shards for sample_id in right.shards.get(entry.shard, [])]
    here = zip(ids, vectors, present, strict=True)
    return {sample_id: vector.tobytes() if valid else None for sample_id, vector, valid in here}
