"""Values on a web server that a corpus refers to: read with the limits and tries that they were sharded with, and proven."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from featurestore import files, http
from featurestore.errors import AlignmentError, MissingExtra, NotFound, StoreError
from featurestore.identity import input_digest
from featurestore.references import read_value
from featurestore.storage import Storage
from tests.loopback_web import BODY, Site, serving


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.02, 0.04))
    yield from serving(Site())


def read(site: Site, path: str, offset: int = 0, size: int = len(BODY), digest: bytes | None = None) -> bytes:
    storage = Storage(uri="/nowhere", media_root=site.uri("").rstrip("/"))
    return read_value(storage, path, offset, size, digest or input_digest(BODY[offset : offset + size]))


@pytest.mark.parametrize(
    ("path", "requests"),
    [
        ("good", 1),
        ("ranged", 1),
        ("busy-twice", 3),
        ("too-many-once", 2),
        ("short-once", 2),
        ("dropped-once", 2),
        ("without-head", 1),
        ("good?a=1&b=%20", 1),
    ],
)
def test_what_a_server_mends_by_itself_is_read(site: Site, path: str, requests: int) -> None:
    """Also of one that gives no ranges: most of these send the whole file whatever part is asked for."""
    assert read(site, path) == BODY
    assert site.asked == {f"GET {path}": requests}


def test_a_range_is_that_range_or_is_told(site: Site) -> None:
    assert read(site, "ranged", 3, 4) == BODY[3:7]
    with pytest.raises(
        StoreError, match=r"good: cannot be read now: the server gives no ranges of files: it answered 200"
    ):
        read(site, "good", 3, 4)
    for offset, size in ((8, 4), (20, 4)):
        with pytest.raises(AlignmentError, match=r"ranged: not the value that was stored: the file changed, was cut"):
            read(site, "ranged", offset, size, input_digest(b"four"))


@pytest.mark.parametrize(
    ("path", "requests", "error", "told"),
    [
        ("gone", 1, NotFound, r"/gone: gone since it was stored$"),
        ("forbidden", 1, StoreError, r"/forbidden: cannot be read now: ClientResponseError: 403 Forbidden; mend that"),
        ("busy", 4, StoreError, r"/busy: cannot be read now: ClientResponseError: 503 Service Unavailable"),
        ("short", 4, StoreError, r"/short: cannot be read now: ClientPayloadError"),
        ("dropped", 4, StoreError, r"/dropped: cannot be read now: (Client(Payload|OS)Error|Connection reset by peer)"),
        ("to-a-file", 1, StoreError, r"/to-a-file: cannot be read now: NonHttpUrlRedirectClientError"),
        ("bomb", 1, AlignmentError, r"/bomb: not the value that was stored"),
    ],
)
def test_what_a_server_does_not_mend_is_told_as_what_it_is(
    site: Site, path: str, requests: int, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as raised:
        read(site, path)
    assert type(raised.value) is error
    assert site.asked == {f"GET {path}": requests}


def test_no_more_of_a_file_is_waited_for_than_the_value(site: Site) -> None:
    """The server says a million bytes and sends one each 20 ms."""
    begun = time.monotonic()
    assert read(site, "drip", 0, 3, input_digest(b"xxx")) == b"xxx"
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("path", ["drip", "silent"])
def test_nothing_is_waited_for_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(http, "TIME_LIMIT_S", 0.5)
    monkeypatch.setattr(http, "SILENCE_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot be read now: it did not come in time; mend that, and run it again"):
        read(site, path, 0, 1000)
    assert time.monotonic() - begun < 2


def test_no_server_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.01,))
    with Site() as never_served:
        pass
    with pytest.raises(StoreError, match=r"good: cannot be read now: Connect call failed"):
        read(never_served, "good")


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtra, match=r"https://h/x/a needs a package that is not installed here: .*aiohttp"):
        read_value(Storage(uri="/nowhere", media_root="https://h/x"), "a", 0, 3, b"")


WITHOUT_CLIENTS = """
import sys
for absent in ("apache_beam", "aiohttp", "s3fs", "gcsfs"):
    sys.modules[absent] = None
from featurestore.identity import input_digest
from featurestore.references import read_value
from featurestore.storage import Storage
print(read_value(Storage(uri="/nowhere", media_root=sys.argv[1]), "a", 1, 2, input_digest(b"bc")))
"""


def test_a_value_on_a_disk_is_read_without_beam_and_the_clients_of_other_places(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcd")
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_CLIENTS, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.returncode) == ("b'bc'\n", 0), ended.stderr
