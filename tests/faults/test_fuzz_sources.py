"""Damaged and hostile source files: a run ends, with every value stored or in quarantine, or with one clear error before it.

Some files of each kind in the suite, 10,000 of each in `make soak` (recordings share them); the same ones each time. What
Python opens is watched: nothing is read but the corpus, the store, and what the interpreter has of its own (FFmpeg opens files
by itself, and is given none by name).
"""

import csv
import faulthandler
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from featurestore import files
from featurestore.catalog import Snapshot
from featurestore.corpora import MISSES
from featurestore.errors import InputError
from featurestore.identity import ids_sha256, input_digest
from featurestore.storage import Storage
from pipelines.ingest import Known, scan
from pipelines.shard_writer import ShardWriter
from pipelines.sources import open_source
from pipelines.synchronize import recording as recording_windows
from tests.pipelines.tars import tar_of
from tests.recordings import beeps, frame_times, sensor_csv, video, write_sound

CASE_LIMIT_S = 10
HANG_S = 120
SAMPLES = 12
NOTHING = Known(Snapshot(Storage.of("/nowhere"), [], -1), "fuzzed")

TOKENS = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[" * 3000,
        b"'",
        b",",
        b";",
        b"\t",
    ),
    *(
        b"null",
        b"NaN",
        b"-1e999",
        b"1" * 400,
        b"\\ud800",
        b"\\u0000",
        b'"id"',
        b"../",
        b"/",
        b"..",
        b"%2e",
        b"*",
        b"{00..99}",
    ),
    *(
        b"\x80",
        "é".encode(),
        "\u202e".encode(),
        b"00:00:00,000 --> 99:99:99,999",
        b"WEBVTT",
        b"ustar",
        b"PAR1",
        b"=cmd|'",
    ),
)
ODD = (
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, 2**63, "", " ", "\x00", "a\x00b", "\ud800", "\u202e"),
    *(
        [],
        {},
        [[]],
        {"bytes": None},
        "x" * 500,
        "é" * 300,
        "..",
        ".",
        "/",
        "//",
        "../m.jsonl",
        "images",
        "images/",
        "~",
        "~root",
    ),
    *(
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "/nowhere",
        "/etc/hostname",
        "file:///etc/hostname",
        "../../../../../../etc/hostname",
        "notes/link.txt",
        "file:///dev/null",
        "file://",
        "://",
        "ftp://x/y",
        "http://[",
    ),
    *(
        "http://127.0.0.1:1/x",
        "data:,x",
        "memory://x",
        "a::b",
        "file://a::file://b",
        "*.png",
        "[",
        "{",
        "{a,b}",
        "{0..9}",
        "x?y",
    ),
    *("2026-13-45", "0001-01-01", "9999-12-31T23:59:59+14:00", "2026-01-01T00:00:00+99:99", "con", "a" * 4096),
)


def write_corpus(folder: Path) -> None:
    """Three images, three sounds and three notes, each of another kind."""
    for name in ("images", "sounds", "notes"):
        (folder / name).mkdir(parents=True)
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for number, kind in enumerate(("png", "jpeg", "gif")):
        picture.save(folder / f"images/{number}.{kind}")
    for number, kind in enumerate(("wav", "flac", "ogg")):
        soundfile.write(folder / f"sounds/{number}.{kind}", np.sin(np.arange(800) / 9), 8000)
    for number, text in enumerate(("a note", "", "é" * 50)):
        (folder / f"notes/{number}.txt").write_text(text, "utf-8")
    (folder / "notes/link.txt").symlink_to("/etc/hostname")


def good_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"s/{n}", "group": f"g{n % 3}", "added": f"2026-01-{n + 1:02}", "label": ("a", "b")[n % 2], "size": n,
            "image": f"images/{n % 3}.{('png', 'jpeg', 'gif')[n % 3]}",
            "sound": f"sounds/{n % 3}.{('wav', 'flac', 'ogg')[n % 3]}",
            "caption": f"caption of {n}", "note": f"notes/{n % 3}.txt",
        }
        for n in range(SAMPLES)
    ]  # fmt: skip


