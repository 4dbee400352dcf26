"""What a source holds that a store does not: compared by id and etag before a shard job is planned, and again inside it.

A sample that changed is a tombstone for the old row and a row in the new ingest; one that is gone is a tombstone. One whose
etag alone is another was touched or copied: its values are compared, and it stays as it is. The job writes its etag of now
into the id index (not into its row: a shard's rows are never changed), so that it is compared once and not in every plan. One
whose source cannot be read now stays as it is, too, and keeps its etag: nothing that is stored is given up for a disk or a
server that does not answer.
"""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from featurestore import ids, media
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import MISSES, ROWS, Corpus, read_ids, read_rows
from featurestore.errors import DecodeError, InputError
from featurestore.identity import IngestDigest, hash64, input_digest
from featurestore.ids import IDS, Ids, hashes
from featurestore.times import TIMESTAMPS
from featurestore.tombstones import CHANGED, GONE, SCHEMA
from pipelines.ahead import ahead
from pipelines.cuts import SHARDS_PER_RANGE
from pipelines.fetch import fetched, reference_to
from pipelines.reference_blocks import packed, unpacked
from pipelines.sources import Doubting, Missing, Sample, SampleRef, Source, Value
from pipelines.sources.rows import RowSource

_BATCH = 65_536
"""References whose ids are looked up at once."""
_THREADS = 8
"""So many samples that may have changed are read again at once."""

NEW, SAME, TOUCHED = "new", "same", "touched"
"""What a sample of the source is to the store; or CHANGED, of tombstones.py."""


