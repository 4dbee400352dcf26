"""Guarded decoding of bytes that nobody vouches for: images, audio, text and readings of sensors; videos are in `video.py`.

Sizes are checked from the header, before anything is decoded. Whatever a codec raises comes out as
`DecodeError(reason, detail)`; only `MemoryError` passes. A detail holds no memory address and no path, so that the
same bad value writes the same quarantine row on every machine.

Reasons:

| reason | meaning |
|---|---|
| `empty` | no bytes, or a text of white space only |
| `too_large` | more bytes, pixels, seconds or channels than the limits below |
| `zero_size` | a header that says 0 pixels wide or high, or 0 samples |
| `invalid_utf8` | a text that is not UTF-8 |
| `no_stream` | a video file that has sound alone |
| `unsupported_format` | not one of the formats, pixel modes or sample rates that are decoded here |
| `decode_error` | the codec refused: damaged, truncated, or samples that are not finite |

What a codec has to say of bytes that it does decode (Pillow: `Corrupt EXIF data`) is silenced for the whole process
when this module is imported, in every thread: nobody could act on it, and the bytes would choose what is on the screen.
"""

import codecs
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from featurestore import containers
from featurestore.errors import DecodeError

if TYPE_CHECKING:
    import soundfile
    from PIL import Image

__all__ = [
    "REASONS", "check", "check_bytes", "check_pixels", "codec", "decode_audio", "decode_image", "decode_sensor", "decode_text",
    "sniff_extension",
]  # fmt: skip

REASONS = ("decode_error", "empty", "invalid_utf8", "no_stream", "too_large", "unsupported_format", "zero_size")

# Limits. Pillow itself warns from 89 million pixels on and refuses from 179 million.
MAX_IMAGE_PIXELS = 64_000_000
MAX_MEDIA_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_AUDIO_SECONDS = 3600.0
MAX_AUDIO_CHANNELS = 16
MAX_AUDIO_VALUES = 2**27
MAX_SAMPLE_RATE = 384_000

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
AUDIO_FORMATS = ("OGG", "WAV", "WAVEX", "FLAC")

_PARSING = threading.Lock()
"""NumPy parses a header as Python: where threads do so at once, 3.11 before 3.11.8 may raise SystemError (gh-106905)."""

# Once, here: warnings.catch_warnings around each value would be seen by the other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_text(raw: bytes) -> str:
    """Decode strict UTF-8; white space at both ends is kept.

    Raises:
        DecodeError: `empty`, `too_large` or `invalid_utf8`.
    """
    check_bytes(raw, MAX_TEXT_BYTES)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError("invalid_utf8", f"byte {error.start} of {len(raw)}: {error.reason}") from None
    if not text.strip():
        raise DecodeError("empty", "the text is white space only")
    return text


