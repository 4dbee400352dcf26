"""Feature views: the vectors of one (field, encoder), or of several fields, row for row beside their corpus.

A view shard is a Parquet file with the columns `present, embedding, input_digest, row_digest, miss_reason`, in the
order of its corpus shard's rows, and a footer that says what it was made from. Readers prove the footer and every row
before they hand out a row.

Where an encoder reads several fields at once, `field` is their names in order with `+` between them. A row then has a vector
where its sample has a value of any of them, and its `input_digest` is over the digests of all (`identity.joined_digest`). A
value that the encoder rejected is in quarantine; the vector is made of the others, if there are any, else `miss_reason` has a
reason for each field, in order, with `+` between them.

While a corpus grows, its view has not all of its shards. Each that it has is as good as ever, so a view is read at those: its
rows are those of the corpus shards that it covers. What needs every sample, or several views of the same ones, opens them with
`whole`, or compares their `shards`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore import artefact, vectors
from featurestore.arguments import several, whole_number
from featurestore.catalog import Entries, Entry, Snapshot
from featurestore.corpora import ROWS, Corpus
from featurestore.errors import AlignmentError, InputError, NotFound, StoreError
from featurestore.identity import DIGEST_BYTES, digest_of, joined_digest, row_digest

VIEW = "view"
COLUMNS = ("id", "present", "embedding", "input_digest", "row_digest", "miss_reason")


def fields_of(field: str) -> list[str]:
    """The names of the fields that a view reads, in order."""
    return field.split("+")


def inputs(rows: pa.Table, field: str) -> Iterator[tuple[bool, str | None, bytes | None]]:
    """Of each row of a corpus shard: whether a view has an input of it, why not, and the input's digest.

    Args:
        rows: with the columns of the view's fields.
        field: the view's.
    """
    columns = [
        zip(
            *(pc.struct_field(rows[name], part).to_pylist() for part in ("present", "miss_reason", "digest")),
            strict=True,
        )
        for name in fields_of(field)
    ]
    for members in zip(*columns, strict=True):
        present = any(member[0] for member in members)
        absent = None if present else "+".join(member[1] for member in members)
        yield present, absent, joined_digest([member[2] for member in members])


def recipe(field: str, fingerprint: str) -> str:
    """What a view's shards are filed under, known before the run: hash of field, encoder fingerprint and codec."""
    return digest_of(field, fingerprint, vectors.CODEC_VERSION)


def schema(dim: int) -> pa.Schema:
    """The schema of a view shard of `dim` float32 values."""
    return pa.schema(
        [
            pa.field("present", pa.bool_(), nullable=False),
            vectors.field("embedding", dim),
            pa.field("input_digest", pa.binary(DIGEST_BYTES)),
            pa.field("row_digest", pa.binary(DIGEST_BYTES), nullable=False),
            pa.field("miss_reason", pa.string()),
        ]
    )


def unmet(stored: pa.Schema, rows: int, entry: Entry, corpus_shard: Entry) -> list[str]:
    """In words, what a view shard's file and entry claim that its corpus shard does not bear out.

    Args:
        stored: the file's schema with its footer.
        rows: the number of rows in the file.
        entry: the catalog's entry of the file.
        corpus_shard: the catalog's entry of the rows that it should stand beside.
    """
    footer = artefact.footer_of(stored)
    claims = {
        "kind": (footer.get("kind"), VIEW),
        "shard": (footer.get("shard"), entry.shard, corpus_shard.shard),
        "recipe": (footer.get("recipe"), entry.recipe),
        "rows": (footer.get("rows"), entry.rows, corpus_shard.rows, rows),
        "ids_sha256": (footer.get("ids_sha256"), entry.ids_sha256, corpus_shard.ids_sha256),
        "input_sha256": (footer.get("input_sha256"), entry.input_sha256, corpus_shard.sha256),
    }
    broken = [
        f"{name} does not hold: {' / '.join(str(value)[:16] for value in values)} (footer / catalog / corpus / file)"
        for name, values in claims.items()
        if len(set(values)) > 1
    ]
    expected = schema(int(entry.info()["encoder"]["dim"]))
    if not stored.equals(expected):
        differ = [each.name for each in expected if each.name not in stored.names or stored.field(each.name) != each]
        broken.append(f"its columns are not a view's: {', '.join(differ) or 'others stand beside them'}")
    return broken


