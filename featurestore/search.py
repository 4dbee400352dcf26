"""Searching an index of a store, across modalities, and opening what was found."""

import base64
import html
import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, builds, encoders, indexes
from featurestore.arguments import whole_number
from featurestore.catalog import Snapshot
from featurestore.errors import AlignmentError, DecodeError, InputError, MissingExtra, StoreError
from featurestore.identity import row_digest
from featurestore.spaces import Space
from featurestore.times import timestamp_ns
from featurestore.tombstones import gone_rows
from featurestore.views import View

if TYPE_CHECKING:
    from PIL import Image

_T = TypeVar("_T")


class Hit(NamedTuple):
    """A sample that was found.

    `score` is the cosine in the index's space, `view` the view whose vector was found. `image`, `text` and `audio` open the
    sample's first field of that modality from the corpus; `raw("video")` is a video's bytes.
    """

    id: str
    score: float
    view: str
    columns: dict[str, Any]
    source: "_Place"

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.columns.items() if value is not None}
        return f"Hit({self.id!r}, score={self.score:.3f}, view={self.view!r}, {shown})"

    @property
    def image(self) -> "Image.Image | None":
        """The sample's picture (RGB); None where it has none, or one that cannot be decoded (it is in quarantine)."""
        from featurestore.media import decode_image

        return self._decoded("image", decode_image)

    @property
    def text(self) -> str | None:
        """The sample's text, or None as of `image`."""
        from featurestore.media import decode_text

        return self._decoded("text", decode_text)

    @property
    def audio(self) -> tuple[np.ndarray, int] | None:
        """The sample's sound as (float32 [frames] mono, sample rate in Hz as stored), or None as of `image`."""
        from featurestore.media import decode_audio, sample_rate_of

        def decode(raw: bytes) -> tuple[np.ndarray, int]:
            rate = sample_rate_of(raw)
            return decode_audio(raw, rate), rate

        return self._decoded("audio", decode)

    def _decoded(self, modality: str, decode: Callable[[bytes], _T]) -> _T | None:
        raw = self.raw(modality)
        try:
            return decode(raw) if raw is not None else None
        except DecodeError:
            return None

    def raw(self, modality: str) -> bytes | None:
        """The bytes of the sample's field of a modality: the one that was found, else the first that it has."""
        return self.source.raw(modality)

    def _repr_html_(self) -> str:
        parts = [f"<b>{html.escape(self.id)}</b> {self.score:.3f} <i>{html.escape(self.view)}</i>"]
        if (picture := self.image) is not None:
            picture.thumbnail((128, 128))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<img src="data:image/png;base64,{encoded}">')
        parts.append(html.escape(self.text or ""))
        sound = self.raw("audio")
        if sound is not None and len(sound) < 1 << 20:
            parts.append(f'<audio controls src="data:;base64,{base64.b64encode(sound).decode()}"></audio>')
        return "<div>" + "<br>".join(parts) + "</div>"


class Hits(list[Hit]):
    """Hits, best first; a notebook shows them with their pictures and sounds."""

    def _repr_html_(self) -> str:
        return "".join(hit._repr_html_() for hit in self)


class _Place(NamedTuple):
    """Where a sample's raw values are."""

    view: View
    shard: str
    row: int

    def raw(self, modality: str) -> bytes | None:
        corpus = self.view.corpus
        fields = [name for name, kind in corpus.fields.items() if kind == modality]
        fields.sort(key=lambda name: name not in self.view.fields)
        for name in fields:
            value = corpus.value(self.shard, self.row, name)
            if value is not None:
                return value
        return None


