"""Writing one shard of a corpus: fetch its values ahead in threads, check them, write the tar, then the rows.

A shard is done when its rows are there: they name the tar, and its footer says what it was made from. With `media: reference` a
value is fetched and checked as well, and the rows say where it is; the tar has only what lies in no file, and may be none.
"""

import copy
import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import artefact, media
from featurestore.catalog import Entry
from featurestore.corpora import MEDIA, MEMBER, MISSES, QUARANTINE, ROWS, float_holds, member_header
from featurestore.errors import DecodeError
from featurestore.identity import ids_sha256, input_digest
from featurestore.references import from_root
from featurestore.row_order import BY_ID
from featurestore.storage import Storage
from featurestore.times import TIMESTAMPS
from pipelines.attempts import attempt, forget
from pipelines.decode_apart import DecodeApart
from pipelines.fetch import fetched, reference_to
from pipelines.quarantine import place_rejected, rejection
from pipelines.runner import Result, result, typed
from pipelines.sources import Missing, Sample, SampleRef, Value, open_source

_FETCH_THREADS = 8
_FETCH_AHEAD = 64
_FETCH_AHEAD_BYTES = 64 << 20
"""Samples are fetched ahead of the tar up to so many and so many bytes, and at least one."""

_HASH_ASIDE_BYTES = 256 << 10
"""A piece of a tar as large as this is worth handing to another thread."""

_WRITEBACK_BYTES = 8 << 20
"""After so many bytes each the kernel begins to write the tar to the disk, so that its fsync finds most of it there."""


class Fetched(NamedTuple):
    """A fetched value and its `input_digest`."""

    raw: bytes
    digest: bytes


Fetch = Fetched | DecodeError | Missing
"""A fetched value, why it was rejected, or why there is none."""


@typed
class ShardTask(NamedTuple):
    """A descriptor of one shard to write: row group `row_group` of the plan at `plan_path`.

    `entries` is a JSON list of what else of its range comes into the catalog with it.
    """

    key: str
    plan_path: str
    plan_sha256: str
    row_group: int
    entries: str = "[]"


_PLAN = pa.schema(
    [pa.field(name, pa.int64() if kind is int else pa.string()) for name, kind in SampleRef.__annotations__.items()]
)


def write_plan(local: Path, shards: Iterable[list[SampleRef]]) -> None:
    with pq.ParquetWriter(local, _PLAN, compression="zstd") as writer:
        for shard in shards:
            columns = [list(column) for column in zip(*shard, strict=True)] or [[]] * len(_PLAN)
            writer.write_table(pa.table(columns, schema=_PLAN), row_group_size=max(1, len(shard)))


def read_plan(storage: Storage, task: ShardTask) -> list[SampleRef]:
    content = artefact.read_checked(storage, task.plan_path, task.plan_sha256)
    rows = pq.ParquetFile(pa.BufferReader(content)).read_row_group(task.row_group)
    return [SampleRef(**row) for row in rows.to_pylist()]


