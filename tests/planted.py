"""A planted corpus: images, tones and captions drawn from a known latent, so that the right answer is known.

Each group has a class (shape, hue, timbre) and a latent (space, size) in [0, 1]^2, which the tone's loudness and
height follow too; its samples are near-duplicates of each other. `truth.json` beside the manifest holds all of it.
Same arguments, same bytes and same file times, on any day.
"""

import colorsys
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["CLASSES", "ODD_IDS", "SHARD_ROWS", "plant_bad_values", "planted_spec", "write_planted"]

SHARD_ROWS = 8
"""160 samples fill 20 shards."""

SIDE = 64  # pixels
SAMPLE_RATE = 8000
FILE_TIME_S = 1_700_000_000  # what every file's time of change is set to
CLASSES = {"circle": 0.0, "square": 0.14, "triangle": 0.33, "cross": 0.6, "ring": 0.8}  # hue of each shape
COLOURS = dict(zip(CLASSES, ("red", "yellow", "green", "blue", "purple"), strict=True))
SIZES = ("tiny", "small", "middling", "large", "huge")
PAPERS = ("hatched", "lined", "striped", "barred", "open")  # by the space between its lines

ODD_IDS = (
    "odd/clip_00.37",
    "odd/clip_00.42",  # WebDataset merges it with the one above when they reach a tar as they are
    "odd/Case",
    "odd/case",
    "v1.5/dots.in.the.folder",
    "100%/50%25",
    "tab\there",
)
"""Ids that need care in a tar; `plant_bad_values` adds a good sample for each."""

Row = dict[str, Any]


def write_planted(folder: Path, n: int = 160, seed: int = 0, bad: bool = False) -> Path:
    """Writes `n` samples into `folder`: `manifest.jsonl`, `truth.json` and media; with `bad`, bad values too.

    Every 4th sample has no sound, every 16th no caption, every 32nd no image, each at places of its own; every
    8th has a note in a text file. Returns the manifest's path.
    """
    planter = _Planter(folder, np.random.default_rng(seed))
    while len(planter.rows) < n:
        planter.add_group(min(int(planter.rng.integers(1, 5)), n - len(planter.rows)))
    planter.write()
    if bad:
        plant_bad_values(folder, planter.manifest)
    return planter.manifest


def plant_bad_values(folder: Path, manifest: Path) -> dict[tuple[str, str], str]:
    """Spoils one value in each of ten samples of a written corpus; adds a good sample for each of `ODD_IDS`.

    Returns:
        (id, field) -> the reason that quarantine must give.
    """
    planter = _Planter(folder, np.random.default_rng(1))
    planter.rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    planter.truth = json.loads((folder / "truth.json").read_text("utf-8"))
    expected: dict[tuple[str, str], str] = {}
    spoiled: set[str] = set()
    for column, ending, reason, spoil in _BAD_FILES:
        row = _next_row(planter.rows, spoiled, column, ending)
        path = folder / row[column]
        bad = spoil(path.read_bytes())
        path.unlink() if bad is None else _write(path, bad)
        expected[row["id"], column.removesuffix("_path")] = reason
    row = _next_row(planter.rows, spoiled, "caption", ".")
    row["caption"] = INVALID_TEXT.decode("utf-8", "surrogateescape")
    expected[row["id"], "caption"] = "invalid_utf8"
    for sample_id in ODD_IDS:
        planter.add_group(1, sample_id)
    planter.write()
    return expected


