"""What must hold for a corpus's id indexes and tombstones, against the rows that they are about."""

from collections import defaultdict

import numpy as np
import pyarrow as pa

from featurestore import ids, tombstones
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import ROWS, read_rows
from featurestore.inspection import INPUT_FIRST, Inspection


def id_index(look: Inspection, snapshot: Snapshot, entry: Entry) -> None:
    """Inspects the id index of one range: it names every row of the range's shards, and no other.

    Its etags are not held against the rows': they may be newer (ids.py), and the file's sha256 proves them.
    """
    table = _table(look, entry, ids.SCHEMA)
    if table is None:
        return
    stem = entry.shard.rpartition("-")[0]
    shards = [each for each in snapshot.entries(ROWS, entry.name) if each.shard.rpartition("-")[0] == stem]
    with look.guard(entry, INPUT_FIRST):
        rows = {int(each.shard.rpartition("-")[2]): read_rows(look.storage, each) for each in shards}
        named = {part: (ids.hashes(own["id"].to_pylist()), np.zeros(len(own), np.uint64)) for part, own in rows.items()}
        expected = ids.table(named).drop_columns(["etag"])
        found = ids.there(table, [*rows]).drop_columns(["etag"])
        for place in np.flatnonzero(_differ(found, expected)).tolist()[:1]:
            look.say(entry, "from here on it does not name the rows that the corpus has", place)


def tombstone_file(look: Inspection, snapshot: Snapshot, entry: Entry) -> None:
    """Inspects tombstones: each is of a row that the corpus has, under its id, and stands once."""
    table = _table(look, entry, tombstones.SCHEMA)
    if table is None:
        return
    shards = {each.shard: each for each in snapshot.entries(ROWS, entry.name)}
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place, row in enumerate(table.to_pylist()):
        places[row["shard"]].append((place, row["row"], row["id"]))
    for shard, own in places.items():
        with look.guard(entry, INPUT_FIRST):
            stored = read_rows(look.storage, shards[shard])["id"].to_pylist() if shard in shards else []
            seen: set[int] = set()
            for place, row, sample_id in own:
                there = stored[row] if 0 <= row < len(stored) else None
                if there != sample_id or row in seen:
                    problem = "stands twice" if row in seen else f"is {there!r} in the corpus"
                    look.say(entry, f"row {row} of shard {shard} {problem}", place, sample_id)
                seen.add(row)


def _table(look: Inspection, entry: Entry, schema: pa.Schema) -> pa.Table | None:
    """A file's table, where rows are read and it is one of this schema."""
    if not look.sized(entry):
        return None
    stored, count, table = look.parquet(entry)
    if count != entry.rows:
        look.say(entry, f"{count} rows where the catalog says {entry.rows}")
    if not stored.equals(schema):
        look.say(entry, f"its columns are not {', '.join(schema.names)}")
        return None
    return table


def _differ(found: pa.Table, expected: pa.Table) -> np.ndarray:
    """Bool [n of the longer]: where two tables of numbers differ."""
    longer, both = max(len(found), len(expected)), min(len(found), len(expected))
    differ = np.ones(longer, bool)
    columns = [np.asarray(found[name])[:both] != np.asarray(expected[name])[:both] for name in found.column_names]
    differ[:both] = np.logical_or.reduce(columns)
    return differ
