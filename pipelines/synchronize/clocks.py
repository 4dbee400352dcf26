"""Clocks: from a stream's own time to the recording's, by an offset and a drift that are given, or measured.

A clock is measured by cross-correlating the envelopes of two streams: how bright, loud or strong each is over time. Steps of
the envelope count and not its level (a Gaussian derivative), so that a sharp peak stands where flash and beep coincide. For a
drift of 0 within a segment of the recording, the correlation of each segment is taken apart; the offset and the drift whose
line through all of them gathers most are found first, and then refined by the peak of each segment beside that line, weighted
by what stands there, with outliers' weights reduced (Huber).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

__all__ = ["STEP_NS", "Clock", "Estimate", "Weak", "estimate", "grid"]

STEP_NS = 5_000_000
"""Step of the grid on which envelopes are compared; peaks are interpolated between."""

MAX_OFFSET_NS = 30 * 10**9
MAX_DRIFT_PPM = 200.0
"""How far a clock is looked for. Crystals of consumer devices are within 100 ppm of each other."""

MIN_CERTAINTY = 8.0
"""Of 340 pairs of streams that have nothing to do with each other the best lines stood at 5.6 deviations at the most; of
recordings of 60 s at 6 dB of noise at 10 at the least."""

_SMOOTH_STEPS = 3
"""Deviation of the Gaussian, 15 ms. Measured at 6 dB from 10 to 40 ms: the longer, the worse."""

_SEGMENT_STEPS = 10 * 10**9 // STEP_NS
_MIN_SEGMENTS, _MAX_SEGMENTS = 4, 128
_MIN_STEPS = 10 * 10**9 // STEP_NS
_MIN_FOR_DRIFT_NS = 30 * 10**9
_NEAR_STEPS = 12
"""A segment's own peak is looked for within 60 ms of the line."""

