"""What must hold for a training set: every row is its sample's, in the Parquet file and in the tar beside it."""

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore import vectors
from featurestore.build_inspection import build_card, build_file, plain_build
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import Corpus
from featurestore.errors import NotFound
from featurestore.identity import tar_key
from featurestore.inspection import INPUT_FIRST, Inspection
from featurestore.views import View

Files = Mapping[str, Entry]


def training_build(look: Inspection, snapshot: Snapshot, files: Files) -> None:
    """Inspects a training set: files in pairs, rows against the corpus and its views, no sample or group in two splits."""
    card = build_card(look, files)
    pairs = {name.removesuffix(".parquet") for name in files if name.endswith(".parquet")}
    for stem in sorted(pairs | {name.removesuffix(".tar") for name in files if name.endswith(".tar")}):
        for ext in (".parquet", ".tar"):
            build_file(look, files, f"{stem}{ext}")
    plain_build(look, (entry for name, entry in files.items() if not name.endswith((".parquet", ".tar"))))
    first = files[min(files)]
    sources: _Sources | None = None
    with look.guard(first, INPUT_FIRST):
        sources = _Sources(snapshot, first.info()["settings"]) if look.reads("rows") else None
    splits: dict[str, dict[str, str]] = {"sample": {}, "group": {}}
    counts: dict[str, int] = defaultdict(int)
    for stem in sorted(pairs):
        rows, tar = files[f"{stem}.parquet"], files.get(f"{stem}.tar")
        split = stem.rpartition("-")[0]
        table = _rows(look, rows, tar, split, sources)
        counts[split] += rows.rows if table is None else len(table)
        if table is not None:
            _leaks(look, rows, table, split, splits)
    if card and dict(card.get("rows", {})) != dict(counts):
        look.say(files["card"], f"its card counts {card.get('rows')} rows; the files hold {dict(counts)}")
    with look.guard(first, INPUT_FIRST):
        if sources is not None and (labelled := sources.labelled()) != sum(counts.values()):
            look.say(first, f"{sum(counts.values())} rows of {labelled} samples with a label")


class _Sources:
    """What a training set's rows are compared with."""

    def __init__(self, snapshot: Snapshot, settings: dict[str, Any]) -> None:
        self.corpus = Corpus(snapshot, settings["corpus"])
        self.views = {name: View(snapshot, name) for name in settings["views"]}
        self.label: str = settings["label"]

    def labelled(self) -> int:
        """Number of samples that have a label."""
        shards = (self.corpus.live(entry.shard, self.corpus.read(entry.shard)) for entry in self.corpus.shards)
        # A shard none of whose samples has one lacks the column.
        return sum(len(rows) - rows[self.label].null_count for rows in shards if self.label in rows.column_names)


def _rows(look: Inspection, rows: Entry, tar: Entry | None, split: str, sources: _Sources | None) -> pa.Table | None:
    table = None
    with look.guard(rows):
        if look.sized(rows):
            _, count, table = look.parquet(rows)
            if count != rows.rows:
                look.say(rows, f"{count} rows where the catalog says {rows.rows}")
            if table is not None and sources is not None:
                with look.guard(rows, INPUT_FIRST):
                    _aligned(look, rows, table, split, sources)
    if tar is not None:
        with look.guard(tar):
            if look.sized(tar) and table is not None:
                _tar(look, tar, table)
            elif look.reads("bytes"):
                look.content(tar)
    return table


def _aligned(look: Inspection, rows: Entry, table: pa.Table, split: str, sources: _Sources) -> None:
    """Compares rows with their samples, one corpus shard after the other: rows stand in the order of the corpus."""
    ids = table["id"].to_pylist()
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    before = ("", -1)
    for row, sample_id in enumerate(ids):
        try:
            shard, number = sources.corpus.locate(sample_id)
        except NotFound:
            look.say(rows, "the corpus has no such sample", row, sample_id)
            continue
        if (shard, number) <= before:
            look.say(rows, "stands behind a sample that comes after it in the corpus, or stands twice", row, sample_id)
        before = (shard, number)
        places[shard].append((row, number))
    for row in np.flatnonzero(np.asarray(table["split"].to_pylist()) != split).tolist():
        look.say(rows, f"is of split {table['split'][row].as_py()!r}", row, ids[row])
    for shard, own in places.items():
        at, numbers = (np.array(each) for each in zip(*own, strict=True))
        for row, problem in _unlike(table.take(at), shard, numbers, sources):
            look.say(rows, problem, int(at[row]), ids[at[row]])


