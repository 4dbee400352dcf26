"""Guarded decoding of bytes that nobody vouches for: images, audio and text.

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
| `unsupported_format` | not one of the formats, pixel modes or sample rates that are decoded here |
| `decode_error` | the codec refused: damaged, truncated, or samples that are not finite |
"""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import DecodeError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["REASONS", "decode_audio", "decode_image", "decode_text", "sniff_extension"]

REASONS = ("decode_error", "empty", "invalid_utf8", "too_large", "unsupported_format", "zero_size")

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


def decode_text(raw: bytes) -> str:
    """Decode strict UTF-8; white space at both ends is kept.

    Raises:
        DecodeError: `empty`, `too_large` or `invalid_utf8`.
    """
    _check_bytes(raw, MAX_TEXT_BYTES)
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
            below this, which decodes photographs several times faster. Other formats ignore it.

    Returns:
        The image, mode RGB. 16-bit grey keeps its upper 8 bits.

    Raises:
        DecodeError: any reason but `invalid_utf8`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_bytes(raw, MAX_MEDIA_BYTES)
    with _codec("image"):
        try:
            image: Image.Image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            _refuse_zero_png(raw)
            raise DecodeError("unsupported_format", f"not a readable {', '.join(IMAGE_FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DecodeError("too_large", f"more than {MAX_IMAGE_PIXELS} pixels") from None
        _check_pixels(*image.size)
        if smallest_side is not None:
            image.draft("RGB", (smallest_side, smallest_side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _on_white(image)


def decode_audio(raw: bytes, sample_rate: int, max_seconds: float | None = None) -> NDArray[np.float32]:
    """Decode to mono (the mean of the channels) and resample with soxr's HQ filter.

    Args:
        raw: an OGG (Vorbis, Opus), WAV or FLAC file.
        sample_rate: Hz of what comes out.
        max_seconds: decode no more than this from the start; None decodes everything.

    Returns:
        float32 [samples], full scale at 1.0.

    Raises:
        DecodeError: any reason but `invalid_utf8`. A file longer than MAX_AUDIO_SECONDS is `too_large` even where
            `max_seconds` would cut it.
    """
    import soundfile
    import soxr

    _check_bytes(raw, MAX_MEDIA_BYTES)
    _refuse_cut_audio(raw)
    with _codec("audio"), soundfile.SoundFile(io.BytesIO(raw)) as source:
        frames, rate = source.frames, source.samplerate
        if source.format not in AUDIO_FORMATS:
            raise DecodeError("unsupported_format", f"{source.format}; allowed: {', '.join(AUDIO_FORMATS)}")
        if not 0 < rate <= MAX_SAMPLE_RATE:
            raise DecodeError("unsupported_format", f"{rate} Hz; allowed: 1 to {MAX_SAMPLE_RATE}")
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


def check(modality: str, raw: bytes) -> None:
    """Decodes a value and throws it away; DecodeError where it cannot be decoded."""
    if modality == "text":
        decode_text(raw)
    elif modality == "image":
        decode_image(raw)
    else:
        decode_audio(raw, sample_rate_of(raw))


def sample_rate_of(raw: bytes) -> int:
    """Frames a second, in Hz, that a sound file's header states; DecodeError where it has none to read."""
    import soundfile

    _check_bytes(raw, MAX_MEDIA_BYTES)
    with _codec("audio"), soundfile.SoundFile(io.BytesIO(raw)) as source:
        return int(source.samplerate)


def sniff_extension(raw: bytes) -> str:
    """Name the format by its first bytes, without a dot: what a tar member is called.

    Returns:
        `png`, `jpg`, `gif`, `bmp`, `tiff`, `webp`, `ogg`, `flac`, `wav`, `txt` (UTF-8 without control
        characters in its first 4 KiB) or `bin`.
    """
    for magic, extension in _MAGIC:
        if raw.startswith(magic):
            return extension
    if raw[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(raw[8:12], "bin")
    return "txt" if _looks_like_text(raw[:4096], whole=len(raw) <= 4096) else "bin"


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
)


def _looks_like_text(head: bytes, *, whole: bool) -> bool:
    try:
        # A character cut in two by the 4 KiB is no fault of the text.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError:
        return False
    return bool(head) and not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)


def _check_bytes(raw: bytes, limit: int) -> None:
    if not raw:
        raise DecodeError("empty", "0 bytes")
    if len(raw) > limit:
        raise DecodeError("too_large", f"{len(raw)} bytes; allowed: {limit}")


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError("zero_size", f"{width} x {height} pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise DecodeError("too_large", f"{width} x {height} pixels; allowed: {MAX_IMAGE_PIXELS}")


def _refuse_zero_png(raw: bytes) -> None:
    """Tell a PNG of no pixels, which Pillow calls unidentified, from other broken files."""
    if sniff_extension(raw) == "png" and raw[12:16] == b"IHDR" and len(raw) >= 24:
        _check_pixels(int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big"))


def _refuse_cut_audio(raw: bytes) -> None:
    """Find the truncated WAV and OGG files that libsndfile plays up to the cut without a word.

    A WAV written to a pipe says 0 or 0xFFFFFFFF bytes, which means unknown. FLAC is checked after decoding.
    """
    declared = 0
    if raw[:4] == b"RIFF":
        size = int.from_bytes(raw[4:8], "little")
        declared = 8 + size if 0 < size < 0xFFFFFFFF else 0
    elif raw[:4] == b"OggS":
        page = raw.rfind(b"OggS\0")
        segments = raw[page + 27 : page + 27 + raw[page + 26]] if page + 26 < len(raw) else b""
        declared = page + 27 + len(segments) + sum(segments)
    if declared > len(raw):
        raise DecodeError("decode_error", f"truncated: {len(raw)} of at least {declared} bytes")


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
def _codec(modality: str) -> Iterator[None]:
    """Turn whatever a codec raises, warnings made errors among it, into a DecodeError."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # libsndfile and Pillow name the buffer by its address.
        detail = re.sub(r"<_io\.BytesIO[^>]*>", f"the {modality}", str(error))
        raise DecodeError("decode_error", f"{type(error).__name__}: {detail}"[:300]) from None
