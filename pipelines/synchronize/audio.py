"""Sound: clips cut at the sample from any file that FFmpeg decodes, as FLAC without loss, and its loudness over time.

The time of a sample is its frame's presentation time plus its place in the frame. Where a container rounds those times (a
Matroska, to a millisecond) a frame that begins within one such step of the last one's end follows it.
"""

import io
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from featurestore import media
from featurestore.errors import DecodeError
from pipelines.sources.files import FileValue
from pipelines.synchronize import TIME_LIMIT_NS, Events
from pipelines.synchronize.container import CHUNK, NoStream, nanoseconds, opened

__all__ = ["Clip", "Clips", "events", "loudness"]

MAX_FLAC_CHANNELS = 8

_ALONE = ("pcm_", "flac")
"""Codecs of which each packet can be decoded without another, as FFmpeg's names begin."""

_NO_SAMPLES = np.empty((0, 1), np.int16)


def events(file: FileValue) -> Iterator[Events]:
    """The packets as intervals, in chunks; `index` counts them. Decodes nothing.

    Raises:
        NoStream, DecodeError: as `container.opened`.
    """
    with opened(file, "audio") as (container, stream):
        base, number, last = stream.time_base, 0, None
        found: list[tuple[int, int]] = []
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                start = nanoseconds(packet.pts, base)
                if last is None or start >= last:
                    found.append((start, nanoseconds(packet.pts + (packet.duration or 0), base)))
                    last = start
            if len(found) >= CHUNK or (found and not packet.size):
                times = np.array(found, np.int64)
                yield Events(times[:, 0], times[:, 1], np.arange(number, number + len(found), dtype=np.int64))
                number, found = number + len(found), []


class Clip(NamedTuple):
    """Decoded sound that can be fetched as FLAC: int16 or int32 (24 bits, in the upper three bytes) [samples, channels]."""

    samples: NDArray[Any]
    rate: int
    source: str

    def stat(self) -> tuple[int, str]:
        """Its size before it is compressed."""
        return self.samples.nbytes, ""

    def fetch(self) -> bytes:
        """The FLAC; `unsupported_format` of more channels than it can hold."""
        if self.samples.shape[1] > MAX_FLAC_CHANNELS:
            raise DecodeError(
                "unsupported_format",
                f"{self.source}: {self.samples.shape[1]} channels; allowed: {MAX_FLAC_CHANNELS}",
            )
        out = io.BytesIO()
        subtype = "PCM_16" if self.samples.dtype == np.int16 else "PCM_24"
        soundfile.write(out, self.samples, self.rate, subtype, format="FLAC")
        return out.getvalue()


class _Piece(NamedTuple):
    """Samples that follow each other; None where a packet could not be decoded. Times in ns."""

    begin_ns: int
    end_ns: int
    samples: NDArray[Any] | None


