"""Tars as WebDataset, img2dataset and others write them: what comes in, under which names, from where."""

import hashlib
import io
import itertools
import json
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from featurestore.catalog import Catalog
from featurestore.errors import InputError, SpecError
from featurestore.identity import from_tar_key
from featurestore.ids import IDS
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import plan
from jobs import spec as specs
from jobs.report import field_counts, rejected
from jobs.run import Runner
from pipelines.sources.tar_members import Tar, members
from pipelines.sources.webdataset import split_name
from tests.loopback_s3 import loopback_s3
from tests.pipelines.tars import expected, header, pairs, signed, source_of, tar_of, values_of, written


@given(st.text(alphabet="ab./%_ é字X", max_size=14))
def test_a_name_is_cut_as_webdataset_cuts_it(name: str) -> None:
    key, extension = base_plus_ext(name)
    assert split_name(name) == ((key, extension.lower()) if key is not None else ("", ""))


KEYS = st.lists(
    st.text(alphabet=st.sampled_from("ab/%_. é字\\'\"\t0X"), min_size=1, max_size=24),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(keys=KEYS, long=st.booleans())
@settings(max_examples=40)
def test_what_webdataset_writes_comes_in_as_webdataset_reads_it(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], long: bool
) -> None:
    path = tmp_path_factory.mktemp("up") / "000.tar"
    with path.open("wb") as file, TarWriter(file, mtime=0, format="GNU_FORMAT" if long else "PAX_FORMAT") as writer:
        for number, key in enumerate(keys):
            writer.write({"__key__": key * 9 if long else key, "seg.PNG": b"p%d" % number, "txt": b"t%d" % number})
    with path.open("rb") as file:
        theirs = list(group_by_keys({"__url__": "x", **each} for each in tar_file_iterator(file)))
    source = source_of(path, image=("image", "seg.png"), caption=("text", "txt"))
    ours = [
        (ref.id, {name: value.fetch() for name, value in sample.values.items() if value is not None})
        for ref in source.references()
        for sample in source.samples([ref])
    ]
    assert ours == [
        (each["__key__"], {name: each[ext] for name, ext in (("image", "seg.png"), ("caption", "txt")) if ext in each})
        for each in theirs
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tars_is_read(tmp_path: Path, kind: int) -> None:
    folder = "f" * 90 + "/" + "g" * 40
    contents = [(f"{folder}/{name}", raw) for name, raw in pairs(4)]
    if kind != tarfile.USTAR_FORMAT:
        contents += [("é" * 300 + "/字.jpg", b"x"), ("é" * 300 + "/字.txt", b"y")]
    path = written(tmp_path, tar_of(contents, kind))
    source = source_of(path)
    found = values_of(source)
    assert list(found)[:4] == [f"{folder}/{number:04}" for number in range(4)]
    assert list(found.values())[:4] == list(expected(4).values())
    assert list(found)[4:] == ([] if kind == tarfile.USTAR_FORMAT else ["é" * 300 + "/字"])
    with tarfile.open(path) as tar, Tar(str(path)) as ours:
        assert [(each.name, each.offset, each.offset_data, each.size) for each in tar] == [
            (each.name, each.start, each.offset, each.size) for each in members(ours)
        ]


def test_numbers_are_read_in_every_form(tmp_path: Path) -> None:
    base256 = signed(header("a.txt")[:124] + b"\x80" + (5).to_bytes(11) + header("a.txt")[136:])
    blanks = signed(header("b.txt")[:124] + b"     5 \0\0\0\0\0" + header("b.txt")[136:])
    record = b"9 size=5\n"
    sized = header("PaxHeaders/c", len(record), type=b"x") + record.ljust(512, b"\0") + header("c.txt", 0)
    old = header("d.txt", 5)
    old = signed(old[:257] + bytes(243) + old[500:])  # V7: nothing behind the link's name
    high = bytearray(header("\udcff.txt".replace("\udcff", "ÿ"), 5))
    high[148:156] = b"%06o\0 " % (sum(struct.unpack("512b", high[:148] + b" " * 8 + high[156:])) & 0o777777)
    data = b"12345".ljust(512, b"\0")
    content = b"".join(each + data for each in (base256, blanks, sized, old, bytes(high))) + bytes(1024)
    assert values_of(source_of(written(tmp_path, content), caption=("text", "txt"))) == {
        key: {"caption": b"12345"} for key in ("a", "b", "c", "d", "ÿ")
    }


def test_planning_skips_over_the_data(tmp_path: Path) -> None:
    """300 members of 1 GiB that take no room on the disk: reading them would take minutes."""
    path, size = tmp_path / "large.tar", 1 << 30
    with path.open("wb") as file:
        for number in range(300):
            file.write(header(f"{number:03}.jpg", size))
            file.seek(size, io.SEEK_CUR)
            file.write(header(f"{number:03}.txt", 3) + b"abc".ljust(512, b"\0"))
        file.write(bytes(1024))
    source = source_of(path)
    references = list(source.references())
    assert [each.bytes for each in references] == [size + 3] * 300
    assert values_of(source, references[-1:]) == {"299": {"image": "too_large", "caption": b"abc"}}


def test_a_sample_is_read_again_from_its_own_range(tmp_path: Path) -> None:
    path = written(tmp_path, tar_of(pairs(50), tarfile.PAX_FORMAT))
    references = list(source_of(path).references())
    assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(references))
    fresh, few = source_of(path), [references[number] for number in (41, 3, 17)]
    assert list(values_of(fresh, few).items()) == [(ref.id, expected(50)[ref.id]) for ref in few]
    assert fresh.place(references[3]) == f"{path}, byte {references[3].offset}"


