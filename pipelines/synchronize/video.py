"""Video: the frames of a file at their true presentation times, and as PNG.

Times are those of the packets, so that a frame that cannot be decoded has one too. A frame is a moment, its presentation
time, and not the time until the next. (An AVI has none, and FFmpeg makes them up in the order of decoding: of H.264 with
B-frames in one, frames are told as not to be decoded that FFmpeg shows at a wrong time.)

A frame is told by its time, so that it is the same one from wherever the file is read: who needs none before some time begins
at a key frame, which `start` finds.
"""

import heapq
import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurestore.errors import DecodeError
from featurestore.video import pixels
from pipelines.sources.files import FileValue
from pipelines.synchronize import TIME_LIMIT_NS, Events
from pipelines.synchronize.container import CHUNK, NoStream, nanoseconds, opened, told

__all__ = ["Frame", "Frames", "Start", "brightness", "events", "start"]

MAX_REORDER = 64
"""Packets between a frame's place in the file and in time; H.264 and H.265 allow 16 frames."""

_IDR = 5
"""A NAL unit's type, ISO/IEC 14496-10, table 7-1."""

_SEEKS = 4
"""So often a key frame is sought for, further back each time."""


class Start(NamedTuple):
    """Where to begin: `target` is sought for, and the key frame at `pts` comes first; ticks of the stream's time base."""

    target: int
    pts: int


def start(file: FileValue, time_ns: int) -> Start | None:
    """Where to begin for the frames from a time of the stream on, and the last before it; None: from the beginning.

    That is so where a container has no list of its key frames, to be trusted and to be sought in: only MP4, QuickTime, Matroska
    and WebM have. And where it cannot be read, which is told where it is.
    """
    try:
        with opened(file, "video") as (container, stream):
            if not container.format.name.startswith(("mov,", "matroska")):
                return None
            last, is_whole = _key_frame(container, stream, _ticks(time_ns, stream.time_base))
            return last if last is None or is_whole else _key_frame(container, stream, last.pts - 1)[0]
    except (DecodeError, NoStream):
        return None


