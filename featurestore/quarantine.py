"""Quarantine: every value that a stage rejected, with what was wrong with it and where it came from."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact
from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import QUARANTINE, REJECTED, ROWS, Corpus
from featurestore.errors import AlignmentError
from featurestore.views import VIEW

__all__ = ["SCHEMA", "read", "rejections", "there"]

SCHEMA = REJECTED.append(pa.field("corpus", pa.string(), nullable=False)).append(pa.field("view", pa.string()))
"""What `rejections` gives; `view` is null where the value was rejected when the corpus was sharded."""


def rejections(snapshot: Snapshot, corpus: str | None = None) -> pa.Table:
    """What the stages rejected of the samples of a corpus (of all where None) that are not gone, by corpus, view and shard.

    A value that two views' encoders rejected stands there twice.

    Raises:
        NotFound: no such corpus.
    """
    tables = [SCHEMA.empty_table()]
    for name in snapshot.names(ROWS) if corpus is None else [corpus]:
        opened = Corpus(snapshot, name)
        for view, entry in _entries(snapshot, name):
            tables.append(_of(there(opened, entry, read(snapshot, entry)), name, view))
    return pa.concat_tables(tables)


def read(snapshot: Snapshot, entry: Entry) -> pa.Table:
    """A quarantine file that the catalog names, checked."""
    content = artefact.read_checked(snapshot.storage, entry.path, entry.sha256)
    with artefact.parsing(entry.path):
        table = artefact.read_table(content).replace_schema_metadata(None)
    if not table.schema.equals(REJECTED):
        raise AlignmentError(f"{entry.path} is no quarantine file; run `braid verify`")
    return table


def _entries(snapshot: Snapshot, corpus: str) -> Iterator[tuple[str | None, Entry]]:
    """The quarantine files of a corpus, and of its views as they are encoded now."""
    yield from ((None, entry) for entry in snapshot.entries(QUARANTINE, f"shard/{corpus}"))
    for view in snapshot.names(VIEW):
        first = snapshot.entries(VIEW, view)[0]
        if first.info()["corpus"] == corpus:
            yield from ((view, entry) for entry in snapshot.entries(QUARANTINE, f"encode/{view}", first.recipe))


def there(corpus: Corpus, entry: Entry, table: pa.Table) -> pa.Table:
    """What of a shard's quarantine file is of samples that are not gone."""
    gone = corpus.gone.get(entry.shard, np.array([], np.int64))
    if not len(gone):
        return table
    return table.filter(pc.invert(pc.is_in(table["id"], corpus.read(entry.shard)["id"].take(gone).combine_chunks())))


def _of(table: pa.Table, corpus: str, view: str | None) -> pa.Table:
    columns = [*table.columns, pa.array([corpus] * len(table)), pa.array([view] * len(table), pa.string())]
    return pa.table(columns, schema=SCHEMA)