def decode_image(raw: bytes, smallest_side: int | None = None) -> "Image.Image":
    """Decode the first frame as 8-bit RGB, upright, with transparency laid on white.

    Args:
        raw: a PNG, JPEG, WebP, GIF, BMP or TIFF file.
        smallest_side: pixels; a JPEG may come out at 1/2, 1/4 or 1/8 of its size as long as neither side falls
            below this, and both are whole numbers of pixels: half of one would move the picture. It decodes large photographs
            several times faster. Other formats ignore it.

    Returns:
        The image, mode RGB. 16-bit grey keeps its upper 8 bits.

    Raises:
        DecodeError: any reason but `invalid_utf8`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_bytes(raw, MAX_MEDIA_BYTES)
    with codec("image"):
        try:
            image: Image.Image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            _refuse_zero_png(raw)
            raise DecodeError("unsupported_format", f"not a readable {', '.join(IMAGE_FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DecodeError("too_large", f"more than {MAX_IMAGE_PIXELS} pixels") from None
        check_pixels(*image.size)
        if smallest_side is not None:
            image.draft("RGB", _shrunk(*image.size, smallest_side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _on_white(image)


def _shrunk(width: int, height: int, smallest_side: int) -> tuple[int, int]:
    for scale in (8, 4, 2):
        if not width % scale and not height % scale and min(width, height) >= scale * smallest_side:
            return width // scale, height // scale
    return width, height


def decode_audio(raw: bytes, sample_rate: int, max_seconds: float | None = None) -> NDArray[np.float32]:
    """Decode to mono (the mean of the channels) and resample with soxr's HQ filter.

    Args:
        raw: an OGG (Vorbis, Opus), WAV or FLAC file; an ID3 tag before it is skipped.
        sample_rate: Hz of what comes out.
        max_seconds: decode no more than this from the start; None decodes everything.

    Returns:
        float32 [samples], full scale at 1.0.

    Raises:
        DecodeError: any reason but `invalid_utf8`. A file longer than MAX_AUDIO_SECONDS is `too_large` even where
            `max_seconds` would cut it. A truncated file is a `decode_error`: of an OGG a stream whose last page is not
            marked as its end, of a WAV a data chunk that says more bytes than there are, of a FLAC a missing frame
            before `max_seconds`. A WAV written to a pipe, whose data chunk says 0xFFFFFFFF bytes (or 0, in a RIFF of
            0 or 0xFFFFFFFF), does not know its length: what is there is played.
    """
    import soxr

    with codec("audio"), _opened(raw) as source:
        frames, rate = source.frames, source.samplerate
        if source.format not in AUDIO_FORMATS:
            raise DecodeError("unsupported_format", f"{source.format}; allowed: {', '.join(AUDIO_FORMATS)}")
        if not 0 < rate <= MAX_SAMPLE_RATE:
            raise DecodeError("unsupported_format", f"{rate} Hz; allowed: 1 to {MAX_SAMPLE_RATE}")
        if frames == _NO_LENGTH:
            raise DecodeError("unsupported_format", f"a {source.format} that does not say how many samples it has")
        if frames > MAX_AUDIO_SECONDS * rate or source.channels > MAX_AUDIO_CHANNELS:
            raise DecodeError("too_large", f"{frames / rate:.0f} s of {source.channels} channels")
        if max_seconds is not None:
            frames = min(frames, max(1, round(max_seconds * rate)))
        if frames * source.channels > MAX_AUDIO_VALUES:
            raise DecodeError("too_large", f"{frames * source.channels} values; allowed: {MAX_AUDIO_VALUES}")
        samples = source.read(frames, dtype="float32", always_2d=True)
        if len(samples) < frames:
            raise DecodeError("decode_error", f"truncated: {len(samples)} of {frames} samples")
        mono = samples.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise DecodeError("decode_error", "samples that are not finite")
        resampled: NDArray[np.float32] = soxr.resample(mono, rate, sample_rate, quality="HQ")
        if not len(resampled):
            raise DecodeError("zero_size", f"{len(samples)} samples at {rate} Hz are none at {sample_rate} Hz")
        return resampled


def decode_sensor(raw: bytes) -> NDArray[np.float32]:
    """Decode readings of a sensor: a `.npy` file of format 1 or 2 whose array is little-endian float32 [readings, channels].

    Returns:
        The array, C-contiguous: at least one reading and one channel, all finite.

    Raises:
        DecodeError: any reason but `invalid_utf8`. Nothing is unpickled: an array of objects is `unsupported_format`.
    """
    check_bytes(raw, MAX_MEDIA_BYTES)
    file = io.BytesIO(raw)
    if not raw.startswith(np.lib.format.MAGIC_PREFIX):
        raise DecodeError("unsupported_format", "not a .npy file")
    with codec("sensor"):
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DecodeError("unsupported_format", f".npy format {version[0]}.{version[1]}; allowed: 1.0, 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _PARSING:
            shape, by_column, kind = read(file)
        if kind != np.dtype("<f4") or len(shape) != 2 or by_column:
            raise DecodeError(
                "unsupported_format", f"{kind.str} {list(shape)}; allowed: <f4 [readings, channels] in C order"
            )
        if not all(shape):
            raise DecodeError("zero_size", f"{shape[0]} readings of {shape[1]} channels")
        if 4 * shape[0] * shape[1] != len(raw) - file.tell():
            raise DecodeError("decode_error", f"{len(raw) - file.tell()} bytes of {4 * shape[0] * shape[1]}")
        values = np.frombuffer(raw, "<f4", offset=file.tell()).reshape(shape)
        if not np.isfinite(values).all():
            raise DecodeError("decode_error", "readings that are not finite")
        return values


def check(modality: str, raw: bytes) -> None:
    """Decodes a value and throws it away; DecodeError where it cannot be decoded."""
    if modality == "text":
        decode_text(raw)
    elif modality == "image":
        decode_image(raw)
    elif modality == "sensor":
        decode_sensor(raw)
    elif modality == "video":
        from featurestore import video

        video.check(raw)
    else:
        decode_audio(raw, sample_rate_of(raw))


def sample_rate_of(raw: bytes) -> int:
    """Frames a second, in Hz, that a sound file's header states; DecodeError where it has none to read."""
    with codec("audio"), _opened(raw) as source:
        return int(source.samplerate)