FIELDS = {
    "image": {"modality": "image", "from": "image", "read": "file"},
    "sound": {"modality": "audio", "from": "sound", "read": "file"},
    "caption": {"modality": "text", "from": "caption", "read": "inline"},
    "note": {"modality": "text", "from": "note", "read": "file"},
}
COLUMNS = {"id": "id", "group": "group", "event_timestamp": "added"}


class Kind(NamedTuple):
    """A kind of source file: what a good one holds, its name, and how often it is damaged in the suite.

    And of the spec: the source's type, its fields where they are others, its path where another file names this one.
    """

    content: Callable[[Path], bytes]
    name: str
    type: str
    number: int
    fields: dict[str, Any] = FIELDS
    path: str = ""
    columns: dict[str, str] = COLUMNS


def settings_of(kind: Kind, corpus: Path) -> dict[str, Any]:
    """The corpus part of a spec; no field has a view, so that all values are decoded."""
    return {
        "name": "fuzzed", "fields": kind.fields, "shard_rows": 100, "shard_mb": 64, "failure_budget": 1.0,
        "source": {"type": kind.type, "path": [str(corpus / (kind.path or kind.name))], "windows": WINDOWS},
        "columns": kind.columns, "unviewed": sorted(kind.fields),
    }  # fmt: skip


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    made = io.StringIO()
    writer = csv.DictWriter(made, sorted(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), made, row_group_size=5)
    return made.getvalue()


def cells(corpus: Path) -> bytes:
    """Of each fourth row the image is another file's."""
    rows = good_rows()
    for number, row in enumerate(rows):
        raw = (corpus / row["image"]).read_bytes()
        row["image"] = {"bytes": raw, "path": None} if number % 4 else {"bytes": None, "path": row["image"]}
        row["sound"] = (corpus / row["sound"]).read_bytes()
    return parquet_of(rows)


def tar(corpus: Path) -> bytes:
    members: list[tuple[str, bytes]] = []
    for row in good_rows():
        kept = {name: row[name] for name in ("group", "added", "label", "size", "caption")}
        members.append((f"{row['id']}.json", json.dumps(kept).encode()))
        for field in ("image", "sound", "note"):
            members.append((f"{row['id']}.{row[field].rpartition('.')[2]}", (corpus / row[field]).read_bytes()))
    return tar_of(members)


TAR_FIELDS = {
    "image": {"modality": "image", "from": ["png", "jpeg", "gif"], "read": None},
    "sound": {"modality": "audio", "from": ["wav", "flac", "ogg"], "read": None},
    "caption": {"modality": "text", "from": "json.caption", "read": None},
    "note": {"modality": "text", "from": "txt", "read": None},
}
CELL_FIELDS = FIELDS | {name: FIELDS[name] | {"read": "inline"} for name in ("image", "sound")}


def recording(field: str, name: str, write: Callable[[Path], Any], number: int) -> Kind:
    """A file of a recording whose other files are whole."""

    def content(corpus: Path) -> bytes:
        write(corpus / name)
        rows = [{"id": f"r{n}", **STREAMS, field: name} for n in range(2)]
        (corpus / f"{name}.jsonl").write_bytes(jsonl(rows))
        for other, path in STREAMS.items():
            if not (corpus / path).exists():
                WHOLE[other](corpus / path)
        return (corpus / name).read_bytes()

    return Kind(content, name, "streams", number, STREAM_FIELDS, f"{name}.jsonl", {"id": "id"})


def sensor(path: Path) -> None:
    times = np.arange(0, 2, 0.02)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"time": times, "x": np.sin(times)}), path)
    else:
        sensor_csv(path, times, np.sin(times)[:, None], "time,x")


