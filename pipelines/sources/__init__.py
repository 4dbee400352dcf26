"""Corpus formats: one module each, its name is the `type` in the spec.

A source yields references, never bytes: `references()` is what planning and the one shuffle see (about 200 bytes a
sample), `samples()` reads again what a worker needs to write its shard. A new format is one new module with
`open_source(corpus)`; where its samples are rows of named columns, RowSource (rows.py) does all but the reading, and
files.py has values that are files, or parts of them, on a disk, in an object store or on a web server.
"""

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable


class SampleRef(NamedTuple):
    """Where one sample stands in its source: `length` bytes at `offset` of `uri`; or row `offset` of it, with length 0.

    `etag` changes when the sample does: a digest over its columns and each value's size and time of change.
    `bytes` is the size of its values, as far as the source can tell without reading them.
    """

    id: str
    group: str
    etag: str
    bytes: int
    uri: str
    offset: int
    length: int


class Value(Protocol):
    """A raw value that can be fetched; raises DecodeError(reason, detail) where it cannot."""

    @property
    def source(self) -> str:
        """Where it comes from, as the source gives it."""
        ...

    def stat(self) -> tuple[int, str]:
        """Its size in bytes (0: not known), and a text that changes when it does; reads nothing of it, raises nothing."""
        ...

    def fetch(self) -> bytes:
        """The bytes."""
        ...


@runtime_checkable
class Referable(Protocol):
    """A value that lies as it is in a file, which a corpus of `media: reference` can refer to."""

    @property
    def address(self) -> tuple[str, int] | None:
        """The file's address and the offset of the value's first byte in it; None where this one has none."""
        ...


class Missing(NamedTuple):
    """A value that is not there for another reason than that the source has none: one of `featurestore.corpora.MISSES`."""

    reason: str


class Sample(NamedTuple):
    """A sample as the source gives it: kept columns, and a value, Missing, or None (absent) for each field.

    `about` has, for a field, the columns that are measured of its value, and change with it: of a stream its residual.
    """

    id: str
    group: str
    etag: str
    columns: dict[str, Any]
    values: dict[str, Value | Missing | None]
    about: Mapping[str, Collection[str]] = MappingProxyType({})


class Source(Protocol):
    """What every corpus format offers."""

    @property
    def order(self) -> str:
        """How its samples are cut into shards and stand in them: one of featurestore.row_order, known before it is read.

        In the source's own order where a worker that reads samples from all over it would read much more than those.
        """
        ...

    def references(self) -> Iterator[SampleRef]:
        """Every sample, in the source's order: by uri, then by offset, where `order` is of places."""
        ...

    def columns(self) -> set[str]:
        """Names of all columns of the samples that `references()` has read so far."""
        ...

    def kept(self) -> set[str]:
        """Names of the columns that the corpus has, of those samples: what a label and a search's condition may name."""
        ...

    def unmatched(self) -> dict[str, str]:
        """Field -> what its `from` names, of the fields for which `references()` has found nothing so called."""
        ...

    def remarks(self) -> list[str]:
        """What a person should know of what `references()` has read, and is no error: files cut off, parts left out."""
        ...

    def whole(self) -> bool:
        """Whether `references()` has read all that there was; else what it has not given is not known to be gone."""
        ...

    def place(self, reference: SampleRef) -> str:
        """Where a person finds a sample: its file and line, or the like. May read the source once."""
        ...

    def samples(self, references: Iterable[SampleRef]) -> Iterator[Sample]:
        """The samples of some references, in the order given."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """A source that measures something once for many samples, as work of its own, before any of them is read.

    It keeps what it has measured in the store that `corpus["source"]["store"]` names, in JSON as `Storage.to_json` writes it.
    """

    def measures(self) -> bool:
        """Whether there is anything to measure for this corpus."""
        ...

    def to_measure(self, references: Iterable[SampleRef]) -> Iterator[SampleRef]:
        """What some samples need measured, as references that are equal where it is the same; equal neighbours once."""
        ...

    def measure(self, reference: SampleRef) -> None:
        """Measures one of these, unless that is done. May be called from several threads."""
        ...


@runtime_checkable
class Doubting(Protocol):
    """A source that may be unable to read now what tells how many samples there are, or what is in them."""

    def in_doubt(self, sample_id: str) -> bool:
        """Whether a sample is of such a part, as far as `references()` has come: it is not known to have changed or gone."""
        ...


def open_source(corpus: dict[str, Any]) -> Source:
    """The source of a corpus, from the corpus part of a spec as a dict (as it travels to workers)."""
    module = importlib.import_module(f"pipelines.sources.{corpus['source']['type'].replace('-', '_')}")
    source: Source = module.open_source(corpus)
    return source