class Ingest(NamedTuple):
    """What a source holds that the store does not: the size of the job, known before it starts.

    `samples` are to be written: new ones, and the `changed` ones among them. `known` stand in the store as they are, the
    `touched` ones among them with another etag; `gone` are in the store and no longer in the source.
    """

    key: str
    samples: int
    bytes: int
    known: int
    changed: int
    gone: int
    touched: int = 0
    remarks: tuple[str, ...] = ()

    def ranges(self, corpus: dict[str, Any]) -> int:
        """Number of ranges, where they are slices of hash(group): about 32 shards' worth each."""
        by_rows = self.samples / corpus["shard_rows"]
        by_bytes = self.bytes / (corpus["shard_mb"] << 20)
        return max(1, -(-int(max(by_rows, by_bytes)) // SHARDS_PER_RANGE))


class Known:
    """What the store holds of a corpus, to compare a source with: 24 bytes a sample, and 20 more in shards with other etags.

    Args:
        snapshot: of the store.
        name: of the corpus.
        renewed: files of the id index that are read instead of those that the snapshot names.
    """

    def __init__(self, snapshot: Snapshot, name: str, renewed: Sequence[Entry] = ()) -> None:
        self._snapshot, self._name = snapshot, name
        self._corpus = Corpus(snapshot, name) if name in snapshot.names(ROWS) else None
        self._ids = Ids(snapshot, name, renewed)
        self._stored_ids: dict[str, pa.ChunkedArray] = {}
        self._touched: dict[str, tuple[array[int], array[int]]] = {}
        self._unread: dict[str, tuple[array[int], array[int]]] = {}
        self._gone = np.zeros(len(self._ids), bool)
        for shard, rows in (self._corpus.gone if self._corpus else {}).items():
            places = self._ids.by_shard[shard]
            self._gone[places[np.isin(self._ids.rows[places], rows)]] = True

    def compare(self, source: Source) -> Iterator[tuple[SampleRef, str, int]]:
        """Every reference of a source, whether it is NEW, SAME or CHANGED by its etag, and its place in the id index.

        Of a new one the place is that of one that is gone and had its id, or -1. Afterwards `tombstones` has what of the
        store was not among them, or changed.
        """
        self._seen, self._changed, self._settled = self._gone.copy(), array("q"), np.array([], np.int64)
        self._doubting = source if isinstance(source, Doubting) else None
        references = source.references()
        while batch := list(itertools.islice(references, _BATCH)):
            found = self._ids.find(hashes([reference.id for reference in batch]))
            etags = hashes([reference.etag for reference in batch])
            for reference, first, etag in zip(batch, found.tolist(), etags, strict=True):
                yield reference, *(self._state(reference, first, etag) if first >= 0 else (NEW, -1))

    def before(self, reference: SampleRef) -> str:
        """Where samples of its id stand, and stood, in words."""
        return " ".join(f"{shard}/{row}" for shard, row in sorted(self._ids.places(reference.id)))

    def number(self, place: int) -> int:
        """The number of a sample's shard, for `settle`."""
        return self._ids.code(place)

    def settle(self, source: Source, number: int, references: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, str]]:
        """Samples of one shard whose etag is another, in the shard's order: CHANGED, or TOUCHED where they hold the same.

        One that cannot be read now is the SAME for now, and keeps its etag: nobody knows what it holds. They are compared in
        threads; the shard's rows are held meanwhile.
        """
        assert self._corpus is not None
        corpus, places = self._corpus, self._ids.of_code(number)
        shard = self._ids.shard(int(places[0]))
        rows = read_rows(corpus.storage, corpus.shard(shard))
        at = {sample_id: row for row, sample_id in enumerate(rows["id"].to_pylist())}
        references = sorted(references, key=lambda each: at[each.id])
        told = {each: (array("q"), array("Q")) for each in (TOUCHED, SAME)}
        self._touched[shard], self._unread[shard] = told[TOUCHED], told[SAME]

        def state_of(sample: Sample) -> str:
            unread: list[str] = []
            if not same(corpus, rows.slice(at[sample.id], 1), sample, unread=unread):
                return CHANGED
            return SAME if unread else TOUCHED

        kept = []
        compared = ahead(state_of, source.samples(references), _THREADS, 2 * _THREADS)
        for reference, (_, state) in zip(references, compared, strict=True):
            if state != CHANGED:
                told[state][0].append(at[reference.id])
                told[state][1].append(hash64(reference.etag))
                kept.append(at[reference.id])
            yield reference, state
        self._settled = np.append(self._settled, places[np.isin(self._ids.rows[places], kept)])

    def renewed(self) -> Iterator[tuple[str, pa.Table]]:
        """Range, and its id index with the etags of now, where `settle` found samples that were only touched."""
        return self._renewed(self._touched)

    def taken(self) -> Iterator[tuple[str, pa.Table]]:
        """The same, and of those that could not be read too, where there are any: what a job holds for the same as planned."""
        if any(rows for rows, _ in self._unread.values()):
            yield from self._renewed(self._touched, self._unread)

    def _renewed(self, *found: dict[str, tuple["array[int]", "array[int]"]]) -> Iterator[tuple[str, pa.Table]]:
        ranges: dict[str, dict[int, tuple[Sequence[int], Sequence[int]]]] = {}
        for shard in sorted({*itertools.chain(*found)}):
            rows, etags = (list(itertools.chain(*(each[shard][part] for each in found))) for part in (0, 1))
            if rows:
                stem, _, part = shard.rpartition("-")
                ranges.setdefault(stem, {})[int(part)] = rows, etags
        for stem, parts in ranges.items():
            entry = self._snapshot.entries(IDS, self._name).find(f"{stem}-00000")
            assert entry is not None
            yield stem, ids.renewed(ids.read(self._snapshot.storage, entry), parts)

    def tombstones(self) -> pa.Table:
        """What `compare` found gone or changed, as a table of `tombstones.SCHEMA`; not what `settle` found the same."""
        rows = []
        changed = np.setdiff1d(np.frombuffer(self._changed, np.int64), self._settled)
        left = ((place, GONE) for place in np.flatnonzero(~self._seen).tolist())
        for place, why in itertools.chain(left, ((place, CHANGED) for place in changed.tolist())):
            shard, row = self._ids.shard(place), int(self._ids.rows[place])
            sample_id = self._ids_in(shard)[row].as_py()
            if not self._in_doubt(sample_id):
                rows.append((shard, row, sample_id, why))
        columns = [list(column) for column in zip(*sorted(rows), strict=True)] or [[]] * len(SCHEMA)
        return pa.table(columns, schema=SCHEMA)

    def _state(self, reference: SampleRef, first: int, etag: np.uint64) -> tuple[str, int]:
        """Of the stored samples with the hash of this one's id, the one that it is."""
        place = first
        while place < len(self._ids) and self._ids.hash[place] == self._ids.hash[first]:
            if not self._gone[place]:
                same_etag = self._ids.etag[place] == etag
                if (
                    same_etag
                    or self._ids_in(self._ids.shard(place))[int(self._ids.rows[place])].as_py() == reference.id
                ):
                    self._seen[place] = True
                    if same_etag or self._in_doubt(reference.id):
                        return SAME, place
                    self._changed.append(place)
                    return CHANGED, place
            place += 1
        return NEW, first

    def _in_doubt(self, sample_id: str) -> bool:
        return self._doubting is not None and self._doubting.in_doubt(sample_id)

    def _ids_in(self, shard: str) -> pa.ChunkedArray:
        if shard not in self._stored_ids:
            assert self._corpus is not None
            self._stored_ids[shard] = read_ids(self._corpus.storage, self._corpus.shard(shard))
        return self._stored_ids[shard]


def same(
    corpus: Corpus, row: pa.Table, sample: Sample, but: Collection[str] = (), unread: list[str] | None = None
) -> bool:
    """Whether a stored sample has the group, the columns and the values (`but` those of some fields) that the source gives now.

    Args:
        corpus: as it is stored.
        row: the sample's row of its shard.
        sample: the same id, as the source gives it.
        but: fields whose values may be others, and what is measured of them.
        unread: takes fields whose values cannot be read now: what is stored is not given up for that.
    """
    times = [name for name in TIMESTAMPS if name in row.column_names]
    stored = row.drop_columns(times).to_pylist()[0]
    own = {"id", "group", "etag", *corpus.fields}
    kept = {name: value for name, value in stored.items() if name not in own}
    given = {name: value for name, value in sample.columns.items() if name not in times}
    about = {column for columns in sample.about.values() for column in columns}
    if (
        stored["group"] != sample.group
        or any(row[name].cast(pa.int64())[0].as_py() != sample.columns.get(name) for name in times)
        or not _equal(kept, given, (kept.keys() | given.keys()) - about)
    ):
        return False
    unknown = [] if unread is None else unread
    for name, value in sample.values.items():
        found = True if name in but else _same_value(corpus, stored[name], name, value)
        if found is False:
            return False
        if found is None:
            unknown.append(name)
    measured = (columns for name, columns in sample.about.items() if name not in {*but, *unknown})
    return _equal(kept, given, {column for columns in measured for column in columns})


def _equal(kept: dict[str, Any], given: dict[str, Any], names: Collection[str]) -> bool:
    """Whether columns of these names are the same."""
    return all(_same_column(kept.get(name), given.get(name)) for name in names)


def _same_column(kept: Any, value: Any) -> bool:
    """Whether a kept value is the source's; what is no number, truth or text is kept as JSON."""
    if value is None:
        return kept is None
    # As JSON a NaN is the same as another, which it is not by itself.
    return kept in (value, told := json.dumps(value, sort_keys=True)) or json.dumps(kept) == told


def _same_value(corpus: Corpus, member: dict[str, Any], field: str, value: Value | Missing | None) -> bool | None:
    """None where that cannot be told now."""
    if value is None or isinstance(value, Missing):
        return bool(member["miss_reason"] == (value.reason if value else "absent"))
    try:
        # Of what was rejected there is no digest: it is the same where it is rejected for the same reason.
        decode = media.check if member["miss_reason"] in media.REASONS else None
        if member["digest"] != input_digest(fetched(value, corpus.fields[field], decode)):
            return False
    except DecodeError as error:
        if error.reason == "unreadable" and (
            member["present"] or member["miss_reason"] in {"unreadable", *MISSES} - {"absent"}
        ):
            return None
        return bool(error.reason == member["miss_reason"])
    # What is referred to must be found where it stands now, too.
    return member["uri"] is None or reference_to(corpus.storage, value) == (member["uri"], member["offset"])


def scan(source: Source, known: Known) -> Ingest:
    """Reads all references once and says what is to do. InputError where an id stands twice, naming both places.

    What has another etag than it had is read again and compared, shard by shard of the store; meanwhile it is held as packed
    references.
    """
    digest, size, counts = IngestDigest(), 0, Counter[str]()
    seen = array("Q")

    def others() -> Iterator[tuple[int, SampleRef]]:
        nonlocal size
        for reference, state, place in known.compare(source):
            seen.append(hash64(reference.id))
            if state == CHANGED:
                yield known.number(place), reference
                continue
            counts[state] += 1
            if state == NEW:
                # With where it stood before: one that comes back as it was is another ingest than its first.
                digest.add(reference.id, reference.etag + ("" if place < 0 else known.before(reference)))
                size += reference.bytes

    blocks: dict[int, list[bytes]] = {}
    for number, block in packed(others()):
        blocks.setdefault(number, []).append(block)
    unique = np.sort(np.frombuffer(seen, np.uint64))
    if len(repeated := unique[1:][unique[1:] == unique[:-1]]):
        _name_duplicate(source, set(repeated.tolist()))
    for number in sorted(blocks):
        for reference, state in known.settle(source, number, unpacked(blocks.pop(number))):
            counts[state] += 1
            if state == CHANGED:
                digest.add(reference.id, reference.etag + known.before(reference))
                size += reference.bytes
    samples, gone = digest.count, 0
    for shard, row, sample_id, why in zip(*known.tombstones().to_pydict().values(), strict=True):
        if why == GONE:
            digest.add(sample_id, f"gone from {shard}, row {row}")
            gone += 1
    known_now = counts[SAME] + counts[TOUCHED]
    return Ingest(digest.key(), samples, size, known_now, counts[CHANGED], gone, counts[TOUCHED])


def _name_duplicate(source: Source, suspects: set[int]) -> None:
    places: dict[str, SampleRef] = {}
    for reference in source.references():
        if hash64(reference.id) not in suspects:
            continue
        first = places.setdefault(reference.id, reference)
        if first is not reference:
            raise twice(source, first, reference)


def twice(source: Source, first: SampleRef, other: SampleRef) -> InputError:
    """What is raised where two samples have one id."""
    counts_anew = isinstance(source, RowSource) and source.could_number() and first.uri != other.uri
    mend = "or, where each file has ids of its own, write corpus.columns: {id: __row__}, which names the file too"
    return InputError(
        f"id {other.id!r} stands twice: {source.place(first)} and {source.place(other)}; ids must be unique in a corpus, so "
        f"rename or remove one{f', {mend}' if counts_anew else ''}"
    )