class Index:
    """An index at one version of the store: vectors of one or more views in one space.

    While its corpus grows, an index answers from the version that it was made of, without the samples that are gone since.

    Attributes:
        version: the version whose rows it has; the store's own where the index is fresh.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self.name = name
        self.storage = snapshot.storage
        entries = builds.files(snapshot, builds.INDEX, name)
        settings = entries["index"].info()["settings"]
        # One whose views were encoded anew, or compacted, would name rows that are no longer theirs: it does not answer.
        made_from = builds.made_from(snapshot, entries["index"])
        if made_from is None or not builds.grown(made_from, snapshot, settings):
            raise StoreError(f"index {name!r} is older than its views or its space; `braid run` builds it again")
        self.version = made_from.version
        self.card = read_card(snapshot, builds.INDEX, name)
        self.space = read_space(made_from, settings["space"])
        self.views = {view: View(made_from, view) for view in settings["views"]}
        self._table = artefact.read_table(_content(self.storage, entries["rows"]))
        self._index = indexes.deserialise(
            _content(self.storage, entries["index"]), self.card["factory"], self.space.dim, len(self._table)
        )
        self._columns: pa.Table | None = None
        self._there = _there(self._table, gone_rows(snapshot, settings["corpus"]))

    def __repr__(self) -> str:
        return f"Index({self.name!r}, {len(self._table)} vectors of {', '.join(self.views)}, {self.card['factory']})"

    def search(
        self,
        query: np.ndarray,
        k: int = 10,
        where: str | None = None,
        modality: str | None = None,
        as_of: str | int | None = None,
    ) -> Hits:
        """The k nearest samples of a query vector of the index's space, each by the view in which it is nearest.

        Args:
            query: float32 [dim], as `embed` makes it.
            k: at least 1; more than there are gives all there are.
            where: an SQL condition over the corpus's columns, e.g. `label = 'animals'`.
            modality: only rows of views of this modality.
            as_of: only samples available by this time (ISO 8601, UTC where it names no zone, or ns since 1970).
        """
        allowed = self._allowed(where, modality, as_of)
        # A sample has at most one row a view.
        enough = whole_number("k", k, 1) * len(self.views)
        scores, rows = indexes.search(self._index, np.atleast_2d(query), enough, allowed)
        best: dict[str, tuple[int, float]] = {}
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            if row >= 0:
                best.setdefault(self._table["id"][row].as_py(), (row, score))
        return Hits(self._hit(row, score) for row, score in list(best.values())[:k])

    def embed(self, via: str, values: np.ndarray) -> np.ndarray:
        """float32 [n, dim] vectors of the index's space from raw vectors [n, view dim] of view `via`."""
        return self.space.projections[via].apply(np.asarray(values, np.float32))

    def via(self, via: str | None, modality: str | None) -> View:
        """The view that a query goes through: the named one, or the only one of the query's modality.

        A query may go through any view of the index's space, whether or not the index holds its rows.
        """
        if via is not None:
            if via not in self.views:
                raise InputError(f"via {via!r}: index {self.name!r} has no such view; allowed: {', '.join(self.views)}")
            return self.views[via]
        fitting = [view for view in self.views.values() if view.modality == modality]
        if len(fitting) != 1:
            has = ", ".join(f"{name} ({view.modality})" for name, view in self.views.items())
            problem = (
                f"{len(fitting)} views of modality {modality!r}" if fitting else f"no view of modality {modality!r}"
            )
            raise InputError(f"index {self.name!r} has {problem}; name one as via; it has: {has}")
        return fitting[0]

    def _allowed(self, where: str | None, modality: str | None, as_of: str | int | None) -> np.ndarray | None:
        allowed = self._there.copy()
        if modality is not None:
            has = sorted({view.modality for view in self.views.values()})
            if modality not in has:
                raise InputError(f"modality {modality!r} is not allowed; index {self.name!r} has: {', '.join(has)}")
            views = [name for name, view in self.views.items() if view.modality == modality]
            allowed &= np.isin(self._table["view"].to_pylist(), views)
        if where is not None:
            allowed &= self._where(where)
        if as_of is not None:
            allowed &= self._available(as_of)
        return None if allowed.all() else np.flatnonzero(allowed)

    def _where(self, where: str) -> np.ndarray:
        """Which rows a condition holds for, bool [n]."""
        try:
            import duckdb
        except ImportError:
            raise MissingExtra("a where condition needs duckdb: pip install 'braid[read]'") from None
        rows = self._sample_columns()
        # The condition is a person's: one expression over these rows, which reads no file, no variable and no network.
        locked = dict.fromkeys(("enable_external_access", "python_enable_replacements"), "false")
        with duckdb.connect(config=locked | {"lock_configuration": "true"}) as connection:
            numbered = connection.from_arrow(rows.append_column("__row", pa.array(range(len(rows)))))
            try:
                found = numbered.filter(where).select("__row").fetchnumpy()["__row"]
            except duckdb.Error as error:
                columns = ", ".join(rows.column_names)
                raise InputError(f"where {where!r}: {str(error).splitlines()[0]}; columns: {columns}") from None
        kept = np.zeros(len(rows), bool)
        kept[np.asarray(found, np.int64)] = True
        return kept

    def _available(self, as_of: str | int) -> np.ndarray:
        """Which rows are of samples that were available at a time, bool [n]; one without a time never was."""
        rows = self._sample_columns()
        clocks = [name for name in ("available_timestamp", "event_timestamp") if name in rows.column_names]
        if not clocks:
            raise InputError(
                f"as_of {as_of!r}: the corpus has no event_timestamp; name it in corpus.columns of the spec"
            )
        times = rows[clocks[0]].cast(pa.int64())
        return np.asarray(pc.fill_null(pc.less_equal(times, timestamp_ns(as_of, "as_of")), False))

    def _sample_columns(self) -> pa.Table:
        """The corpus's columns for every row of the index."""
        if self._columns is None:
            corpus = next(iter(self.views.values())).corpus
            samples = corpus.to_arrow()
            samples = samples.drop_columns(["row", "etag", *corpus.fields])
            position = {sample_id: row for row, sample_id in enumerate(samples["id"].to_pylist())}
            take = pa.array([position[sample_id] for sample_id in self._table["id"].to_pylist()], pa.int64())
            self._columns = samples.take(take)
        return self._columns

    def _hit(self, row: int, score: float) -> Hit:
        found = {name: self._table[name][row].as_py() for name in self._table.column_names}
        view = self.views[found["view"]]
        if view.corpus.ids(found["shard"])[found["row"]] != found["id"]:
            raise AlignmentError(f"index {self.name!r} row {row} is not {found['id']!r}; run `braid verify`")
        if row_digest(found["id"], None, indexes.vector(self._index, row).tobytes()) != found["row_digest"]:
            raise AlignmentError(
                f"index {self.name!r}: the vector of row {row} is not the one that was made for {found['id']!r}; run "
                "`braid verify`, then delete the index's files and `braid run`"
            )
        (columns,) = view.corpus.columns(found["shard"], found["row"], 1)
        del columns["id"]
        return Hit(found["id"], score, found["view"], columns, _Place(view, found["shard"], found["row"]))