def misaligned(table: pa.Table, ids: Sequence[str], rows: pa.Table, field: str) -> Iterator[tuple[int, str]]:
    """(row, what does not hold) of every row of a view shard that is not that of its sample, in order.

    Args:
        table: the view shard as it lies on disk.
        ids: the ids of its corpus shard, in order; as many as the table has rows.
        rows: the corpus shard; as many rows.
        field: the view's.
    """
    matrix = vectors.matrix(table["embedding"])
    finite, nan = np.isfinite(matrix).all(axis=1).tolist(), np.isnan(matrix).all(axis=1).tolist()
    stored = (table[name].to_pylist() for name in ("present", "miss_reason", "input_digest", "row_digest"))
    columns = zip(range(len(table)), ids, matrix, finite, nan, *stored, inputs(rows, field), strict=True)
    for row, sample_id, vector, whole, empty, present, reason, value, bound, (given, absent, digest) in columns:
        if value != digest:
            yield row, f"input_digest {_hex(value)} is not that of the corpus ({_hex(digest)}): made from another value"
        elif bound != row_digest(sample_id, value, vector.tobytes()):
            yield row, "row_digest does not bind this vector to this sample: it was moved or changed after it was made"
        elif present != whole or present == empty:
            yield row, f"present = {present} beside a vector that is {'whole' if whole else 'NaN, at least in part'}"
        elif present == (reason is not None) or (present and not given) or (not given and reason != absent):
            yield row, f"present = {present} with miss_reason {reason!r}; the corpus has {given} and {absent!r}"


def _hex(digest: bytes | None) -> str:
    return digest.hex() if digest is not None else "none"


def covers(snapshot: Snapshot, name: str, corpus: str) -> bool:
    """Whether a view has a shard for every shard of a corpus as it is now, no file opened."""
    made = snapshot.table(VIEW, name, columns=("shard", "input_sha256"))
    shards = snapshot.table(ROWS, corpus, columns=("shard", "sha256"))
    same = made["shard"].equals(shards["shard"]) and made["input_sha256"].equals(shards["sha256"])
    return bool(same and len(made))


def whole(snapshot: Snapshot, names: Sequence[str]) -> dict[str, "View"]:
    """Views that each have a row for every sample of their corpus.

    Raises:
        StoreError: one has not; the text names the last version at which all had.
    """
    opened = {name: View(snapshot, name) for name in names}
    if partial := [view for view in opened.values() if view.unencoded]:
        raise StoreError(f"{partial[0].behind()}{last_whole(snapshot, names)}")
    return opened


def last_whole(snapshot: Snapshot, names: Sequence[str]) -> str:
    """In words, the last version at which some views covered their corpora; nothing where there was none."""
    corpora = {name: View(snapshot, name).corpus.name for name in names}
    found = snapshot.last(lambda each: all(covers(each, name, corpus) for name, corpus in corpora.items()))
    return f"; or read version {found.version}, the last at which nothing was missing" if found else ""


