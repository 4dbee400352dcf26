"""One recording: its streams on one clock, its windows, and the value of each stream in each window.

Nothing of a stream is held but what the windows in hand need: its times are merged with the windows in one pass, and its
values are read beside that in another; where long windows hold many short ones, in some more. A stream that is measured
against another one is read once more before, and so is that.

A stream that breaks off with an error is good up to there: of later windows its value is that error.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from featurestore.errors import DecodeError, InputError
from pipelines.sources import Missing, Value
from pipelines.sources.files import FileValue
from pipelines.synchronize import (
    TIME_LIMIT_NS,
    Events,
    WindowChunk,
    audio,
    container,
    sensor,
    subtitles,
    video,
)
from pipelines.synchronize.clock_store import Measured
from pipelines.synchronize.clocks import STEP_NS, Clock, Envelope, Estimate, Weak, estimate, grid
from pipelines.synchronize.container import NoStream
from pipelines.synchronize.values import Given, Refused, Stream, arrays, frames, layout, matched, sounds, texts
from pipelines.synchronize.windows import every, per_event

__all__ = ["MAX_WINDOWS", "Recording", "Window"]

MAX_WINDOWS = 10_000_000
"""In a recording."""

CHUNK = 256
"""Windows that are merged at once."""

_TEXT_BYTES, _READING_BYTES = 200, 4096


class Window(NamedTuple):
    """One window of a recording, [begin, end) in ns, with what each field has in it.

    Args:
        values: field -> value, or why there is none.
        residual_ns: field -> how far from what was asked for the value is, where there is one. Of sound: how much later than
            the window its first sample is. Of others: Matches' `residual_ns`.
        covered_ns: field -> how much of the window what is there covers, of sound (to a sample; silence in its gaps counts) and
            of `overlap`: Matches' `overlap_ns`. None of others.
    """

    number: int
    begin_ns: int
    anchor_ns: int
    end_ns: int
    values: dict[str, Value | Missing | None]
    residual_ns: dict[str, int | None]
    covered_ns: dict[str, int | None]


class Recording:
    """One recording.

    Args:
        name: what errors call it.
        files: field -> its file, or None where the recording has none.
        fields: the fields of a corpus of streams, as its spec has them.
        windows: `every` and `length` in ns, or `per`, a field, and `length`; perhaps an `anchor`, one of windows.ANCHORS.
    """

    def __init__(
        self, name: str, files: Mapping[str, FileValue | None], fields: Mapping[str, Any], windows: Mapping[str, Any]
    ) -> None:
        self._name, self._files, self._fields, self._windows = name, files, fields, windows
        self._headers: dict[str, container.Header | None] = {}
        self._envelopes: dict[str, Envelope | DecodeError | Weak] = {}
        self.estimates: dict[str, Measured] = {}
        """Field -> its measured clock, or why there is none. What `read` does not find here it measures."""
        self.unread: DecodeError | None = None
        """What keeps a file from being read now, of those that tell of the windows, as far as was looked."""

    def windows(self) -> Iterator[WindowChunk]:
        """All windows, on the recording's clock; one at least.

        Windows at a fixed distance begin at whole multiples of it, from the first event of any stream to the last, of those
        whose clock is not measured.

        Raises:
            InputError: more than MAX_WINDOWS.
        """
        length, anchor = self._windows["length"], self._windows.get("anchor", "centre")
        if self._windows["per"] is not None:
            cut = per_event(self._whole(self._windows["per"]), length, anchor)
        else:
            step = self._windows["every"]
            first, last = self._extent()
            first = first // step * step
            if (last - first) // step >= MAX_WINDOWS:
                raise InputError(
                    f"recording {self._name!r}: its streams reach from {first / 1e9:.3f} s to {last / 1e9:.3f} s, more than "
                    f"{MAX_WINDOWS} windows; correct the unit or the offset of a field's clock, or windows.every"
                )
            cut = every(first, last, step, length, anchor)
        count = 0
        for chunk in cut:
            count += len(chunk.begin_ns)
            if count > MAX_WINDOWS:
                raise InputError(f"recording {self._name!r}: more than {MAX_WINDOWS} windows; name another windows.per")
            yield chunk
        if not count:
            yield WindowChunk(*(np.array([time], np.int64) for time in (0, 0, 1)))

    def _extent(self) -> tuple[int, int]:
        """From the first event of any stream to the last, on the recording's clock."""
        spans = [
            span
            for name, field in self._fields.items()
            if field["clock"]["estimate"] is None and (span := self._span(name)) is not None
        ]
        return (min(first for first, _ in spans), max(last for _, last in spans)) if spans else (0, 1)

    def _span(self, name: str) -> tuple[int, int] | None:
        header = self._header(name)
        if header is not None and header.span_ns is not None:
            first, last = self._clock(name).to_reference(np.array(header.span_ns, np.int64))
            return int(first), int(last)
        first_ns, last_ns = TIME_LIMIT_NS, -TIME_LIMIT_NS
        for chunk in self._whole(name):
            if len(chunk.start_ns):
                first_ns = min(first_ns, int(chunk.start_ns[0]))
                last_ns = max(last_ns, int(chunk.end_ns.max()))
        return (first_ns, last_ns) if first_ns <= last_ns else None

    def _header(self, name: str) -> container.Header | None:
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        return self._headers[name]

    def _read_header(self, name: str) -> container.Header | None:
        file, kind = self._files[name], _MEDIA.get(self._fields[name]["modality"])
        if file is None or kind is None:
            return None
        try:
            return container.header(file, kind)
        except NoStream:
            return None
        except DecodeError as error:
            self._note(error)
            return None

    def _note(self, error: DecodeError | None) -> None:
        if self.unread is None and error is not None and error.reason == "unreadable":
            self.unread = error

    def _whole(self, name: str) -> Iterator[Events]:
        """A stream's events on the recording's clock, as far as they can be read."""
        stream = Stream(self._events(name), self._clock(name))
        yield from stream
        self._note(stream.error)

    def _clock(self, name: str) -> Clock:
        given = self._fields[name]["clock"]
        return Clock(given["offset"], given["drift"])

    def bytes_per_window(self) -> int:
        """About how many bytes the values of a window have as they are stored: from the headers of its files."""
        length_s = (self._windows["length"] or 10**9) / 1e9
        size = 0
        for name, field in self._fields.items():
            header = self._header(name)
            if header is not None:
                size += header.frame_bytes + round(header.bytes_per_s * length_s)
            elif self._files[name] is not None:
                size += _TEXT_BYTES if field["modality"] == "text" else _READING_BYTES
        return size

    def _events(self, name: str) -> Iterator[Events]:
        file, field = self._files[name], self._fields[name]
        if file is None:
            return iter(())
        if field["modality"] == "image":
            return video.events(file)
        if field["modality"] == "audio":
            return audio.events(file)
        if field["modality"] == "text":
            return _of_cues(file)
        return sensor.events(file, layout(field))

    def read(self, numbers: Sequence[int]) -> Iterator[Window]:
        """Some windows, by their numbers from 0, which must ascend, with their values.

        Raises:
            InputError: a number that the recording has no window of.
        """
        chunks = list(_chosen(self.windows(), numbers))
        if not chunks or sum(len(chunk.begin_ns) for chunk in chunks) != len(numbers):
            raise InputError(
                f"recording {self._name!r} has no window {numbers[-1]} any more: its files changed while the job ran; run "
                "it again"
            )
        given = {name: self._given(name, chunks) for name in self._fields}
        left = iter(numbers)
        for chunk in chunks:
            for begin, anchor, end in zip(*(column.tolist() for column in chunk), strict=True):
                found = {name: next(each) for name, each in given.items()}
                yield Window(
                    next(left), begin, anchor, end,
                    {name: each.value for name, each in found.items()},
                    {name: each.residual_ns for name, each in found.items()},
                    {name: each.covered_ns for name, each in found.items()},
                )  # fmt: skip

    def _given(self, name: str, chunks: list[WindowChunk]) -> Iterator[Given]:
        """What a field has in each window, in their order."""
        file, field = self._files[name], self._fields[name]
        if file is None:
            return iter([Given(None)] * sum(len(chunk.begin_ns) for chunk in chunks))
        clock = self._measured(name) if field["clock"]["estimate"] is not None else self._clock(name)
        windows = (window for chunk in chunks for window in zip(*(column.tolist() for column in chunk), strict=True))
        if not isinstance(clock, Clock):
            value = Missing("no_clock") if isinstance(clock, Weak) else Refused(clock, file.source)
            return (Given(value) for _ in windows)
        if field["modality"] == "audio":
            return sounds(file, field, clock, chunks)
        if field["modality"] == "image":
            # A nanosecond that a clock rounds, and one that its inverse does.
            begin = video.start(file, int(clock.to_stream(chunks[0].begin_ns[:1])[0]) - 2)
            return matched(file, field, clock, chunks, video.events(file, begin), frames(file))
        if field["modality"] == "text":
            return matched(file, field, clock, chunks, self._events(name), texts(file, field, clock))
        events = self._events(name)
        if field["policy"] == "overlap":
            events = sensor.held(events, field["staleness"])
        return matched(file, field, clock, chunks, events, arrays(file, field, clock))

    def measure(self) -> None:
        """Measures every clock that is to be: decodes those streams, and the ones they are measured against, whole."""
        for name, field in self._fields.items():
            if field["clock"]["estimate"] is not None:
                self._measured(name)

    def _measured(self, name: str) -> Clock | DecodeError | Weak:
        """The clock of a field, measured against another one."""
        if name not in self.estimates:
            self.estimates[name] = self._estimate(name, self._fields[name]["clock"]["estimate"])
        found = self.estimates[name]
        return found.clock if isinstance(found, Estimate) else found

    def _estimate(self, name: str, reference: str) -> Measured:
        own, other = (self._envelope(each) for each in (name, reference))
        if isinstance(own, DecodeError | Weak):
            return own
        if isinstance(other, DecodeError) and other.reason == "unreadable":
            # That may be mended, so this is no recording without a clock.
            return other
        if isinstance(other, DecodeError | Weak):
            return Weak(f"of {reference}: {other}")
        given = self._clock(name)
        try:
            # What is measured is what is left beside the offset that is given.
            found = estimate((own[0] + given.offset_ns, own[1]), other)
        except Weak as weak:
            return weak
        return found._replace(clock=found.clock._replace(offset_ns=found.clock.offset_ns + given.offset_ns))

    def _envelope(self, name: str) -> Envelope | DecodeError | Weak:
        """How strong a stream is over time; a reference's on the recording's clock, another's on its own."""
        if name not in self._envelopes:
            file, field = self._files[name], self._fields[name]
            try:
                if file is None:
                    raise Weak("the recording has none")
                samples = _strength(file, field)
                if field["clock"]["estimate"] is None:
                    clock = self._clock(name)
                    samples = ((clock.to_reference(times), values) for times, values in samples)
                self._envelopes[name] = grid(samples)
            except NoStream as error:
                self._envelopes[name] = Weak(str(error))
            except (DecodeError, Weak) as error:
                self._envelopes[name] = error
        return self._envelopes[name]


_MEDIA: dict[str, container.Kind] = {"image": "video", "audio": "audio"}


def _of_cues(file: FileValue) -> Iterator[Events]:
    yield from subtitles.events(subtitles.cues(file))


def _strength(file: FileValue, field: Mapping[str, Any]) -> Iterator[Any]:
    if field["modality"] == "image":
        return video.brightness(file)
    if field["modality"] == "audio":
        return audio.loudness(file, STEP_NS)
    return sensor.magnitude(file, layout(field))


def _chosen(windows: Iterable[WindowChunk], numbers: Sequence[int]) -> Iterator[WindowChunk]:
    """Windows of some numbers, ascending, in chunks."""
    wanted, done = np.array(numbers, np.int64), 0
    for chunk in windows:
        size = len(chunk.begin_ns)
        own = wanted[np.searchsorted(wanted, done) : np.searchsorted(wanted, done + size)] - done
        for start in range(0, len(own), CHUNK):
            yield WindowChunk(*(column[own[start : start + CHUNK]] for column in chunk))
        done += size
        if not len(wanted) or done > wanted[-1]:
            return