class Clips:
    """Clips of a sound, read in one pass: the windows' begins must ascend, from `begin_ns` on where that is given."""

    def __init__(self, file: FileValue, begin_ns: int | None = None) -> None:
        self._file, self._pieces = file, _pieces(file, begin_ns)
        self._begin_ns = -TIME_LIMIT_NS if begin_ns is None else begin_ns
        self._held: deque[_Piece] = deque()
        self._rate, self._shape = 0, (0, 0)
        self._ended = self._started = False
        self._failed: DecodeError | NoStream | None = None

    def get(self, begin_ns: int, end_ns: int) -> tuple[Clip | DecodeError | str, int]:
        """The samples in [begin, end), and the time of the first in ns.

        Where sound is missing in the middle there is silence; what is missing at either end is left out.

        Returns:
            A clip; or the error that keeps it from being decoded; or the reason why there is none: `no_stream`,
            `not_started`, `stream_ended` or `no_event`.
        """
        assert begin_ns >= self._begin_ns, "what is before it may be gone"
        self._begin_ns = begin_ns
        while self._held and self._held[0].end_ns <= begin_ns:
            self._held.popleft()
        while not self._ended and (not self._held or self._held[-1].end_ns < end_ns):
            self._read(begin_ns)
        if isinstance(self._failed, NoStream):
            return "no_stream", 0
        if self._failed is not None and (not self._held or self._held[-1].end_ns < end_ns):
            return self._failed, 0
        parts = [piece for piece in self._held if piece.begin_ns < end_ns and piece.end_ns > begin_ns]
        if any(piece.samples is None for piece in parts):
            return DecodeError("decode_error", f"{self._file.source}: sound that cannot be decoded"), 0
        cut = [each for each in (self._cut(piece, begin_ns, end_ns) for piece in parts) if len(each.samples)]  # type: ignore[arg-type]
        if not cut:
            missing = "no_event" if self._started else "not_started"
            return "stream_ended" if self._ended and not self._held else missing, 0
        return self._joined(cut), cut[0].begin_ns

    def _read(self, begin_ns: int) -> None:
        try:
            piece = next(self._pieces, None)
        except (DecodeError, NoStream) as error:
            self._failed, piece = error, None
        if piece is None:
            self._ended = True
            return
        rate, found = piece
        self._started = self._started or found.begin_ns <= begin_ns
        if found.samples is not None:
            self._rate = rate
        if found.end_ns > begin_ns:
            self._held.append(found)

    def _cut(self, piece: _Piece, begin_ns: int, end_ns: int) -> _Piece:
        assert piece.samples is not None
        first, beyond = (
            # A sample that is as near as times are rounded is in.
            min(max(-(-(2 * (time - piece.begin_ns) - 1) * self._rate // (2 * 10**9)), 0), len(piece.samples))
            for time in (begin_ns, end_ns)
        )
        start = piece.begin_ns + nanoseconds(first, Fraction(1, self._rate))
        return _Piece(start, piece.end_ns, piece.samples[first:beyond])

    def _joined(self, parts: list[_Piece]) -> Clip | DecodeError:
        joined: list[NDArray[Any]] = []
        size = 0
        for part in parts:
            assert part.samples is not None
            gap = round((part.begin_ns - parts[0].begin_ns) * self._rate / 10**9) - size
            if gap > 0:
                joined.append(np.zeros((gap, part.samples.shape[1]), part.samples.dtype))
            joined.append(part.samples[max(-gap, 0) :])
            size += max(gap, 0) + len(joined[-1])
        if size * parts[0].samples.shape[1] > media.MAX_AUDIO_VALUES:  # type: ignore[union-attr]
            return DecodeError("too_large", f"{self._file.source}: {size} samples; allowed: {media.MAX_AUDIO_VALUES}")
        if len({(each.dtype, each.shape[1]) for each in joined}) > 1:
            return DecodeError("decode_error", f"{self._file.source}: its number of channels changes")
        return Clip(np.concatenate(joined), self._rate, self._file.source)


def _pieces(file: FileValue, begin_ns: int | None = None) -> Iterator[tuple[int, _Piece]]:
    """(rate, piece) of every decoded frame, and of every packet that cannot be decoded; without samples before `begin_ns`.

    Nothing is sought for: the last bits of a lossy codec depend on all that was decoded before, and where a container rounds
    its times, a sample's place is counted from the beginning. Packets that stand alone, at exact times, are passed over.
    """
    with opened(file, "audio") as (container, stream):
        rate, end = stream.rate, None
        # Counted from there: the sum of what frames last would be off by half a nanosecond more with each.
        origin_ns, count = 0, 0
        alone = stream.codec_context.name.startswith(_ALONE) and stream.time_base == Fraction(1, rate or 1)
        for packet in container.demux(stream):
            if begin_ns is not None and alone and packet.pts is not None and packet.duration:
                begin, over = (nanoseconds(at, stream.time_base) for at in (packet.pts, packet.pts + packet.duration))
                if over <= begin_ns:
                    yield rate, _Piece(begin, over, _NO_SAMPLES)
                    continue
            try:
                frames = packet.decode()
            except Exception:
                # FFmpeg's errors are of many classes, and all mean this.
                if packet.pts is not None:
                    begin = nanoseconds(packet.pts, packet.time_base)
                    end = nanoseconds(packet.pts + (packet.duration or 1), packet.time_base)
                    origin_ns, count = end, 0
                    yield rate, _Piece(begin, end, None)
                continue
            for frame in frames:
                if frame.pts is None or not frame.samples:
                    continue
                if frame.sample_rate != rate:
                    raise DecodeError("decode_error", f"{file.source}: its sample rate changes")
                begin, tick = nanoseconds(frame.pts, frame.time_base), nanoseconds(1, frame.time_base)
                if frame.time_base != Fraction(1, rate) and end is not None and abs(begin - end) <= tick:
                    begin = end
                else:
                    origin_ns, count = begin, 0
                count += frame.samples
                end = origin_ns + nanoseconds(count, Fraction(1, rate))
                is_before = begin_ns is not None and end <= begin_ns
                yield rate, _Piece(begin, end, _NO_SAMPLES if is_before else _samples(frame))


def _samples(frame: Any) -> NDArray[Any]:
    """int16 [samples, channels] of what has 16 bits or fewer, else int32 with 24 bits in its upper three bytes."""
    given: NDArray[Any] = frame.to_ndarray()
    given = given.T if frame.format.is_planar else given.reshape(-1, frame.layout.nb_channels)
    if given.dtype == np.int16:
        return np.ascontiguousarray(given)
    if given.dtype == np.uint8:
        wide: NDArray[np.int16] = (given.astype(np.int16) - 128) << 8
        return wide
    if given.dtype != np.int32:
        scaled = np.rint(np.clip(np.nan_to_num(given.astype(np.float64)), -1, 1) * (1 << 23))
        given = np.minimum(scaled, (1 << 23) - 1).astype(np.int32) << 8
    whole: NDArray[np.int32] = given & ~0xFF
    return whole


def loudness(file: FileValue, step_ns: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Chunks of (time in ns int64 [N], root mean square float32 [N], full scale at 1) over steps of about `step_ns`."""
    for rate, piece in _pieces(file):
        if piece.samples is None:
            continue
        full = 1 << (15 if piece.samples.dtype == np.int16 else 31)
        power = np.square(piece.samples.astype(np.float64) / full).mean(axis=1)
        size = max(1, min(len(power), round(step_ns * rate / 10**9)))
        starts = np.arange(0, len(power), size)
        counts = np.diff(np.append(starts, len(power)))
        middle = (starts + counts / 2) * 1e9 / rate
        yield (
            piece.begin_ns + np.rint(middle).astype(np.int64),
            np.sqrt(np.add.reduceat(power, starts) / counts).astype(np.float32),
        )