class ShardWriter:
    """Writes shards of one corpus. Doing a shard again gives the same bytes; one that is done is not done again."""

    def __init__(self, storage: Storage, corpus: dict[str, Any]) -> None:
        self.storage, self.corpus = storage, corpus
        self._folder = f"corpora/{corpus['name']}"
        self._done = storage.list(self._folder)
        self._source = open_source(corpus)
        self._apart: DecodeApart | None = None

    def write(self, task: ShardTask) -> Result:
        """The shard's tar, quarantine and rows.

        Where an earlier attempt was cut off, at it or at one before it in its bundle, values that are decoded here are so in
        another process: one that kills it is quarantined as `killed_decoder`, or as `decoder_timeout` where it comes to no end.
        """
        references = read_plan(self.storage, task)
        ids = ids_sha256(reference.id for reference in references)
        receipt = f"attempts/shard/{self.corpus['name']}/{task.key}"
        done = self._adopt(task, ids)
        if done is not None:
            forget(self.storage, receipt)
            return with_entries(done, task.entries)
        with attempt(self.storage, receipt) as tried:
            if not tried.cut:
                return with_entries(self._make(task, references, ids), task.entries)
            with DecodeApart() as apart:
                careful = copy.copy(self)
                careful._apart = apart
                made = careful._make(task, references, ids)
                tried.found = apart.lost
                return with_entries(made, task.entries)

    def _adopt(self, task: ShardTask, ids: str) -> Result | None:
        """The Result of a shard that an earlier run finished: its rows are there, and so is the tar they name."""
        stem = f"{self._folder}/{task.key}-"
        for path in sorted(key for key in self._done if key.startswith(stem) and key.endswith(".parquet")):
            content = self.storage.read(path)
            sha256 = hashlib.sha256(content).hexdigest()
            if not artefact.is_named_for(path, sha256):
                continue
            footer = artefact.read_footer(content)
            if footer.get("ids_sha256") != ids or footer.get("settings") != self._settings():
                continue
            made = [artefact.Placed(*each) for each in (footer["media"], *footer["quarantine"]) if each]
            if all(artefact.holds(self.storage, each) for each in made):
                placed = artefact.Placed(path, len(content), sha256)
                return self._result(task.key, placed, footer, self._lineage(footer))
        return None

    def _settings(self) -> dict[str, Any]:
        settings = {"fields": self.corpus["fields"], "columns": self.corpus["columns"], "media": self._media}
        if self._media == "reference":
            # References of another root lead nowhere; as it lies from the source, so that both may move.
            settings["root"] = [from_root(self.storage, path) for path in self.corpus["source"].get("path", [])[:1]]
        if self._source.order != BY_ID:
            settings["order"] = self._source.order
        return settings

    @property
    def _media(self) -> str:
        return str(self.corpus.get("media", "copy"))

    def _make(self, task: ShardTask, references: list[SampleRef], ids: str) -> Result:
        stem = f"{self._folder}/{task.key}"
        with self.storage.scratch() as folder:
            local = folder / "shard.tar"
            with TarWriter(local) as tar:
                samples, members, rejected = self._write_members(references, tar)
            empty = self._media == "reference" and tar.members == 0
            media = None if empty else artefact.place(self.storage, local, stem, tar.sha256)
        quarantine = place_rejected(self.storage, rejected, f"quarantine/shard/{self.corpus['name']}/{task.key}")
        table = _rows_table(samples, members, self.corpus["fields"])
        footer = {
            "kind": ROWS,
            "name": self.corpus["name"],
            "shard": task.key,
            "rows": len(table),
            "ids_sha256": ids,
            "settings": self._settings(),
            "media": media,
            "quarantine": quarantine,
            "tried": tried_values(members),
            "rejected": len(rejected),
            "example": f"{rejected[0]['field']} of {rejected[0]['id']!r}: {rejected[0]['detail']}" if rejected else "",
            "events": _events(table),
        }
        placed = artefact.place_table(self.storage, table, stem, footer)
        made = self._result(task.key, placed, footer, self._lineage(footer))
        read = sum(member["size"] for row in members for member in row.values() if member["present"])
        return made._replace(computed=made.tried, read_bytes=read)

    def _lineage(self, footer: dict[str, Any]) -> str:
        about = {
            "fields": {field: each["modality"] for field, each in self.corpus["fields"].items()},
            "source": self.corpus["source"]["type"],
            "settings": footer["settings"],
            "tried": footer["tried"],
        }
        return json.dumps(about, sort_keys=True)

    def _result(self, key: str, rows: artefact.Placed, footer: dict[str, Any], about: str) -> Result:
        name, media = self.corpus["name"], artefact.Placed(*footer["media"] or ("", 0, ""))
        count, ids, events = footer["rows"], footer["ids_sha256"], footer["events"]
        first, last = events
        entries = [
            Entry(
                ROWS, name, "", key, rows.path, count, rows.bytes, rows.sha256, ids, media.sha256, first, last, about
            ),
        ]
        if media.path:
            entries.append(
                Entry(MEDIA, name, "", key, media.path, count, media.bytes, media.sha256, ids, "", first, last)
            )
        for each in (artefact.Placed(*each) for each in footer["quarantine"]):
            entries.append(
                Entry(
                    QUARANTINE, f"shard/{name}", "", key, each.path, footer["rejected"], each.bytes, each.sha256,
                    input_sha256=media.sha256,
                )
            )  # fmt: skip
        return result(key, entries, footer["tried"], footer["rejected"], footer["example"])

    def _write_members(
        self, references: list[SampleRef], tar: "TarWriter"
    ) -> tuple[list[Sample], list[dict[str, dict[str, Any]]], list[dict[str, Any]]]:
        samples, members, rejected = [], [], []
        for sample, values in self._fetch(references):
            row = {}
            for field, (value, outcome) in values.items():
                row[field] = self._member(sample.id, field, value, outcome, tar)
                if isinstance(outcome, DecodeError):
                    rejected.append(rejection(sample.id, field, "shard", outcome, row[field]["source"]))
            samples.append(sample)
            members.append(row)
        return samples, members, rejected

    def _member(
        self,
        sample_id: str,
        field: str,
        value: Value | Missing | None,
        outcome: Fetch,
        tar: "TarWriter",
    ) -> dict[str, Any]:
        source = None if value is None or isinstance(value, Missing) else value.source
        if isinstance(outcome, DecodeError | Missing):
            return {"present": False, "miss_reason": outcome.reason, "source": source}
        raw, digest = outcome
        ext = _extension(self.corpus["fields"][field]["modality"], raw)
        uri, offset = reference_to(self.storage, value) if self._media == "reference" else (None, 0)
        if uri is None:
            offset = tar.add(member_header(sample_id, field, ext, len(raw)), raw)
        return {
            "present": True, "offset": offset, "size": len(raw), "digest": digest, "ext": ext, "source": source, "uri": uri,
        }  # fmt: skip

    def _fetch(
        self, references: list[SampleRef]
    ) -> Iterator[tuple[Sample, dict[str, tuple[Value | Missing | None, Fetch]]]]:
        """Samples with their raw values, in order; fetched ahead in threads."""
        waiting: deque[tuple[Sample, int, Future[Any]]] = deque()
        ahead = 0
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            for reference, sample in zip(references, self._source.samples(references), strict=True):
                while waiting and (ahead + reference.bytes > _FETCH_AHEAD_BYTES or len(waiting) >= _FETCH_AHEAD):
                    first, size, values = waiting.popleft()
                    yield first, values.result()
                    ahead -= size
                waiting.append((sample, reference.bytes, pool.submit(self._fetch_one, sample)))
                ahead += reference.bytes
            for first, _, values in waiting:
                yield first, values.result()

    def _fetch_one(self, sample: Sample) -> dict[str, tuple[Value | Missing | None, Fetch]]:
        return {field: (value, self._checked(field, value)) for field, value in sample.values.items()}

    def _checked(self, field: str, value: Value | Missing | None) -> Fetch:
        """The value, or why it is rejected already here: what needs no decoder, and what no view would ever decode."""
        if value is None or isinstance(value, Missing):
            return value or Missing("absent")
        decode = self._apart or media.check if field in self.corpus.get("unviewed", ()) else None
        try:
            raw = fetched(value, self.corpus["fields"][field]["modality"], decode)
        except DecodeError as error:
            return error
        return Fetched(raw, input_digest(raw))


