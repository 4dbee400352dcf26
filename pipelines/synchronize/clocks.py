"""Clocks: from a stream's own time to the recording's, by an offset and a drift that are given, or measured.

A clock is measured by cross-correlating the envelopes of two streams: how bright, loud or strong each is over time. Steps of
the envelope count and not its level (a Gaussian derivative), so that a sharp peak stands where flash and beep coincide. For a
drift of 0 within a segment of the recording, the correlation of each segment is taken apart; the offset and the drift whose
line through all of them gathers most are found first, and then refined by the peak of each segment of what they share beside
that line, weighted by what stands there, with outliers' weights reduced (Huber).

Few events meet by chance at some of the thousands of offsets, and then stand far above what is typical, which is nothing. So
the best line must also stand above its rival, the best offset that has nothing to do with it. About the right offset the
correlation is as high on one side as on the other, like that of a stream with itself: what has its like on the other side is
no rival but a repetition, and makes the clock ambiguous where it is as high.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

__all__ = ["METHOD", "STEP_NS", "Clock", "Estimate", "Weak", "estimate", "grid"]

METHOD = 2
"""How clocks are measured. Where another method measured one that is kept, it is measured anew."""

STEP_NS = 5_000_000
"""Step of the grid on which envelopes are compared; peaks are interpolated between."""

MAX_OFFSET_NS = 30 * 10**9
MAX_DRIFT_PPM = 200.0
"""How far a clock is looked for. Crystals of consumer devices are within 100 ppm of each other."""

MIN_CERTAINTY = 8.0
"""Of 340 pairs of streams that have nothing to do with each other the best lines stood at 5.6 deviations at the most; of
recordings of 60 s at 6 dB of noise at 10 at the least."""

MAX_RIVAL = 2 / 3
MIN_EVENTS_MORE = 3.0
"""How much of the best line a rival may gather, and how many events (a flash, say) it must lack that the best has. Of 2500
pairs of streams of 20 to 300 s, sparse and dense, that share 3 to 60 s or nothing, no clock was then off by more than 7 ms."""

_SMOOTH_STEPS = 3
"""Deviation of the Gaussian, 15 ms. Measured at 6 dB from 10 to 40 ms: the longer, the worse."""

_SEGMENT_STEPS = 10 * 10**9 // STEP_NS
_MIN_SEGMENTS, _MAX_SEGMENTS = 4, 128
_MIN_STEPS = 10 * 10**9 // STEP_NS
_MIN_SHARED_STEPS = 5 * 10**9 // STEP_NS
_MIN_FOR_DRIFT_NS = 30 * 10**9
_MAX_DRIFT_ERROR_PPM = 50.0
"""A drift known no better is told as 0: crystals are nearer than that to each other."""

_EVENT_STEPS = 200 * 10**6 // STEP_NS
"""What is counted as one event: a flash of 0.1 s, its begin and its end."""

_FINEST_STEPS = 0.02
"""Peaks are not told to less than 0.1 ms: three that agree by chance must not outweigh all else."""

_REACH = MAX_OFFSET_NS // STEP_NS
_NEAR_STEPS = 12
"""A segment's own peak is looked for within 60 ms of the line."""

_AS_GOOD = 0.9
"""A repetition that fits so well, against the best, or less well by no more than the rival, may be the right one as well."""

_MAX_STEPS = 24 * 3600 * 10**9 // STEP_NS
"""A day: 70 MB for an envelope, and four times as much while it is made."""

_STEPS_OF_DRIFT = 4
"""Drifts are tried so far apart that the ends of the recording move by so many steps."""

Floats = NDArray[np.float64]
Samples = tuple[NDArray[np.int64], NDArray[np.float32]]
Envelope = tuple[int, NDArray[np.float32]]
"""The time of the first point in ns, and points float32 [N], STEP_NS apart."""


