"""Media files as FFmpeg reads them, opened so that a file can name no other, and the times in them as int64 nanoseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import av

from featurestore import media
from featurestore.errors import DecodeError
from pipelines.sources.files import FileValue

FORMATS = "aac,asf,avi,flac,flv,matroska,webm,mov,mp4,m4a,mp3,mpeg,mpegts,mxf,ogg,wav,w64"
"""FFmpeg's names of the containers that are read. Playlists, and lists of files, are none of them: they open other files."""

CHUNK = 4096
"""Events in a chunk, at the most."""


Kind = Literal["video", "audio"]


class NoStream(Exception):
    """A media file without a stream of the kind that is asked for: a video with no audio."""


def nanoseconds(ticks: int, time_base: Fraction) -> int:
    """A time in ticks, in nanoseconds; half of one is rounded up."""
    return (2 * ticks * time_base.numerator * 10**9 + time_base.denominator) // (2 * time_base.denominator)


@contextmanager
def opened(file: FileValue, kind: Kind) -> Iterator[tuple[Any, Any]]:
    """PyAV's container, and its first stream of a kind (a picture of the cover is none).

    Raises:
        NoStream: there is none.
        DecodeError: `unreadable`; `unsupported_format`; `decode_error`, also of what PyAV raises inside the context;
            `too_large` where a picture has more pixels than `featurestore.media` allows.
    """
    with file.open() as raw, told(file.source):
        with av.open(raw, "r", container_options={"format_whitelist": FORMATS}, metadata_errors="replace") as container:
            for stream in getattr(container.streams, kind):
                if not stream.disposition & stream.disposition.__class__.attached_pic:
                    if stream.codec_context is None:
                        raise DecodeError(
                            "unsupported_format", f"{file.source}: its {kind} has a codec that is not known here"
                        )
                    if kind == "video":
                        _check_size(stream.codec_context, file.source)
                    yield container, stream
                    return
            raise NoStream(f"{file.source} has no {kind}")


def _check_size(context: Any, source: str) -> None:
    if context.width * context.height > media.MAX_IMAGE_PIXELS:
        raise DecodeError(
            "too_large", f"{source}: {context.width} x {context.height} pixels; allowed: {media.MAX_IMAGE_PIXELS}"
        )
    context.options = {"max_pixels": str(media.MAX_IMAGE_PIXELS)}


@contextmanager
def told(source: str) -> Iterator[None]:
    """Makes DecodeErrors of what FFmpeg raises."""
    try:
        yield
    except (DecodeError, NoStream, GeneratorExit):
        raise
    # One of its errors, of a header that asks for more than FFmpeg gives to any file, is a MemoryError too.
    except av.error.FFmpegError as error:
        # FFmpeg calls a container that is not allowed an invalid argument.
        unknown = isinstance(error, av.error.InvalidDataError | av.error.DemuxerNotFoundError | av.error.ArgumentError)
        what = "no media that is read here, or damaged" if unknown else error.strerror or type(error).__name__
        raise DecodeError("decode_error", f"{source}: {what}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DecodeError(
            "unreadable", f"{source}: {getattr(error, 'strerror', None) or type(error).__name__}"
        ) from error


class Header(NamedTuple):
    """What a file says of a stream before it is read.

    Args:
        span_ns: when it begins and ends in its own time; None where the header does not say, or FFmpeg only estimates it.
        bytes_per_s: about how many its sound has as FLAC: a byte a sample of 16 bits or fewer, 2 of more, which is what a lossy
            codec gives; 0 of a video.
        frame_bytes: about how many a frame has as PNG: half of its pixels' (photographs have from 0.4 to 0.6); 0 of sound.
    """

    span_ns: tuple[int, int] | None
    bytes_per_s: int
    frame_bytes: int


def header(file: FileValue, kind: Kind) -> Header:
    """What the header says. Raises as `opened`.

    Its span is trusted where the one who wrote the file has counted: MP4 and QuickTime, Matroska and WebM with a Duration, FLAC
    with a number of samples, WAV and Wave64 of PCM, Ogg that begins at 0. In others (ADTS, MP3, MPEG, AVI, FLV, ASF, MXF, and
    those above that say nothing) FFmpeg reckons from bytes and a bit rate, or cannot say whether it did: their packets tell.
    """
    with opened(file, kind) as (container, stream):
        context = stream.codec_context
        per_s = (
            (1 if context.format and context.format.bytes <= 2 else 2) * stream.rate * stream.channels
            if kind == "audio"
            else 0
        )
        frame = 3 * context.width * context.height // 2 if kind == "video" else 0
        return Header(_span(container, stream), per_s, frame)


def _span(container: Any, stream: Any) -> tuple[int, int] | None:
    format_name, begin = container.format.name, stream.start_time or 0
    if format_name.startswith("matroska"):
        # Its Duration is of the whole file and counts from 0. One of the stream FFmpeg makes up.
        if stream.duration is not None or not container.duration or container.duration < 0:
            return None
        first = (container.start_time or 0) * 1000
        return first, max(first, container.duration * 1000)
    counted = (
        format_name.startswith("mov,")
        or format_name == "flac"
        or (format_name in ("wav", "w64") and stream.codec_context.name.startswith("pcm_"))
        or (format_name == "ogg" and begin == 0)
    )
    if not counted or not stream.duration or stream.duration < 0:
        return None
    return nanoseconds(begin, stream.time_base), nanoseconds(begin + stream.duration, stream.time_base)