def with_entries(made: Result, entries: str) -> Result:
    """A Result that brings more entries (a JSON list) into the catalog."""
    return made._replace(entries=json.dumps([*json.loads(made.entries), *json.loads(entries)]))


def tried_values(members: list[dict[str, dict[str, Any]]]) -> int:
    """How many values of a shard there were to fetch."""
    return sum(member["present"] or member["miss_reason"] not in MISSES for row in members for member in row.values())


def _extension(modality: str, raw: bytes) -> str:
    return "txt" if modality == "text" else media.sniff_extension(raw)


def _rows_table(samples: list[Sample], members: list[dict[str, dict[str, Any]]], fields: dict[str, Any]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "id": pa.array([sample.id for sample in samples], pa.string()),
        "group": pa.array([sample.group for sample in samples], pa.string()),
        "etag": pa.array([sample.etag for sample in samples], pa.string()),
    }
    names = sorted({name for sample in samples for name in sample.columns})
    for name in names:
        values = [sample.columns.get(name) for sample in samples]
        columns[name] = pa.array(values, pa.timestamp("ns", "UTC")) if name in TIMESTAMPS else kept_column(values)
    for field in fields:
        columns[field] = pa.array([row[field] for row in members], MEMBER)
    return pa.table(columns)


def kept_column(values: list[Any]) -> pa.Array:
    """A column of the source: of numbers, truths or texts as it is; of anything mixed or nested as JSON texts.

    Whole numbers beside others are float64 where it holds each of them to the last digit, else they are mixed.
    """
    kinds = {type(value) for value in values if value is not None}
    if not kinds or kinds == {str}:
        return pa.array(values, pa.string())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(abs(value) < 1 << 63 for value in values if value is not None):
        return pa.array(values, pa.int64())
    if kinds <= {int, float} and float in kinds and float_holds(values):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values])


def _events(table: pa.Table) -> tuple[int | None, int | None]:
    if "event_timestamp" not in table.column_names:
        return None, None
    times = [value for value in table["event_timestamp"].cast(pa.int64()).to_pylist() if value is not None]
    return (min(times), max(times)) if times else (None, None)


class TarWriter:
    """Writes a tar whose bytes depend on its members alone, and hashes it on the way.

    A large piece is hashed in a thread of its own while it is written, one piece at a time: no more of the tar is in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._size, self._begun, self.members = path, hashlib.sha256(), 0, 0, 0
        self.sha256 = ""

    def __enter__(self) -> "TarWriter":
        self._file = self._path.open("wb")
        self._hasher = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error: object) -> None:
        # Two empty blocks, filled up to a record: the end of a tar.
        end = 2 * tarfile.BLOCKSIZE
        with self._file, self._hasher:
            self._write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
        self.sha256 = self._digest.hexdigest()

    def add(self, header: bytes, raw: bytes) -> int:
        """Adds a member and returns the offset of its data."""
        self.members += 1
        self._write(header)
        offset = self._size
        self._write(raw)
        self._write(bytes(-len(raw) % tarfile.BLOCKSIZE))
        if self._size - self._begun >= _WRITEBACK_BYTES:
            self._begin_writeback()
        return offset

    def _write(self, data: bytes) -> None:
        if len(data) < _HASH_ASIDE_BYTES:
            self._digest.update(data)
            self._file.write(data)
        else:
            hashing = self._hasher.submit(self._digest.update, data)
            self._file.write(data)
            hashing.result()
        self._size += len(data)

    def _begin_writeback(self) -> None:
        # Linux begins to write what is dirty in the range, without waiting; only pages that are on the disk it drops.
        self._file.flush()
        os.posix_fadvise(self._file.fileno(), self._begun, self._size - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._size