_AS_GOOD = 0.9
"""An offset that fits so well, against the best, may be the right one as well: the smallest is."""

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
    """

    clock: Clock
    offset_error_ns: int
    drift_error_ppm: float
    certainty: float


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

    Of offsets that fit nearly as well as the best (a beep each second fits at every second) that is taken which is the
    smallest at the reference's begin.

    Raises:
        Weak: they have nothing in common that stands out, or less than 10 s.
    """
    (stream_ns, other), (reference_ns, own) = ((begin, _steps_of(values)) for begin, values in (stream, reference))
    # In steps, an event at `i` of the reference stands at i + base - lag of the stream.
    base = round((reference_ns - stream_ns) / STEP_NS)
    rest_ns = reference_ns - stream_ns - base * STEP_NS
    reach = MAX_OFFSET_NS // STEP_NS
    count = min(max(len(own) // _SEGMENT_STEPS, _MIN_SEGMENTS), _MAX_SEGMENTS)
    size = min(len(own) // count, _SEGMENT_STEPS)
    starts = np.linspace(0, len(own) - size, count).astype(np.int64)
    curves = np.stack([_correlation(own[start : start + size], other, int(start) + base, reach) for start in starts])
    away = starts - starts.mean()
    places = starts[:, None] + base - np.arange(-reach, reach + 1)
    shared = (np.minimum(places + size, len(other)) - np.maximum(places, 0)).clip(0).sum(axis=0)
    lag, drift, certainty = _best_line(curves, away, shared >= shared.max() / 2)
    if certainty < MIN_CERTAINTY:
        raise Weak(f"certainty {certainty:.1f}; at least {MIN_CERTAINTY:g} is needed")
    peaks, heights = _peaks(curves, reach + lag + drift * away)
    # Of frames at a steady rate against beeps at another the misses beat slowly. Where the ends of the recording count less, a
    # part of a beat does not look like a drift: of 600 s at 29.97 Hz it made 6 ppm, and now 0.4.
    weights = heights * np.sin(np.pi * (np.arange(count) + 0.5) / count)
    line = _line(away, peaks - reach, weights, level=(away[-1] - away[0]) * STEP_NS < _MIN_FOR_DRIFT_NS)
    drift_ppm = round(line.slope / (1 - line.slope) * 1e6, 2)
    middle_ns = reference_ns + round((starts.mean() + size / 2) * STEP_NS)
    offset_ns = line.level * STEP_NS + rest_ns - middle_ns * (drift_ppm / (1e6 + drift_ppm))
    clock = Clock(round(offset_ns / 1000) * 1000, drift_ppm)
    return Estimate(clock, round(line.level_error * STEP_NS), line.slope_error * 1e6, round(certainty, 1))


def _steps_of(values: NDArray[np.float32]) -> Floats:
    if len(values) < _MIN_STEPS:
        raise Weak(f"{len(values) * STEP_NS / 1e9:.1f} s long; at least {_MIN_STEPS * STEP_NS / 1e9:.0f} s are needed")
    steps: Floats = ndimage.gaussian_filter1d(values.astype(np.float64), _SMOOTH_STEPS, order=1, mode="nearest")
    deviation = steps.std()
    if not deviation:
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


def _best_line(curves: Floats, away: Floats, typical: NDArray[np.bool_]) -> tuple[int, float, float]:
    """(lag in the middle, drift, certainty) of the line through the curves that gathers most; the others are `typical` ones."""
    reach = curves.shape[1] // 2
    span = away[-1] - away[0]
    half = int(np.ceil(MAX_DRIFT_PPM / 1e6 * span / _STEPS_OF_DRIFT))
    drifts = np.arange(-half, half + 1) * (_STEPS_OF_DRIFT / span)
    margin = int(np.ceil(np.abs(drifts).max() * np.abs(away).max())) + 1
    padded = np.pad(curves, ((0, 0), (margin, margin)))
    best = np.full(curves.shape[1], -np.inf)
    chosen = np.zeros(curves.shape[1])
    for drift in drifts:
        shifts = margin + np.rint(drift * away).astype(int)
        score = sum(row[shift : shift + len(best)] for row, shift in zip(padded, shifts, strict=True)) / len(curves)
        chosen = np.where(score > best, drift, chosen)
        best = np.maximum(score, best)
    good = np.flatnonzero(best >= _AS_GOOD * best.max())
    first = good[np.argmin(np.abs(good - reach + chosen[good] * away[0]))]
    low = max(0, first - 2 * _NEAR_STEPS)
    peak = low + int(np.argmax(best[low : first + 2 * _NEAR_STEPS + 1]))
    level = np.median(best[typical])
    spread = 1.4826 * np.median(np.abs(best[typical] - level))
    return peak - reach, float(chosen[peak]), float((best[peak] - level) / spread) if spread else 0.0


def _peaks(curves: Floats, expected: Floats) -> tuple[Floats, Floats]:
    """Where each curve is highest near the place expected, between its points by a parabola; and how high, 0 where nowhere."""
    places, heights = expected.copy(), np.zeros(len(curves))
    for number, (curve, place) in enumerate(zip(curves, expected, strict=True)):
        low = round(place) - _NEAR_STEPS
        near = curve[max(low, 0) : max(low, 0) + 2 * _NEAR_STEPS + 1]
        top = int(np.argmax(near)) if len(near) > 2 else 0
        if 0 < top < len(near) - 1 and near[top] > 0:
            before, height, after = near[top - 1 : top + 2]
            places[number] = max(low, 0) + top + (before - after) / (2 * (before - 2 * height + after))
            heights[number] = height
    return places, heights


class _Line(NamedTuple):
    level: float
    slope: float
    level_error: float
    slope_error: float


def _line(x: Floats, y: Floats, weights: Floats, level: bool) -> _Line:
    """A weighted line, of slope 0 where `level`, with Huber's weights for outliers; x has the mean 0."""
    if np.count_nonzero(weights) < 3:
        raise Weak("fewer than 3 segments of it have anything in common with the other")
    design = np.stack([np.ones(len(x)), np.zeros(len(x)) if level else x / np.abs(x).max()], axis=1)[:, : 2 - level]
    used = weights / weights.sum()
    solution = np.zeros(design.shape[1])
    for _ in range(20):
        scaled = design * used[:, None]
        solution = np.linalg.solve(design.T @ scaled, scaled.T @ y)
        misses = np.abs(y - design @ solution)
        scale = 1.4826 * np.median(misses[weights > 0]) + 1e-9
        used = weights * np.minimum(1, 1.345 * scale / np.maximum(misses, 1e-12))
        used /= used.sum()
    effective = 1 / np.square(used).sum()
    variance = (used * np.square(misses)).sum() / max(effective - design.shape[1], 1)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ (design * used[:, None]))) * variance)
    unit = 1.0 if level else float(np.abs(x).max())
    return _Line(
        float(solution[0]),
        0.0 if level else float(solution[1]) / unit,
        float(errors[0]),
        float("inf") if level else float(errors[1]) / unit,
    )
