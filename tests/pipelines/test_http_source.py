"""Values on a web server that is slow, wrong, hostile or gone: what comes in, what is rejected, and how often it is asked."""

import json
import socket
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from featurestore import files, http
from featurestore.errors import DecodeError, InputError
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from jobs.report import field_counts, rejected
from pipelines.sources import open_source
from pipelines.sources.files import FileValue, Part
from tests.faults.stores import shard_corpus
from tests.loopback_web import BODY, Site, serving

CORPUS: dict[str, Any] = {
    "name": "web",
    "columns": {"id": "id", "group": None},
    "fields": {"note": {"modality": "text", "from": "note", "read": "file"}},
    "shard_rows": 100,
    "shard_mb": 64,
    "failure_budget": 1.0,
}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.02, 0.04))
    yield from serving(Site())


@pytest.mark.parametrize(
    ("path", "requests"),
    [
        ("good", 1),
        ("good?a=1&b=%20", 1),
        ("busy-twice", 3),
        ("too-many-once", 2),
        ("short-once", 2),
        ("without-head", 1),
        ("to-good", 1),
    ],
)
def test_what_a_server_mends_by_itself_comes_in(site: Site, path: str, requests: int) -> None:
    assert FileValue(site.uri(path), "it").fetch() == BODY
    assert site.asked == Counter({f"GET {path}": requests}) + Counter({"GET good": path == "to-good"})


@pytest.mark.parametrize(
    ("path", "requests", "told"),
    [
        ("gone", 1, r"unreadable: it: No such file or directory"),
        ("forbidden", 1, r"unreadable: it: ClientResponseError: 403 Forbidden"),
        ("busy", 4, r"unreadable: it: ClientResponseError: 503 Service Unavailable"),
        ("short", 4, r"unreadable: it: ClientPayloadError: Response payload is not completed"),
        ("dropped", 4, r"unreadable: it: Client(Payload|OS)Error|unreadable: it: Connection reset by peer"),
        ("loop", 10, r"unreadable: it: TooManyRedirects$"),
        ("to-a-file", 1, r"unreadable: it: NonHttpUrlRedirectClientError: file:///etc/passwd"),
        ("huge", 1, r"too_large: 8589934592 bytes; at most 268435456 are allowed"),
    ],
)
def test_what_a_server_does_not_mend_is_rejected(site: Site, path: str, requests: int, told: str) -> None:
    with pytest.raises(DecodeError, match=f"^({told})"):
        FileValue(site.uri(path), "it").fetch()
    assert site.asked == {f"GET {path}": requests}


def test_many_values_are_asked_for_at_once_and_come_in_their_order(site: Site, tmp_path: Path) -> None:
    path, count = tmp_path / "m.jsonl", 160
    (tmp_path / "near.txt").write_text("near")
    notes = [site.uri(f"late?{number}") if number % 10 != 3 else "near.txt" for number in range(count)]
    path.write_text("".join(json.dumps({"id": f"s{n:03}", "note": note}) + "\n" for n, note in enumerate(notes)))
    source = open_source(CORPUS | {"source": {"type": "manifest", "path": [str(path)]}})
    begun = time.monotonic()
    found = source.references()
    first = next(found)
    assert site.asked.total() == 1
    references = [first, *found]
    assert time.monotonic() - begun < 0.5 * 0.03 * count
    assert [reference.id for reference in references] == [f"s{n:03}" for n in range(count)]
    assert {reference.bytes for reference in references} == {len(BODY), 4}
    assert site.asked.total() == 0.9 * count
    assert 8 < site.most_at_once <= 32
    assert len({reference.etag for reference in references}) == count
    again = [source.place(reference) for reference in references[:2]]
    assert again == [f"{path}, line 1", f"{path}, line 2"]


def test_of_a_body_longer_than_was_said_nothing_reaches_the_next_value(site: Site) -> None:
    """Whether it is rejected or cut where it was said to end depends on when the rest of it comes."""
    for _ in range(5):
        with suppress(DecodeError):
            assert FileValue(site.uri("long"), "it").fetch() == BODY[:5]
        assert FileValue(site.uri("good"), "it").fetch() == BODY


def test_all_of_a_value_of_unsaid_size_comes_in(site: Site) -> None:
    assert FileValue(site.uri("unsized"), "it").fetch() == BODY * 100_000


