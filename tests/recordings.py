"""Recordings whose truth is known: a flash and a beep at each whole second of the reference's time, cues, and a sensor.

Each frame says its own number: a code of black and white squares, which survives what a codec does to it.
"""

import io
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

__all__ = ["FPS", "FRAME_NS", "SECOND", "beeps", "flashes", "frame_number", "frame_times", "sensor_csv", "video"]

SECOND = 10**9
FPS = Fraction(30_000, 1001)
FRAME_NS = round(SECOND / FPS)
FLASH_S = 0.1
SIDE, BITS, RATE = 32, 16, 16_000


def frame_times(seconds: float, *, start_s: float = 0.0, drop: float = 0.0, seed: int = 0) -> NDArray[np.int64]:
    """Presentation times in ticks of 1/30000 s of a camera at 29.97 Hz that loses a share `drop` of its frames."""
    rng = np.random.default_rng(seed)
    times = np.arange(int(seconds * FPS)) * 1001 + round(start_s * 30_000)
    keep = rng.random(len(times)) >= drop
    keep[[0, -1]] = True
    return times[keep]


def flashes(time_s: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether it is light (or loud) at some times: for 0.1 s from each whole second on."""
    return time_s % 1 < FLASH_S


def _picture(number: int, light: bool, noise: NDArray[np.float64]) -> NDArray[np.uint8]:
    """32 x 32 grey: the upper half the number in 16 squares of 8 x 4, the lower half light or dark, with noise."""
    bits = (number >> np.arange(BITS)) & 1
    upper = np.kron(bits.reshape(4, 4) * 255, np.ones((4, 8)))
    lower = np.where(light, 200, 60) + noise
    return np.clip(np.vstack([upper, np.broadcast_to(lower, (16, SIDE))]), 0, 255).astype(np.uint8)


def frame_number(png: bytes) -> int:
    """The number that a frame's picture says."""
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    squares = grey[:16].reshape(4, 4, 4, 8).mean(axis=(1, 3)).ravel() > 127
    return int((squares << np.arange(BITS)).sum())


def video(
    path: Path,
    ticks: Iterable[int],
    *,
    codec: str = "mpeg4",
    noise: float = 0.0,
    lit: Callable[[NDArray[np.float64]], NDArray[np.bool_]] = flashes,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes frame `i` at `ticks[i]` / 30000 s; `noise` is the deviation of each pixel, of a flash of 140."""
    rng = np.random.default_rng(7)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=30, options=options or {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 30_000)
        stream.codec_context.bit_rate = 2_000_000
        stream.codec_context.gop_size = 12
        track: Any = file.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for number, tick in enumerate(ticks):
            light = bool(lit(np.array([tick / 30_000]))[0])
            frame = av.VideoFrame.from_ndarray(
                _picture(number, light, rng.normal(0, noise, (16, SIDE)) if noise else np.zeros((16, SIDE))), "gray"
            ).reformat(format="yuv420p")
            frame.pts, frame.time_base = int(tick), Fraction(1, 30_000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if track is not None:
            _mux_tone(file, track)
    return path


def _mux_tone(file: Any, track: Any) -> None:
    tone = np.sin(np.arange(RATE) * 0.3).astype(np.float32)[None] * 0.5
    frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    file.mux(track.encode(frame))
    file.mux(track.encode())


def beeps(seconds: float, *, offset_s: float = 0.0, drift_ppm: float = 0.0, noise: float = 0.0) -> NDArray[np.float32]:
    """Sound at 16 kHz whose own time `u` is that of the reference t = (u + offset)(1 + drift); beeps of power 1/8."""
    own = np.arange(int(seconds * RATE)) / RATE
    time = (own + offset_s) * (1 + drift_ppm / 1e6)
    tone = np.where(flashes(time), 0.5 * np.sin(2 * np.pi * 1000 * own), 0)
    return (tone + np.random.default_rng(3).normal(0, noise, len(own))).astype(np.float32)


def write_sound(path: Path, samples: NDArray[np.float32]) -> Path:
    soundfile.write(path, samples, RATE, "PCM_16")
    return path


def sensor_csv(path: Path, time_s: NDArray[np.float64], values: NDArray[np.float64], header: str = "time,x,y") -> Path:
    """A CSV of times with 9 digits and channels as they are."""
    rows = (
        f"{time:.9f}," + ",".join(repr(float(each)) for each in row) for time, row in zip(time_s, values, strict=True)
    )
    path.write_text("\n".join([header, *rows]) + "\n")
    return path