def test_a_tar_that_changed_under_the_job_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, tar_of(pairs(5)))
    source = source_of(path)
    references = list(source.references())
    for content in (tar_of(pairs(5)[2:]), bytes(len(path.read_bytes()))):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"the source changed while the job ran|wrong checksum"):
            values_of(source, references)


def test_the_first_extension_that_a_sample_has_is_taken(tmp_path: Path) -> None:
    contents = [("a.png", b"png"), ("a.JPG", b"jpg"), ("b.png", b"png"), ("c.txt", b"c"), ("c.webp", b"?")]
    found = values_of(source_of(written(tmp_path, tar_of(contents))))
    assert {key: each["image"] for key, each in found.items()} == {"a": b"jpg", "b": b"png", "c": None}


def test_columns_are_those_of_the_json_and_of_the_table_beside(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "caption": "one", "group": "g", "width": 3, "exif": "{}", "nested": {"a": [1]}},
        {"id": 8, "caption": "two", "group": "h", "width": None},
    ]
    contents = []
    for number, row in enumerate(rows):
        contents += [(f"{number}.txt", b"x"), (f"{number}.json", json.dumps(row).encode())]
    written(tmp_path, tar_of([*contents, ("2.txt", b"x")]))
    table = {
        "key": ["1", "0", "9"], "width": [5, 4, 1], "status": ["success", "success", "failed"], "raw": [b"a", b"b", b"c"],
        "at": pa.array([1, 2, 3], pa.timestamp("ns", "Europe/Rome")), "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "000.parquet")
    columns = {"group": "group", "event_timestamp": "at"}
    source = source_of(tmp_path / "000.tar", columns=columns, caption=("text", "txt"), title=("text", "json.caption"))
    found = {each.id: each for each in source.samples(list(source.references()))}
    assert {key: each.group for key, each in found.items()} == {"0": "g", "1": "h", "2": "2"}
    assert found["0"].columns == {
        "json.id": 7, "width": 3, "exif": "{}", "nested": {"a": [1]}, "key": "0", "status": "success", "kind": "y",
        "event_timestamp": 0,
    }  # fmt: skip
    assert found["1"].columns == {
        "json.id": 8, "width": None, "key": "1", "status": "success", "kind": "x", "event_timestamp": 0,
    }  # fmt: skip
    assert found["2"].columns == {"event_timestamp": None}
    titles = [each.values["title"] for each in found.values()]
    assert [title and title.fetch() for title in titles] == [b"one", b"two", None]
    assert source.remarks() == [f"tars with fewer samples than rows beside them: 1, e.g. {tmp_path}/000.tar: 2 of 3"]
    kept = source_of(tmp_path / "000.tar", caption=("text", "txt"))
    assert next(kept.samples(list(kept.references())[:1])).columns["json.caption"] == "one"


@pytest.mark.parametrize("columns", [{}, {"id": "__key__"}, {"id": "json.id"}])
def test_the_id_is_the_key_or_what_the_spec_names(tmp_path: Path, columns: dict[str, str]) -> None:
    path = written(tmp_path, tar_of([("k.txt", b"x"), ("k.json", b'{"id": "own", "key": "z"}')]))
    source = source_of(path, columns=columns, caption=("text", "txt"))
    (sample,) = source.samples(list(source.references()))
    if columns.get("id") == "json.id":
        assert (sample.id, sample.columns) == ("own", {"__key__": "k", "key": "z"})
    else:
        assert (sample.id, sample.columns) == ("k", {"json.id": "own", "key": "z"})


def test_an_etag_changes_with_its_columns(tmp_path: Path) -> None:
    path = written(tmp_path, tar_of([("k.txt", b"x"), ("k.json", b'{"a": 1}')]))
    stamp = path.stat()

    def etag() -> str:
        import os

        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        return next(source_of(path, caption=("text", "txt")).references()).etag

    etags = [etag()]
    written(tmp_path, tar_of([("k.txt", b"x"), ("k.json", b'{"a": 2}')]))
    etags.append(etag())
    for status in "ab":
        pq.write_table(pa.table({"key": ["k"], "status": [status]}), tmp_path / "000.parquet")
        etags.append(etag())
    assert len(set(etags)) == 4


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pa.table({"key": ["a", "b", "a"]}), r"key 'a' stands twice: rows 0 and 2"),
        (pa.table({"kay": ["a"]}), r"it has no column 'key' of the samples' keys"),
        (pa.table({"key": [1]}), r"its column 'key' holds no texts"),
        (pa.table({"key": [b"a"]}), r"its column 'key' holds no texts"),
        (b"PAR1 and no more", r"it cannot be read: "),
    ],
)
def test_a_table_beside_a_tar_that_is_none_is_told(tmp_path: Path, table: pa.Table | bytes, told: str) -> None:
    written(tmp_path, tar_of(pairs(1)))
    if isinstance(table, bytes):
        (tmp_path / "000.parquet").write_bytes(table)
    else:
        pq.write_table(table, tmp_path / "000.parquet")
    with pytest.raises(InputError, match=rf"000\.parquet, beside a tar: {told}.*; correct it, or take it away"):
        list(source_of(tmp_path / "000.tar").references())


