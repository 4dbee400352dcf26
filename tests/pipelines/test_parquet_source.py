"""Parquet files that hold the values: which columns are read when, what a value is, and what is wrong told by its file."""

import gc
import io
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from featurestore.errors import DecodeError, InputError
from featurestore.store import FeatureStore
from jobs import plan
from jobs import spec as specs
from jobs.run import Runner
from pipelines.sources import Sample, Source, open_source, parquet, parquet_rows
from pipelines.sources.files import opened

BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def source_of(path: Path | str, modality: str = "image", read: str | None = None, column: str = "image") -> Source:
    fields = {"picture": {"modality": modality, "from": column, "read": read}}
    spec = {"source": {"type": "parquet", "path": [str(path)]}, "columns": {"id": "id"}, "fields": fields}
    return open_source(spec)


def written(path: Path, **columns: Any) -> Path:
    options = {"row_group_size": columns.pop("row_group_size", None), "compression": "none"}
    count = len(next(iter(columns.values())))
    pq.write_table(pa.table({"id": [f"s{n}" for n in range(count)], **columns}), path, **options)
    return path


def samples(source: Source) -> list[Sample]:
    """In another order than they stand in, as a shard reads them."""
    return list(source.samples(list(source.references())[::-1]))[::-1]


def values(source: Source) -> list[bytes | None]:
    return [value.fetch() if (value := sample.values["picture"]) else None for sample in samples(source)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_value_is_the_bytes_of_a_cell_and_a_null_is_absent(tmp_path: Path, kind: pa.DataType) -> None:
    path = written(tmp_path / "a.parquet", image=pa.array([b"one", None, b"", b"four"], kind), label=[1, 2, 3, 4])
    source = source_of(path)
    assert values(source) == [b"one", None, b"", b"four"]
    assert [sample.columns for sample in samples(source)] == [{"label": n} for n in (1, 2, 3, 4)]
    reference = next(iter(source.references()))
    assert (reference.uri, reference.offset, reference.length) == (str(path), 0, 0)
    assert source.place(reference) == f"{path}, row 1"


def test_a_struct_of_bytes_and_path_is_either(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"of a file")
    cells = [
        {"bytes": b"inside", "path": "gone.png"},
        {"bytes": None, "path": "b.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "gone.png"},
    ]
    found = samples(source_of(written(tmp_path / "a.parquet", image=pa.array(cells, BYTES_AND_PATH))))
    pictures = [sample.values["picture"] for sample in found]
    assert pictures[0] is not None
    assert pictures[1] is not None
    assert (pictures[0].fetch(), pictures[1].fetch(), pictures[2:4]) == (b"inside", b"of a file", [None, None])
    with pytest.raises(DecodeError, match=r"^unreadable: gone\.png: No such file"):
        pictures[4].fetch()  # type: ignore[union-attr]


def test_a_struct_of_paths_alone_is_known_by_its_files_when_planned(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"x" * 5000)
    cells = pa.array([{"bytes": None, "path": "b.png"}], BYTES_AND_PATH)
    source = source_of(written(tmp_path / "a.parquet", image=cells))
    (before,) = source.references()
    assert before.bytes == 5000
    os.utime(tmp_path / "b.png", ns=(1, 1))
    (after,) = source.references()
    assert after.etag != before.etag


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_column_of_texts_is_read_as_texts_or_as_paths(tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "b.txt").write_bytes(b"of a file")
    path = written(tmp_path / "a.parquet", image=pa.array(["b.txt", None, ""]).cast(kind))
    assert values(source_of(path, "text")) == [b"b.txt", None, None]
    assert values(source_of(path, "text", "file")) == [b"of a file", None, None]
    assert values(source_of(path, "image", "file")) == [b"of a file", None, None]


@pytest.mark.parametrize(
    ("array", "modality", "read", "told"),
    [
        (pa.array([[1, 2]]), "image", None, r"is list<.*int64>; allowed: binary, large_binary, string, or a struct"),
        (pa.array([[1, 2]], pa.list_(pa.uint8(), 2)), "image", None, r"is fixed_size_list<.*>\[2\]; allowed: binary"),
        (pa.array([b"ab"], pa.binary(2)), "image", None, r"is fixed_size_binary\[2\]; allowed: binary"),
        (pa.array([7]), "text", None, r"is int64; allowed: binary"),
        (pa.array([{"path": "a"}]), "image", None, r"is struct<path: string>; allowed: binary"),
        (pa.array([{"bytes": "a", "path": "a"}]), "image", None, r"is struct<bytes: string, .*; allowed: binary"),
        (pa.array([b"x"]), "image", "file", r"is binary; allowed with `read: file`: string, large_string"),
        (pa.array(["x"]), "image", None, r"is string; a text is no value of this modality: say `read: file`"),
    ],
)
def test_a_column_of_a_wrong_type_is_told(
    tmp_path: Path, array: pa.Array, modality: str, read: str | None, told: str
) -> None:
    path = written(tmp_path / "a.parquet", image=array)
    with pytest.raises(InputError, match=rf"{path}: column 'image' \(corpus\.fields\.picture\.from\) {told}"):
        list(source_of(path, modality, read).references())


def test_files_may_differ_in_their_columns(tmp_path: Path) -> None:
    ids = [{"id": [f"f{n}"]} for n in range(4)]
    cell = pa.array([{"bytes": b"b", "path": None}], BYTES_AND_PATH)
    kept: list[dict[str, Any]] = [
        {"image": [b"a"], "n": [1]},
        {"image": cell, "n": ["x"]},
        {"more": [True]},
        {"image": [None]},
    ]
    for number, (name, columns) in enumerate(zip(ids, kept, strict=True)):
        pq.write_table(pa.table(name | columns), tmp_path / f"{number}.parquet")
    source = source_of(tmp_path / "[012].parquet")
    assert values(source) == [b"a", b"b", None]
    assert [sample.columns for sample in samples(source)] == [{"n": 1}, {"n": "x"}, {"more": True}]
    assert source.columns() == {"id", "n", "more"}
    assert source.unmatched() == {}
    with pytest.raises(InputError, match=r"3\.parquet: column 'image' .* is null; allowed: binary"):
        list(source_of(tmp_path / "*.parquet").references())


def test_a_column_that_is_nowhere_is_unmatched(tmp_path: Path) -> None:
    source = source_of(written(tmp_path / "a.parquet", photo=[b"x"]))
    assert [reference.bytes for reference in source.references()] == [0]
    assert source.unmatched() == {"picture": "image"}


class Counted(io.BufferedReader):
    """A file that adds up the bytes that are read of it."""

    def __init__(self, file: io.BufferedReader, counts: list[int]) -> None:
        super().__init__(file.raw)
        self._file, self._counts = file, counts

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._counts.append(len(content))
        return content


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(parquet_rows, "opened", lambda uri, what: Counted(opened(uri, what), found))
    return found


VALUE_BYTES, COUNT, GROUP = 100_000, 200, 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 values of 100 kB that cannot be compressed, 10 in a row group."""
    cells = [{"bytes": bytes([n]) + os.urandom(VALUE_BYTES - 1), "path": f"{n}.png"} for n in range(COUNT)]
    column = pa.array(cells, BYTES_AND_PATH)
    return written(tmp_path_factory.mktemp("large") / "a.parquet", image=column, row_group_size=GROUP)


def test_planning_reads_no_bytes_of_values(large: Path, counts: list[int]) -> None:
    references = list(source_of(large).references())
    assert [reference.id for reference in references] == [f"s{n}" for n in range(COUNT)]
    assert {abs(reference.bytes - VALUE_BYTES) < 1000 for reference in references} == {True}
    assert 0 < sum(counts) < 2 * VALUE_BYTES, "of 20 MB"


def test_a_shard_reads_the_row_groups_of_its_rows_once(large: Path, counts: list[int]) -> None:
    source = source_of(large)
    references = list(source.references())
    counts.clear()
    wanted = [references[number] for number in (155, 3, 151, 9, 0, 3)]
    found = [sample.values["picture"] for sample in source.samples(wanted)]
    assert [value.fetch()[0] for value in found if value] == [155, 3, 151, 9, 0, 3]
    assert 2 * GROUP * VALUE_BYTES < sum(counts) < 3 * GROUP * VALUE_BYTES


def test_memory_is_bounded_by_pages_and_not_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 4 << 20)
    size, count = 1 << 20, 120
    path = tmp_path / "a.parquet"
    table = pa.table({"id": [f"s{n}" for n in range(count)], "image": [bytes([n]) * size for n in range(count)]})
    # The writer looks at a page's size after so many values, by default after 1,024.
    pq.write_table(table, path, compression="none", write_batch_size=4)
    del table
    source, whole = source_of(path), pa.default_memory_pool()
    references = list(source.references())
    pool = pa.proxy_memory_pool(whole)
    pa.set_memory_pool(pool)
    try:
        found = [sample.values["picture"] for sample in source.samples(references)]
    finally:
        pa.set_memory_pool(whole)
    assert [value.fetch()[:1] for value in found if value] == [bytes([n]) for n in range(count)]
    assert size < pool.max_memory() < 32 << 20, "of 120 MiB"


def test_a_value_is_fetched_as_long_as_it_is_held(tmp_path: Path) -> None:
    """A worker's threads fetch values after the last sample was given."""
    source = source_of(written(tmp_path / "a.parquet", image=[b"one"]))
    (value,) = [sample.values["picture"] for sample in source.samples(list(source.references()))]
    gc.collect()
    assert value is not None
    assert value.fetch() == b"one"
    held = len(os.listdir("/proc/self/fd"))
    del value
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == held - 1


def test_a_value_over_the_limit_is_rejected_and_its_neighbours_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_VALUE_BYTES", 4)
    found = samples(source_of(written(tmp_path / "a.parquet", image=[b"one", b"three", b"four"])))
    one, three, four = (sample.values["picture"] for sample in found)
    assert one is not None
    assert four is not None
    assert (one.fetch(), four.fetch()) == (b"one", b"four")
    with pytest.raises(DecodeError, match=r"^too_large: 5 bytes"):
        three.fetch()  # type: ignore[union-attr]


def test_an_etag_is_of_the_row_and_of_the_file(tmp_path: Path) -> None:
    def etags(**columns: Any) -> list[str]:
        path = written(tmp_path / "a.parquet", image=[b"a", b"b"], **columns)
        os.utime(path, ns=(1, 1))
        return [reference.etag for reference in source_of(path).references()]

    assert len({*etags(n=[1, 1])}) == 2, "rows of the same columns"
    before = etags(n=[1, 2])
    assert etags(n=[1, 2]) == before
    assert [new == old for new, old in zip(etags(n=[1, 3]), before, strict=True)] == [True, False]
    os.utime(tmp_path / "a.parquet", ns=(2, 2))
    assert not {reference.etag for reference in source_of(tmp_path / "a.parquet").references()} & {*before}


def test_a_file_that_changed_since_planning_is_told(tmp_path: Path) -> None:
    source = source_of(written(tmp_path / "a.parquet", image=[b"a", b"b"]))
    references = list(source.references())
    pq.write_table(pa.table({"id": ["s1", "s0"], "image": [b"b", b"a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: found 's1' where planning saw 's0': the source changed"):
        list(source.samples(references))
    pq.write_table(pa.table({"id": ["s0"], "image": [b"b"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 2: found '' where planning saw 's1'"):
        list(source.samples(references))


SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: pictures
  source: {{type: parquet, path: {folder}/a.parquet}}
  fields: {{text: {{modality: text, from: text}}}}
  shard_rows: 8
"""


def test_a_file_that_was_only_touched_is_read_again_once_and_changes_nothing(tmp_path: Path, counts: list[int]) -> None:
    texts = [f"text {n} ".encode() * 10_000 for n in range(40)]
    written(tmp_path / "a.parquet", text=texts, row_group_size=4)
    spec = specs.parse(SPEC.format(folder=tmp_path), "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    snapshot = plan.open_catalog(spec.store)
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    counts.clear()
    found = plan.ingest(spec, snapshot)
    assert (found.samples, found.known, found.changed, found.gone) == (0, 40, 0, 0)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size / 2 < sum(counts) < 2 * size
    texts[7], texts[33] = texts[33], texts[7]
    written(tmp_path / "a.parquet", text=texts, row_group_size=4)
    found = plan.ingest(spec, snapshot)
    assert (found.samples, found.known, found.changed, found.gone) == (2, 38, 2, 0)


@pytest.mark.parametrize("cut", [1, 8, 300, -1])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "a.parquet", image=[b"a" * 100] * 9)
    path.write_bytes(path.read_bytes()[: cut if cut < 0 else -cut])
    with pytest.raises(InputError, match=rf"{path}: no Parquet file, or one that is cut off or broken: "):
        list(source_of(path).references())


class Quiet(SimpleHTTPRequestHandler):
    """Knows ranges, as object stores and web servers do."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        part = content[int(first) : int(last) + 1] if asked else content
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_web_server_are_read_in_ranges(tmp_path: Path, served: str) -> None:
    written(tmp_path / "a.parquet", image=[b"one", b"two"])
    assert values(source_of(f"{served}/a.parquet")) == [b"one", b"two"]


def test_by_reference_cells_are_copied_and_what_a_path_names_stays(tmp_path: Path) -> None:
    """A cell is compressed with others of its column: nowhere do its bytes stand by themselves."""
    (tmp_path / "b.txt").write_bytes(b"in a file")
    cells = pa.array([{"bytes": b"in a cell", "path": None}, {"bytes": None, "path": "b.txt"}], BYTES_AND_PATH)
    written(tmp_path / "a.parquet", text=cells)
    spec = specs.parse(SPEC.format(folder=tmp_path) + "  media: reference\n", "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    corpus = FeatureStore(spec.store).corpus("pictures")
    assert [row["text"]["uri"] for row in corpus.to_arrow().to_pylist()] == [None, "b.txt"]
    found = [corpus.value(*corpus.locate(sample_id), "text") for sample_id in ("s0", "s1")]
    assert found == [b"in a cell", b"in a file"]
