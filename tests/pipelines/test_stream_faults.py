"""Recordings on a web server that fails once, or for good: what is read again, what is quarantined, what stays in the store."""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import files
from featurestore.catalog import Catalog
from featurestore.corpora import Corpus
from featurestore.storage import Storage
from tests.faults.stores import shard_corpus
from tests.loopback_web import Site, serving
from tests.pipelines.test_streams import SRT, quarantined, settings
from tests.recordings import beeps, frame_times, sensor_csv, video, write_sound

SECONDS = 6
FILES = {"frame": "v.mp4", "sound": "s.wav", "words": "t.srt", "csv": "m.csv", "motion": "m.parquet"}
HOW = {"v.mp4": "drops", "s.wav": "drops", "t.srt": "busy", "m.csv": "drops", "m.parquet": "busy"}
FIELDS = """
    frame: {modality: image, from: frame, tolerance: 50ms}
    sound: {modality: audio, from: sound}
    words: {modality: text, from: words}
    csv: {modality: sensor, from: csv}
    motion: {modality: sensor, from: motion}
"""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    video(folder / "v.mp4", frame_times(SECONDS), noise=70)
    write_sound(folder / "s.wav", beeps(SECONDS, noise=0.1))
    (folder / "t.srt").write_text(SRT)
    times = np.arange(0, SECONDS, 0.01)
    sensor_csv(folder / "m.csv", times, np.stack([times, times], axis=1))
    pq.write_table(pa.table({"time": times, "x": times}), folder / "m.parquet")
    return folder


class _Faulty(BaseHTTPRequestHandler):
    """Serves ranges of files. `site.faults` has, by a file's name, how many GETs of it fail, and how."""

    server: "FaultySite"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.strip("/")
        content = (self.server.folder / name).read_bytes()
        first, beyond = 0, len(content)
        if given := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, beyond = int(given[1]), min(int(given[2]) + 1, len(content))
        left, how = self.server.faults.get(name, (0, ""))
        fails = self.command == "GET" and left > 0
        if fails:
            self.server.asked[name] += 1
            self.server.faults[name] = (left - 1, how)
        body = content[first:beyond]
        busy = fails and how == "busy"
        self.send_response(503 if busy else 206)
        self.send_header("Content-Length", "0" if busy else str(len(body)))
        self.send_header("Connection", "close")
        if not busy:
            self.send_header("Content-Range", f"bytes {first}-{beyond - 1}/{len(content)}")
            self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET" and not busy:
            self.wfile.write(body[: len(body) // 2] if fails else body)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class FaultySite(Site):
    def __init__(self, folder: Path) -> None:
        super().__init__(_Faulty)
        self.folder = folder
        self.faults: dict[str, tuple[int, str]] = {}


@pytest.fixture
def site(media: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultySite]:
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.02, 0.04))
    yield from serving(FaultySite(media))  # type: ignore[misc]


def corpus_of(site: FaultySite, folder: Path) -> dict[str, Any]:
    row = {"id": "talk", "start": None} | {field: site.uri(name) for field, name in FILES.items()}
    (folder / "recordings.jsonl").write_text(json.dumps(row) + "\n")
    return settings(folder, FIELDS, "{every: 1s}")


def rows(storage: Storage) -> list[dict[str, Any]]:
    return Corpus(Catalog(storage).snapshot(), "talks").to_arrow().to_pylist()


@pytest.fixture(scope="module")
def expected(media: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows that a good server gives."""
    folder = tmp_path_factory.mktemp("good")
    for good in serving(FaultySite(media)):
        assert isinstance(good, FaultySite)
        storage = Storage.of(folder / "store")
        shard_corpus(storage, corpus_of(good, folder))
        assert quarantined(storage) == {}
        return [_values(row) for row in rows(storage)]
    raise AssertionError


def _values(row: dict[str, Any]) -> dict[str, Any]:
    told = {name: row[name] for name in row if name.endswith("_ns")}
    return told | {field: (row[field]["miss_reason"], row[field]["digest"]) for field in FILES}


def test_a_server_that_fails_once_is_asked_again(
    site: FaultySite, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """In planning and in the job, and whatever the stream is."""
    corpus, storage = corpus_of(site, tmp_path), Storage.of(tmp_path / "store")
    site.faults = {name: (3, how) for name, how in HOW.items()}
    shard_corpus(storage, corpus)
    assert site.asked == dict.fromkeys(HOW, 3)
    assert [_values(row) for row in rows(storage)] == expected
    assert quarantined(storage) == {}


def test_a_server_that_fails_for_good_costs_the_values_that_it_has(site: FaultySite, tmp_path: Path) -> None:
    corpus, storage = corpus_of(site, tmp_path), Storage.of(tmp_path / "store")
    site.faults = {name: (1 << 30, how) for name, how in HOW.items() if name != "s.wav"}
    shard_corpus(storage, corpus)
    stored = rows(storage)
    assert len(stored) == SECONDS
    assert all(row["sound"]["present"] for row in stored)
    rejected = quarantined(storage)
    assert rejected.keys() == {(row["id"], field) for row in stored for field in FILES if field != "sound"}
    for (_, field), told in rejected.items():
        name = FILES[field]
        wanted = "503 Service Unavailable" if HOW[name] == "busy" else "ClientPayloadError: Response payload is not"
        assert told.startswith(f"unreadable: {site.uri(name)}: ")
        assert wanted in told