# From elsewhere


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files, and ranges of them."""

    asked: ClassVar[list[tuple[int, int]]] = []
    ranges = True
    failing = "none"

    def do_GET(self) -> None:
        if self.path.endswith(self.failing):
            return self.send_error(503)
        content, asked = Path(self.directory, self.path.lstrip("/")), self.headers.get("Range")
        if not content.exists():
            return self.send_error(404)
        raw = content.read_bytes()
        first, last = 0, len(raw) - 1
        if asked and self.ranges:
            first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
            self.asked.append((first, last))
        self.send_response(206 if asked and self.ranges else 200)
        self.send_header("Content-Length", str(len(raw[first : last + 1])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw[first : last + 1])

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, type[_Ranges]]]:
    class Handler(_Ranges):
        asked: ClassVar[list[tuple[int, int]]] = []

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(tmp_path), **kwargs)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Handler
        server.shutdown()


def test_a_web_server_is_asked_for_ranges(tmp_path: Path, served: tuple[str, type[_Ranges]]) -> None:
    """Small members are streamed over in growing windows, large ones left out; a sample comes by one request."""
    address, handler = served
    written(tmp_path, tar_of(pairs(200, 5000)))
    written(tmp_path, tar_of(pairs(4, 9 << 20)), "large.tar")
    source = source_of(f"{address}/000.tar")
    references = list(source.references())
    assert len(handler.asked) < 8
    assert sum(last + 1 - first for first, last in handler.asked) < 1.1 * len((tmp_path / "000.tar").read_bytes())
    handler.asked.clear()
    assert values_of(source, references[::20]) == {f"{n:04}": expected(200, 5000)[f"{n:04}"] for n in range(0, 200, 20)}
    assert len(handler.asked) == 10

    handler.asked.clear()
    large = source_of(f"{address}/large.tar")
    references = list(large.references())
    assert sum(last + 1 - first for first, last in handler.asked) < 2 << 20
    assert values_of(large, references[2:3]) == {"0002": expected(4, 9 << 20)["0002"]}


def test_a_web_server_without_ranges_is_told(tmp_path: Path, served: tuple[str, type[_Ranges]]) -> None:
    """Else the beginning of the file would be taken for the range."""
    address, handler = served
    handler.ranges = False
    written(tmp_path, tar_of(pairs(200, 5000)))
    with pytest.raises(InputError, match=r"000\.tar cannot be read: .*no ranges of files"):
        list(source_of(f"{address}/000.tar").references())


def test_a_server_that_fails_is_not_taken_for_one_without_a_table_beside_the_tar(
    tmp_path: Path, served: tuple[str, type[_Ranges]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else columns would be missing without a word."""
    address, handler = served
    monkeypatch.setattr("featurestore.files.PAUSES_S", (0.0,))
    written(tmp_path, tar_of(pairs(2)))
    assert len(list(source_of(f"{address}/000.tar").references())) == 2
    handler.failing = ".parquet"
    with pytest.raises(InputError, match=r"the Parquet file beside a tar http://.*/000\.parquet cannot be read: 503"):
        list(source_of(f"{address}/000.tar").references())


