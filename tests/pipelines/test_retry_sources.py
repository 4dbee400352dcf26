"""Trying quarantined values again of each kind of source, and of a web server that answers again."""

import io
import json
import tarfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import files
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import plan
from jobs.report import rejected
from jobs.spec import load
from tests.conftest import Made
from tests.jobs.test_retry import FRESH, mend, planted, retry, run, states, still
from tests.loopback_web import Site, serving


def test_what_a_web_server_did_not_give_comes_in_once_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.02, 0.04))
    rows = [{"id": f"{n:02}", "note": f"{n}.txt"} for n in range(20)]
    (tmp_path / "m.jsonl").write_text("")
    for site in serving(Site(_Upset)):
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(r | {"note": site.uri(r["note"])}) + "\n" for r in rows))
        spec = tmp_path / "spec.yaml"
        spec.write_text(f"""\
version: 1
store: {{uri: {tmp_path}/store}}
corpus:
  name: planted
  source: {{type: manifest, path: {tmp_path}/m.jsonl}}
  columns: {{id: id}}
  fields:
    note: {{modality: text, from: note, read: file}}
  shard_rows: 4
  failure_budget: 50%
""")
        made = Made(tmp_path, spec, tmp_path / "store")
        run(made)
        assert [row["reason"] for row in rejected(made.open(), "planted")] == ["unreadable"] * 3
        before = made.open().corpus("planted")
        site.over.set()
        site.asked.clear()
        assert "shard planted: 3 values tried, 3 in now, 0 in quarantine" in retry(made)
        assert {path for path in site.asked if path.startswith("GET")} == {f"GET /{n}.txt" for n in (3, 4, 5)}
        corpus = made.open().corpus("planted")
        assert [corpus.value(*corpus.locate(r["id"]), "note") for r in rows] == [
            f"/{n}.txt".encode() for n in range(20)
        ]
        assert [e.ids_sha256 for e in corpus.shards] == [e.ids_sha256 for e in before.shards]
        assert states(made) == {("shard", plan.FRESH)}
        assert verify(made.open().storage).ok


class _Upset(BaseHTTPRequestHandler):
    """Answers each path with itself; three of them only once `over` is set."""

    server: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked[f"{self.command} {self.path}"] += 1
        well = self.server.over.is_set() or self.path not in ("/3.txt", "/4.txt", "/5.txt")
        self.send_response(200 if well else 503)
        self.send_header("Content-Length", str(len(self.path)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.path.encode())
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


SOURCES = ("folder", "webdataset", "parquet")


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_what_was_mended_in_it(tmp_path: Path, kind: str) -> None:
    """Also where all samples of a mended file have another etag since: the others are compared, and are the same."""
    paths = {"folder": "s", "webdataset": "s.tar", "parquet": "s.parquet"}
    field = {"folder": 'from: "{id}.txt"', "webdataset": "from: txt", "parquet": "from: txt"}[kind]
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"""\
version: 1
store: {{uri: {tmp_path}/store}}
corpus:
  name: planted
  source: {{type: {kind}, path: {tmp_path}/{paths[kind]}}}
  {"columns: {id: id}" if kind == "parquet" else ""}
  fields:
    note: {{modality: text, {field}}}
  shard_rows: 4
  failure_budget: 50%
""")
    made = Made(tmp_path, spec, tmp_path / "store")
    texts = {f"n{number:02}": f"Note {number}.".encode() for number in range(12)}
    spoil = texts | {"n03": b"Caf\xe9", "n07": b"", "n08": b"\xff"}
    _put(tmp_path / paths[kind], kind, spoil)
    run(made)
    assert len(still(made)) == 3
    before = made.open().corpus("planted")
    _put(tmp_path / paths[kind], kind, texts | {"n08": b"\xff"})
    assert "shard planted: 3 values tried, 2 in now, 1 in quarantine\n  note, invalid_utf8: 1\n" in retry(made)
    corpus = made.open().corpus("planted")
    found = {each: corpus.value(*corpus.locate(each), "note") for each in texts}
    assert found == texts | {"n08": None}
    assert [(e.shard, e.ids_sha256) for e in corpus.shards] == [(e.shard, e.ids_sha256) for e in before.shards]
    assert verify(made.open().storage).ok
    assert states(made) == {("shard", plan.FRESH)}


def _put(path: Path, kind: str, texts: dict[str, bytes]) -> None:
    if kind == "folder":
        path.mkdir(exist_ok=True)
        for name, raw in texts.items():
            if not (path / f"{name}.txt").exists() or (path / f"{name}.txt").read_bytes() != raw:
                (path / f"{name}.txt").write_bytes(raw)
    elif kind == "webdataset":
        with tarfile.open(path, "w") as tar:
            for name, raw in texts.items():
                info = tarfile.TarInfo(f"{name}.txt")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    else:
        pq.write_table(pa.table({"id": [*texts], "txt": pa.array(texts.values(), pa.binary())}), path)


def test_with_references_the_row_refers_to_what_came_in(tmp_path: Path) -> None:
    made = planted(tmp_path, "reference")
    bad = mend(made, made)
    before = made.open()
    retry(made)
    store = FeatureStore(load(made.spec).store)
    corpus = store.corpus("planted")
    for sample_id in (bad.missing, bad.empty):
        shard, row = corpus.locate(sample_id)
        member = corpus.read(shard)["sound"][row].as_py()
        assert member["uri"] == str(bad.sounds[sample_id].relative_to(made.corpus))
        assert corpus.value(shard, row, "sound") == bad.sounds[sample_id].read_bytes()
    assert corpus.value(*corpus.locate(bad.latin), "caption") == "Café".encode()
    assert {finding.kind for finding in verify(store.storage).findings} == {"space"}
    assert states(made) == FRESH
    assert [e.shard for e in before.corpus("planted").shards] == [e.shard for e in corpus.shards]
