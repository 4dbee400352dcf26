"""What a store holds, in figures: samples, values per field, what was rejected and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from featurestore.artefact import read_checked, read_table
from featurestore.corpora import QUARANTINE
from featurestore.errors import AlignmentError
from featurestore.store import FeatureStore


def counted(count: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} {what}{'s' * (count != 1)}"


def rejected(store: FeatureStore, corpus: str) -> list[dict[str, Any]]:
    """Every quarantined value of a corpus: id, field, stage, reason, detail, source."""
    views = [view for view in map(store.view, store.views()) if view.corpus.name == corpus]
    scopes = [("", f"shard/{corpus}"), *((view.recipe, f"encode/{view.name}") for view in views)]
    rows: list[dict[str, Any]] = []
    for recipe, name in scopes:
        for entry in store.snapshot.entries(QUARANTINE, name, recipe):
            rows += read_table(read_checked(store.storage, entry.path, entry.sha256)).to_pylist()
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
            "missing": sum(member["miss_reason"] == "absent" for member in members.values()),
            "quarantined": len(bad[field]),
        }
        if sum(counts[field].values()) != opened.rows:
            raise AlignmentError(
                f"corpus {corpus!r}, field {field!r}: {counts[field]} do not add up to {opened.rows} samples; a quarantine "
                "file is not that of its shard: run `braid verify`"
            )
    return counts


def status_lines(store: FeatureStore) -> Iterator[str]:
    """A store in words, for `braid status`."""
    yield f"{store.storage.uri}, version {store.version}, digest {store.digest()}"
    for name in store.corpora():
        corpus = store.corpus(name)
        yield f"corpus {name}: {counted(corpus.rows, 'sample')} in {counted(len(corpus.shards), 'shard')}"
        for field, counts in field_counts(store, name).items():
            yield "  " + f"{field}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
        for (stage, field, reason), count in sorted(Counter(_causes(store, name)).items()):
            yield f"  rejected at {stage}: {field}, {reason}: {count}"
    for name in store.views():
        view = store.view(name)
        yield f"view {name}: {counted(view.rows, 'row')} × {view.dim} float32, {view.encoder['key']} of {view.field}"
    for name in store.indexes():
        yield f"index {name}: {counted(store.index(name).card['rows'], 'vector')}, {store.index(name).card['factory']}"
    for name in store.training_sets():
        yield f"training set {name}: {store.training_set(name)}"


def _causes(store: FeatureStore, corpus: str) -> Iterator[tuple[str, str, str]]:
    return ((row["stage"], row["field"], row["reason"]) for row in rejected(store, corpus))
