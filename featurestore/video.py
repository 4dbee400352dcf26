"""Guarded decoding of videos that nobody vouches for: frames at equal distances in time, upright, as 8-bit RGB.

A file is read twice. Once for the times of its frames, which decodes nothing and costs little; then of the frames that are
wanted, each from the key frame that it is built on. What stands between them is passed over, in memory, so that no container
has to know how to seek.

Raises DecodeError with the reasons of `featurestore.media`.
"""

import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore import containers, media
from featurestore.errors import DecodeError

__all__ = ["check", "pixels", "sample"]

MAX_SECONDS = 4 * 3600
MAX_FRAMES = 2**20
MAX_DECODED_PIXELS = 2**36
"""Of the frames that are decoded to get at those that are wanted: 9 minutes of 1920 x 1080 at 60 Hz without key frames."""


class _Times(NamedTuple):
    """What a video's packets say, in ticks of its stream.

    Args:
        shown: when each frame is shown, ascending.
        keys: when each key frame is shown, ascending.
        place: of each frame its packet's number, in the order of decoding.
        end: when the last frame is no more shown.
    """

    shown: list[int]
    keys: list[int]
    place: dict[int, int]
    end: int

    def key_of(self, time: int) -> int:
        """The key frame that the frame of a time is decoded from."""
        return self.keys[bisect_right(self.keys, time) - 1]

    def spread(self, count: int) -> list[int]:
        """The frames that are shown in the middle of each of `count` equal stretches; of a short video some come twice."""
        first, span = self.shown[0], self.end - self.shown[0]
        middles = [first + (2 * each + 1) * span // (2 * count) for each in range(count)]
        return [self.shown[bisect_right(self.shown, middle) - 1] for middle in middles]

    def decoded(self, wanted: Sequence[int]) -> int:
        """How many frames are decoded for some that are wanted, which ascend."""
        count, last = 0, -1
        for time in wanted:
            count += max(0, self.place[time] - max(last, self.place[self.key_of(time)] - 1))
            last = max(last, self.place[time])
        return count


def check(raw: bytes) -> None:
    """Reads the whole file and decodes its first frame; DecodeError where that fails or the file is beyond the limits."""
    for _ in _chosen(raw, lambda times: times.shown[:1]):
        pass


def sample(raw: bytes, count: int) -> Iterator[NDArray[np.uint8]]:
    """Frames in the order of their times, at equal distances over the video's duration: always the same of the same bytes.

    Args:
        raw: an MP4, QuickTime, Matroska, WebM, AVI or MPEG transport stream file; of several streams the first is read.
        count: how many; each is the one shown in the middle of one of `count` equal stretches.

    Yields:
        uint8 [height, width, 3], upright. A frame that two stretches share comes twice.

    Raises:
        DecodeError: `no_stream` where there is sound alone; any other reason but `invalid_utf8`. A file that is cut is a
            `decode_error` where its container says its length, as all do but transport streams: of those what is there is read.
    """
    return _chosen(raw, lambda times: times.spread(count))


def _chosen(raw: bytes, choose: Callable[[_Times], list[int]]) -> Iterator[NDArray[np.uint8]]:
    """The frames of the times that are chosen, which ascend and may repeat."""
    with media.codec("video"):
        with _opened(raw) as (container, stream):
            times = _times(container, stream)
            wanted = choose(times)
            _check_work(times, wanted, stream)
        with _opened(raw) as (container, stream):
            frames = _decoded(container, stream, times, wanted)
            for _, same in itertools.groupby(wanted):
                made = pixels(next(frames))
                yield from (made for _ in same)


def _check_work(times: _Times, wanted: Sequence[int], stream: Any) -> None:
    seconds = float((times.end - times.shown[0]) * stream.time_base)
    if seconds > MAX_SECONDS:
        raise DecodeError("too_large", f"{seconds:.0f} s; allowed: {MAX_SECONDS}")
    count, size = times.decoded(wanted), stream.codec_context.width * stream.codec_context.height
    if count * size > MAX_DECODED_PIXELS:
        raise DecodeError(
            "too_large",
            f"{count} frames of {size} pixels to decode; allowed: {MAX_DECODED_PIXELS} pixels; set more key frames",
        )


@contextmanager
def _opened(raw: bytes) -> Iterator[tuple[Any, Any]]:
    """PyAV's container, and its first video stream (a picture of the cover is none)."""
    import av

    media.check_bytes(raw, media.MAX_MEDIA_BYTES)
    if containers.sniff(raw) is None:
        raise DecodeError("unsupported_format", f"no video; allowed: {', '.join(containers.EXTENSIONS)}")
    if containers.stated_bytes(raw) > len(raw):
        raise DecodeError("decode_error", f"truncated: {len(raw)} of at least {containers.stated_bytes(raw)} bytes")
    with av.open(
        io.BytesIO(raw),
        options={"fflags": "+genpts"},  # AVI states when frames are decoded, not when they are shown
        container_options={"format_whitelist": containers.FORMATS},
        metadata_errors="replace",
    ) as container:
        shown = [s for s in container.streams.video if not s.disposition & s.disposition.__class__.attached_pic]
        if not shown:
            raise DecodeError("no_stream", "it has no video")
        context = shown[0].codec_context
        if context is None:
            raise DecodeError("unsupported_format", "its codec is not known here")
        media.check_pixels(context.width, context.height)
        # Also of a frame that is larger than the header says. Values are decoded in threads already.
        context.options, context.thread_count = {"max_pixels": str(media.MAX_IMAGE_PIXELS)}, 1
        yield container, shown[0]


def _times(container: Any, stream: Any) -> _Times:
    place: dict[int, int] = {}
    keys: list[int] = []
    end = number = 0
    for packet in container.demux(stream):
        # A stream that begins in its middle is shown from its first key frame on.
        if packet.pts is not None and packet.size and (keys or packet.is_keyframe):
            number += 1
            if packet.is_keyframe:
                keys.append(packet.pts)
            if not packet.is_discard:
                place[packet.pts] = number
                end = max(end, packet.pts + (packet.duration or 0))
        if number > MAX_FRAMES:
            raise DecodeError("too_large", f"more than {MAX_FRAMES} frames")
    keys.sort()
    shown = sorted(time for time in place if time >= keys[0])
    if not shown:
        raise DecodeError("decode_error", "it has no frame that can be decoded")
    gap = shown[-1] - shown[-2] if len(shown) > 1 else 0
    return _Times(shown, keys, place, max(end, shown[-1] + (0 if end > shown[-1] else gap)))


def _decoded(container: Any, stream: Any, times: _Times, wanted: Sequence[int]) -> Iterator[Any]:
    """PyAV's frames of some times, which ascend, each once."""
    left = sorted(set(wanted), reverse=True)
    reading: int | None = None  # the last key frame of those that are decoded without a gap
    for packet in container.demux(stream):
        if (
            packet.is_keyframe
            and packet.pts is not None
            and (reading is not None or packet.pts == times.key_of(left[-1]))
        ):
            if reading is None:
                stream.codec_context.flush_buffers()
            reading = packet.pts
        for frame in packet.decode() if reading is not None else ():
            while left and frame.pts is not None and frame.pts >= left[-1]:
                if frame.is_corrupt:
                    raise DecodeError(
                        "decode_error", f"the frame at {float(frame.pts * stream.time_base):.3f} s is damaged"
                    )
                left.pop()
                yield frame
        if not left:
            return
        if reading is not None and times.key_of(left[-1]) > reading:
            reading = None
    raise DecodeError("decode_error", f"no frame at {float(left[-1] * stream.time_base):.3f} s can be decoded")


def pixels(frame: Any, form: str = "rgb24") -> NDArray[np.uint8]:
    """A frame of PyAV's, upright: uint8 [height, width, 3], or [height, width] of form `gray`."""
    from av.video.reformatter import Interpolation

    # The same picture from the same frame on every kind of processor.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
    made: NDArray[np.uint8] = frame.reformat(format=form, interpolation=exact, threads=1).to_ndarray()
    if turns := round(frame.rotation / 90) % 4:
        made = np.ascontiguousarray(np.rot90(made, turns))
    return made