def _unlike(part: pa.Table, shard: str, numbers: np.ndarray, sources: _Sources) -> Iterator[tuple[int, str]]:
    samples = sources.corpus.read(shard).take(numbers)
    for name, column in (("group", samples["group"]), ("label", samples[sources.label].cast(pa.string()))):
        for row, (here, there) in _pairs(part[name], column):
            yield row, f"{name} {here!r} where the corpus has {there!r}"
    for name, view in sources.views.items():
        stored = view.read(shard).take(numbers)
        for suffix in ("present", "miss_reason"):
            for row, (here, there) in _pairs(part[f"{name}_{suffix}"], stored[suffix]):
                yield row, f"{name}_{suffix} is {here!r}; the view has {there!r}"
        found, expected = vectors.matrix(part[name]), vectors.matrix(stored["embedding"])
        # NaN is compared by its bits like any other value.
        same = [a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True)]
        for row in np.flatnonzero(~np.array(same, bool)).tolist():
            yield row, f"its {name} is not the vector that the view has for it"


def _pairs(here: pa.ChunkedArray, there: pa.ChunkedArray) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The rows at which two columns differ, with both values."""
    pairs = enumerate(zip(here.to_pylist(), there.to_pylist(), strict=True))
    return ((row, pair) for row, pair in pairs if pair[0] != pair[1])


def _leaks(look: Inspection, rows: Entry, table: pa.Table, split: str, splits: dict[str, dict[str, str]]) -> None:
    columns = zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True)
    for row, (sample_id, group) in enumerate(columns):
        for what, key in (("sample", sample_id), ("group", group)):
            other = splits[what].setdefault(key, split)
            if other != split:
                look.say(rows, f"its {what} {key!r} is in split {other}, too", row, sample_id)


def _tar(look: Inspection, tar: Entry, table: pa.Table) -> None:
    """The tar must hold the Parquet file's rows: in their order, under their ids, with the same values."""
    expected = _members(table)
    for info, raw in look.members(tar):
        row, sample_id, name, value = next(expected, (None, None, None, None))
        if info.name != name:
            told = f"the rows put {name!r} there" if name else "the rows end before it"
            look.say(tar, f"member {info.name!r} stands where {told}", row, sample_id)
            return
        if raw is None or not _equal(raw, value):
            look.say(tar, f"member {info.name!r} is not what the row holds", row, sample_id)
    for row, sample_id, name, _ in expected:
        look.say(tar, f"member {name!r} is not in the tar", row, sample_id)


def _members(table: pa.Table) -> Iterator[tuple[int, str, str, Any]]:
    """(row, id, name, value) of every member that a tar of these rows has, in order."""
    views = [name.removesuffix("_present") for name in table.column_names if name.endswith("_present")]
    arrays = {name: vectors.matrix(table[name]) for view in views for name in (view, f"{view}_pred")}
    records = table.select([name for name in table.column_names if name not in arrays]).to_pylist()
    for row, record in enumerate(records):
        values: dict[str, Any] = {"json": record}
        for name, array in arrays.items():
            if record.get(f"{name}_present", True):
                values[f"{name}.npy"] = array[row]
        for name, value in sorted(values.items()):
            yield row, record["id"], f"{tar_key(record['id'])}.{name}", value


def _equal(raw: bytes, value: Any) -> bool:
    if isinstance(value, dict):
        return bool(json.loads(raw) == value)
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return False
    return bool(array.dtype == value.dtype and array.shape == value.shape and array.tobytes() == value.tobytes())