SRT = "".join(f"{n + 1}\n00:00:0{n},000 --> 00:00:0{n},800\ncue {n}\n\n" for n in range(3))
STREAMS = {"frame": "whole.mkv", "sound": "whole.wav", "words": "whole.srt", "motion": "whole.csv"}
WHOLE: dict[str, Callable[[Path], Any]] = {
    "frame": lambda path: video(path, frame_times(1), codec="mpeg4", sound=True),
    "sound": lambda path: write_sound(path, beeps(2)),
    "words": lambda path: path.write_text(SRT),
    "motion": sensor,
}
STREAM_FIELDS = {
    name: {"modality": modality, "from": name, "read": None, "policy": policy, "tolerance": tolerance}
    for name, modality, policy, tolerance in (
        ("frame", "image", "nearest", 50_000_000),
        ("sound", "audio", "window", None),
        ("words", "text", "overlap", None),
        ("motion", "sensor", "window", None),
    )
}
WINDOWS = {"every": 500_000_000, "length": 500_000_000, "per": None}
KINDS = {
    "jsonl": Kind(lambda _: jsonl(good_rows()), "m.jsonl", "manifest", 30),
    "csv": Kind(lambda _: csv_of(good_rows()), "m.csv", "manifest", 20),
    "parquet": Kind(lambda _: parquet_of(good_rows()), "m.parquet", "manifest", 20),
    "cells": Kind(cells, "cells.parquet", "parquet", 20, CELL_FIELDS),
    "tar": Kind(tar, "all.tar", "webdataset", 20, TAR_FIELDS),
    "mp4": recording("frame", "v.mp4", WHOLE["frame"], 5),
    "mkv": recording("frame", "v.mkv", WHOLE["frame"], 5),
    "wav": recording("sound", "s.wav", WHOLE["sound"], 5),
    "srt": recording("words", "s.srt", WHOLE["words"], 5),
    "vtt": recording("words", "s.vtt", lambda path: path.write_text("WEBVTT\n\n" + SRT.replace(",", ".")), 5),
    "sensor csv": recording("motion", "s.csv", sensor, 5),
    "sensor parquet": recording("motion", "s.parquet", sensor, 5),
}
ROWS = ("jsonl", "csv", "parquet", "cells", "tar")
"""Of these a whole file gives SAMPLES samples."""


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut, repeated in parts, overwritten, spliced or filled with what readers stumble over."""
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, 1 << 20)) % (len(content) + 1)
        size = draw(st.sampled_from((1, 1, 2, 4, 16, 100, 512, 1 << 20)))
        head, middle, tail = content[:at], content[at : at + size], content[at + size :]
        how = draw(st.sampled_from(("flip", "cut", "repeat", "insert", "overwrite", "move", "end")))
        if how == "flip":
            middle = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in middle[:1]) + middle[1:]
        elif how == "cut":
            middle = b""
        elif how == "repeat":
            middle = middle[:5000] * draw(st.integers(2, 5))
        elif how in ("insert", "overwrite"):
            token = draw(st.sampled_from(TOKENS) | st.binary(max_size=8))
            middle = token + middle if how == "insert" else token
        elif how == "move":
            head, tail = head + tail[:size], tail[size:]
        else:
            tail = b""
        content = head + middle + tail
    return content


ODD_CELLS = tuple(value for value in ODD if isinstance(value, str) and "\ud800" not in value)


@st.composite
def odd_cells(draw: st.DrawFn, write: Callable[[list[dict[str, Any]]], bytes]) -> bytes:
    """Rows of texts that nobody expects."""
    rows = [{name: str(value) for name, value in row.items()} for row in good_rows()]
    for _ in range(draw(st.integers(1, 8))):
        draw(st.sampled_from(rows))[draw(st.sampled_from(sorted(rows[0])))] = draw(st.sampled_from(ODD_CELLS))
    return write(rows)


@st.composite
def odd_rows(draw: st.DrawFn) -> bytes:
    """Rows that are JSON and hold what nobody expects."""
    rows = good_rows()
    for _ in range(draw(st.integers(1, 8))):
        row = draw(st.sampled_from(rows))
        row[draw(st.sampled_from(sorted(rows[0])) | st.sampled_from(("", "embedding", "\ud800")))] = draw(
            st.sampled_from(ODD)
        )
    return jsonl(rows)


class Damaged:
    """A file's content, too long to be shown; where it fails, the file is there to look at."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __repr__(self) -> str:
        return f"{len(self.content)} bytes, sha256 {hashlib.sha256(self.content).hexdigest()[:8]}"


