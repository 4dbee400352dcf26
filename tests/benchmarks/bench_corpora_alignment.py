"""Alignment of timed events in pure numbers: how fast, in how much memory, and how near to what could be reached.

The recording is 100 Hz of a jittered sensor, 29.97 frames a second of which every tenth was dropped at random, and cues that
overlap. It is made up piece by piece while it is read, as a reader would decode it: that is part of the seconds.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.synchronize import Events
from pipelines.synchronize.merge import align
from pipelines.synchronize.windows import every, per_event
from tests.benchmarks import Bar, at_most

SECOND_NS = 1_000_000_000
FRAME_NS = 33_366_667
CHUNK_S = 600
EVENTS_A_SECOND = 100 + 29.97 * 0.9 + 0.5
MAX_SECONDS, MAX_MORE_MB = 60, 50
ACCURACY_S = 3600


def bars() -> list[Bar]:
    """The bars of this area that are about alignment; each size is measured in a process of its own."""
    small, large = (_in_a_process(events) for events in (1_000_000, 10_000_000))
    detail = {"1M": small, "10M": large}
    return [
        at_most("corpora", "10 million timed events aligned: seconds", large["seconds"], MAX_SECONDS, **detail),
        at_most(
            "corpora", "peak memory of 10 million timed events beyond that of 1 million: MB",
            large["peak_mb"] - small["peak_mb"], MAX_MORE_MB,
        ),
        *_accuracy(),
    ]  # fmt: skip


def _in_a_process(events: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_corpora_alignment", str(events)]
    made: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return made


def _sensor(seconds: int) -> Iterator[Events]:
    """100 Hz, each reading up to 4 ms early or late."""
    for first in range(0, seconds, CHUNK_S):
        index = np.arange(first * 100, min(first + CHUNK_S, seconds) * 100)
        jitter = np.random.default_rng([1, first]).integers(-4_000_000, 4_000_001, len(index))
        at = index * (SECOND_NS // 100) + jitter
        yield Events(at, at, index)


def _frames(seconds: int) -> Iterator[Events]:
    """29.97 frames a second of which a tenth is missing, at random; they are numbered as they are decoded."""
    shown = 0
    for first in range(0, seconds, CHUNK_S):
        ticks = np.arange(-(-first * SECOND_NS // FRAME_NS), -(-min(first + CHUNK_S, seconds) * SECOND_NS // FRAME_NS))
        at = ticks[np.random.default_rng([2, first]).random(len(ticks)) >= 0.1] * FRAME_NS
        yield Events(at, at, np.arange(shown, shown + len(at)))
        shown += len(at)


def _cues(seconds: int) -> Iterator[Events]:
    """One each two seconds, of up to ten seconds."""
    for first in range(0, seconds, CHUNK_S):
        index = np.arange(first // 2, min(first + CHUNK_S, seconds) // 2)
        rng = np.random.default_rng([3, first])
        start = index * 2 * SECOND_NS + rng.integers(0, 2 * SECOND_NS, len(index))
        yield Events(start, start + rng.integers(1, 10 * SECOND_NS, len(index)), index)


def _align(events: int) -> dict[str, float]:
    """Aligns a recording of so many events with windows of 2 s each second, and its sensor with each of its frames."""
    seconds = int(events / EVENTS_A_SECOND)
    streams = {"nearest": _frames, "linear": _sensor, "window": _sensor, "overlap": _cues}
    begun = time.monotonic()
    windows = matched = 0
    for policy, stream in streams.items():
        for matches in align(every(0, seconds * SECOND_NS, SECOND_NS, 2 * SECOND_NS), stream(seconds), policy):
            windows, matched = windows + len(matches.reason), matched + int((matches.reason == 0).sum())
    for matches in align(per_event(_frames(seconds)), _sensor(seconds), "linear"):
        windows, matched = windows + len(matches.reason), matched + int((matches.reason == 0).sum())
    took = time.monotonic() - begun
    status = Path("/proc/self/status").read_text()
    peak_kb = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    counted = sum(len(chunk.index) for chunk in itertools.chain(*(each(seconds) for each in (_sensor, _frames, _cues))))
    return {
        "seconds": round(took, 2), "peak_mb": round(peak_kb / 1024, 1), "events": counted, "hours": seconds // 3600,
        "windows": windows, "matched": matched,
    }  # fmt: skip


def _joined(stream: Iterator[Events]) -> Events:
    return Events(*(np.concatenate(columns) for columns in zip(*stream, strict=True)))


def _signal(at_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the sensor measures: a body that moves, up to 3 Hz."""
    seconds = at_ns / SECOND_NS
    return sum(np.sin(2 * np.pi * hz * seconds + hz) / hz for hz in (0.3, 1.1, 3.0))


def _accuracy() -> list[Bar]:
    """How far what is matched is from the truth at each anchor."""
    windows = list(every(0, ACCURACY_S * SECOND_NS, SECOND_NS // 7, SECOND_NS // 7))
    anchors = np.concatenate([chunk.anchor_ns for chunk in windows])

    sensor, errors = _joined(_sensor(ACCURACY_S)), {}
    values = _signal(sensor.start_ns)
    for policy in ("nearest", "linear"):
        (found,) = align(windows, _sensor(ACCURACY_S), policy)
        here = found.reason == 0
        value = (1 - found.weight) * values[found.first] + found.weight * values[found.last]
        errors[policy] = float(np.sqrt(np.mean((value - _signal(anchors))[here] ** 2)))

    frames = _joined(_frames(ACCURACY_S)).start_ns
    (found,) = align(windows, _frames(ACCURACY_S), "nearest")
    miss = np.abs(found.residual_ns)
    after = np.clip(np.searchsorted(frames, anchors), 1, len(frames) - 1)
    gap = frames[after] - frames[after - 1]
    by_rate = np.rint(anchors / SECOND_NS * len(frames) / ACCURACY_S).astype(np.int64).clip(0, len(frames) - 1)
    peer = np.abs(frames[by_rate] - anchors)
    detail = {
        "p99_ms": round(float(np.percentile(miss, 99)) / 1e6, 2),
        "p99_ms where no frame is missing": round(float(np.percentile(miss[gap == FRAME_NS], 99)) / 1e6, 2),
        "half a frame, ms": round(FRAME_NS / 2e6, 2),
        "round(t * average fps): mean_ms": round(float(peer.mean()) / 1e6, 1),
        "round(t * average fps): p99_ms": round(float(np.percentile(peer, 99)) / 1e6, 1),
    }
    return [
        at_most("corpora", "error of linear over nearest, 100 Hz jittered sensor", errors["linear"] / errors["nearest"], 0.2),
        at_most(
            "corpora", "nearest frame at 29.97 fps, a tenth missing: p99 residual over half the gap of frames around it",
            float(np.percentile(miss / (gap / 2), 99)), 1, **detail,
        ),
        at_most(
            "corpora", "nearest frame at 29.97 fps, a tenth missing: p99 residual over half a frame, where none is missing",
            float(np.percentile(miss[gap == FRAME_NS], 99)) / (FRAME_NS / 2), 1,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_align(int(sys.argv[1]))))