def sniff_extension(raw: bytes) -> str:
    """Name the format by its first bytes, without a dot: what a tar member is called.

    Returns:
        `png`, `jpg`, `gif`, `bmp`, `tiff`, `webp`, `ogg`, `flac`, `wav`, `npy`, `mp4`, `mov`, `mkv`, `webm`, `avi`, `ts`,
        `txt` (UTF-8 without control characters in its first 4 KiB) or `bin`.
    """
    for magic, extension in _MAGIC:
        if raw.startswith(magic):
            return extension
    if raw[:4] == b"RIFF" and raw[8:12] in (b"WEBP", b"WAVE"):
        return {b"WEBP": "webp", b"WAVE": "wav"}[raw[8:12]]
    if _looks_like_text(raw[:4096], whole=len(raw) <= 4096):
        return "txt"
    return containers.sniff(raw) or "bin"


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"OggS", "ogg"),
    (b"fLaC", "flac"),
    (b"\x93NUMPY", "npy"),
)


def _looks_like_text(head: bytes, *, whole: bool) -> bool:
    try:
        # A character cut in two by the 4 KiB is no fault of the text.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError:
        return False
    return bool(head) and not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)


def check_bytes(raw: bytes, limit: int) -> None:
    if not raw:
        raise DecodeError("empty", "0 bytes")
    if len(raw) > limit:
        raise DecodeError("too_large", f"{len(raw)} bytes; allowed: {limit}")