def test_tars_on_s3_are_as_on_a_disk(tmp_path: Path) -> None:
    contents = {
        "a/000.tar": tar_of(pairs(30)),
        "a/001.tar": tar_of([("x.jpg", b"1"), ("x.json", b'{"a": 1}')])[:2048],
    }
    pq.write_table(pa.table({"key": ["0007"], "status": ["success"]}), tmp_path / "beside")
    with loopback_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        client = s3fs.S3FileSystem(endpoint_url=endpoint)
        client.mkdir("corpus")
        for name, content in contents.items():
            client.pipe(f"corpus/{name}", content)
        client.pipe("corpus/a/000.parquet", (tmp_path / "beside").read_bytes())
        for path in ("s3://corpus/a/*.tar", "s3://corpus/a/{000..001}.tar"):
            source = source_of(path)
            references = list(source.references())
            assert {each.uri for each in references} == {"s3://corpus/a/000.tar", "s3://corpus/a/001.tar"}
            assert values_of(source, references) == expected(30) | {"x": {"image": b"1", "caption": "truncated"}}
            assert [each.columns.get("status") for each in source.samples(references[6:9])] == [None, "success", None]
        s3fs.S3FileSystem.clear_instance_cache()


# Runs

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: tars
  source: {{type: webdataset, path: "{path}"}}
  fields:
    image: {{modality: image, from: [jpg, png, webp]}}
    caption: {{modality: text, from: txt}}
  shard_rows: 5
  failure_budget: {budget}
