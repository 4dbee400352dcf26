"""Files of which a part cannot be read: it costs the values that stand there, and no other, and no job."""

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec.implementations.http
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem

from featurestore import artefact, files
from featurestore.catalog import Catalog
from featurestore.corpora import QUARANTINE, Corpus
from featurestore.errors import DecodeError, InputError
from featurestore.storage import Storage
from pipelines.sources import open_source
from tests.faults.stores import shard_corpus
from tests.loopback_web import Site, serving
from tests.pipelines.tars import pairs, tar_of

COUNT, SIZE, GROUP = 60, 3000, 10


def picture(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def members() -> list[tuple[str, bytes]]:
    return [each for n in range(COUNT) for each in ((f"{n:04}.jpg", picture(n)), (f"{n:04}.txt", b"text %d" % n))]


class _Spotty(BaseHTTPRequestHandler):
    """Serves ranges of files, but none that touches `site.spot`."""

    server: "SpottySite"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.server.folder / self.path.strip("/")
        content = path.read_bytes() if path.exists() else b""
        first, beyond = 0, len(content)
        if given := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, beyond = int(given[1]), min(int(given[2]) + 1, len(content))
        bad = self.command == "GET" and first < self.server.spot.stop and self.server.spot.start < beyond
        body = b"" if bad else content[first:beyond]
        self.server.asked["bad" if bad else "good"] += 1
        self.send_response(503 if bad else 206 if path.exists() else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if body:
            self.send_header("Content-Range", f"bytes {first}-{beyond - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class SpottySite(Site):
    def __init__(self, folder: Path) -> None:
        super().__init__(_Spotty)
        self.folder, self.spot = folder, range(0)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpottySite]:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    # Else all of a small file comes by its first request.
    monkeypatch.setattr(fsspec.implementations.http, "DEFAULT_BLOCK_SIZE", 512)
    HTTPFileSystem.clear_instance_cache()
    (tmp_path / "served").mkdir()
    yield from serving(SpottySite(tmp_path / "served"))  # type: ignore[misc]
    HTTPFileSystem.clear_instance_cache()


def corpus_of(uri: str) -> dict[str, Any]:
    kind, fields = ("parquet", ("image", "caption")) if uri.endswith("parquet") else ("webdataset", ("jpg", "txt"))
    return {
        "name": "spotty", "shard_rows": 25, "shard_mb": 64, "failure_budget": 0.2,
        "source": {"type": kind, "path": [uri]}, "columns": {"id": "id"},
        "fields": {
            "image": {"modality": "image", "from": fields[0], "read": None},
            "caption": {"modality": "text", "from": fields[1], "read": None},
        },
    }  # fmt: skip


def test_a_spot_of_a_tar_costs_the_values_that_stand_there(site: SpottySite, tmp_path: Path) -> None:
    """Of small samples, which come many at once; the spot is there in planning too, which reads over them in large windows."""
    whole = tar_of(members())
    (site.folder / "000.tar").write_bytes(whole)
    begin = whole.index(b"0030.jpg") + 512
    site.spot = range(begin + 100, begin + 110)
    storage = Storage.of(tmp_path / "store")
    shard_corpus(storage, corpus_of(site.uri("000.tar")))
    assert check_stored(storage, "unreadable", "000.tar/0030.jpg: ClientResponseError: 503") == [30]
    assert site.asked["bad"] < 60
    assert site.asked["good"] < 150

    site.spot = range(0)
    site.asked.clear()
    list(open_source(corpus_of(site.uri("000.tar"))).references())
    assert site.asked["good"] < 10


def test_a_spot_of_a_large_member_costs_that_value(site: SpottySite, tmp_path: Path) -> None:
    whole = tar_of(pairs(3, 5 << 20))
    (site.folder / "000.tar").write_bytes(whole)
    begin = whole.index(b"0001.jpg") + 512
    site.spot = range(begin + 1000, begin + 2000)
    source = open_source(corpus_of(site.uri("000.tar")))
    told = []
    for sample in source.samples(list(source.references())):
        try:
            told.append(len(sample.values["image"].fetch()))  # type: ignore[union-attr]
        except DecodeError as error:
            told.append(error.reason)  # type: ignore[arg-type]
        assert sample.values["caption"].fetch() == b"text %d" % int(sample.id)  # type: ignore[union-attr]
    assert told == [5 << 20, "unreadable", 5 << 20]


@pytest.mark.parametrize("planned", [False, True])
def test_a_tar_whose_headers_do_not_come_is_an_error(site: SpottySite, planned: bool) -> None:
    """Nobody knows then what samples there are, or of which group: nothing is made up."""
    whole = tar_of(members())
    (site.folder / "000.tar").write_bytes(whole)
    at = whole.index(b"0030.jpg")
    source = open_source(corpus_of(site.uri("000.tar")))
    references = list(source.references()) if planned else []
    site.spot = range(at, at + 1)
    told = rf"^tar {site.uri('000.tar')} cannot be read: .*503 .*, at byte {at}: so what is in it is not known; run it again"
    with pytest.raises(InputError, match=told):
        list(source.samples(references or source.references()))


def check_stored(storage: Storage, reason: str, told: str) -> list[int]:
    """Which pictures are in quarantine; fails where what is not is not stored as it is."""
    rejected = [
        row
        for entry in Catalog(storage).snapshot().entries(QUARANTINE, "shard/spotty")
        for row in artefact.read_table(storage.read(entry.path)).to_pylist()
    ]
    assert {(row["field"], row["reason"]) for row in rejected} == {("image", reason)}
    assert all(row["detail"].startswith(told) for row in rejected), rejected
    corpus, bad = Corpus(Catalog(storage).snapshot(), "spotty"), sorted(int(row["id"]) for row in rejected)
    for n in range(COUNT):
        shard, row = corpus.locate(f"{n:04}")
        assert corpus.value(shard, row, "caption") == b"text %d" % n
        assert corpus.value(shard, row, "image") == (None if n in bad else picture(n))
    return bad


@pytest.fixture(params=["column", "struct"])
def table(request: pytest.FixtureRequest, site: SpottySite) -> Path:
    """Row groups of ten; pictures in pages of two."""
    images: Any = [picture(n) for n in range(COUNT)]
    if request.param == "struct":
        images = [{"bytes": raw, "path": None} for raw in images]
        images = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {
        "id": [f"{n:04}" for n in range(COUNT)],
        "image": images,
        "caption": [b"text %d" % n for n in range(COUNT)],
    }
    path = site.folder / "a.parquet"
    pq.write_table(
        pa.table(columns), path, row_group_size=GROUP, compression="gzip", use_dictionary=False, data_page_size=2 * SIZE,
        write_batch_size=1,
    )  # fmt: skip
    return path


def place_of(path: Path, group: int, column: str) -> range:
    meta = pq.ParquetFile(path).metadata.row_group(group)
    own = next(each for at in range(meta.num_columns) if (each := meta.column(at)).path_in_schema.startswith(column))
    return range(own.data_page_offset, own.data_page_offset + own.total_compressed_size)


@pytest.mark.parametrize("how", ["broken", "not served"])
def test_a_page_costs_the_values_of_its_row_group_from_there_on(
    site: SpottySite, table: Path, tmp_path: Path, how: str
) -> None:
    pages = place_of(table, 3, "image")
    middle = pages.start + len(pages) * 11 // 20
    if how == "broken":
        raw = bytearray(table.read_bytes())
        raw[middle - 40 : middle + 40] = bytes(80)
        table.write_bytes(raw)
    else:
        site.spot = range(middle, middle + 1)
    storage = Storage.of(tmp_path / "store")
    shard_corpus(storage, corpus_of(str(table) if how == "broken" else site.uri("a.parquet")))
    told = {
        "broken": ("decode_error", "a.parquet: "),
        "not served": ("unreadable", "a.parquet: ClientResponseError: 503"),
    }
    bad = check_stored(storage, *told[how])
    assert bad == list(range(bad[0], 40))
    assert bad[0] in (range(33, 37) if how == "broken" else [30])


def test_a_column_that_tells_what_samples_there_are_is_an_error(table: Path) -> None:
    source = open_source(corpus_of(str(table)))
    references = list(source.references())
    pages = place_of(table, 3, "id")
    raw = bytearray(table.read_bytes())
    raw[pages.start : pages.stop] = bytes(len(pages))
    table.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{table}: no Parquet file, or one that is cut off or broken: "):
        list(source.samples(references))