def _there(rows: pa.Table, gone: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows of an index are of samples that are not gone, bool [n]."""
    if not gone:
        return np.ones(len(rows), bool)
    shards = np.asarray(pc.fill_null(pc.index_in(rows["shard"], pa.array(gone)), -1), np.int64)
    places = np.concatenate([at << 40 | own for at, own in enumerate(gone.values())])
    there: np.ndarray = ~np.isin(shards << 40 | np.asarray(rows["row"]), places)
    return there


class Query:
    """Encodes what a person asks with, through the encoder that wrote the view. Models load once and stay."""

    def __init__(self) -> None:
        self._encoders: dict[str, encoders.BaseEncoder] = {}

    def encode(self, view: View, raw: bytes, modality: str) -> np.ndarray:
        """float32 [1, view dim] of one raw value, as the pipeline would encode it.

        To a view of several fields it is a sample with the first field of its modality, and without the others.

        Raises:
            DecodeError: the value cannot be decoded.
            StoreError: this machine's encoder is not the one that the view was made with.
        """
        encoder = self._encoder(view)
        if len(encoder.reads) == 1:
            return encoder.encode([encoder.decode_query(raw)])
        place = encoder.reads.index(modality)
        parts = [encoder.decode_field(raw, place) if at == place else None for at in range(len(encoder.reads))]
        return encoder.encode([encoder.joined(parts)])

    def _encoder(self, view: View) -> encoders.BaseEncoder:
        card = view.encoder
        if card["fingerprint"] not in self._encoders:
            encoder = encoders.find_as(card)
            here = encoder.card()
            if encoder.fingerprint() != card["fingerprint"]:
                differs = [name for name in here if here[name] != card.get(name)]
                raise StoreError(
                    f"view {view.name!r} was encoded by another {card['key']} than the one here (they differ in "
                    f"{', '.join(f'{name}: {card.get(name)} / {here[name]}' for name in differs)}): install the "
                    "same versions, or encode the view again"
                )
            self._encoders[card["fingerprint"]] = encoder
        return self._encoders[card["fingerprint"]]


def read_space(snapshot: Snapshot, name: str) -> Space:
    """A space of the store."""
    return Space.from_bytes(_content(snapshot.storage, builds.files(snapshot, builds.SPACE, name)["space"]))


def read_card(snapshot: Snapshot, kind: str, name: str) -> dict[str, Any]:
    """The card of a build."""
    card: dict[str, Any] = json.loads(_content(snapshot.storage, builds.files(snapshot, kind, name)["card"]))
    return card


def _content(storage: Any, entry: Any) -> bytes:
    return artefact.read_checked(storage, entry.path, entry.sha256)
