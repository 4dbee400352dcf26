import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from featurestore.catalog import Catalog
from featurestore.errors import BraidError, InputError, MissingExtra, NotFound, StoreError
from featurestore.storage import Storage
from tests.loopback_s3 import REGION, loopback_s3


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with loopback_s3() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Storage:
    store = Storage(uri="s3://shelf/stores/a", endpoint=endpoint, region=REGION, allow_http=True)
    store.fs.mkdir("shelf")
    return store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(uri=str(tmp_path / "store"))
    bucket: Storage = request.getfixturevalue("bucket")
    return bucket.model_copy(update={"uri": f"s3://shelf/{tmp_path.name}"})


def put_bytes(store: Storage, key: str, data: bytes) -> None:
    with store.scratch() as folder:
        (folder / "x").write_bytes(data)
        store.put(folder / "x", key)


def test_what_is_put_is_read_whole_and_in_parts(store: Storage) -> None:
    put_bytes(store, "views/image/ab/0-1.parquet", b"0123456789")
    key = "views/image/ab/0-1.parquet"
    assert store.read(key) == b"0123456789"
    assert store.read(key, 2, 3) == b"234"
    assert store.read(key, length=4) == b"0123"
    assert store.read(key, 7) == b"789"
    assert store.read(key, 3, 0) == b""
    assert store.size(key) == 10
    with store.open(key) as file:
        file.seek(8)
        assert file.read() == b"89"


def test_a_read_past_the_end_is_never_short(store: Storage) -> None:
    put_bytes(store, "a.tar", b"0123456789")
    with pytest.raises(StoreError, match=r"a\.tar: 2 bytes at 8, 5 expected"):
        store.read("a.tar", 8, 5)
    with pytest.raises(InputError, match="not negative"):
        store.read("a.tar", -1, 5)


def test_putting_again_replaces(store: Storage) -> None:
    put_bytes(store, "k", b"old")
    put_bytes(store, "k", b"newer")
    assert store.read("k") == b"newer"
    assert store.list() == {"k": 5}


def test_a_listing_is_recursive_sorted_and_knows_sizes(store: Storage) -> None:
    for key, size in {"a/z/3": 3, "a/b": 1, "ab/c": 2, "a/é b.tar": 4}.items():
        put_bytes(store, key, b"x" * size)
    assert list(store.list("a").items()) == [("a/b", 1), ("a/z/3", 3), ("a/é b.tar", 4)]
    assert store.list() == {"a/b": 1, "a/z/3": 3, "a/é b.tar": 4, "ab/c": 2}
    assert store.list("nothing") == {}
    assert store.list("a/b") == {}


def test_a_listing_sees_what_another_client_wrote_since(store: Storage) -> None:
    # On S3 another region makes another client, like one of another process.
    other = store if store.is_local else store.model_copy(update={"region": "eu-west-2"})
    put_bytes(store, "a/1", b"x")
    assert set(store.list("a")) == {"a/1"}
    put_bytes(other, "a/2", b"x")
    assert store.exists("a/2")
    assert set(store.list("a")) == {"a/1", "a/2"}
    other.delete("a/1")
    assert not store.exists("a/1")


def test_existence_is_of_objects_not_folders(store: Storage) -> None:
    put_bytes(store, "a/1", b"x")
    assert store.exists("a/1")
    assert not store.exists("a")
    assert not store.exists("a/2")
    assert not store.exists("a/1/2")


def test_an_empty_object_is_made_and_made_again(store: Storage) -> None:
    for _ in range(2):
        store.touch("notes/a/b")
        assert store.list("notes") == {"notes/a/b": 0}
    with pytest.raises(InputError, match="not a key"):
        store.touch("../b")
    store.delete("notes/a/b")


