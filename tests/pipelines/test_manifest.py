"""Manifests as people have them: what is read all the same, and where what is wrong is said to stand."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from featurestore.catalog import Snapshot
from featurestore.errors import DecodeError, InputError
from featurestore.storage import Storage
from pipelines.ingest import Known, scan
from pipelines.sources import Sample, open_source
from pipelines.sources.files import FileValue
from pipelines.sources.manifest import Manifest

ROWS = [{"id": f"s{n}", "title": f"é {n}", "added": f"2026-01-0{n + 1}"} for n in range(4)]
BOM = b"\xef\xbb\xbf"
NOTHING = Known(Snapshot(Storage.of("/nowhere"), [], -1), "planted")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def source_of(folder: Path, content: bytes) -> Manifest:
    (folder / "m.jsonl").write_bytes(content)
    fields = {"title": {"modality": "text", "from": "title", "read": "inline"}}
    columns = {"id": "id", "group": None, "event_timestamp": "added"}
    source = open_source(
        {"source": {"type": "manifest", "path": [f"{folder}/m.jsonl"]}, "columns": columns, "fields": fields}
    )
    assert isinstance(source, Manifest)
    return source


def samples(source: Manifest) -> list[Sample]:
    return list(source.samples(source.references()))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n \n"])
def test_a_byte_order_mark_and_line_ends_are_no_part_of_a_sample(tmp_path: Path, newline: bytes) -> None:
    plain = source_of(tmp_path, lines(ROWS))
    expected = [(ref.id, ref.etag) for ref in plain.references()], [sample.columns for sample in samples(plain)]
    marked = source_of(tmp_path, BOM + lines(ROWS).replace(b"\n", newline))
    assert ([(ref.id, ref.etag) for ref in marked.references()], [each.columns for each in samples(marked)]) == expected
    assert scan(marked, NOTHING).key == scan(plain, NOTHING).key


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"id,title\ns0,a\n", r"m\.jsonl, line 1: 'id,title' is no JSON object; .* JSON Lines .*name a CSV \.csv"),
        (BOM + b"id,title\n", r"line 1: 'id,title' is no JSON object"),
        (b'[{"id": "s0"}]', r"line 1: '\[\{\"id\": \"s0\"\}\]' is no JSON object; .*a JSON array"),
        (b"\xff\xfe" + '{"id": "s0"}'.encode("utf-16-le"), r"line 1: '\?\?\{.* is no JSON object; .*UTF-16 first"),
        (lines(ROWS[:2]) + b'"s2"\n', r"line 3: '\"s2\"' is no JSON object"),
        (lines(ROWS[:2]) + b'\n{"id": \n"s2"}', r"line 4: not JSON: .*one object a line.*: correct the line"),
        (lines(ROWS) + b'{"id": 7.0}\n', r"line 5: id 7\.0 is not a non-empty text or a whole number"),
        (lines(ROWS) + b'{"id": true}\n', r"line 5: id True is not a non-empty text or a whole number"),
        (lines(ROWS) + b'{"id": "s9", "added": "soon"}\n', r"line 5: 'soon' is not a time; allowed: ISO 8601"),
        (
            b'{"id": "s9", "added": "0001-01-01"}\n',
            r"line 1: 0001-01-01 is too far from 1970 .*; allowed: 1677-09-22 to",
        ),
        (b'{"id": "s9", "added": 9223372036854775808}\n', r"line 1: 9223372036854775808 is too far from 1970"),
    ],
)
def test_what_is_no_sample_is_told_by_its_line_when_the_source_is_scanned(
    tmp_path: Path, content: bytes, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        scan(source_of(tmp_path, content), NOTHING)


@pytest.mark.parametrize("mark", [b"", BOM])
def test_a_sample_is_found_by_its_line(tmp_path: Path, mark: bytes) -> None:
    source = source_of(tmp_path, mark + b"\n" + lines(ROWS[:2]) + b"\n\n" + lines(ROWS[2:]))
    places = {ref.id: source.place(ref) for ref in source.references()}
    assert places == {f"s{n}": f"{tmp_path}/m.jsonl, line {line}" for n, line in enumerate((2, 3, 6, 7))}


def test_an_id_that_stands_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    source = source_of(tmp_path, BOM + lines([*ROWS, ROWS[1]]))
    with pytest.raises(InputError, match=rf"id 's1' stands twice: {tmp_path}/m\.jsonl, line 2 and .*m\.jsonl, line 5;"):
        scan(source, NOTHING)


def test_a_manifest_that_is_not_there_is_told_without_an_errno(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"")
    (tmp_path / "m.jsonl").unlink()
    with pytest.raises(InputError, match=r"m\.jsonl cannot be read: No such file or directory; correct corpus\.source"):
        scan(source, NOTHING)


def test_half_a_surrogate_pair_spoils_only_the_value_it_stands_in(tmp_path: Path) -> None:
    row = b'{"id": "h", "title": "cut \\ud83d", "more": "cut \\ud83d", "odd \\ud83d": 1, "added": "2026-01-01"}\n'
    (found,) = samples(source_of(tmp_path, row))
    assert {name: value for name, value in found.columns.items() if name != "event_timestamp"} == {
        "more": "cut \ufffd\ufffd\ufffd",
        "odd \ufffd\ufffd\ufffd": 1,
    }
    title = found.values["title"]
    assert title is not None
    with pytest.raises(UnicodeDecodeError):
        title.fetch().decode()


def test_a_column_without_a_name_is_no_group(tmp_path: Path) -> None:
    (found,) = samples(source_of(tmp_path, b'{"id": "h", "title": "x", "": 7, "added": "2026-01-01"}\n'))
    assert found.group == "h"


def test_fields_in_another_order_as_workers_get_them_give_the_same_etags(tmp_path: Path) -> None:
    """Else every plan reads all values again, to see that none of them changed."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "m.jsonl").write_bytes(lines([{"id": "s", "one": "a.txt", "two": "b.txt"}]))
    fields = {name: {"modality": "text", "from": name, "read": "file"} for name in ("one", "two")}
    etags = {
        reference.etag
        for order in (fields, dict(reversed(fields.items())))
        for reference in open_source(
            {"source": {"type": "manifest", "path": [f"{tmp_path}/m.jsonl"]}, "columns": {"id": "id"}, "fields": order}
        ).references()
    }
    assert len(etags) == 1


def test_what_is_no_file_is_rejected_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (f"{tmp_path}/pipe", "device or pipe"),
        ("/dev/zero", "device or pipe"),
        (str(tmp_path), "directory"),
    ):
        with pytest.raises(DecodeError, match=f"^unreadable: it: no file but a {told}"):
            FileValue(path if "://" in path else f"file://{path}", "it").fetch()


def test_what_a_client_raises_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    for uri in ("s3://bucket/a.png", "s3://"):
        with pytest.raises(DecodeError, match=r"^unreadable: it: "):
            FileValue(uri, "it").fetch()


class _Endless(BaseHTTPRequestHandler):
    """Never says how much comes: 20 bytes in all."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(bytes(range(20)))

    def log_message(self, *_: Any) -> None:
        pass


def test_a_file_of_unknown_size_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        value = FileValue(f"http://127.0.0.1:{server.server_port}/a", "it")
        assert value.fetch() == bytes(range(20))
        monkeypatch.setattr("featurestore.files.MAX_VALUE_BYTES", 8)
        with pytest.raises(DecodeError, match=r"^too_large: more than 8 bytes"):
            value.fetch()
        server.shutdown()
