"""What a source holds that a store does not: compared by id and etag before a shard job is planned, and again inside it.

A sample that changed is a tombstone for the old row and a row in the new ingest; one that is gone is a tombstone. One whose
etag alone is another was touched or copied: its values are compared, and it stays as it is. So does one whose source cannot be
read now: nothing that is stored is given up for a disk or a server that does not answer.
"""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from featurestore import media
from featurestore.catalog import Snapshot
from featurestore.corpora import MISSES, ROWS, Corpus
from featurestore.errors import DecodeError, InputError
from featurestore.identity import IngestDigest, hash64, input_digest
from featurestore.ids import Ids, hashes
from featurestore.times import TIMESTAMPS
from featurestore.tombstones import CHANGED, GONE, SCHEMA
from pipelines.cuts import SHARDS_PER_RANGE
from pipelines.fetch import fetched, reference_to
from pipelines.sources import Doubting, Missing, Sample, SampleRef, Source, Value

_BATCH = 65_536
"""References whose ids are looked up at once."""
_AGAIN_BYTES = 512 << 20
"""Of samples that may have changed, how many are read again at once."""

NEW, SAME = "new", "same"
"""What a sample of the source is to the store; or CHANGED, of tombstones.py."""


class Ingest(NamedTuple):
    """What a source holds that the store does not: the size of the job, known before it starts.

    `samples` are to be written: new ones, and the `changed` ones among them. `known` stand in the store as they are; `gone`
    are in the store and no longer in the source.
    """

    key: str
    samples: int
    bytes: int
    known: int
    changed: int
    gone: int
    remarks: tuple[str, ...] = ()

    def ranges(self, corpus: dict[str, Any]) -> int:
        """Number of ranges, where they are slices of hash(group): about 32 shards' worth each."""
        by_rows = self.samples / corpus["shard_rows"]
        by_bytes = self.bytes / (corpus["shard_mb"] << 20)
        return max(1, -(-int(max(by_rows, by_bytes)) // SHARDS_PER_RANGE))


class Known:
    """What the store holds of a corpus, to compare a source with: 24 bytes a sample, and no rows are read.

    A sample whose etag is another is the same all the same where its columns and values are: it was only touched or copied.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self._corpus = Corpus(snapshot, name) if name in snapshot.names(ROWS) else None
        self._ids = Ids(snapshot, name)
        self._gone = np.zeros(len(self._ids), bool)
        for shard, rows in (self._corpus.gone if self._corpus else {}).items():
            places = self._ids.by_shard[shard]
            self._gone[places[np.isin(self._ids.rows[places], rows)]] = True

    def compare(self, source: Source) -> Iterator[tuple[SampleRef, str, str]]:
        """Every reference of a source, whether it is NEW, SAME or CHANGED, and where it stood before, in words.

        Afterwards `tombstones` has what of the store was not among them, or changed.
        """
        self._seen = self._gone.copy()
        self._changed: list[int] = []
        self._doubting = source if isinstance(source, Doubting) else None
        references = source.references()
        while batch := list(itertools.islice(references, _BATCH)):
            found = self._ids.find(hashes([reference.id for reference in batch]))
            etags = hashes([reference.etag for reference in batch])
            stored = np.flatnonzero(found >= 0)
            touched = stored[self._gone[found[stored]] | (self._ids.etag[found[stored]] != etags[stored])]
            again = _samples(source, [batch[place] for place in touched if not self._in_doubt(batch[place].id)])
            for reference, first, etag in zip(batch, found.tolist(), etags, strict=True):
                state = NEW if first < 0 else self._state(reference, first, etag, again)
                before = [] if first < 0 or state == SAME else self._ids.places(reference.id)
                yield reference, state, " ".join(f"{shard}/{row}" for shard, row in sorted(before))

    def tombstones(self) -> pa.Table:
        """What `compare` found gone or changed, as a table of `tombstones.SCHEMA`."""
        rows = []
        left = ((place, GONE) for place in np.flatnonzero(~self._seen).tolist())
        for place, why in itertools.chain(left, ((place, CHANGED) for place in self._changed)):
            shard, row = self._ids.shard(place), int(self._ids.rows[place])
            sample_id = self._rows(shard)["id"][row].as_py()
            if not self._in_doubt(sample_id):
                rows.append((shard, row, sample_id, why))
        columns = [list(column) for column in zip(*sorted(rows), strict=True)] or [[]] * len(SCHEMA)
        return pa.table(columns, schema=SCHEMA)

    def _state(self, reference: SampleRef, first: int, etag: np.uint64, again: Iterator[Sample]) -> str:
        """Of the stored samples with the hash of this one's id, the one that it is. `again` comes to its sample."""
        place = first
        while place < len(self._ids) and self._ids.hash[place] == self._ids.hash[first]:
            if not self._gone[place]:
                if self._ids.etag[place] == etag:
                    self._seen[place] = True
                    return SAME
                shard, row = self._ids.shard(place), int(self._ids.rows[place])
                if self._rows(shard)["id"][row].as_py() == reference.id:
                    self._seen[place] = True
                    if self._in_doubt(reference.id):
                        return SAME
                    sample = next(each for each in again if each.id == reference.id)
                    assert self._corpus is not None
                    if same(self._corpus, self._rows(shard).slice(row, 1), sample):
                        return SAME
                    self._changed.append(place)
                    return CHANGED
            place += 1
        return NEW

    def _in_doubt(self, sample_id: str) -> bool:
        return self._doubting is not None and self._doubting.in_doubt(sample_id)

    def _rows(self, shard: str) -> pa.Table:
        assert self._corpus is not None
        return self._corpus.read(shard)


def same(corpus: Corpus, row: pa.Table, sample: Sample, but: Collection[str] = ()) -> bool:
    """Whether a stored sample has the group, the columns and the values (`but` those of some fields) that the source gives now.

    Args:
        corpus: as it is stored.
        row: the sample's row of its shard.
        sample: the same id, as the source gives it.
        but: fields whose values may be others, and what is measured of them.
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
    unknown = {*but}
    for name, value in sample.values.items():
        found = None if name in unknown else _same_value(corpus, stored[name], name, value)
        if found is False:
            return False
        if found is None:
            unknown.add(name)
    return _equal(
        kept, given, {each for name, columns in sample.about.items() if name not in unknown for each in columns}
    )


def _equal(kept: dict[str, Any], given: dict[str, Any], names: Collection[str]) -> bool:
    """Whether columns of these names are the same; what is no number, truth or text is kept as JSON."""
    return all(
        (kept.get(name) is None) if value is None else kept.get(name) in (value, json.dumps(value, sort_keys=True))
        for name, value in ((name, given.get(name)) for name in names)
    )


def _same_value(corpus: Corpus, member: dict[str, Any], field: str, value: Value | Missing | None) -> bool | None:
    """None where that cannot be told now: what is stored is not given up for a server that does not answer."""
    if value is None or isinstance(value, Missing):
        return bool(member["miss_reason"] == (value.reason if value else "absent"))
    try:
        # Of what was rejected there is no digest: it is the same where it is rejected for the same reason.
        decode = media.check if member["miss_reason"] in media.REASONS else None
        if member["digest"] != input_digest(fetched(value, corpus.fields[field], decode)):
            return False
    except DecodeError as error:
        if error.reason == "unreadable" and (member["present"] or member["miss_reason"] in MISSES - {"absent"}):
            return None
        return bool(error.reason == member["miss_reason"])
    # What is referred to must be found where it stands now, too.
    return member["uri"] is None or reference_to(corpus.storage, value) == (member["uri"], member["offset"])


def _samples(source: Source, references: list[SampleRef]) -> Iterator[Sample]:
    """Samples read again in the source's order, about as many at once as a shard has bytes."""
    for _, some in itertools.groupby(
        zip(references, itertools.accumulate(each.bytes for each in references), strict=True),
        key=lambda each: each[1] // _AGAIN_BYTES,
    ):
        yield from source.samples(reference for reference, _ in some)


def scan(source: Source, known: Known) -> Ingest:
    """Reads all references once and says what is to do. InputError where an id stands twice, naming both places."""
    digest, size, counts = IngestDigest(), 0, Counter[str]()
    seen = array("Q")
    for reference, state, before in known.compare(source):
        seen.append(hash64(reference.id))
        counts[state] += 1
        if state != SAME:
            # With where it stood before: one that comes back as it was is another ingest than its first.
            digest.add(reference.id, reference.etag + before)
            size += reference.bytes
    unique = np.sort(np.frombuffer(seen, np.uint64))
    if len(repeated := unique[1:][unique[1:] == unique[:-1]]):
        _name_duplicate(source, set(repeated.tolist()))
    samples, gone = digest.count, 0
    for shard, row, sample_id, why in zip(*known.tombstones().to_pydict().values(), strict=True):
        if why == GONE:
            digest.add(sample_id, f"gone from {shard}, row {row}")
            gone += 1
    return Ingest(digest.key(), samples, size, counts[SAME], counts[CHANGED], gone)


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
    return InputError(
        f"id {other.id!r} stands twice: {source.place(first)} and {source.place(other)}; ids must be unique in a corpus, so "
        "rename or remove one"
    )
