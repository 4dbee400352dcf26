"""What is to be encoded: a view's recipe, and which shards of its corpus it lacks. Runs nothing and needs no Beam."""

from collections.abc import Collection
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from featurestore import encoders, views
from featurestore.catalog import Snapshot, lost
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.storage import Storage


class ViewPlan(NamedTuple):
    """What every shard of a view is made with; `field` is of several fields their names, as `views.fields_of` reads it."""

    name: str
    corpus: str
    field: str
    encoder: str
    options: dict[str, Any]
    recipe: str


def view_plan(name: str, corpus: str, field: str, encoder: str, options: dict[str, Any], modality: str) -> ViewPlan:
    """Completes a view of the spec, on a field of a modality, with its recipe: hashes the weights, loads nothing."""
    made = encoders.find_for(encoder, options, modality)
    given = made.options.model_dump(mode="json", exclude_unset=True)
    return ViewPlan(name, corpus, field, encoder, given, views.recipe(field, made.fingerprint()))


class EncodeTask(NamedTuple):
    """A descriptor of one shard to encode: where its rows and its tar (empty where it has none) are.

    `earlier_path` is the view's file of the same recipe, shard and ids that the catalog has, `rejected_path` that one's
    quarantine; empty where there is none.
    """

    shard: str
    rows_path: str
    rows: int
    sha256: str
    ids_sha256: str
    tar_path: str
    tar_sha256: str
    earlier_path: str = ""
    earlier_sha256: str = ""
    rejected_path: str = ""
    rejected_sha256: str = ""


def stale(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int]) -> list[EncodeTask]:
    """The shards of the corpus that the view lacks, or of which a file (its quarantine too) is gone or has another size.

    The largest tar comes first, of those without one that with most rows: a large shard that begins last is waited for alone.

    Args:
        snapshot: the catalog.
        plan: the view.
        listing: key -> bytes of what lies in the view's folders, as `listed` gives it.
    """
    have, rows = _have(snapshot, plan, listing), _rows_of(snapshot, plan)
    return _tasks(snapshot, plan, have, rows.filter(_is_stale(have, rows)))


def stale_rows(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int]) -> pa.Table:
    """Of the shards of `stale`, in the order of their keys, `shard` and `rows`: half a million tasks take half a gigabyte."""
    have, rows = _have(snapshot, plan, listing), _rows_of(snapshot, plan)
    return rows.select(["shard", "rows"]).filter(_is_stale(have, rows))


def remakes(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int], shards: Collection[str]) -> list[EncodeTask]:
    """As `stale`, of the shards that the view has: those made from earlier rows, and some more that are to be made again."""
    have, rows = _have(snapshot, plan, listing), _rows_of(snapshot, plan)
    again = pc.or_(_is_stale(have, rows), pc.is_in(rows["shard"], pa.array(shards, pa.string())))
    return [task for task in _tasks(snapshot, plan, have, rows.filter(again)) if task.earlier_path]


def _tasks(snapshot: Snapshot, plan: ViewPlan, have: pa.Table, todo: pa.Table) -> list[EncodeTask]:
    corpus = Corpus(snapshot, plan.corpus)
    tars = snapshot.table(MEDIA, plan.corpus, None, ("shard", "path", "sha256", "bytes"))
    tars = tars.take(pc.index_in(todo["shard"], tars["shard"]))
    for shard in todo["shard"].filter(pc.and_(pc.is_null(tars["shard"]), pc.not_equal(todo["input_sha256"], ""))):
        corpus.media(shard.as_py())
    sizes = pa.table({"bytes": pc.fill_null(tars["bytes"], 0), "rows": todo["rows"]})
    order = pc.sort_indices(sizes, [("bytes", "descending"), ("rows", "descending")])
    earlier = have.take(pc.index_in(todo["shard"], have["shard"]))
    copied = pc.fill_null(pc.equal(earlier["ids_sha256"], todo["ids_sha256"]), False)
    rejected = snapshot.table(QUARANTINE, f"encode/{plan.name}", plan.recipe, ("shard", "path", "sha256"))
    rejected = rejected.take(pc.index_in(todo["shard"], rejected["shard"]))
    files = [tars[name] for name in ("path", "sha256")]
    files += [pc.if_else(copied, each[name], "") for each in (earlier, rejected) for name in ("path", "sha256")]
    todo = todo.drop_columns(["input_sha256"])
    columns = [column.take(order) for column in (*todo.columns, *(pc.fill_null(each, "") for each in files))]
    return [EncodeTask(*task) for task in zip(*(column.to_pylist() for column in columns), strict=True)]


def _rows_of(snapshot: Snapshot, plan: ViewPlan) -> pa.Table:
    columns = ("shard", "path", "rows", "sha256", "ids_sha256", "input_sha256")
    return snapshot.table(ROWS, plan.corpus, None, columns)


def _have(snapshot: Snapshot, plan: ViewPlan, listing: dict[str, int]) -> pa.Table:
    """The view's shards of which no file (its quarantine too) is lost: by columns, as there may be a million."""
    scopes = ((views.VIEW, plan.name, plan.recipe), (QUARANTINE, f"encode/{plan.name}", plan.recipe))
    gone = [lost(snapshot.table(*scope, ("shard", "path", "bytes")), listing)["shard"] for scope in scopes]
    have = snapshot.table(*scopes[0], ("shard", "path", "sha256", "ids_sha256", "input_sha256"))
    for shards in gone:
        have = have.filter(pc.invert(pc.is_in(have["shard"], shards)))
    return have


def _is_stale(have: pa.Table, rows: pa.Table) -> pa.ChunkedArray:
    """Bool [shards of the corpus]: whether the view has no file made from these bytes."""
    made_from = have["input_sha256"].take(pc.index_in(rows["shard"], have["shard"]))
    return pc.invert(pc.fill_null(pc.equal(made_from, rows["sha256"]), False))


def folder(plan: ViewPlan) -> str:
    """Where the view's shards are."""
    return f"views/{plan.name}/{plan.recipe}"


def listed(storage: Storage, plan: ViewPlan) -> dict[str, int]:
    """Key -> bytes of every file that the view's recipe has, one listing for each of its two folders."""
    return storage.list(folder(plan)) | storage.list(f"quarantine/encode/{plan.name}/{plan.recipe}")