def test_deleting_twice_is_no_error(store: Storage) -> None:
    put_bytes(store, "a/1", b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert not store.exists("a/1")


@pytest.mark.parametrize("act", [lambda s: s.read("a/b"), lambda s: s.size("a/b"), lambda s: s.open("a/b").read()])
def test_a_missing_object_is_named(store: Storage, act) -> None:
    with pytest.raises(NotFound, match=r"a/b: no such object"):
        act(store)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".tmp/a", "a/.b", "a\n", "a?b", "a\0"]
)
def test_keys_that_leave_the_store_or_hide_are_refused(tmp_path: Path, key: str) -> None:
    store = Storage(uri=str(tmp_path))
    for act in (
        store.read,
        store.size,
        store.delete,
        store.exists,
        store.open,
        store.delta_uri,
        store.local_path,
    ):
        with pytest.raises(InputError, match="is not a key of a store; allowed: relative"):
            act(key)


@given(key=st.text(max_size=30))
def test_every_key_is_inside_the_store_or_refused(key: str) -> None:
    try:
        path = Storage(uri="/stores/a").local_path(key)
    except InputError:
        return
    assert Path(os.path.normpath(str(path))).is_relative_to("/stores/a")
    assert path != Path("/stores/a")


def test_a_file_from_outside_is_copied_and_one_of_scratch_is_moved(tmp_path: Path) -> None:
    store = Storage(uri=str(tmp_path / "store"))
    mine = tmp_path / "mine"
    mine.write_bytes(b"x")
    store.put(mine, "a")
    assert mine.exists()
    with store.scratch() as folder:
        assert folder.is_relative_to(tmp_path / "store" / ".tmp")
        (folder / "b").write_bytes(b"y")
        inode = (folder / "b").stat().st_ino
        store.put(folder / "b", "b")
    assert (tmp_path / "store" / "b").stat().st_ino == inode
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []
    assert store.list() == {"a": 1, "b": 1}


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalog that names it afterwards never names what a power cut took."""
    storage, steps = Storage.of(tmp_path / "store"), []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append(("rename", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with storage.scratch() as folder:
        (folder / "a").write_bytes(b"one")
        storage.put(folder / "a", "x/a")
    assert steps == [("fsync", f"{folder}/a"), ("rename", f"{folder}/a"), ("fsync", f"{tmp_path}/store/x")]


def test_scratch_goes_away_also_after_an_error(store: Storage) -> None:
    with pytest.raises(ZeroDivisionError), store.scratch() as folder:
        _ = (folder / "half").write_bytes(b"x") / 0
    assert not folder.exists()


def test_a_put_of_nothing_is_refused(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: not a file, cannot be put as 'a'"):
        store.put(tmp_path / "gone", "a")


def test_only_scratch_of_dead_processes_of_this_host_is_cleaned(tmp_path: Path) -> None:
    store = Storage(uri=str(tmp_path))
    code = (
        "import os, sys; from featurestore.storage import Storage\n"
        "with Storage(uri=sys.argv[1]).scratch() as f:\n"
        "    (f / 'x').write_bytes(b'x'); print(f, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    leftover = Path(killed.stdout.strip())
    elsewhere = tmp_path / ".tmp" / f"braid-{socket.gethostname()}x-999999999-a"
    elsewhere.mkdir()
    with store.scratch() as mine:
        assert leftover.exists()
        assert store.clean_scratch() == 1
        assert not leftover.exists()
        assert mine.exists()
        assert elsewhere.exists()
    assert store.list() == {}


def test_a_store_that_is_not_there_has_nothing_to_clean(tmp_path: Path) -> None:
    assert Storage(uri=str(tmp_path / "none")).clean_scratch() == 0
    assert not (tmp_path / "none").exists()


def test_a_local_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Storage.of("./s/../t/")
    assert store.uri == str(tmp_path / "t")
    assert Storage.of(tmp_path / "t") == store == Storage.of(store) == Storage.of(f"file://{tmp_path}/t")
    assert store.local_path("a/b") == tmp_path / "t/a/b"


def test_json_gives_the_same_storage_and_no_secrets(bucket: Storage) -> None:
    assert Storage.from_json(bucket.to_json()) == bucket
    assert set(json.loads(bucket.to_json())) == {"uri", "endpoint", "region", "allow_http"}
    for text in ("", "[]", '{"uri": 1}', '{"uri": "/a", "key": "AKIA"}'):
        with pytest.raises(InputError, match=r"not a Storage in JSON|store: "):
            Storage.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "s3://b", "endpoint_url": "https://x"}, "endpoint_url"),
        ({"uri": "s3://b", "key": "AKIA"}, "key"),
        ({"uri": ""}, "not a store's address"),
        ({"uri": "/a%20b"}, "no % with two hex digits"),
        ({"uri": "/a[1]"}, "no brackets"),
        ({"uri": "/a\n"}, "no control characters"),
        ({"uri": "s3://"}, "not a store's address"),
        ({"uri": "s3://key:secret@b/c"}, "credentials belong in a profile"),
        ({"uri": "s3://b/../c"}, "not a store's address"),
        ({"uri": "https://b/c"}, "not a store's address"),
        ({"uri": "/a", "region": "x"}, "region: not for '/a'"),
        ({"uri": "gs://b", "profile": "x"}, "profile: not for 'gs://b'"),
        ({"uri": "s3://b", "endpoint": "http://x"}, "set allow_http: true"),
        ({"uri": "s3://b", "endpoint": "https://u:p@x"}, "no credentials"),
        ({"uri": "s3://b", "profile": "x", "anonymous": True}, "exclude each other"),
        ({"uri": "s3://b", "allow_http": "yes"}, "valid boolean"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Storage(**options)
    with pytest.raises(InputError, match=message):
        Storage.from_json(json.dumps(options))


@given(uri=st.text(max_size=40) | st.text(max_size=20).map(lambda t: "s3://" + t))
def test_any_text_is_an_address_or_an_input_error(uri: str) -> None:
    try:
        store = Storage.of(uri)
    except InputError:
        return
    assert Storage.from_json(store.to_json()) == store


def test_deltalake_and_fsspec_read_what_each_other_wrote(store: Storage) -> None:
    uri, options = store.delta_uri("catalog")
    write_deltalake(uri, pa.table({"a": [1, 2]}), storage_options=options)
    write_deltalake(uri, pa.table({"a": [3]}), mode="append", storage_options=options)
    assert sorted(DeltaTable(uri, storage_options=options).to_pyarrow_table()["a"].to_pylist()) == [1, 2, 3]
    keys = store.list("catalog")
    assert {
        "catalog/_delta_log/00000000000000000000.json",
        "catalog/_delta_log/00000000000000000001.json",
    } <= set(keys)
    assert b"commitInfo" in store.read("catalog/_delta_log/00000000000000000001.json")
    store.delete("catalog/_delta_log/00000000000000000001.json")
    assert DeltaTable(uri, storage_options=options).version() == 0


def test_odd_local_folders_are_the_same_for_both_clients(tmp_path: Path) -> None:
    store = Storage(uri=str(tmp_path / "a b%c#d é?*{}"))
    uri, options = store.delta_uri("catalog")
    write_deltalake(uri, pa.table({"a": [1]}), storage_options=options)
    assert "catalog/_delta_log/00000000000000000000.json" in store.list()
    assert DeltaTable(uri, storage_options=options).version() == 0


def test_a_missing_bucket_is_an_error_and_not_an_empty_store(bucket: Storage, tmp_path: Path) -> None:
    store = bucket.model_copy(update={"uri": "s3://typo/stores"})
    (tmp_path / "x").write_bytes(b"x")
    for act in (lambda: store.list("a"), lambda: store.put(tmp_path / "x", "a"), lambda: store.read("a")):
        with pytest.raises(StoreError, match=r"there is no bucket 'typo'; make it or correct store\.uri"):
            act()


def test_a_store_that_does_not_answer_is_a_store_error(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        store = bucket.model_copy(update={"endpoint": f"http://127.0.0.1:{held.getsockname()[1]}"})
        with pytest.raises(StoreError, match=r"cannot look up: .*check the store's uri, endpoint"):
            store.size("a")


def test_a_store_without_credentials_says_what_to_give_on_one_line(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients, each with a text of its own: fsspec's for data, deltalake's (several lines in colour) for the catalog."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = Storage(uri="s3://closed/store", region=REGION)
    catalog = Catalog(store)
    for act in (lambda: store.read("a"), lambda: store.list(), catalog.exists, catalog.snapshot, catalog.create):
        with pytest.raises(StoreError, match=r"^s3://closed/store.*: no credentials for it are found here; ") as caught:
            act()
        assert re.search(r"store\.profile, .*AWS_ACCESS_KEY_ID and .*, or .*anonymous: true", str(caught.value))
        assert str(caught.value).isprintable()


def test_what_a_client_says_is_one_line() -> None:
    error = OSError("Kernel error -> refused\n   \x1b[31m↳\x1b[0m no answer:\n    \x1b[31m↳\x1b[0m from 1.2.3.4\n")
    said = Storage(uri="s3://a/b").client_says(error)
    assert said.startswith("OSError: Kernel error -> refused: no answer: from 1.2.3.4; check the store's uri, endpoint")
    said = Storage(uri="gs://a/b").client_says(OSError("Generic GCS error: Error performing token request"))
    login = "sign in with `gcloud auth application-default login`"
    assert re.search(rf"^no credentials .*; {login}, set GOOGLE_APPLICATION_CREDENTIALS in .*anonymous: true", said)
    assert (
        Storage(uri="/a").client_says(OSError(28, "No space left")).endswith("check the path, its rights and the disk")
    )


def test_missing_rights_are_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match=r"a: not allowed to write \(.*Permission denied.*check the rights"):
        put_bytes(Storage(uri=str(tmp_path)), "a", b"x")


def test_a_file_where_a_folder_should_be_is_a_store_error(tmp_path: Path) -> None:
    store = Storage(uri=str(tmp_path))
    put_bytes(store, "a", b"x")
    with pytest.raises(StoreError, match=r"a/b: cannot write: .*Error"):
        put_bytes(store, "a/b", b"x")


class _Signed(BaseHTTPRequestHandler):
    """An S3 that has nothing and remembers who asked."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", "unsigned"))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def ears(endpoint: str) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Ears", (_Signed,), {"seen": seen}))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def ask_with_both(store: Storage, seen: list[str]) -> tuple[set[str], set[str]]:
    assert not store.exists("a")
    by_fsspec = set(seen)
    seen.clear()
    uri, options = store.delta_uri("catalog")
    # Not is_deltatable: it holds Python's lock while it waits for an answer of this very process.
    with pytest.raises(OSError, match="404 Not Found"):
        DeltaTable(uri, storage_options=options)
    return by_fsspec, set(seen)


