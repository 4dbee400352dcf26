"""Videos made in memory, whose frames say their own number: frame `i` is of one grey, `grey(i)`."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

__all__ = ["CODECS", "greedy", "grey", "numbers", "sound", "video"]

CODECS = {"mp4": "libx264", "mov": "mpeg4", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "ts": "libx264"}
"""Container -> a codec that people put into it."""

_NAMES = {"mkv": "matroska", "ts": "mpegts"}
# Encoders that would set key frames of their own where the picture changes.
_NO_MORE_KEYS = {"libx264": {"sc_threshold": "0"}, "mpeg4": {"sc_threshold": "1000000000"}}
_TICK = Fraction(1, 1000)
STEP = 6


def grey(number: int) -> int:
    """The level of a frame, which survives what a codec does to it."""
    return 20 + STEP * number


def numbers(frames: Any) -> list[int]:
    """Which frames of the video these are."""
    return [round((float(np.asarray(frame).mean()) - grey(0)) / STEP) for frame in frames]


def video(
    times_ms: Sequence[int],
    container: str = "mp4",
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "",
    key_every: int = 12,
    options: dict[str, str] | None = None,
    greys: Sequence[int] | None = None,
    drawn: NDArray[np.uint8] | None = None,
) -> bytes:
    """A video whose frames are shown at some times; of other `greys`, or all as `drawn`, uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=_NAMES.get(container, container), options=options or {}) as file:
        codec = codec or CODECS[container]
        stream: Any = file.add_stream(codec, rate=1000, options=_NO_MORE_KEYS.get(codec, {}))
        stream.width, stream.height = size if drawn is None else drawn.shape[1::-1]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = _TICK
        stream.codec_context.gop_size, stream.codec_context.bit_rate = key_every, 20_000_000
        for number, time in enumerate(times_ms):
            level = greys[number] if greys else grey(number)
            pixels = np.full((size[1], size[0], 3), level, np.uint8) if drawn is None else drawn
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, _TICK
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def _tone(file: Any, codec: str) -> None:
    track: Any = file.add_stream(codec, rate=16_000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
    file.mux(track.encode(frame))
    file.mux(track.encode())


def sound(container: str = "mp4") -> bytes:
    """A file of a video's kind that has sound alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=_NAMES.get(container, container)) as file:
        _tone(file, "libopus" if container == "webm" else "aac")
    return buffer.getvalue()


def greedy() -> bytes:
    """An MP4 whose table of times claims two thousand million entries: FFmpeg says that there is no memory for it."""
    raw = bytearray(video([0, 1, 2, 3], "mp4"))
    count = raw.index(b"stts") + 8
    raw[count : count + 4] = b"\x7f\xff\xff\xff"
    return bytes(raw)