class Case(NamedTuple):
    """What became of one file: the error it was refused with, or what became of its values."""

    told: str
    values: Counter[str]


def run(corpus: dict[str, Any], folder: Path) -> Case:
    """Plans and writes the shard that a source makes, and holds the outcome against what was there."""
    storage = Storage.of(folder / "store")
    try:
        scan(open_source(corpus), NOTHING)
        references = sorted(open_source(corpus).references(), key=lambda reference: reference.id)
    except InputError as error:
        check_clear(str(error), corpus["source"]["path"][0])
        return Case(str(error), Counter())
    ids = [reference.id for reference in references]
    try:
        ShardWriter(storage, corpus)._make(SimpleNamespace(key="all"), references, ids_sha256(ids))  # type: ignore[arg-type]
    except InputError as error:
        # Planning reads no columns of bytes: that a page of one is broken a worker sees first.
        assert corpus["source"]["type"] == "parquet"
        check_clear(str(error), corpus["source"]["path"][0])
        return Case(str(error), Counter())
    return Case("", stored(folder / "store", ids, sorted(corpus["fields"])))


def check_clear(told: str, path: str) -> None:
    """Fails where an error does not name the file, or the recording, or cannot be shown."""
    assert path in told or "recording 'r" in told
    assert len(told) < 1500
    told.encode()


def stored(store: Path, ids: list[str], fields: list[str]) -> Counter[str]:
    """Fails where a value is neither stored, nor absent, nor in quarantine, or stored otherwise than its row says."""
    (table,), (tar,) = store.glob("corpora/fuzzed/all-*.parquet"), list(store.glob("corpora/fuzzed/all-*.tar"))
    rows = pq.read_table(table, columns=["id", *fields]).to_pylist()
    assert [row["id"] for row in rows] == ids
    rejected = [row for path in store.glob("quarantine/**/*.parquet") for row in pq.read_table(path).to_pylist()]
    quarantined = {(row["id"], row["field"]): row["reason"] for row in rejected}
    assert len(quarantined) == len(rejected)
    content = tar.read_bytes()
    values: Counter[str] = Counter()
    for row in rows:
        for field in fields:
            member = row[field]
            if member["present"]:
                raw = content[member["offset"] : member["offset"] + member["size"]]
                assert input_digest(raw) == member["digest"]
                values["present"] += 1
            elif (row["id"], field) in quarantined:
                assert quarantined.pop((row["id"], field)) == member["miss_reason"]
                values["quarantined"] += 1
            else:
                assert member["miss_reason"] in MISSES
                values["absent"] += 1
    assert not quarantined
    with tarfile.open(tar) as members:
        assert len(members.getmembers()) == values["present"]
    assert values.total() == len(ids) * len(fields)
    return values


OWN = tuple(
    {f"{os.path.realpath(each)}/" for each in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}
    | {
        "/usr/lib/",
        "/usr/local/lib/",
        "/usr/share/zoneinfo/",
        "/lib/",
        "/proc/self/status",
        "/proc/cpuinfo",
        "/proc/meminfo",
    }
)
"""What the interpreter and its packages may read of their own, whenever they are imported."""


class _Watch:
    """Audit hook: what is written and read where that is not allowed, while it is on; a hook cannot be taken away again."""

    def __init__(self) -> None:
        self.within, self.corpus = "", ""
        self.outside: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.within or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
            return
        if event == "os.remove" and args[1] != -1:
            # A name in a folder that is open: of one that is taken away with all that is in it.
            return
        allowed = (self.within, "/dev/null", "/dev/urandom")
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            allowed = (*allowed, self.corpus, *OWN)
        for path in args[:2] if event in ("os.rename", "os.symlink", "os.link") else args[:1]:
            if isinstance(path, str | bytes | os.PathLike):
                # Where it leads: what is opened by a link is what the link is to.
                real = os.path.realpath(os.fsdecode(path))
                if not real.startswith(allowed):
                    self.outside.append(f"{event} {os.fsdecode(path)}")


