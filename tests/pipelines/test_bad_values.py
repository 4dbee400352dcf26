"""Values that are not there, or not what they seem: each ends in quarantine, and costs no more than it may."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from featurestore.storage import Storage
from featurestore.store import FeatureStore
from jobs.report import field_counts, rejected
from tests import videos
from tests.faults.stores import shard_corpus

MAX_MORE_MB = 200
"""The smallest of the images that are too large would be 243 MB."""


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *before: bytes) -> bytes:
    """A PNG of zeros, a thousandth of its pixels' size."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + 3 * width)) for _ in range(height)) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    """A GIF whose screen is large and whose first frame is not."""
    out = io.BytesIO()
    Image.new("P", (2, 2)).save(out, "GIF")
    raw = bytearray(out.getvalue())
    raw[6:10] = struct.pack("<HH", width, height)
    return bytes(raw)


def tiff(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "TIFF", compression="group4")
    return out.getvalue()


def bombs() -> dict[str, tuple[bytes, str]]:
    """Name -> an image of few bytes, and the reason that it is rejected for."""
    zeros = b"a\0\0" + zlib.compress(bytes(50 << 20), 9)
    huge = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    return {
        "png": (png(9_000, 9_000), "too_large"),
        "png-header": (png(1, 1).replace(struct.pack(">II", 1, 1), huge), "too_large"),
        "png-text": (png(4, 4, chunk(b"zTXt", zeros)), "decode_error"),
        "png-profile": (png(4, 4, chunk(b"iCCP", zeros)), "decode_error"),
        "gif": (gif(65_535, 65_535), "too_large"),
        "tiff": (tiff(9_000, 9_000), "too_large"),
    }


def settings(folder: Path, modality: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A corpus of one field that no view encodes: its values are decoded when they are sharded."""
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "bad", "source": {"type": "manifest", "path": [f"{folder}/m.jsonl"]}, "shard_rows": 100, "shard_mb": 64,
        "columns": {"id": "id", "group": None}, "fields": {"it": {"modality": modality, "from": "it", "read": "file"}},
        "failure_budget": 1.0, "unviewed": ["it"],
    }  # fmt: skip


def reasons(store: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in rejected(FeatureStore(store), "bad")}


def test_a_bomb_of_an_image_is_rejected_in_little_memory(tmp_path: Path) -> None:
    made = bombs()
    for name, (raw, _) in made.items():
        assert len(raw) < 2 << 20, name
        (tmp_path / name).write_bytes(raw)
    corpus = settings(tmp_path, "image", [{"id": name, "it": name} for name in made])
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    command = [sys.executable, "-m", "tests.pipelines.test_bad_values", str(tmp_path)]
    grown_mb = float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
    assert reasons(tmp_path / "store") == {name: reason for name, (_, reason) in made.items()}
    assert grown_mb < MAX_MORE_MB


def test_videos_that_no_view_encodes_are_tried_one_by_one_when_they_are_sharded(tmp_path: Path) -> None:
    whole = videos.video([0, 40, 80], "mkv")
    bad = {
        "cut.mkv": (whole[:-1], "decode_error"),
        "empty.mp4": (b"", "empty"),
        "picture.mp4": (png(4, 4), "unsupported_format"),
        "sound.mp4": (videos.sound(), "no_stream"),
    }
    for name, raw in {"whole.mkv": whole, **{name: raw for name, (raw, _) in bad.items()}}.items():
        (tmp_path / name).write_bytes(raw)
    corpus = settings(tmp_path, "video", [{"id": name, "it": name} for name in ("whole.mkv", *bad)])
    shard_corpus(Storage.of(tmp_path / "store"), corpus)
    assert reasons(tmp_path / "store") == {name: reason for name, (_, reason) in bad.items()}
    (member,) = (tmp_path / "store" / "corpora" / "bad").glob("*.tar")
    assert b"whole%2Emkv.it.mkv" in member.read_bytes()


def test_paths_that_name_nothing_that_can_be_read_are_rejected_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    paths = (
        "missing.txt",
        "folder",
        "dangling",
        "round",
        "good.txt/x",
        "x" * 300,
        "a\0b",
        "ftp://host/x",
        "file://",
        "",
    )
    rows = [{"id": f"{n}", "it": path} for n, path in enumerate(paths)]
    corpus = settings(tmp_path, "text", [*rows, {"id": "good", "it": "good.txt"}, {"id": "none"}])
    shard_corpus(Storage.of(tmp_path / "store"), corpus)
    told = {f"{n}": "outside" if path == "file://" else "unreadable" for n, path in enumerate(paths) if path}
    assert reasons(tmp_path / "store") == told
    counts = {"present": 1, "missing": 2, "quarantined": len(paths) - 1}
    assert field_counts(FeatureStore(tmp_path / "store"), "bad")["it"] == counts
    for row in rejected(FeatureStore(tmp_path / "store"), "bad"):
        assert str(tmp_path) not in row["detail"]


if __name__ == "__main__":

    def peak_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

    before = peak_mb()
    shard_corpus(Storage.of(Path(sys.argv[1]) / "store"), json.loads((Path(sys.argv[1]) / "corpus.json").read_text()))
    print(peak_mb() - before)
