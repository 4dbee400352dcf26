"""Values in an object store whose answers fail: its client tries again, and nothing above it does so once more."""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs

from featurestore.errors import AlignmentError, DecodeError, InputError, NotFound, StoreError
from featurestore.identity import input_digest
from featurestore.references import read_value
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from jobs.report import field_counts, rejected
from pipelines.sources import open_source
from pipelines.sources.files import FileValue, Part
from tests.faults.stores import shard_corpus
from tests.loopback_s3 import REGION, loopback_s3

BODY = b"abcdefghij"
ATTEMPTS = 3


class _Between(BaseHTTPRequestHandler):
    """Hands requests to the store; those for a key called busy-<n> it answers n times with 503 before."""

    server: "Proxy"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        key = urlsplit(self.path).path.rpartition("/")[2].removesuffix(".jsonl")
        self.server.asked[f"{self.command} {key}"] += 1
        if key.startswith("busy-") and self.server.asked[f"{self.command} {key}"] <= int(key.partition("-")[2]):
            return self.answer(503, {"Content-Length": "0"}, b"")
        with self.server.connect() as store:
            size = int(self.headers.get("Content-Length", 0))
            store.request(self.command, self.path, self.rfile.read(size), dict(self.headers))
            found = store.getresponse()
            body = found.read()
            headers = {name: value for name, value in found.getheaders() if name.lower() != "transfer-encoding"}
            cut = key == "cut" and self.command == "GET"
            return self.answer(found.status, headers, body[:4] if cut else body)

    do_HEAD = do_PUT = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    """Stands between a client and a store."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Between)
        self.asked: Counter[str] = Counter()
        self._store = urlsplit(endpoint).netloc

    def connect(self) -> Any:
        return closing(http.client.HTTPConnection(self._store))


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with loopback_s3() as endpoint, Proxy(endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(endpoint_url=endpoint, client_kwargs={"region_name": REGION})
        fs.mkdir("shelf", region_name=REGION)
        for key in ("good", "busy-1", "busy-99", "cut", "part"):
            fs.pipe(f"shelf/{key}", BODY)
        rows = [{"id": key, "note": f"s3://shelf/{key}"} for key in ("good", "busy-1", "busy-99", "gone")]
        for key in ("m/busy-1.jsonl", "m/busy-99.jsonl"):
            fs.pipe(f"shelf/{key}", "".join(json.dumps(row) + "\n" for row in rows).encode())
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.shutdown()


@pytest.fixture(autouse=True)
def nothing_asked(proxy: Proxy) -> None:
    proxy.asked.clear()


def test_what_the_store_mends_by_itself_comes_in(proxy: Proxy) -> None:
    assert FileValue("s3://shelf/busy-1", "it").fetch() == BODY
    assert proxy.asked["GET busy-1"] == 2
    assert Part("s3://shelf/part", 3, 4, "", "it").fetch() == BODY[3:7]


@pytest.mark.parametrize(("offset", "there"), [(8, 2), (20, 0)])
def test_what_a_file_ends_before_is_truncated_and_a_reference_to_it_changed(offset: int, there: int) -> None:
    with pytest.raises(DecodeError, match=rf"^truncated: it: 4 bytes are named, {there} are there"):
        Part("s3://shelf/part", offset, 4, "", "it").fetch()
    storage = Storage(uri="/nowhere", media_root="s3://shelf")
    with pytest.raises(
        AlignmentError, match=r"s3://shelf/part: not the value that was stored: the file changed, was cut"
    ):
        read_value(storage, "part", offset, 4, input_digest(b"four"))


def test_references_are_asked_for_as_often_as_the_client_asks(proxy: Proxy) -> None:
    storage = Storage(uri="/nowhere", media_root="s3://shelf")
    assert read_value(storage, "busy-1", 0, 10, input_digest(BODY)) == BODY
    with pytest.raises(StoreError, match=r"s3://shelf/cut: cannot be read now: ClientPayloadError"):
        read_value(storage, "cut", 0, 10, input_digest(BODY))
    assert proxy.asked["GET cut"] == s3fs.S3FileSystem.retries
    with pytest.raises(NotFound, match=r"s3://shelf/gone: gone since it was stored"):
        read_value(storage, "gone", 0, 10, input_digest(BODY))


def test_a_store_that_stays_busy_is_asked_as_often_as_its_client_asks(proxy: Proxy) -> None:
    with pytest.raises(DecodeError, match=r"^unreadable: it: "):
        FileValue("s3://shelf/busy-99", "it").fetch()
    assert proxy.asked["HEAD busy-99"] == ATTEMPTS
    assert proxy.asked["GET busy-99"] == 0


def test_a_connection_that_drops_half_way_is_tried_as_often_as_its_client_tries(proxy: Proxy) -> None:
    with pytest.raises(DecodeError, match=r"^unreadable: it: ClientPayloadError"):
        FileValue("s3://shelf/cut", "it").fetch()
    assert proxy.asked["GET cut"] == s3fs.S3FileSystem.retries


def test_every_value_of_a_manifest_in_a_store_is_stored_or_in_quarantine(proxy: Proxy, tmp_path: Path) -> None:
    fields = {"note": {"modality": "text", "from": "note", "read": "file"}}
    corpus = {
        "name": "shelf", "columns": {"id": "id", "group": None}, "fields": fields, "shard_rows": 100, "shard_mb": 64,
        "failure_budget": 1.0, "source": {"type": "manifest", "path": ["s3://shelf/m/busy-1.jsonl"]},
    }  # fmt: skip
    shard_corpus(Storage.of(tmp_path / "store"), corpus)
    store = FeatureStore(tmp_path / "store")
    assert field_counts(store, "shelf")["note"] == {"present": 2, "missing": 0, "quarantined": 2}
    assert {row["id"]: row["reason"] for row in rejected(store, "shelf")} == dict.fromkeys(
        ("busy-99", "gone"), "unreadable"
    )
    for path in ("gone.jsonl", "m/busy-99.jsonl"):
        with pytest.raises(InputError, match=rf"manifest s3://shelf/{path} cannot be read: .*; correct corpus\.source"):
            list(open_source(corpus | {"source": {"type": "manifest", "path": [f"s3://shelf/{path}"]}}).references())
