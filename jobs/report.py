"""What a store holds, in figures: samples, values per field, what was rejected and why."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurestore.builds import INDEX
from featurestore.corpora import MISSES, QUARANTINE, REJECTED
from featurestore.errors import AlignmentError
from featurestore.store import FeatureStore
from featurestore.views import VIEW

_PREFIXES = 10
_DUPLICATES = 10
"""So many folders that rejected values came from are named, for each reason."""


def counted(count: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} {what}{'s' * (count != 1)}"


def rejected(store: FeatureStore, corpus: str) -> list[dict[str, Any]]:
    """Every quarantined value of a corpus's samples: id, field, stage, reason, detail, source."""
    rows: list[dict[str, Any]] = store.quarantine(corpus).select(REJECTED.names).to_pylist()
    return rows


def field_counts(store: FeatureStore, corpus: str) -> dict[str, dict[str, int]]:
    """Per field: present, missing and quarantined values. They add up to the number of samples.

    A value that one view's encoder rejected counts as quarantined, not as present.
    """
    opened = store.corpus(corpus)
    table = opened.to_arrow()
    bad: dict[str, set[str]] = {field: set() for field in opened.fields}
    for row in rejected(store, corpus):
        bad[row["field"]].add(row["id"])
    counts = {}
    for field in opened.fields:
        members = dict(zip(table["id"].to_pylist(), table[field].to_pylist(), strict=True))
        counts[field] = {
            "present": sum(member["present"] and key not in bad[field] for key, member in members.items()),
            "missing": sum(member["miss_reason"] in MISSES for member in members.values()),
            "quarantined": len(bad[field]),
        }
        if sum(counts[field].values()) != opened.rows:
            raise AlignmentError(
                f"corpus {corpus!r}, field {field!r}: {counts[field]} do not add up to {opened.rows} samples; a quarantine "
                "file is not that of its shard: run `braid verify`"
            )
    return counts


def duplicate_lines(store: FeatureStore, corpus: str) -> Iterator[str]:
    """Values of a corpus that stand in several samples, byte for byte, by field; the first `_DUPLICATES` of each are named."""
    opened = store.corpus(corpus)
    table = opened.to_arrow()
    for field in opened.fields:
        samples: dict[bytes, list[str]] = {}
        for sample_id, digest in zip(
            table["id"].to_pylist(), pc.struct_field(table[field], "digest").to_pylist(), strict=True
        ):
            if digest is not None:
                samples.setdefault(digest, []).append(sample_id)
        shared = sorted((ids for ids in samples.values() if len(ids) > 1), key=lambda ids: (-len(ids), ids))
        yield f"{field}: {counted(len(shared), 'value')} in {counted(sum(map(len, shared)), 'sample')}"
        yield from (f"  {len(ids)}: {', '.join(ids[:_DUPLICATES])}" for ids in shared[:_DUPLICATES])
    yield "samples that share bytes stand on one side of a training set's splits where its group_equal names the field"


def prefix(source: str | None) -> str:
    """The folder (or bucket) that a value came from; a value that stood in the manifest itself came from that."""
    source = source or "?"
    return source.rpartition("/")[0] or source


def tried(lineage: pa.ChunkedArray) -> int:
    """How many values were tried, summed over the lineages of a corpus's or a view's shards."""
    # Of a million shards hardly any two differ: each is parsed once.
    each = pc.value_counts(lineage).to_pylist()
    return sum(count["counts"] * int(json.loads(count["values"]).get("tried", 0)) for count in each)


def rejection_lines(job: str, counts: Counter[tuple[str, str, str]], of: int | None) -> Iterator[str]:
    """What a job rejected, by reason and by the folders that most of it came from; `of` so many values tried."""

    def share(count: int) -> str:
        return f"{count} ({count / of:.2%})" if of else str(count)

    total = counts.total()
    yield f"rejected by {job}: " + (f"{total} of {of} values ({total / of:.2%})" if of else counted(total, "value"))
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for (field, reason, source), count in counts.items():
        reasons.setdefault((field, reason), Counter())[source] += count
    for (field, reason), sources in sorted(reasons.items()):
        yield f"  {field}, {reason}: {share(sources.total())}"
        ranked = sorted(sources.items(), key=lambda each: (-each[1], each[0]))
        for source, count in ranked[:_PREFIXES]:
            yield f"    from {source}: {share(count)}"
        if left := ranked[_PREFIXES:]:
            yield f"    from {counted(len(left), 'other folder')}: {share(sum(count for _, count in left))}"


def status_lines(store: FeatureStore) -> Iterator[str]:
    """A store in words, from its catalog and the cards of its builds: no shard is read."""
    yield f"version {store.version}, digest {store.digest()}"
    for name in store.corpora():
        corpus = store.corpus(name)
        yield f"corpus {name}: {counted(corpus.rows, 'sample')} in {counted(len(corpus.shards), 'shard')}"
    for name in store.views():
        table = store.snapshot.table(VIEW, name, None, ("rows", "lineage"))
        about = store.snapshot.entries(VIEW, name)[0].info()
        bad = pc.sum(store.snapshot.table(QUARANTINE, f"encode/{name}", None, ("rows",))["rows"]).as_py() or 0
        made = f"{about['encoder']['dim']} float32, {about['encoder']['key']} of {about['field']}"
        rows, values = pc.sum(table["rows"]).as_py(), tried(table["lineage"])
        yield f"view {name}: {counted(rows, 'row')} × {made}: {values - bad} present, {bad} rejected"
    for name in store.indexes():
        card = store.card(INDEX, name)
        yield f"index {name}: {counted(card['rows'], 'vector')}, {card['factory']}"
    for name in store.training_sets():
        yield f"training set {name}: {store.training_set(name)}"