"""


def run(folder: Path, path: str, budget: str = "0%", more: str = "") -> tuple[FeatureStore, str]:
    """The shard stage, and what it printed."""
    spec = specs.parse(SPEC.format(folder=folder, path=path, budget=budget) + more, "spec")
    out = io.StringIO()
    Runner(spec, Console(file=out, width=1000)).run(("shard",))
    return FeatureStore(spec.store), out.getvalue()


def picture(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 40, 80)).save(out, "JPEG")
    return out.getvalue()


def read_by_webdataset(store: FeatureStore) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes of every shard of a store; upstream raises where a name comes twice."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(store.storage.root).glob("corpora/*/*.tar")):
        with path.open("rb") as file:
            for each in group_by_keys({"__url__": "x", **member} for member in tar_file_iterator(file)):
                key = from_tar_key(each["__key__"])
                assert key not in found
                found[key] = {name: raw for name, raw in each.items() if not name.startswith("__")}
    return found


def test_what_webdataset_writes_goes_in_and_what_braid_writes_webdataset_reads(tmp_path: Path) -> None:
    """The members of a sample are adjacent, no key is misread, and every value has its bytes."""
    keys = [f"{number:09}" for number in range(11)]
    keys += [
        "a/b/0",
        "v1.5/x",
        "é/字",
        "100%/50%25",
        "../up",
        "/abs",
        "tab\there",
        "a b",
        "x/__meta__/y",
        "Case",
        "case",
    ]
    for shard_number, some in enumerate((keys[:9], keys[9:])):
        with (tmp_path / f"{shard_number:03}.tar").open("wb") as file, TarWriter(file, mtime=0) as writer:
            for key in some:
                sample = {"__key__": key, "jpg": picture(len(key)), "txt": f"caption of {key}".encode()}
                writer.write(sample | {"cls": b"7", "json": json.dumps({"label": key.upper()}).encode()})
    store, _ = run(tmp_path, f"{tmp_path}/{{000..001}}.tar")
    found = read_by_webdataset(store)
    assert sorted(found) == sorted(keys)
    for key, values in found.items():
        assert values == {"image.jpg": picture(len(key)), "caption.txt": f"caption of {key}".encode()}
    rows = store.corpus("tars").to_arrow().to_pylist()
    assert {row["id"]: row["label"] for row in rows} == {key: key.upper() for key in keys}
    assert verify(store.storage).ok


def test_tars_as_img2dataset_writes_them_go_in_as_they_are(tmp_path: Path) -> None:
    """Key = shard x 10^4 + row, the members .jpg .txt .json, a table beside with the rows whose download failed too."""
    kept = []
    for number in range(2):
        contents, rows = [], []
        for row in range(7):
            key, failed = f"{number * 10_000 + row:09}", row == 3
            meta = {
                "caption": f"a boat, {key}", "url": f"https://example.com/{key}", "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: Not Found" if failed else None, "width": None if failed else 8,
                "height": None if failed else 8, "original_width": None if failed else 640, "exif": None if failed else "{}",
                "sha256": None if failed else hashlib.sha256(picture(row)).hexdigest(),
            }  # fmt: skip
            rows.append(meta | {"pwatermark": row / 8})
            if not failed:
                contents += [(f"{key}.jpg", picture(row)), (f"{key}.json", json.dumps(meta).encode())]
                contents.append((f"{key}.txt", meta["caption"].encode()))
                kept.append(meta | {"pwatermark": row / 8})
        written(tmp_path, tar_of(contents), f"{number:05}.tar")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number:05}.parquet")
        (tmp_path / f"{number:05}_stats.json").write_text("{}")
    store, told = run(tmp_path, f"{tmp_path}/{{00000..00001}}.tar")
    assert f"tars with fewer samples than rows beside them: 2, e.g. {tmp_path}/00000.tar: 6 of 7" in told
    rows = {row["id"]: row for row in store.corpus("tars").to_arrow().to_pylist()}
    assert sorted(rows) == [meta["key"] for meta in kept]
    for meta in kept:
        row = rows[meta["key"]]
        assert row["json.caption"] == meta.pop("caption")
        assert {name: row[name] for name in meta} == meta
        assert row["image"]["present"]
        assert row["caption"]["source"] == f"{int(meta['key']) // 10_000:05}.tar/{meta['key']}.txt"
    assert run(tmp_path, f"{tmp_path}/*.tar")[0].digest() == store.digest()


def test_a_run_over_a_tar_that_is_cut_off_says_so(tmp_path: Path) -> None:
    contents = [(f"{n:02}.{ext}", raw) for n in range(8) for ext, raw in (("jpg", picture(n)), ("txt", b"x" * 900))]
    whole = tar_of(contents)
    written(tmp_path, whole[: whole.index(b"07.txt") + 512 + 100])
    store, told = run(tmp_path, f"{tmp_path}/000.tar", "10%")
    word = f"tars that are cut off: 1, e.g. {tmp_path}/000.tar: it is cut off in '07.txt': 900 bytes are named, 100 are there"
    assert word in told
    counts = {
        "image": {"present": 8, "missing": 0, "quarantined": 0},
        "caption": {"present": 7, "missing": 0, "quarantined": 1},
    }
    assert field_counts(store, "tars") == counts
    assert [(row["id"], row["field"], row["reason"]) for row in rejected(store, "tars")] == [
        ("07", "caption", "truncated")
    ]
    spec = specs.parse(SPEC.format(folder=tmp_path, path=f"{tmp_path}/000.tar", budget="10%"), "spec")
    assert word in plan.steps(spec, Catalog(spec.store).snapshot())[0].why


def test_the_same_tars_in_another_folder_give_the_same_store(tmp_path: Path) -> None:
    contents = [(f"{n:02}.{ext}", raw) for n in range(8) for ext, raw in (("jpg", picture(n)), ("txt", b"x"))]
    whole = tar_of(contents)
    (tmp_path / "a").mkdir()
    for number, content in enumerate((whole, tar_of([("z.jpg", picture(9))])[:2048])):
        written(tmp_path / "a", content, f"{number:03}.tar")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy2)
    digests = [run(tmp_path / name, f"{tmp_path}/{name}/*.tar", "20%")[0].digest() for name in "ab"]
    assert digests[0] == digests[1]


def test_a_tar_that_was_whole_and_is_cut_off_removes_nothing(tmp_path: Path) -> None:
    """Samples that the source has no longer are removed from the corpus; what a cut took away is none of them."""
    whole = tar_of([(f"{n:02}.{ext}", raw) for n in range(8) for ext, raw in (("jpg", picture(n)), ("txt", b"x"))])
    path = written(tmp_path, whole)
    store, _ = run(tmp_path, str(path))
    for cut in ("05.jpg", "07.txt"):
        path.write_bytes(whole[: whole.index(cut.encode()) + 512])
        with pytest.raises(
            InputError, match=r"'tars': \d stored samples? would be removed or replaced .*bring these whole"
        ):
            run(tmp_path, str(path))
    assert FeatureStore(store.storage).digest() == store.digest()
    path.write_bytes(whole)
    again, before = run(tmp_path, str(path))[0].snapshot, store.snapshot
    # Written anew it has another etag, which the id index takes on; nothing else is made again.
    assert set(before.all()) - set(again.all()) == set(before.entries(IDS, "tars"))


def test_a_spec_is_checked_against_the_tars(tmp_path: Path) -> None:
    written(tmp_path, tar_of(pairs(2)))
    label = "training_sets:\n  t: {views: [v], label: kind, splits: {train: 1.0}}\n"
    label += "views:\n  v: {field: caption, encoder: minilm-l6}\n"
    with pytest.raises(
        InputError,
        match=r"training_sets\.t\.label: 'kind': no sample of .*000\.tar has it; columns to learn: group, id",
    ):
        run(tmp_path, f"{tmp_path}/000.tar", more=label)
    text = SPEC.format(folder=tmp_path, path=f"{tmp_path}/000.tar", budget="0%")
    for old, new, told in (
        ("from: txt", "from: [text, cap.txt]", r"corpus\.fields\.caption\.from: 'text, cap\.txt': no sample of"),
        ("from: txt", "from: txt, read: file", r"corpus\.fields\.caption\.read: 'file' says nothing where members are"),
        ("[jpg, png, webp]", "json.url", r"corpus\.fields\.image\.from: 'json\.url' is a column, which can be a text"),
    ):
        with pytest.raises(InputError, match=told):
            Runner(specs.parse(text.replace(old, new), "spec"), Console(quiet=True)).run(("shard",))
    with pytest.raises(SpecError, match=r'corpus\.fields\.image\.from: \["jpg", .* is a list: name one column'):
        specs.parse(text.replace("webdataset", "manifest"), "spec")
