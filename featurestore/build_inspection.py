"""What must hold for a space and for an index, against the views that they were made from."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore import artefact, indexes, vectors
from featurestore.builds import SPACE
from featurestore.catalog import Entry, Snapshot
from featurestore.errors import AlignmentError
from featurestore.inspection import INPUT_FIRST, Inspection
from featurestore.spaces import Space
from featurestore.views import View

SAME = 1e-4
"""How far a vector of an index may be from one projected anew: sums round otherwise in batches of another size."""

Files = Mapping[str, Entry]


def plain_build(look: Inspection, entries: Iterable[Entry]) -> None:
    """Inspects files of which nothing more is known than the catalog says."""
    for entry in entries:
        look.whole(entry)


def space_build(look: Inspection, snapshot: Snapshot, files: Files) -> None:
    """Inspects a space: it can be read, and projects the views of its settings."""
    plain_build(look, files.values())
    entry = build_file(look, files, "space")
    build_card(look, files)
    if entry is not None and look.reads("rows"):
        with look.guard(entry):
            space = Space.from_bytes(look.storage.read(entry.path))
            for name in entry.info()["settings"]["views"]:
                takes = dim = len(space.projections[name].mean)
                with look.guard(entry, INPUT_FIRST):
                    dim = View(snapshot, name).dim
                if dim != takes:
                    look.say(entry, f"projects vectors of {takes} values; those of view {name!r} have {dim}")


def index_build(look: Inspection, snapshot: Snapshot, files: Files) -> None:
    """Inspects an index: its rows are those of its views, and each vector in it is its row's, projected anew."""
    index, rows, card = build_file(look, files, "index"), build_file(look, files, "rows"), build_card(look, files)
    for entry in files.values():
        if entry is not rows:
            look.whole(entry)
    if rows is None:
        return
    with look.guard(rows):
        if not look.sized(rows):
            return
        stored, count, table = look.parquet(rows)
        claims: dict[str, Sequence[Any]] = {
            "kind": [rows.kind],
            "name": [rows.name],
            "recipe": [rows.recipe],
            "rows": [rows.rows, count],
        }
        look.claims(rows, artefact.footer_of(stored), claims)
        if table is not None:
            opened = _open_index(look, index, card, count) if index is not None else None
            with look.guard(rows, INPUT_FIRST):
                _index_rows(look, snapshot, rows, table, opened)


def _open_index(look: Inspection, entry: Entry, card: dict[str, Any], count: int) -> Any:
    with look.guard(entry):
        # FAISS trusts what it reads: only bytes that the catalog names are shown to it.
        content = artefact.read_checked(look.storage, entry.path, entry.sha256)
        opened = indexes.deserialise(content, card["factory"], card["dim"], count)
        if hasattr(opened, "make_direct_map"):
            opened.make_direct_map()
        return opened
    return None


def _index_rows(look: Inspection, snapshot: Snapshot, rows: Entry, table: pa.Table, opened: Any) -> None:
    settings = rows.info()["settings"]
    space = _space(look, snapshot, rows, settings["space"])
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, at in enumerate(zip(table["view"].to_pylist(), table["shard"].to_pylist(), strict=True)):
        places[at].append(place)
    for name in settings["views"]:
        view = View(snapshot, name)
        for shard in view.shards:
            own = np.array(places.pop((name, shard.shard), []), np.int64)
            _index_shard(look, rows, view, shard.shard, table.take(own), own, space, opened)
    for (name, shard_key), left in sorted(places.items()):
        for place in left:
            look.say(rows, f"is of view {name!r}, shard {shard_key}: the index has no such", place)


def _index_shard(
    look: Inspection,
    rows: Entry,
    view: View,
    shard: str,
    own: pa.Table,
    at: np.ndarray,
    space: Space | None,
    opened: Any,
) -> None:
    """One shard's rows of an index: all that are present, each once, under their ids, and with their vectors."""
    try:
        stored, ids = view.read(shard), view.corpus.ids(shard)
    except AlignmentError as error:
        problem = f"cannot be proven, shard {shard} of view {view.name!r} does not hold: {error}"
        look.say(rows, problem, mend=INPUT_FIRST)
        return
    present = np.flatnonzero(np.asarray(stored["present"]))
    numbers = np.asarray(own["row"], np.int64)
    wanted = np.intersect1d(present, view.corpus.live_rows(shard))
    for number in sorted(set(wanted.tolist()) - set(numbers.tolist())):
        look.say(
            rows, f"row {number} of shard {shard} of view {view.name!r} is not in the index", sample_id=ids[number]
        )
    seen: set[int] = set()
    for place, number, sample_id in zip(at.tolist(), numbers.tolist(), own["id"].to_pylist(), strict=True):
        there = ids[number] if 0 <= number < len(ids) else None
        if there != sample_id:
            look.say(rows, f"row {number} of shard {shard} of view {view.name!r} is {there!r}", place, sample_id)
        elif number in seen or number not in present:
            problem = "stands twice" if number in seen else "is missing in the view"
            look.say(rows, f"row {number} of shard {shard} of view {view.name!r} {problem}", place, sample_id)
        seen.add(number)
    known = (numbers >= 0) & (numbers < len(ids))
    if space is not None and opened is not None and known.any():
        found = opened.reconstruct_batch(at[known])
        expected = space.apply(view.name, vectors.matrix(stored["embedding"])[numbers[known]])
        wrong = ~(np.abs(found - expected).max(axis=1) < SAME)
        for place in at[known][wrong].tolist():
            problem = "the vector in the index is not that of this row of the view"
            look.say(rows, problem, place, own["id"][int(np.flatnonzero(at == place)[0])].as_py())


def _space(look: Inspection, snapshot: Snapshot, rows: Entry, name: str) -> Space | None:
    for entry in snapshot.entries(SPACE, name):
        if entry.shard == "space":
            with look.guard(rows, INPUT_FIRST):
                return Space.from_bytes(artefact.read_checked(look.storage, entry.path, entry.sha256))
    return None


def build_file(look: Inspection, files: Files, shard: str) -> Entry | None:
    """A file that every such build has; says so where this one has it not."""
    if shard not in files:
        any_file = next(iter(files.values()))
        look.say(any_file._replace(shard=shard), f"the build has no file {shard!r}; it has: {', '.join(files)}")
    return files.get(shard)


def build_card(look: Inspection, files: Files) -> dict[str, Any]:
    """A build's card; empty where it cannot be read."""
    entry = build_file(look, files, "card")
    if entry is None or not look.storage.exists(entry.path):
        return {}
    with look.guard(entry):
        return dict(json.loads(look.storage.read(entry.path)))
    return {}