@pytest.fixture(scope="module")
def watch() -> _Watch:
    made = _Watch()
    sys.addaudithook(made)
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    write_corpus(folder)
    return folder


@contextmanager
def guarded(watch: _Watch, corpus: Path) -> Iterator[Path]:
    """A folder of its own that all is written in; ends the process where nothing comes to an end."""
    watch.outside = []
    with tempfile.TemporaryDirectory(prefix="braid-fuzz-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PAUSES_S", ())
        # A cue may be damaged so that it lasts for days.
        patch.setattr(recording_windows, "MAX_WINDOWS", 1_000)
        patch.setattr(tempfile, "tempdir", folder)
        # Not to where pytest may have put a buffer.
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
        watch.corpus, watch.within, begun = f"{corpus}/", os.path.realpath(folder), time.monotonic()
        try:
            yield Path(folder)
        finally:
            watch.within = ""
            faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - begun < CASE_LIMIT_S
        assert watch.outside == []


def fuzz(kind: Kind, contents: st.SearchStrategy[bytes], number: int, corpus: Path, watch: _Watch) -> Counter[str]:
    """Runs so many files of a kind; counts those refused, and the values of those that were not."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(contents.map(Damaged))
    def each(damaged: Damaged) -> None:
        (corpus / kind.name).write_bytes(damaged.content)
        with guarded(watch, corpus) as folder:
            case = run(settings_of(kind, corpus), folder)
        seen.update(case.values, refused=bool(case.told), files=1)

    each()
    return seen


def contents_of(kind: str, corpus: Path) -> st.SearchStrategy[bytes]:
    whole = KINDS[kind].content(corpus)
    harmed: st.SearchStrategy[bytes] = st.composite(damaged)(whole)
    odd = {"jsonl": odd_rows(), "csv": odd_cells(csv_of), "parquet": odd_cells(parquet_of)}
    return harmed | odd[kind] if kind in odd else harmed


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_file_comes_in_whole(kind: str, corpus: Path, watch: _Watch) -> None:
    (corpus / KINDS[kind].name).write_bytes(KINDS[kind].content(corpus))
    with guarded(watch, corpus) as folder:
        case = run(settings_of(KINDS[kind], corpus), folder)
    if kind in ROWS:
        assert case == Case("", Counter(present=SAMPLES * 4 - SAMPLES // 3, quarantined=SAMPLES // 3))
    else:
        assert not case.told
        assert case.values["present"] >= 20
        assert case.values["quarantined"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_values_stored_or_rejected_or_in_one_error(
    kind: str, corpus: Path, watch: _Watch
) -> None:
    number = KINDS[kind].number
    seen = fuzz(KINDS[kind], contents_of(kind, corpus), number, corpus, watch)
    assert seen["files"] >= 0.7 * number
    assert seen["present"] > 10
    assert seen["refused"] + seen["quarantined"] + seen["absent"] > 0
    if kind in ROWS:
        assert 0 < seen["refused"] < seen["files"]


@pytest.mark.parametrize("path", ["/etc/hostname", "notes/link.txt"])
def test_a_read_outside_of_the_corpus_would_be_seen(path: str, corpus: Path, watch: _Watch) -> None:
    with guarded(watch, corpus):
        (corpus / "notes/0.txt").read_bytes()
    with pytest.raises(AssertionError), guarded(watch, corpus):
        (corpus / path).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_10_000_damaged_files(kind: str, corpus: Path, watch: _Watch, capsys: pytest.CaptureFixture[str]) -> None:
    number = 10_000 if kind in ROWS else 10_000 // (len(KINDS) - len(ROWS)) + 1
    seen = fuzz(KINDS[kind], contents_of(kind, corpus), number, corpus, watch)
    assert seen["files"] >= 0.9 * number
    with capsys.disabled():
        print(f"\n{kind}: {dict(seen)}")