def test_a_body_packed_on_the_way_is_unpacked_no_further_than_allowed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_VALUE_BYTES", 1 << 20)
    tracemalloc.start()
    with pytest.raises(DecodeError, match=r"^too_large: more than 1048576 bytes, which are allowed, came"):
        FileValue(site.uri("bomb"), "it").fetch()
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("path", ["drip", "silent"])
def test_nothing_is_waited_for_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(http, "TIME_LIMIT_S", 0.5)
    monkeypatch.setattr(http, "SILENCE_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(DecodeError, match=r"^unreadable: it: it did not come in time"):
        FileValue(site.uri(path), "it").fetch()
    assert time.monotonic() - begun < 2


def test_no_server_at_all_is_told(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DecodeError, match=r"^unreadable: it: Connect call failed"):
            FileValue(f"http://127.0.0.1:{unused.getsockname()[1]}/a", "it").fetch()


def test_a_part_of_a_file_is_that_part_or_is_rejected(site: Site) -> None:
    def part(path: str, offset: int, size: int) -> bytes:
        return Part(site.uri(path), offset, size, "", "it").fetch()

    assert part("ranged", 3, 4) == BODY[3:7]
    for offset, size, there in ((8, 4, 2), (20, 4, 0)):
        with pytest.raises(DecodeError, match=rf"^truncated: it: {size} bytes are named, {there} are there"):
            part("ranged", offset, size)
    with pytest.raises(DecodeError, match=r"^unreadable: it: the server gives no ranges of files: it answered 200"):
        part("good", 3, 4)
    assert part("good", 0, 4) == BODY[:4], "the first part of all that comes"


BAD = {"gone", "forbidden", "busy", "short", "dropped", "loop", "to-a-file", "huge"}
GOOD = {"good", "busy-twice", "short-once", "without-head", "to-good", "too-many-once"}


def test_every_value_of_a_manifest_is_stored_or_in_quarantine(site: Site, tmp_path: Path) -> None:
    rows = [{"id": path, "note": site.uri(path)} for path in sorted(BAD | GOOD)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = CORPUS | {"source": {"type": "manifest", "path": [str(tmp_path / "m.jsonl")]}}
    shard_corpus(Storage.of(tmp_path / "store"), corpus)
    store = FeatureStore(tmp_path / "store")
    assert field_counts(store, "web")["note"] == {"present": len(GOOD), "missing": 0, "quarantined": len(BAD)}
    found = {row["id"]: row["reason"] for row in rejected(store, "web")}
    assert found == dict.fromkeys(BAD, "unreadable") | {"huge": "too_large"}
    for path in GOOD:
        value = store.corpus("web").value(*store.corpus("web").locate(path), "note")
        assert value == BODY


class _Flaky(SimpleHTTPRequestHandler):
    """Python's own server, which gives no ranges; every third request fails."""

    server: Site

    def do_HEAD(self) -> None:
        self.reply(super().do_HEAD)

    def do_GET(self) -> None:
        self.reply(super().do_GET)

    def reply(self, well: Callable[[], None]) -> None:
        self.server.asked["all"] += 1
        if self.server.asked["all"] % 3 == 0:
            self.send_error(503)
        else:
            well()

    def log_message(self, *_: Any) -> None:
        pass


def manifest_at(uri: str) -> Any:
    fields = {"note": {"modality": "text", "from": "note", "read": "inline"}}
    return open_source(CORPUS | {"source": {"type": "manifest", "path": [uri]}, "fields": fields})


def test_a_manifest_on_a_server_that_fails_now_and_then_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.02, 0.04))
    rows = [{"id": f"{n:05d}", "note": "x" * 100} for n in range(5000)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for site in serving(Site(lambda *args: _Flaky(*args, directory=str(tmp_path)))):
        source = manifest_at(site.uri("m.jsonl"))
        for _ in range(3):
            assert [sample.id for sample in source.samples(source.references())] == [row["id"] for row in rows]
        assert site.asked["all"] > 6


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("gone", r"cannot be read: ClientResponseError: 404 Not Found; correct corpus\.source\.path"),
        ("busy", r"cannot be read: ClientResponseError: 503 Service Unavailable; correct"),
        ("short", r"cannot be read on from byte 0: ClientPayloadError: .*; run it again, or copy it to a disk"),
        ("unsized", r"line 1: 'abcdefghij"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_told(site: Site, path: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(manifest_at(site.uri(f"{path}.jsonl")).references())
