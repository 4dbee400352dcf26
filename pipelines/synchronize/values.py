"""What a stream has in each window of a recording: its events merged with the windows, and the value of what is matched."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import DecodeError, InputError
from pipelines.sources import Missing, Value
from pipelines.sources.files import FileValue
from pipelines.sources.rows import InlineText
from pipelines.synchronize import TIME_LIMIT_NS, Events, Int64s, WindowChunk, audio, sensor, subtitles, video
from pipelines.synchronize.clocks import Clock
from pipelines.synchronize.container import NoStream
from pipelines.synchronize.merge import REASONS, align

__all__ = ["Given", "Refused", "Stream", "arrays", "frames", "layout", "matched", "sounds", "texts"]

AHEAD = 16
"""Windows that are looked at before the first of them is given; so many frames are held where windows lie in others."""


class Refused(NamedTuple):
    """A value that cannot be given."""

    error: DecodeError
    source: str

    def stat(self) -> tuple[int, str]:
        return 0, ""

    def fetch(self) -> bytes:
        raise self.error


class Given(NamedTuple):
    """What a field has in a window; the residual and what is covered, as Window has them."""

    value: Value | Missing | None
    residual_ns: int | None = None
    covered_ns: int | None = None


class Stream:
    """Events on the recording's clock, up to where they can be read.

    `error` is what ended them before their end, `read_to_ns` the time of the last before it.
    """

    def __init__(self, events: Iterable[Events], clock: Clock) -> None:
        self._events, self._clock = events, clock
        self.error: DecodeError | None = None
        self.has_stream = True
        self.read_to_ns = -TIME_LIMIT_NS

    def __iter__(self) -> Iterator[Events]:
        try:
            for start, end, index in self._events:
                yield Events(self._clock.to_reference(start), self._clock.to_reference(end), index)
                if len(start):
                    self.read_to_ns = int(self._clock.to_reference(start[-1:])[0])
        except DecodeError as error:
            self.error = error
        except NoStream:
            self.has_stream = False


def matched(
    file: FileValue,
    field: Mapping[str, Any],
    clock: Clock,
    chunks: list[WindowChunk],
    events: Iterator[Events],
    value: "_Values",
) -> Iterator[Given]:
    """What a stream of events has in each window, in their order.

    Values are read in the order of the stream. Where the anchor of a long window stands after those of some that begin later,
    theirs are read before and held, of AHEAD windows at the most; farther back the reader has to go again.
    """
    found = _found(file, field, clock, chunks, events)
    ahead: deque[tuple[Given, _Match | None]] = deque()
    while True:
        ahead.extend(itertools.islice(found, AHEAD - len(ahead)))
        if not ahead:
            return
        if (wanted := ahead[0][1]) is not None:
            before = (
                (match.first, at, match)
                for at, (_, match) in enumerate(ahead)
                if match is not None and match.first <= wanted.first
            )
            for _, at, match in sorted(before):
                ahead[at] = ahead[at][0]._replace(value=_or_refused(value, file, match)), None
        yield ahead.popleft()[0]


def _found(
    file: FileValue, field: Mapping[str, Any], clock: Clock, chunks: list[WindowChunk], events: Iterator[Events]
) -> Iterator[tuple[Given, "_Match | None"]]:
    """What is known of each window before values are read, and what its value is to be made of, if there is one."""
    stream = Stream(events, clock)
    policy = field["policy"]
    # Readings that hold are over by then.
    staleness = None if field["modality"] == "sensor" and policy == "overlap" else field["staleness"]
    merged = align(iter(chunks), iter(stream), policy, field["tolerance"], staleness)
    for chunk in chunks:
        matches = None
        try:
            matches = next(merged, None)
        except InputError as error:
            # Of times that a file can hold and no recording has.
            stream.error = DecodeError("decode_error", f"{file.source}: {error}")
        asked = chunk.end_ns if policy in ("window", "overlap") else chunk.anchor_ns
        for row in range(len(asked)):
            if stream.error is not None and (matches is None or asked[row] > stream.read_to_ns):
                yield Given(Refused(stream.error, file.source)), None
            elif matches is None or not stream.has_stream:
                yield Given(Missing("no_stream")), None
            elif reason := int(matches.reason[row]):
                yield Given(Missing(REASONS[reason])), None
            else:
                first, last, weight, residual, _, overlap = (column[row].item() for column in matches)
                match = _Match(int(chunk.begin_ns[row]), int(chunk.end_ns[row]), first, last, weight, overlap)
                yield Given(None, residual, overlap if policy == "overlap" else None), match


def _or_refused(value: "_Values", file: FileValue, match: "_Match") -> Value:
    try:
        return value(match)
    except DecodeError as error:
        return Refused(error, file.source)


class _Match(NamedTuple):
    """What is matched in a window of [begin, end) ns, as Matches has it."""

    begin: int
    end: int
    first: int
    last: int
    weight: float
    overlap_ns: int


_Values = Callable[[_Match], Value]
"""A value, or DecodeError."""


def frames(file: FileValue) -> _Values:
    found_in = video.Frames(file)

    def value(match: _Match) -> Value:
        found = found_in.get(match.first)
        if isinstance(found, DecodeError):
            raise found
        return found

    return value


def texts(file: FileValue, field: Mapping[str, Any], clock: Clock) -> _Values:
    cues: list[subtitles.Cue] = []

    def value(match: _Match) -> Value:
        cues.extend(() if cues else subtitles.cues(file))
        said = cues[match.first : match.last + 1]
        if field["policy"] == "overlap":
            times = clock.to_reference(np.array([cue[:2] for cue in said], np.int64))
            inside = (times[:, 1] > match.begin) | (times[:, 0] >= match.begin)
            said = [cue for cue, is_inside in zip(said, inside, strict=True) if is_inside]
        for cue in said:
            if cue.wrong is not None:
                raise cue.wrong
        return InlineText("\n".join(cue.text for cue in said), file.source)

    return value


def arrays(file: FileValue, field: Mapping[str, Any], clock: Clock) -> _Values:
    rows = sensor.Rows(file, layout(field), timed=field["policy"] == "overlap")

    def value(match: _Match) -> Value:
        times, found = rows.get(match.first, match.last)
        if field["policy"] == "linear":
            found = (found[:1] + match.weight * (found[-1:] - found[:1])) if match.weight else found[:1]
        elif field["policy"] == "overlap":
            until = clock.to_reference(sensor.hold(times[:-1], times[1:], field["staleness"]))
            found = _mean(match, clock.to_reference(times[:-1]), until, found)
        return sensor.Array(found, file.source)

    return value


def _mean(match: _Match, start: Int64s, until: Int64s, readings: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean [1, channels] of readings, each weighted by how long it holds in the window; of a moment alone the last."""
    weights = np.maximum(np.minimum(until, match.end) - np.maximum(start, match.begin), 0)
    # How long the last holds is what the others leave of what all do: the next is not read.
    weights = np.append(weights, match.overlap_ns - weights.sum())
    if not match.overlap_ns:
        return readings[-1:]
    counted = weights > 0
    return (weights[counted] / match.overlap_ns @ readings[counted])[None]


