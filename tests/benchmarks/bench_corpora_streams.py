"""Timed streams of known truth, from media files to aligned samples: residuals, and clocks that are measured.

The media are made here: 29.97 Hz of which every tenth frame is lost, from 1.4 s on, with a flash each second; a beep each
second in a sound whose clock is 237 ms and 40 ppm off; white noise at 6 dB on pixels and sound; a sensor at 100 Hz with jitter.
The same is measured at 6 dB of noise on the mean brightness of each frame, which no number of pixels averages out.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from featurestore.media import decode_sensor
from pipelines.sources import Missing
from pipelines.sources.files import FileValue
from pipelines.synchronize import audio, clocks, sensor, video
from pipelines.synchronize.merge import align
from pipelines.synchronize.recording import Recording
from pipelines.synchronize.windows import every
from tests.benchmarks import Bar, at_least, at_most
from tests.recordings import FPS, SECOND, beeps, flashes, frame_times, sensor_csv, write_sound
from tests.recordings import video as write_video

SECONDS, START_S = 600, 1.4
OFFSET_S, DRIFT_PPM = 0.237, 40.0
FLASH, BEEP_POWER, NOISE_DB = 140.0, 1 / 8, 6.0
SEEDS = 10
SHORT_MIN, LONG_MIN, VIDEO_FPS = 10, 120, 5


def bars() -> list[Bar]:
    """The bars of this area that are about timed streams."""
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as name:
        folder = Path(name)
        return [*_frames(folder), *_clock(folder), *_sensor(folder), *_memory()]


def _file(path: Path) -> FileValue:
    return FileValue(f"file://{path}", path.name)


def _frames(folder: Path) -> list[Bar]:
    ticks = frame_times(SECONDS, start_s=START_S, drop=0.1)
    noise = FLASH / 10 ** (NOISE_DB / 20)
    write_video(folder / "v.mp4", ticks, noise=noise)
    times = np.rint(ticks * SECOND / 30_000).astype(np.int64)
    begun = time.monotonic()
    windows = list(every(int(times[0]), int(times[-1]) - SECOND, 37_000_000, SECOND))
    matches = list(align(iter(windows), video.events(_file(folder / "v.mp4")), "nearest"))
    took = time.monotonic() - begun
    anchors = np.concatenate([chunk.anchor_ns for chunk in windows])
    residuals = np.abs(np.concatenate([chunk.residual_ns for chunk in matches]))
    after = np.searchsorted(times, anchors, "right").clip(1, len(times) - 1)
    interval = times[after] - times[after - 1]
    counted = np.rint(anchors / SECOND * (len(ticks) / SECONDS)).astype(int).clip(0, len(times) - 1)
    naive = np.abs(times[counted] - anchors)
    half = SECOND / float(FPS) / 2
    kept = np.abs(interval - 2 * half) < 1000
    detail = {
        "windows": len(anchors),
        "seconds": round(took, 2),
        "p99_ms": round(float(np.percentile(residuals, 99)) / 1e6, 3),
        "share_of_windows_at_a_lost_frame": round(1 - float(kept.mean()), 3),
        "mean_ms": round(float(residuals.mean()) / 1e6, 3),
        "round_t_times_average_rate_mean_ms": round(float(naive.mean()) / 1e6, 1),
    }
    p99 = float(np.percentile(residuals[kept], 99))
    return [
        at_most("corpora", "nearest frame: p99 of residuals where no frame is lost, in half frames", p99 / half, 1, **detail),
        at_most(
            "corpora", "nearest frame: p99 of residuals, in halves of the interval that the anchor is in",
            float(np.percentile(residuals / (interval / 2), 99)), 1, **detail,
        ),
    ]  # fmt: skip


def _clock(folder: Path) -> list[Bar]:
    sigma = float(np.sqrt(BEEP_POWER / 10 ** (NOISE_DB / 10)))
    samples = beeps(SECONDS + START_S, offset_s=OFFSET_S, drift_ppm=DRIFT_PPM, noise=sigma)
    write_sound(folder / "s.wav", samples)
    begun = time.monotonic()
    seen = clocks.grid(video.brightness(_file(folder / "v.mp4")))
    heard = clocks.grid(audio.loudness(_file(folder / "s.wav"), clocks.STEP_NS))
    found = clocks.estimate(heard, seen)
    detail: dict[str, Any] = {
        "seconds": round(time.monotonic() - begun, 1),
        "of_media_s": SECONDS,
        "offset_error_told_ms": round(found.offset_error_ns / 1e6, 3),
        "drift_error_told_ppm": round(found.drift_error_ppm, 2),
        "certainty": found.certainty,
    }
    many = [clocks.estimate(heard, clocks.grid(_dim(seed))).clock for seed in range(SEEDS)]
    offsets = [abs(each.offset_ns / 1e6 - OFFSET_S * 1e3) for each in many]
    drifts = [abs(each.drift_ppm - DRIFT_PPM) for each in many]
    return [
        at_most("corpora", "offset measured at 6 dB: error in ms", abs(found.clock.offset_ns / 1e6 - 237), 2, **detail),
        at_most("corpora", "drift measured at 6 dB: error in ppm", abs(found.clock.drift_ppm - DRIFT_PPM), 10, **detail),
        at_most(
            "corpora", "offset measured at 6 dB on each frame's brightness: median error in ms", float(np.median(offsets)), 2,
            worst=round(max(offsets), 2), recordings=SEEDS,
        ),
        at_most(
            "corpora", "drift measured at 6 dB on each frame's brightness: median error in ppm", float(np.median(drifts)), 10,
            worst=round(max(drifts), 2), recordings=SEEDS,
        ),
    ]  # fmt: skip


def _dim(seed: int) -> list[clocks.Samples]:
    ticks = frame_times(SECONDS, start_s=START_S, drop=0.1, seed=seed)
    noise = np.random.default_rng(seed + 100).normal(0, 1 / 10 ** (NOISE_DB / 20), len(ticks))
    values = flashes(ticks / 30_000) + noise
    return [(np.rint(ticks * SECOND / 30_000).astype(np.int64), values.astype(np.float32))]


def _sensor(folder: Path) -> list[Bar]:
    rng = np.random.default_rng(1)
    time_s = np.round(np.arange(0, 60, 0.01) + rng.uniform(-0.003, 0.003, 6000), 9)
    sensor_csv(folder / "s.csv", time_s, np.stack([np.sin(2 * np.pi * time_s)] * 2, axis=1))
    errors = {}
    for policy in ("nearest", "linear"):
        clock = {"unit": "s", "offset": 0, "drift": 0.0, "estimate": None}
        field = {"modality": "sensor", "clock": clock, "time": "time", "channels": ["x"], "policy": policy}
        fields = {"s": {**field, "tolerance": 20_000_000, "staleness": None}}
        windows = {"every": 7_000_000, "length": 7_000_000, "per": None}
        recording = Recording("bench", {"s": _file(folder / "s.csv")}, fields, windows)
        count = sum(len(chunk.begin_ns) for chunk in recording.windows())
        given = [(window.anchor_ns, window.values["s"]) for window in recording.read(range(count))]
        found = [
            (anchor, decode_sensor(value.fetch())[0, 0]) for anchor, value in given if isinstance(value, sensor.Array)
        ]
        anchors, values = np.array(found, np.float64).T
        errors[policy] = float(np.sqrt(np.mean(np.square(values - np.sin(2 * np.pi * anchors / SECOND)))))
    ratio = errors["nearest"] / errors["linear"]
    return [
        at_least("corpora", "linear against nearest readings of 100 Hz: errors, nearest / linear", ratio, 5, **errors)
    ]


def _memory() -> list[Bar]:
    """Peak memory of reading every window of a short and of a long recording; each in a process of its own."""
    found = {}
    for minutes in (SHORT_MIN, LONG_MIN):
        command = [sys.executable, "-m", "tests.benchmarks.bench_corpora_streams", str(minutes)]
        found[minutes] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    grown = found[LONG_MIN]["peak_mb"] - found[SHORT_MIN]["peak_mb"]
    detail = {f"{minutes} min": told for minutes, told in found.items()}
    return [
        at_most(
            "corpora", f"memory of {LONG_MIN} min of streams more than of {SHORT_MIN} min, in MB", grown, 50, **detail
        )
    ]


def _read_all(minutes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as name:
        folder, seconds = Path(name), 60 * minutes
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(folder / "s.wav", "w", 16_000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(rng.integers(-9999, 9999, 60 * 16_000, dtype=np.int16))
        with (folder / "s.csv").open("w") as csv, (folder / "s.srt").open("w") as srt:
            csv.write("time,x,y,z\n")
            for second in range(seconds):
                csv.writelines(f"{second + at / 100},{at},{second},0.5\n" for at in range(100))
                clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
                srt.write(f"{second}\n{clock},100 --> {clock},900\nsaid {second}\n\n")
        _plain_video(folder / "v.mp4", seconds)
        fields = {
            "frame": {"modality": "image", "policy": "nearest"},
            "sound": {"modality": "audio", "policy": "window"},
            "words": {"modality": "text", "policy": "overlap"},
            "motion": {"modality": "sensor", "policy": "window", "time": "time", "channels": None},
        }
        clock_spec = {"unit": "s", "offset": 0, "drift": 0.0, "estimate": None}
        names = {"frame": "v.mp4", "sound": "s.wav", "words": "s.srt", "motion": "s.csv"}
        files = {field: _file(folder / name) for field, name in names.items()}
        recording = Recording(
            "bench", files,
            {key: {**field, "clock": clock_spec, "tolerance": None, "staleness": None} for key, field in fields.items()},
            {"every": SECOND, "length": 2 * SECOND, "per": None},
        )  # fmt: skip
        begun, bytes_ = time.monotonic(), 0
        count = sum(len(chunk.begin_ns) for chunk in recording.windows())
        for window in recording.read(range(count)):
            bytes_ += sum(
                len(value.fetch()) for value in window.values.values() if not isinstance(value, Missing | None)
            )
        return {
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "windows": count,
            "mb": bytes_ >> 20,
            "seconds": round(time.monotonic() - begun, 1),
        }


def _plain_video(path: Path, seconds: int) -> None:
    """128 x 96 at VIDEO_FPS: were one frame of each second held, 2 h of it would take 250 MB."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("mpeg4", rate=VIDEO_FPS, options={"g": "50"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(seconds * VIDEO_FPS):
            frame = av.VideoFrame.from_ndarray(np.full((144, 128), number % 256, np.uint8), "yuv420p")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


if __name__ == "__main__":
    print(json.dumps(_read_all(int(sys.argv[1]))))