class View:
    """A view at one version of the store.

    Attributes:
        field: the name of its field; of several, in order, with `+` between them.
        fields: their names.
        shards: the catalog's entries of the corpus shards that it covers, in order; its rows are theirs.
        unencoded: the number of shards that the corpus has and the view has not yet.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self.name = name
        self.storage = snapshot.storage
        self.version = snapshot.version
        entries = snapshot.entries(VIEW, name)
        if not entries:
            raise NotFound(
                f"no view {name!r} in {self.storage.uri}; it has: {', '.join(snapshot.names(VIEW)) or 'none'}"
            )
        info = entries[0].info()
        self.recipe = entries[0].recipe
        self.field: str = info["field"]
        self.fields = fields_of(self.field)
        self.encoder: dict[str, Any] = info["encoder"]
        self.corpus = Corpus(snapshot, info["corpus"])
        self._entries = entries
        self._proven: set[str] = set()
        have, table = entries.table, self.corpus.shards.table
        covered = pc.is_in(table["shard"], have["shard"])
        shards = table if pc.all(covered).as_py() else table.filter(covered)
        if not have["shard"].equals(shards["shard"]) or pc.unique(have["recipe"]).to_pylist() != [self.recipe]:
            raise AlignmentError(
                f"view {name!r} has shards of several encoders, or shards that corpus {self.corpus.name!r} has not; "
                "run `braid verify`"
            )
        self.shards, self.unencoded = Entries(shards), len(table) - len(shards)
        gone = self.corpus.gone
        live = [
            rows - len(gone.get(shard, ()))
            for shard, rows in zip(shards["shard"].to_pylist(), shards["rows"].to_pylist(), strict=True)
        ]
        self._starts = np.cumsum([0, *live])

    def __repr__(self) -> str:
        made = f"{self.encoder['key']} of {self.corpus.name}.{self.field}"
        waits = f"; {self.corpus.rows - self.rows} samples not encoded yet" if self.unencoded else ""
        return f"View({self.name!r}, {self.rows} rows × {self.dim}, {made}{waits})"

    def behind(self) -> str:
        """In words, how far a view is behind its corpus, and the mend."""
        return (
            f"view {self.name!r} has {len(self.shards)} of the {len(self.corpus.shards)} shards of corpus "
            f"{self.corpus.name!r} in version {self.version}: `braid run` encodes the rest"
        )

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.encoder["dim"])

    @property
    def modality(self) -> str:
        """Modality of the field; of several, in order, with `+` between them."""
        return str(self.encoder["modality"])

    @property
    def rows(self) -> int:
        """Number of rows: one per sample of the shards that it covers that is not gone, missing values included."""
        return int(self._starts[-1])

    @property
    def schema(self) -> pa.Schema:
        """The columns that reading gives; `embedding` is null where a value is missing."""
        return self._table(self.shards[0].shard, COLUMNS).schema

    def entries(self) -> list[Entry]:
        """The catalog's entries, in the order of `shards`."""
        return list(self._entries)

    def files(self) -> list[str]:
        """Keys of the Parquet files, in order, relative to the store: `store.storage.uri` goes before them."""
        return [entry.path for entry in self.entries()]

    def read(self, shard: str) -> pa.Table:
        """One shard as it lies on disk (missing vectors are NaN), proven: its bytes, its footer, every row's digests.

        The rows are proven once: after that, bytes of the same sha256 need no second proof.

        Raises:
            AlignmentError: any of it does not hold.
        """
        entry = self._entries.find(shard)
        if entry is None:
            raise NotFound(f"view {self.name!r} has no shard {shard!r} in version {self.version}")
        content = artefact.read_checked(self.storage, entry.path, entry.sha256)
        with artefact.parsing(entry.path):
            stored, rows = pq.read_schema(pa.BufferReader(content)), artefact.rows(content)
        for problem in unmet(stored, rows, entry, self.corpus.shard(shard)):
            raise AlignmentError(
                f"{entry.path}: {problem}; shard {shard} of view {self.name!r} is not aligned: run `braid verify`"
            )
        with artefact.parsing(entry.path):
            table = artefact.read_table(content).replace_schema_metadata(None)
        if shard not in self._proven:
            ids = self.corpus.ids(shard)
            for row, problem in misaligned(table, ids, self.corpus.read(shard), self.field):
                raise AlignmentError(
                    f"{entry.path}: {problem}; shard {shard}, row {row}, id {ids[row]!r} of view {self.name!r}: run "
                    "`braid verify`"
                )
            self._proven.add(shard)
        return table

    def to_arrow(self, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """All rows in the order of the corpus, in memory; `scanner` gives them shard by shard.

        Args:
            columns: of `COLUMNS`, in any order.
        """
        _check_columns(columns)
        return pa.concat_tables([self._live(shard.shard, columns) for shard in self.shards])

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [rows, dim] with rows of NaN where missing, bool [rows] present), in the order of the corpus."""
        tables = [self.corpus.live(shard.shard, self.read(shard.shard)) for shard in self.shards]
        present = np.concatenate([np.asarray(table["present"]) for table in tables])
        return np.concatenate([vectors.matrix(table["embedding"]) for table in tables]), present

    def scanner(self, columns: Sequence[str] = COLUMNS, batch_size: int = 4096) -> Iterator[pa.RecordBatch]:
        """Record batches of at most `batch_size` rows in the order of the corpus; one shard in memory at a time."""
        _check_columns(columns)
        whole_number("batch_size", batch_size, 1)
        return self._batches(columns, batch_size)

    def _batches(self, columns: Sequence[str], batch_size: int) -> Iterator[pa.RecordBatch]:
        for shard in self.shards:
            yield from self._live(shard.shard, columns).to_batches(max_chunksize=batch_size)

    def take(self, ids: Sequence[str] | Sequence[int] | np.ndarray, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """Rows by id, or by their number in `to_arrow()`: one for each asked for, in the order asked for.

        Raises:
            NotFound: an id that the corpus does not hold, or the view not yet; a row number past its end.
            InputError: what is neither an id nor a row number, or another column than `COLUMNS`.
        """
        _check_columns(columns)
        wanted = list(several("ids", ids))
        texts = all(isinstance(each, str) for each in wanted)
        places = (
            self._of_ids(wanted)
            if texts
            else self._of_rows(
                [whole_number("an item of ids (all texts, or all row numbers)", each) for each in wanted]
            )
        )
        if not wanted:
            return self._table(self.shards[0].shard, columns).slice(0, 0)
        found = pa.concat_tables([self._table(shard, columns).take(rows) for shard, (_, rows) in places.items()])
        # Its rows stand by shards: the inverse of that order is the one asked for.
        order = np.argsort(np.concatenate([at for at, _ in places.values()]))
        return found.take(order).combine_chunks()

    def _of_ids(self, ids: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Shard -> (positions in `ids`, rows in the shard)."""
        places = self.corpus.locate_all(ids)
        for shard, (at, _) in places.items():
            if self.unencoded and self._entries.find(shard) is None:
                raise NotFound(f"sample {ids[at.min()]!r} is not encoded yet: {self.behind()}")
        return places

    def _of_rows(self, numbers: list[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        for row in numbers:
            if not 0 <= row < self.rows:
                raise NotFound(f"view {self.name!r} has no row {row}; it has rows 0 to {self.rows - 1}")
        rows, places = np.array(numbers, np.int64), {}
        of = np.searchsorted(self._starts, rows, "right") - 1
        for number in np.unique(of).tolist():
            at, shard = np.flatnonzero(of == number), self.shards[number].shard
            places[shard] = at, self.corpus.live_rows(shard)[rows[at] - self._starts[number]]
        return places

    def _live(self, shard: str, columns: Sequence[str]) -> pa.Table:
        return self.corpus.live(shard, self._table(shard, columns))

    def _table(self, shard: str, columns: Sequence[str]) -> pa.Table:
        stored = self.read(shard)
        present = np.asarray(stored["present"])
        made: dict[str, Any] = {
            "id": self.corpus.read(shard)["id"],
            "embedding": vectors.masked(stored["embedding"], present),
        }
        return pa.table({name: made.get(name) if name in made else stored[name] for name in columns})


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [name for name in several("columns", columns) if name not in COLUMNS]
    if unknown:
        raise InputError(f"a view has no column {unknown[0]!r}; allowed: {', '.join(COLUMNS)}")