def sounds(file: FileValue, field: Mapping[str, Any], clock: Clock, chunks: list[WindowChunk]) -> Iterator[Given]:
    """The clip of each window."""
    clips = audio.Clips(file, int(clock.to_stream(chunks[0].begin_ns[:1])[0]) if chunks else None)
    for chunk in chunks:
        starts, ends = (clock.to_stream(times).tolist() for times in (chunk.begin_ns, chunk.end_ns))
        bounds = zip(chunk.begin_ns.tolist(), chunk.end_ns.tolist(), starts, ends, strict=True)
        for begin, end, own_begin, own_end in bounds:
            found, first_ns = clips.get(own_begin, own_end)
            late_ns = int(clock.to_reference(np.array([first_ns]))[0]) - begin
            if isinstance(found, DecodeError):
                yield Given(Refused(found, file.source))
            elif isinstance(found, str):
                yield Given(Missing(found))
            elif field["tolerance"] is not None and late_ns > field["tolerance"]:
                yield Given(Missing("out_of_tolerance"))
            else:
                length_ns = len(found.samples) * 10**9 // found.rate
                until = int(clock.to_reference(np.array([first_ns + length_ns]))[0])
                yield Given(found, late_ns, min(until, end) - begin - late_ns)


def layout(field: Mapping[str, Any]) -> sensor.Layout:
    return sensor.Layout(field["time"], field["clock"]["unit"], tuple(field["channels"] or ()))