def planted_spec(
    folder: Path,
    store: Path | str,
    *,
    image: str = "efficientnet-lite0",
    caption: str = "minilm-l6",
    failure_budget: str = "1%",
) -> str:
    """The YAML text of a spec over the corpus in `folder`. With bad values, the budget must be wider."""
    return f"""\
version: 1
store: {{uri: {json.dumps(str(store))}}}
corpus:
  name: planted
  source: {{type: manifest, path: {json.dumps(str(folder / "manifest.jsonl"))}}}
  columns: {{id: id, group: group, event_timestamp: added}}
  fields:
    image: {{modality: image, from: image_path}}
    caption: {{modality: text, from: caption}}
    note: {{modality: text, from: note_path, read: file}}
    sound: {{modality: audio, from: sound_path}}
  shard_rows: {SHARD_ROWS}
  failure_budget: {failure_budget}
views:
  image: {{field: image, encoder: {image}}}
  caption: {{field: caption, encoder: {caption}}}
  sound: {{field: sound, encoder: log-mel}}
spaces:
  seen: {{views: [image, caption], method: cca}}
  heard: {{views: [image, sound], method: cca}}
indexes:
  seen: {{space: seen, views: [image, caption]}}
  heard: {{space: heard, views: [image, sound]}}
training_sets:
  category: {{views: [image, caption, sound], label: label, splits: {{train: 0.8, val: 0.1, test: 0.1}}}}
"""