def check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError("zero_size", f"{width} x {height} pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise DecodeError("too_large", f"{width} x {height} pixels; allowed: {MAX_IMAGE_PIXELS}")


def _refuse_zero_png(raw: bytes) -> None:
    """Tell a PNG of no pixels, which Pillow calls unidentified, from other broken files."""
    if sniff_extension(raw) == "png" and raw[12:16] == b"IHDR" and len(raw) >= 24:
        check_pixels(int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big"))


_UNKNOWN = 0xFFFFFFFF
_NO_LENGTH = 2**63 - 1
"""Frames, libsndfile's word for a FLAC whose header leaves its length out."""
_MPEG_IN_WAV = (0x50, 0x55)


def _opened(raw: bytes) -> "soundfile.SoundFile":
    """A sound file whose header is read; refused before if it is cut where libsndfile would play up to the cut.

    MPEG sound is refused here too, because libmpg123 writes to the screen what it finds wrong with a file.
    """
    import soundfile

    check_bytes(raw, MAX_MEDIA_BYTES)
    if raw.startswith(b"ID3"):
        # Ten bytes of header; the size in four of seven bits each (ID3v2.4, section 3.1).
        size = sum((byte & 0x7F) << shift for byte, shift in zip(raw[6:10], (21, 14, 7, 0), strict=False))
        raw = raw[10 + size :]
    if raw.startswith(b"ID3") or (raw[:1] == b"\xff" and raw[1:2] >= b"\xe0"):
        raise DecodeError("unsupported_format", f"MP3; allowed: {', '.join(AUDIO_FORMATS)}")
    if raw.startswith(b"OggS"):
        _refuse_cut_ogg(raw)
    elif raw.startswith((b"RIFF", b"RIFX")):
        raw = _checked_wav(raw)
    return soundfile.SoundFile(io.BytesIO(raw))


def _refuse_cut_ogg(raw: bytes) -> None:
    """Every page must be whole, and the last page of every logical stream marked as its end (RFC 3533, section 6)."""
    ended: dict[int, bool] = {}
    end = 0
    while (page := raw.find(b"OggS\0", end)) >= 0:
        table = page + 27 + int.from_bytes(raw[page + 26 : page + 27])
        end = table + sum(raw[page + 27 : table])
        if max(table, end) > len(raw):
            raise DecodeError("decode_error", f"truncated: {len(raw)} of at least {max(table, end)} bytes")
        ended[int.from_bytes(raw[page + 14 : page + 18], "little")] = bool(raw[page + 5] & 4)
    for stream, is_ended in ended.items():
        if not is_ended:
            raise DecodeError(
                "decode_error",
                f"truncated: the last page of stream {stream} is not marked as its end; if the sound is whole, mark it: "
                "ffmpeg -i IN -c copy OUT",
            )


def _checked_wav(raw: bytes) -> bytes:
    """The file, whose data chunk is whole or of unknown length, with the latter said in the one way libsndfile knows."""
    order: Literal["little", "big"] = "little" if raw.startswith(b"RIFF") else "big"
    unknown = int.from_bytes(raw[4:8], order) in (0, _UNKNOWN)
    chunk = 12
    while chunk + 8 <= len(raw):
        name, size = raw[chunk : chunk + 4], int.from_bytes(raw[chunk + 4 : chunk + 8], order)
        start = chunk + 8
        if name == b"fmt " and int.from_bytes(raw[start : start + 2], order) in _MPEG_IN_WAV:
            raise DecodeError("unsupported_format", "MPEG sound in a WAV")
        if name == b"data":
            if size == 0 and unknown:
                return raw[: chunk + 4] + _UNKNOWN.to_bytes(4, order) + raw[start:]
            if size != _UNKNOWN and start + size > len(raw):
                raise DecodeError("decode_error", f"truncated: {len(raw)} of at least {start + size} bytes")
            return raw
        chunk = start + size + size % 2
    return raw


def _on_white(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # 32-bit and floating-point pixels have no scale that the file names.
        raise DecodeError("unsupported_format", f"pixel mode {image.mode}; save it with 8 or 16 bits a channel")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(image, mask=image.getchannel("A"))
    return flat


@contextmanager
def codec(modality: str) -> Iterator[None]:
    """Turn whatever a codec raises, warnings made errors among it, into a DecodeError."""
    try:
        yield
    except DecodeError:
        raise
    except MemoryError as error:
        if not type(error).__module__.startswith("av."):
            raise
        # FFmpeg's own limit: a header asks for more than it gives to any file.
        raise DecodeError(
            "decode_error", f"the {modality} claims to need more memory than FFmpeg gives to any"
        ) from None
    except Exception as error:
        # libsndfile and Pillow name the buffer by its address.
        detail = re.sub(r"<_io\.BytesIO[^>]*>", f"the {modality}", str(error))
        raise DecodeError("decode_error", f"{type(error).__name__}: {detail}"[:300]) from None
