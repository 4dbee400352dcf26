"""How long a recording is: from a header that was counted, else from the packets, and never from what FFmpeg estimates."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.sources.files import FileValue
from pipelines.sources.streams import filled
from pipelines.synchronize import audio, container
from pipelines.synchronize.recording import Recording
from tests.recordings import RATE, SECOND

SECONDS = 24
WINDOWS = {"every": SECOND, "length": SECOND, "per": None}


class _Pipe:
    """A file that cannot go back to fill in its header."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)


def levels(first: float, second: float) -> NDArray[np.float32]:
    """Noise, half of it of one deviation and half of another: a codec of variable rate spends other bits on each."""
    deviation = np.repeat([first, second], SECONDS * RATE // 2)
    return (np.random.default_rng(0).normal(0, 1, SECONDS * RATE) * deviation).clip(-1, 1).astype(np.float32)


def write(
    path: Path, codec: str, samples: NDArray[np.float32], start_s: int = 0, pipe: bool = False, bit_rate: int = 64_000
) -> FileValue:
    whole = codec in ("pcm_s16le", "flac")
    kind, to = {".aac": "adts", ".mka": "matroska"}.get(path.suffix, path.suffix[1:]), _Pipe()
    # An MP3's count of its frames is left out.
    with av.open(
        to if pipe else str(path), "w", format=kind, options={"write_xing": "0"} if kind == "mp3" else {}
    ) as file:
        stream: Any = file.add_stream(codec, rate=RATE, layout="mono")
        stream.bit_rate = bit_rate
        for at in range(0, len(samples), 1024):
            piece = samples[None, at : at + 1024]
            piece = (piece * 32767).astype(np.int16) if whole else piece
            frame = av.AudioFrame.from_ndarray(piece, "s16" if whole else "fltp", "mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), start_s * RATE + at
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if pipe:
        path.write_bytes(to.written)
    return FileValue(f"file://{path}", path.name)


def last_window_s(file: FileValue) -> float:
    """The begin of the last window of 1 s."""
    fields = filled({"sound": {"modality": "audio"}})
    begins = np.concatenate([chunk.begin_ns for chunk in Recording("r", {"sound": file}, fields, WINDOWS).windows()])
    return float(begins[-1]) / SECOND


def end_s(file: FileValue) -> float:
    return float(max(int(chunk.end_ns.max()) for chunk in audio.events(file))) / SECOND


LOUD_FIRST, QUIET_FIRST = levels(0.3, 0.0005), levels(0.0005, 0.3)


@pytest.mark.parametrize(
    ("name", "codec", "samples", "start_s", "pipe"),
    [
        ("s.aac", "aac", LOUD_FIRST, 0, False),
        ("s.aac", "aac", QUIET_FIRST, 0, False),
        ("s.mka", "pcm_s16le", QUIET_FIRST, 0, True),
        ("s.flac", "flac", QUIET_FIRST, 0, True),
        ("s.ogg", "libopus", QUIET_FIRST, 2, False),
        ("s.mp3", "libmp3lame", LOUD_FIRST, 0, False),
    ],
    ids=["adts", "adts, longer at first", "matroska from a pipe", "flac from a pipe", "ogg from 2 s on", "mp3"],
)
def test_windows_reach_to_the_last_packet_where_no_header_counts_to_it(
    tmp_path: Path, name: str, codec: str, samples: NDArray[np.float32], start_s: int, pipe: bool
) -> None:
    file = write(tmp_path / name, codec, samples, start_s, pipe)
    assert container.header(file, "audio").span_ns is None
    assert SECONDS + start_s <= end_s(file) < SECONDS + start_s + 0.2
    assert SECONDS + start_s - 1 <= last_window_s(file) <= end_s(file)


def test_an_mp3_of_two_rates_without_a_count_of_frames_is_as_long_as_its_packets(tmp_path: Path) -> None:
    raw = b""
    for samples, rate in zip(np.split(LOUD_FIRST, 2), (128_000, 16_000), strict=True):
        write(tmp_path / "part.mp3", "libmp3lame", samples, bit_rate=rate)
        raw += (tmp_path / "part.mp3").read_bytes()
    (tmp_path / "s.mp3").write_bytes(raw)
    file = FileValue(f"file://{tmp_path}/s.mp3", "s.mp3")
    assert SECONDS <= end_s(file) < SECONDS + 0.4
    assert SECONDS - 1 <= last_window_s(file) <= end_s(file)


@pytest.mark.parametrize(
    ("name", "codec", "start_s"),
    [
        ("s.m4a", "aac", 2), ("s.mov", "pcm_s16le", 2), ("s.mka", "flac", 2), ("s.flac", "flac", 0),
        ("s.wav", "pcm_s16le", 0), ("s.w64", "pcm_s16le", 0), ("s.ogg", "libopus", 0),
    ],
)  # fmt: skip
def test_a_header_that_was_counted_spares_the_packets(
    tmp_path: Path, name: str, codec: str, start_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / name.replace("m4a", "mp4"), codec, QUIET_FIRST, start_s)
    span = container.header(file, "audio").span_ns
    assert span is not None
    assert abs(span[1] / SECOND - end_s(file)) <= 0.01
    monkeypatch.setattr(audio, "events", None)
    assert last_window_s(file) in (SECONDS + start_s - 1, SECONDS + start_s)