class _Planter:
    """Draws groups and renders their samples; one generator, so that the order of calls is the seed's."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder = folder
        self.manifest = folder / "manifest.jsonl"
        self.rng = rng
        self.rows: list[Row] = []
        self.truth: dict[str, Row] = {}

    def add_group(self, size: int, only_id: str | None = None) -> None:
        label = list(CLASSES)[int(self.rng.integers(len(CLASSES)))]
        centre = self.rng.random(2)
        day = 1 + len({row["group"] for row in self.rows})  # keeps the captions of two groups different
        group = only_id or f"{label}/{len(self.rows):04d}"
        for _ in range(size):
            index = len(self.rows)
            sample_id = only_id or f"{label}/{index:04d}"
            latent = np.clip(centre + self.rng.normal(0, 0.02, 2), 0, 1).round(6)
            values = self._values(index, label, latent, day)
            added = f"2026-{1 + index // 28 % 12:02d}-{1 + index % 28:02d}T12:00:00Z"
            self.rows.append({"id": sample_id, "group": group, "label": label, "added": added} | values)
            self.truth[sample_id] = {"label": label, "group": group, "latent": latent.tolist()}

    def _values(self, index: int, label: str, latent: NDArray[np.float64], day: int) -> Row:
        picture = "jpg" if index % 4 == 1 else "png"
        image = _image(label, latent, ("RGB", "RGB", "RGBA", "P")[index % 4], picture, self.rng)
        sound = "ogg" if index % 2 else "wav"
        tone = _tone(label, latent, sound)
        note = f"Planted as number {index}: ü, я, 字.\n"
        return {
            "image_path": None if index % 32 == 22 else self._put(f"images/{index:04d}.{picture}", image),
            "caption": None if index % 16 == 8 else _caption(label, latent, day),
            "sound_path": None if index % 4 == 3 else self._put(f"sounds/{index:04d}.{sound}", tone),
            "note_path": self._put(f"notes/{index:04d}.txt", note.encode()) if index % 8 == 2 else None,
        }

    def _put(self, name: str, content: bytes) -> str:
        _write(self.folder / name, content)
        return name

    def write(self) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        # A text that is not UTF-8 stands in its line with its own bytes.
        _write(self.manifest, "".join(lines).encode("utf-8", "surrogateescape"))
        _write(self.folder / "truth.json", json.dumps(self.truth, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (FILE_TIME_S, FILE_TIME_S))


def _caption(label: str, latent: NDArray[np.float64], day: int) -> str:
    space, size = (min(int(z * 5), 4) for z in latent)
    return f"A {SIZES[size]} {COLOURS[label]} {label} on {PAPERS[space]} paper, day {day}."


def _image(label: str, latent: NDArray[np.float64], mode: str, format: str, rng: np.random.Generator) -> bytes:
    space, size = (float(z) for z in latent)
    fill = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(CLASSES[label], 0.9, 0.8))
    paper = tuple(int(part) for part in rng.integers(240, 256, 3))
    image = Image.new("RGBA", (SIDE, SIDE), (*paper, 0 if mode == "RGBA" else 255))
    pen = ImageDraw.Draw(image)
    for at in np.arange(0, SIDE, 3 * 6**space):
        pen.rectangle((at, 0, at + 1, SIDE), (128, 128, 128))
    _draw(pen, label, 8 + 20 * size, fill)
    out = io.BytesIO()
    image.convert(mode).save(out, {"jpg": "JPEG", "png": "PNG"}[format])
    return out.getvalue()


def _draw(pen: ImageDraw.ImageDraw, label: str, radius: float, fill: tuple[int, ...]) -> None:
    centre, third = SIDE / 2, radius / 3
    low, high = centre - radius, centre + radius
    if label == "square":
        pen.rectangle((low, low, high, high), fill)
    elif label == "triangle":
        pen.polygon([(centre, low), (high, high), (low, high)], fill)
    elif label == "cross":
        pen.rectangle((low, centre - third, high, centre + third), fill)
        pen.rectangle((centre - third, low, centre + third, high), fill)
    elif label == "ring":
        pen.ellipse((low, low, high, high), outline=fill, width=round(third) + 1)
    else:
        pen.ellipse((low, low, high, high), fill)


def _tone(label: str, latent: NDArray[np.float64], format: str) -> bytes:
    """0.3 s; falls two octaves as the size grows, is louder with more space; overtones tell the class."""
    space, size = latent
    phase = 2 * np.pi * 880 * 4**-size * np.arange(round(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    overtone = 1 + list(CLASSES).index(label)
    samples = (0.1 + 0.3 * space) * (np.sin(phase) + np.sin(overtone * phase) / 2)
    out = io.BytesIO()
    subtype = "VORBIS" if format == "ogg" else "PCM_16"
    soundfile.write(out, samples, SAMPLE_RATE, format=format.upper(), subtype=subtype)
    return _fixed_serial(out.getvalue()) if format == "ogg" else out.getvalue()


def _fixed_serial(ogg: bytes) -> bytes:
    """The same OGG with serial number 1: libsndfile draws it from the clock. Pages and checksum as RFC 3533."""
    pages, start = bytearray(), 0
    while start < len(ogg):
        segments = ogg[start + 27 : start + 27 + ogg[start + 26]]
        end = start + 27 + len(segments) + sum(segments)
        page = ogg[start:end]
        page = page[:14] + struct.pack("<I", 1) + page[18:22] + bytes(4) + page[26:]
        pages += page[:22] + struct.pack("<I", _ogg_crc(page)) + page[26:]
        start = end
    return bytes(pages)


def _ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc = (crc << 8 & 0xFFFFFFFF) ^ _CRC[crc >> 24 ^ byte]
    return crc


def _crc_of_byte(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc


_CRC = [_crc_of_byte(byte) for byte in range(256)]


def _empty_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims `width` x `height` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _next_row(rows: list[Row], spoiled: set[str], column: str, ending: str) -> Row:
    """The next sample with such a value that is not spoiled yet, and makes it one that is."""
    row = next(row for row in rows if row["id"] not in spoiled and (row[column] or "").endswith(ending))
    spoiled.add(row["id"])
    return row


INVALID_TEXT = b"Caf\xe9, in Latin-1"

# column, ending of the file's name, the reason to expect, and what the file's bytes become (None: no file).
_BAD_FILES: tuple[tuple[str, str, str, Callable[[bytes], bytes | None]], ...] = (
    ("image_path", ".jpg", "decode_error", _half),
    ("image_path", ".png", "decode_error", _half),
    ("image_path", ".png", "empty", lambda _: b""),
    ("image_path", ".png", "zero_size", lambda _: _empty_png(0, 0)),
    ("image_path", ".png", "too_large", lambda _: _empty_png(60_000, 60_000)),
    ("image_path", ".jpg", "unreadable", lambda _: None),
    ("sound_path", ".ogg", "decode_error", lambda _: b"This is no sound: the server said 404.\n"),
    ("sound_path", ".wav", "empty", lambda _: b""),
    ("note_path", ".txt", "invalid_utf8", lambda _: INVALID_TEXT),
)