def _ticks(time_ns: int, base: Fraction) -> int:
    # A seek takes an int64.
    return max(-(1 << 62), min(time_ns * base.denominator // (base.numerator * 10**9), 1 << 62))


def _key_frame(container: Any, stream: Any, latest: int) -> tuple[Start | None, bool]:
    """The last key frame that is not presented after a time, and whether it is whole by itself."""
    target = latest
    # What is sought for is a time of decoding, in some containers: frames are presented later.
    for _ in range(_SEEKS):
        try:
            container.seek(target, stream=stream)
            packet = next(container.demux(stream))
        except av.error.FFmpegError:
            # Before the first.
            break
        if packet.pts is None or not packet.is_keyframe:
            break
        if packet.pts <= latest:
            return Start(target, packet.pts), _is_whole(packet, stream.codec_context)
        target = min(target, packet.pts if packet.dts is None else packet.dts) - 1
    return None, False


def _is_whole(packet: Any, context: Any) -> bool:
    """Whether a key frame is built on nothing before it.

    Of H.264 an IDR picture is; another one may begin a refresh in stripes, which is over at the next key frame.
    """
    if context.name != "h264":
        return True
    head = context.extradata or b""
    if len(head) < 5 or head[0] != 1:
        # Not as MP4 and Matroska are to have it: units after their lengths, whose size this tells (ISO/IEC 14496-15).
        return False
    data, size, at = bytes(packet), (head[4] & 3) + 1, 0
    while at + size < len(data):
        if data[at + size] & 31 == _IDR:
            return True
        at += size + int.from_bytes(data[at : at + size])
    return False


@contextmanager
def _opened(file: FileValue, begin: Start | None) -> Iterator[tuple[Any, Any]]:
    with opened(file, "video") as (container, stream):
        if begin is not None:
            container.seek(begin.target, stream=stream)
        yield container, stream


def events(file: FileValue, begin: Start | None = None) -> Iterator[Events]:
    """The frames as moments, in chunks; `index` is their time, for which `Frames` has them. Decodes nothing.

    Raises:
        NoStream, DecodeError: as `container.opened`.
    """
    with _opened(file, begin) as (container, stream):
        order, base = _Order(begin), stream.time_base
        chunk: list[int] = []
        for packet in container.demux(stream):
            chunk += order.push(packet) if packet.size else order.rest()
            while len(chunk) >= CHUNK or (chunk and not packet.size):
                times = np.array([nanoseconds(pts, base) for pts in chunk[:CHUNK]], np.int64)
                yield Events(times, times, times)
                chunk = chunk[CHUNK:]


class _Order:
    """Presentation times of packets, given in the order of decoding, put in their own order; each once."""

    def __init__(self, begin: Start | None) -> None:
        self._waiting: list[int] = []
        self._last = None if begin is None else begin.pts - 1

    def push(self, packet: Any) -> list[int]:
        """Takes a packet; returns the times before which none can come any more."""
        if packet.pts is None or packet.is_discard:
            return []
        heapq.heappush(self._waiting, packet.pts)
        ready = []
        while self._waiting and (
            len(self._waiting) > MAX_REORDER or (packet.dts is not None and self._waiting[0] <= packet.dts)
        ):
            ready += self._pop()
        return ready

    def rest(self) -> list[int]:
        """The times left at the end."""
        ready = []
        while self._waiting:
            ready += self._pop()
        return ready

    def _pop(self) -> list[int]:
        pts = heapq.heappop(self._waiting)
        if self._last is not None and pts <= self._last:
            return []
        self._last = pts
        return [pts]


class Frame(NamedTuple):
    """A decoded frame that can be fetched as a PNG of 8-bit RGB, upright; uint8 [height, width, 3]."""

    pixels: NDArray[np.uint8]
    source: str

    def stat(self) -> tuple[int, str]:
        """Its size before it is compressed."""
        return self.pixels.nbytes, ""

    def fetch(self) -> bytes:
        """The PNG."""
        out = io.BytesIO()
        Image.fromarray(self.pixels).save(out, "PNG", compress_level=1)
        return out.getvalue()


class Frames:
    """The frames of a video by their times in its own ns, as `events` has them.

    In one pass as long as the times ascend, or repeat; to go back the file is opened again, at a key frame where that can be.
    """

    def __init__(self, file: FileValue) -> None:
        self._file = file
        self._found: Iterator[tuple[int, Any]] = iter(())
        self._read_to = -TIME_LIMIT_NS
        self._frame: Any = None
        """The last that was read, None where it cannot be decoded, or what ended the reading."""
        self._made: tuple[int, Frame | DecodeError] | None = None

    def get(self, time_ns: int) -> Frame | DecodeError:
        """The frame of exactly this time, or why it cannot be decoded."""
        if self._made is None or time_ns < self._made[0]:
            self._found = _frames(self._file, start(self._file, time_ns))
            self._read_to, self._frame = -TIME_LIMIT_NS, None
        if self._made is None or time_ns != self._made[0]:
            self._made = time_ns, self._read(time_ns)
        return self._made[1]

    def _read(self, time_ns: int) -> Frame | DecodeError:
        try:
            while self._read_to < time_ns:
                self._read_to, self._frame = next(self._found, (TIME_LIMIT_NS, None))
        except DecodeError as error:
            # So all that comes after is lost.
            self._read_to, self._frame = TIME_LIMIT_NS, error
        if isinstance(self._frame, DecodeError):
            return self._frame
        if self._read_to != time_ns or self._frame is None:
            what = f"the frame at {time_ns / 1e9:.6f} s cannot be decoded"
            return DecodeError("decode_error", f"{self._file.source}: {what}")
        try:
            with told(self._file.source):
                return Frame(pixels(self._frame), self._file.source)
        except DecodeError as error:
            return error


def _frames(file: FileValue, begin: Start | None = None) -> Iterator[tuple[int, Any]]:
    """(time in ns, frame, or None where it cannot be decoded) of every frame that `events` has.

    A frame that is lost or damaged spoils those that are decoded after it, up to the next key frame: they may be built on it.
    """
    with _opened(file, begin) as (container, stream):
        order, decoding, base = _Order(begin), _Decoding(begin), stream.time_base
        waiting: deque[int] = deque()
        for packet in container.demux(stream):
            waiting.extend(order.push(packet) if packet.size else order.rest())
            decoding.push(packet)
            while waiting:
                found, frame = decoding.pop(waiting[0], len(waiting) > MAX_REORDER)
                if not found:
                    break
                yield nanoseconds(waiting.popleft(), base), frame


class _Decoding:
    """Frames by their times, told good or not once all that was decoded before them is.

    A frame that is presented before the key frame that it is decoded after is built on earlier ones too, and none on it.
    """

    def __init__(self, begin: Start | None) -> None:
        self._begin = begin
        self._packets: deque[tuple[int, bool, bool]] = deque()
        self._frames: dict[int, Any] = {}
        self._told: dict[int, Any] = {}
        self._read_to: int | None = None
        self._key: int | None = None
        self._ended = self._spoiled = self._spoiled_before = False

    def push(self, packet: Any) -> None:
        """Decodes a packet."""
        if packet.pts is not None and not packet.is_discard and not self._is_before(packet.pts):
            self._packets.append((packet.pts, packet.is_keyframe, packet.is_corrupt))
        self._ended = not packet.size
        try:
            frames = packet.decode()
        except Exception:
            # FFmpeg's errors are of many classes, and all mean that no frame comes of it.
            return
        for frame in frames:
            if frame.pts is not None and not self._is_before(frame.pts):
                self._frames[frame.pts] = frame
                self._read_to = frame.pts

    def pop(self, pts: int, late: bool) -> tuple[bool, Any]:
        """Whether it is told yet what became of a frame, and the frame, or None; where it is `late` it is lost."""
        while self._packets and pts not in self._told:
            time, is_key, is_corrupt = self._packets[0]
            if not (self._ended or late or (self._read_to is not None and time <= self._read_to)):
                return False, None
            self._packets.popleft()
            frame = self._frames.pop(time, None)
            lost = frame is None or frame.is_corrupt or is_corrupt
            if self._key is not None and time < self._key:
                self._told[time] = None if lost or self._spoiled_before else frame
                continue
            if is_key:
                self._key, self._spoiled_before, self._spoiled = time, self._spoiled, False
            self._spoiled = self._spoiled or lost
            self._told[time] = None if self._spoiled else frame
        return True, self._told.pop(pts, None)

    def _is_before(self, pts: int) -> bool:
        return self._begin is not None and pts < self._begin.pts


def brightness(file: FileValue) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Chunks of (time in ns int64 [N], mean brightness 0 to 255 float32 [N]) of the frames that can be decoded."""
    times: list[int] = []
    values: list[float] = []
    for time_ns, frame in _frames(file):
        if frame is not None:
            times.append(time_ns)
            values.append(float(pixels(frame, "gray").mean()))
        if len(times) >= CHUNK:
            yield np.array(times, np.int64), np.array(values, np.float32)
            times, values = [], []
    yield np.array(times, np.int64), np.array(values, np.float32)