class Clock(NamedTuple):
    """reference = (stream + offset) × (1 + drift / 10^6); times in ns. A drift of 40 ppm gains 40 µs a second."""

    offset_ns: int = 0
    drift_ppm: float = 0.0

    def to_reference(self, stream_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Times of the recording, int64 ns, of a stream's: exact to 1 ns."""
        shifted: NDArray[np.int64] = stream_ns + self.offset_ns
        shifted += np.rint(shifted * (self.drift_ppm / 1e6)).astype(np.int64)
        return shifted

    def to_stream(self, reference_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Times of the stream, int64 ns, of the recording's: exact to 1 ns."""
        back = np.rint(reference_ns * (self.drift_ppm / (1e6 + self.drift_ppm))).astype(np.int64)
        stream: NDArray[np.int64] = reference_ns - back - self.offset_ns
        return stream


class Estimate(NamedTuple):
    """A clock, and how sure it is.

    Args:
        clock: of the stream against the reference; the offset in whole microseconds, the drift in hundredths of a ppm.
        offset_error_ns: standard error of the offset in the middle of the recording.
        drift_error_ppm: standard error of the drift; where the recording is too short for one, it is not measured: infinite.
        certainty: how far the correlation stands above that of other offsets, in their standard deviations.
        ambiguous_ns: how far the nearest offset is that fits as well, since both streams repeat themselves; None: there is
            none. An offset that is given as a first guess, right to half of that, tells which one it is.
    """

    clock: Clock
    offset_error_ns: int
    drift_error_ppm: float
    certainty: float
    ambiguous_ns: int | None = None


class Weak(Exception):
    """Two envelopes from which no clock can be told; the text says why."""


def grid(samples: Iterable[Samples]) -> Envelope:
    """An envelope from samples in the order of their times; it is linear between them, and of several in a step their mean.

    Raises:
        Weak: fewer than two samples, or more than a day of them.
    """
    first_ns: int | None = None
    times: list[Floats] = []
    values: list[Floats] = []
    # Of the last step, which may go on in the next samples.
    held: tuple[Floats, Floats] = (np.zeros(0), np.zeros(0))
    for time, given in samples:
        if not len(time):
            continue
        first_ns = int(time[0]) if first_ns is None else first_ns
        at = np.concatenate([held[0], (time - first_ns) / STEP_NS])
        value = np.concatenate([held[1], given.astype(np.float64)])
        if at[-1] > _MAX_STEPS:
            raise Weak("more than a day long")
        last = int(np.searchsorted(at, np.floor(at[-1])))
        held = (at[last:], value[last:])
        if last:
            starts = np.flatnonzero(np.diff(np.floor(at[:last]), prepend=-1))
            counts = np.diff(np.append(starts, last))
            times.append(np.add.reduceat(at[:last], starts) / counts)
            values.append(np.add.reduceat(value[:last], starts) / counts)
    if first_ns is None:
        raise Weak("nothing in it")
    at, value = (np.concatenate([*whole, [rest.mean()]]) for whole, rest in zip((times, values), held, strict=True))
    return first_ns, np.interp(np.arange(int(at[-1]) + 1), at, value).astype(np.float32)


def estimate(stream: Envelope, reference: Envelope) -> Estimate:
    """The clock of a stream against a reference.

    Of offsets that fit as well because the streams repeat themselves (a beep each second fits at every second) that is taken
    which is the smallest at the reference's begin, and `ambiguous_ns` says how far the next one is.

    Raises:
        Weak: nothing that they have in common stands out, another offset fits nearly as well for no such reason, they share
            too little, or they drift by more than MAX_DRIFT_PPM.
    """
    (stream_ns, other), (reference_ns, own) = ((begin, _steps_of(values)) for begin, values in (stream, reference))
    # In steps, an event at `i` of the reference stands at i + base - lag of the stream.
    base = round((reference_ns - stream_ns) / STEP_NS)
    rest_ns = reference_ns - stream_ns - base * STEP_NS
    best = _best_line(own, other, base)
    low, high = max(0, best.lag - base), min(len(own), len(other) + best.lag - base)
    at = np.arange(low, high)
    lags = np.rint(best.lag + best.drift * (at - best.middle)).astype(np.int64)
    _check_rival(best, own[at] * other[np.clip(at + base - lags, 0, len(other) - 1)])
    starts, size = _segments(low, high)
    away = starts - starts.mean()
    expected: Floats = best.lag + best.drift * (starts.astype(np.float64) + (size / 2 - best.middle))
    peaks, heights = _peaks(own, other, base, starts, size, expected)
    # Of frames at a steady rate against beeps at another the misses beat slowly. Where the ends of the recording count less, a
    # part of a beat does not look like a drift: of 600 s at 29.97 Hz it made 6 ppm, and now 0.4.
    weights = heights * np.sin(np.pi * (np.arange(len(starts)) + 0.5) / len(starts))
    line = _line(away, peaks, weights)
    drift_ppm = round(line.slope / (1 - line.slope) * 1e6, 2)
    if abs(drift_ppm) > MAX_DRIFT_PPM:
        raise Weak(f"a drift of {drift_ppm:.0f} ppm fits best; looked for: up to {MAX_DRIFT_PPM:.0f}")
    middle_ns = reference_ns + round((starts.mean() + size / 2) * STEP_NS)
    offset_ns = line.level * STEP_NS + rest_ns - middle_ns * (drift_ppm / (1e6 + drift_ppm))
    return Estimate(
        Clock(round(offset_ns / 1000) * 1000, drift_ppm),
        round(line.level_error * STEP_NS),
        line.slope_error * 1e6,
        round(best.certainty, 1),
        None if best.ambiguous is None else best.ambiguous * STEP_NS,
    )


def _segments(low: int, high: int) -> tuple[NDArray[np.int64], int]:
    """Where the segments of [low, high) begin, and how long they are: 10 s, or a quarter of it if that is less."""
    count = min(max((high - low) // _SEGMENT_STEPS, _MIN_SEGMENTS), _MAX_SEGMENTS)
    size = min((high - low) // count, _SEGMENT_STEPS)
    return np.linspace(low, high - size, count).astype(np.int64), size


def _steps_of(values: NDArray[np.float32]) -> Floats:
    if len(values) < _MIN_STEPS:
        raise Weak(f"{len(values) * STEP_NS / 1e9:.1f} s long; at least {_MIN_STEPS * STEP_NS / 1e9:.0f} s are needed")
    if not np.isfinite(values).all():
        raise Weak("a value in it is not finite")
    steps: Floats = ndimage.gaussian_filter1d(values.astype(np.float64), _SMOOTH_STEPS, order=1, mode="nearest")
    deviation = steps.std()
    if deviation <= 1e-9 * np.abs(values).max():
        raise Weak("nothing changes in it")
    # A single click must not outweigh all else.
    bounded: Floats = np.clip(steps / deviation, -8, 8)
    return bounded


def _correlation(own: Floats, other: Floats, at: int, reach: int) -> Floats:
    """Correlation of a piece with what stands at `at - lag` of the other, for each lag from -reach to reach."""
    begin, end = at - reach, at + reach + len(own)
    window = np.zeros(end - begin)
    low, high = max(begin, 0), min(end, len(other))
    if low < high:
        window[low - begin : high - begin] = other[low:high]
    size = fft.next_fast_len(len(window) + len(own), real=True)
    product = fft.rfft(window, size) * np.conj(fft.rfft(own, size))
    found: Floats = fft.irfft(product, size)[: 2 * reach + 1][::-1] / len(own)
    return found


class _Best(NamedTuple):
    """The line that gathers most: its lag at `middle` of the reference, in steps, and its drift.

    `rival` is how much, as a share, the best lag gathers that has nothing to do with it, and `rival_at` is its distance;
    `ambiguous` the distance of the next lag that is as good as it, where there is one.
    """

    lag: int
    drift: float
    middle: float
    certainty: float
    rival: float
    rival_at: int
    ambiguous: int | None


def _best_line(own: Floats, other: Floats, base: int) -> _Best:
    starts, size = _segments(0, len(own))
    away = starts - starts.mean()
    # Three times as far as is looked for: what stands on the other side of a lag tells what this side is.
    curves = np.stack([_correlation(own[at : at + size], other, at + base, 3 * _REACH) for at in starts.tolist()])
    places = starts[:, None] + base - np.arange(-3 * _REACH, 3 * _REACH + 1)
    shared = (np.minimum(places + size, len(other)) - np.maximum(places, 0)).clip(0).sum(axis=0)
    looked = slice(2 * _REACH, 4 * _REACH + 1)
    gathers, drifts = _over_drifts(curves, away, looked)
    common = shared[looked]
    if common.max() < _MIN_SHARED_STEPS:
        raise Weak(f"they share less than {_MIN_SHARED_STEPS * STEP_NS / 1e9:.0f} s")
    enough = common >= _MIN_SHARED_STEPS
    peak = int(np.argmax(np.where(enough, gathers, -np.inf)))
    height = gathers[peak]
    typical = gathers[common >= common.max() / 2]
    level = np.median(typical)
    spread = 1.4826 * np.median(np.abs(typical - level))
    certainty = float((height - level) / spread) if spread else 0.0
    if not (certainty >= MIN_CERTAINTY and height > 0):
        raise Weak(f"certainty {certainty:.1f}; at least {MIN_CERTAINTY:g} is needed")
    # About the right lag the correlation is that of a stream with itself, which is as high on one side as on the other.
    there = np.arange(2 * _REACH, 4 * _REACH + 1)
    mirrored = 2 * (peak + 2 * _REACH) - there
    inside = (mirrored >= 0) & (mirrored < len(shared))
    mirrored[~inside] = 0
    inside &= shared[mirrored] >= np.maximum(common / 2, 1)
    one = _gathered(curves, away, drifts[peak], slice(None))
    explained = np.where(inside, one[mirrored].clip(0) * common / np.maximum(shared[mirrored], 1), 0)
    apart = np.abs(there - there[peak]) > 2 * _NEAR_STEPS
    left = np.where(apart, gathers - explained, 0)
    rival_at = int(np.argmax(left))
    rival = float(left[rival_at] / height)
    asked = height * (1 - np.clip(rival, 1 - _AS_GOOD, 0.5)) * np.minimum(common / common[peak], 1)
    good = enough & (np.minimum(gathers, explained) >= np.maximum(asked, height / 2))
    good[peak] = True
    runs = np.split(np.flatnonzero(good), np.flatnonzero(np.diff(np.flatnonzero(good)) > 2 * _NEAR_STEPS) + 1)
    tops = np.array([run[np.argmax(gathers[run])] for run in runs])
    first = int(tops[np.argmin(np.abs(tops - _REACH + drifts[tops] * away[0]))])
    others = np.abs(tops[tops != first] - first)
    return _Best(
        first - _REACH, float(drifts[first]), float(starts.mean() + size / 2), certainty, rival, abs(rival_at - peak),
        int(others.min()) if len(others) else None,
    )  # fmt: skip


def _over_drifts(curves: Floats, away: Floats, looked: slice) -> tuple[Floats, Floats]:
    """How much the line through each lag gathers, on average of the curves, and with which drift, of those that are tried."""
    span = away[-1] - away[0]
    half = int(np.ceil(MAX_DRIFT_PPM / 1e6 * span / _STEPS_OF_DRIFT))
    best = np.full(looked.stop - looked.start, -np.inf)
    chosen = np.zeros(len(best))
    for drift in np.arange(-half, half + 1) * (_STEPS_OF_DRIFT / span):
        score = _gathered(curves, away, drift, looked)
        chosen = np.where(score > best, drift, chosen)
        best = np.maximum(score, best)
    return best, chosen


def _gathered(curves: Floats, away: Floats, drift: float, looked: slice) -> Floats:
    """The mean of the curves along the line of a drift through each lag; 0 is beyond them."""
    begin, end, _ = looked.indices(curves.shape[1])
    total = np.zeros(end - begin)
    for curve, shift in zip(curves, np.rint(drift * away).astype(int).tolist(), strict=True):
        low, high = max(begin + shift, 0), min(end + shift, len(curve))
        total[low - begin - shift : high - begin - shift] += curve[low:high]
    return total / len(curves)


def _check_rival(best: _Best, products: Floats) -> None:
    """Whether a line stands for itself: `products` are what it gathers, step by step."""
    events = np.add.reduceat(products, np.arange(0, len(products), _EVENT_STEPS))
    # As many as would give this sum if all were alike: of the two, or of the twenty, that meet by chance.
    count = float(events.sum() ** 2 / np.square(events).sum()) if events.any() else 0.0
    more = (1 - best.rival) * count
    if best.rival > MAX_RIVAL or more < MIN_EVENTS_MORE:
        raise Weak(
            f"an offset {best.rival_at * STEP_NS / 1e9:.2f} s away fits {best.rival:.0%} as well, by {more:.1f} events less; "
            f"needed: at most {MAX_RIVAL:.0%}, and {MIN_EVENTS_MORE:g} events"
        )


def _peaks(
    own: Floats, other: Floats, base: int, starts: NDArray[np.int64], size: int, expected: Floats
) -> tuple[Floats, Floats]:
    """Where each segment's correlation is highest near the lag expected, between steps by a parabola; and how high, or 0."""
    places, heights = expected.copy(), np.zeros(len(starts))
    for number, (start, lag) in enumerate(zip(starts.tolist(), np.rint(expected).astype(int).tolist(), strict=True)):
        near = _correlation(own[start : start + size], other, start + base - lag, _NEAR_STEPS)
        top = int(np.argmax(near))
        if 0 < top < len(near) - 1 and near[top] > 0:
            before, height, after = near[top - 1 : top + 2]
            places[number] = lag + top - _NEAR_STEPS + (before - after) / (2 * (before - 2 * height + after))
            heights[number] = height
    return places, heights


class _Line(NamedTuple):
    level: float
    slope: float
    level_error: float
    slope_error: float


def _line(x: Floats, y: Floats, weights: Floats) -> _Line:
    """A weighted line, with Huber's weights for outliers; x has the mean 0. Its slope is 0 where it cannot be told well."""
    used = np.flatnonzero(weights)
    if len(used) < 3:
        raise Weak("fewer than 3 segments of it have anything in common with the other")
    if len(used) > 3 and (x[used[-1]] - x[used[0]]) * STEP_NS >= _MIN_FOR_DRIFT_NS:
        line = _fitted(x, y, weights, level=False)
        if line.slope_error * 1e6 <= _MAX_DRIFT_ERROR_PPM:
            return line
    return _fitted(x, y, weights, level=True)


def _fitted(x: Floats, y: Floats, weights: Floats, level: bool) -> _Line:
    unit = float(np.abs(x).max())
    design = np.stack([np.ones(len(x)), x / unit], axis=1)[:, : 2 - level]
    used = weights / weights.sum()
    for _ in range(20):
        root = np.sqrt(used)
        solution = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        misses = np.abs(y - design @ solution)
        scale = 1.4826 * np.median(misses[weights > 0]) + _FINEST_STEPS
        used = weights * np.minimum(1, 1.345 * scale / np.maximum(misses, 1e-12))
        used /= used.sum()
    effective = 1 / np.square(used).sum()
    variance = (used * np.square(misses)).sum() / max(effective - design.shape[1], 1) + _FINEST_STEPS**2 / effective
    errors = np.sqrt(np.diag(np.linalg.pinv(design.T @ (design * used[:, None]))) * variance)
    if level:
        return _Line(float(solution[0]), 0.0, float(errors[0]), float("inf"))
    return _Line(float(solution[0]), float(solution[1]) / unit, float(errors[0]), float(errors[1]) / unit)