def test_both_clients_sign_with_the_profile_and_its_region(
    ears: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile p]\naws_access_key_id = OFPROFILE\naws_secret_access_key = s\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    store = Storage(uri="s3://shelf/a", endpoint=ears[0], allow_http=True, profile="p")
    for signatures in ask_with_both(store, ears[1]):
        assert signatures
        assert all("Credential=OFPROFILE/" in s and "/eu-north-1/s3/" in s for s in signatures), signatures


def test_both_clients_take_keys_and_region_of_the_environment(
    ears: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    store = Storage(uri="s3://shelf/a", endpoint=ears[0], allow_http=True)
    for signatures in ask_with_both(store, ears[1]):
        assert signatures
        assert all("Credential=testing/" in s and "/eu-west-3/s3/" in s for s in signatures), signatures


def test_anonymous_clients_sign_nothing(ears: tuple[str, list[str]]) -> None:
    store = Storage(uri="s3://shelf/a", endpoint=ears[0], allow_http=True, anonymous=True)
    assert ask_with_both(store, ears[1]) == ({"unsigned"}, {"unsigned"})


def test_a_profile_that_is_not_there_is_named(endpoint: str) -> None:
    store = Storage(uri="s3://shelf/a", profile="nobody")
    with pytest.raises(BraidError, match=r"nobody"):
        store.delta_uri("catalog")
    with pytest.raises(BraidError, match=r"nobody"):
        store.exists("a")


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"needs s3fs, not installed here: pip install 'braid\[read\]'"):
        _ = Storage(uri="s3://nobody-has-this").fs


def test_the_import_is_light() -> None:
    code = (
        "import sys; import featurestore.storage\n"
        "print([m for m in ('fsspec', 's3fs', 'torch', 'deltalake', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_forked_worker_gets_a_client_of_its_own(bucket: Storage) -> None:
    store = bucket.model_copy(update={"uri": "s3://shelf/forked"})
    put_bytes(store, "a", b"x")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if list(store.list()) == ["a"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
