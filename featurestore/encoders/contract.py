"""What every encoder promises, as checks: of Braid's own in its tests, of a person's by `braid check-encoder`.

Each check gives what does not hold. Values are made here, of each modality a few that differ in size.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore import media
from featurestore.encoders import BaseEncoder
from featurestore.errors import DecodeError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CHANNELS", "CHECKS", "EXAMPLES", "check", "decoded", "examples", "image", "readings", "samples", "sound"]

BATCH_TOLERANCE = 1e-4
"""By how much a component may move with the size of its batch: this, and a hundred-thousandth of itself."""

CHANNELS = 3
"""Of the examples of sensors."""

BAD = (b"", b"\xff\xfe\x00 neither text nor media")


_COLORS = ("red", "blue", "green", "black", "red", "red", "red")
_SIZES = ((200, 90), (200, 90), (200, 90), (200, 90), (1, 1), (40, 300), (500, 500))
_VIDEOS = (
    ((96, 64), 12),
    ((96, 64), 12),
    ((96, 64), 12),
    ((96, 64), 12),
    ((16, 16), 1),
    ((48, 120), 3),
    ((320, 240), 30),
)
_SOUNDS = ((110, 1.0), (220, 1.0), (440, 1.0), (880, 1.0), (1760, 0.01), (3000, 3.0), (55, 0.3))


def _texts() -> list[bytes]:
    birds = [f"a {color} bird" for color in ("red", "blue", "green", "black")]
    return [each.encode() for each in (*birds, "x", "Ein Vogel, рыба und 🐸.", "a long text " * 60)]


def _drawn(color: str, size: tuple[int, int], right: int = 0) -> "Image.Image":
    from PIL import Image

    drawn = Image.new("RGB", size, "white")
    drawn.paste(color, (size[0] // 4 + right, size[1] // 4, size[0] // 2 + right, size[1]))
    return drawn


def image(color: str, size: tuple[int, int]) -> bytes:
    """A PNG: a patch of a colour on white."""
    buffer = io.BytesIO()
    _drawn(color, size).save(buffer, "PNG")
    return buffer.getvalue()


def _video(color: str, size: tuple[int, int], frames: int) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_image(_drawn(color, size, number * size[0] // 60))))
        file.mux(stream.encode())
    return buffer.getvalue()


def sound(hertz: float, seconds: float) -> bytes:
    """A WAV at 16 kHz: a sine."""
    import soundfile

    wave = np.sin(2 * np.pi * hertz * np.arange(round(16_000 * seconds)) / 16_000)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave * 0.5, 16_000, format="WAV")
    return buffer.getvalue()


def readings(count: int, channels: int) -> bytes:
    """Readings of a sensor: a sine of its own in each channel."""
    time = np.arange(count)[:, None] / 50
    values = np.sin(2 * np.pi * time * (1 + np.arange(channels) + count / 100)) * (1 + count / 50)
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<f4"), allow_pickle=False)
    return buffer.getvalue()


EXAMPLES: dict[str, Callable[[], list[bytes]]] = {
    "text": _texts,
    "image": lambda: [image(color, size) for color, size in zip(_COLORS, _SIZES, strict=True)],
    "video": lambda: [_video(color, *video) for color, video in zip(_COLORS, _VIDEOS, strict=True)],
    "audio": lambda: [sound(hertz, seconds) for hertz, seconds in _SOUNDS],
    "sensor": lambda: [readings(count, CHANNELS) for count in (50, 64, 100, 128, 200)],
}
"""Modality -> what makes values of it, of unlike sizes and none like another."""


def examples(modality: str) -> list[bytes]:
    """Values of a modality."""
    return EXAMPLES[modality]()


def samples(encoder: BaseEncoder) -> list[tuple[bytes, ...]]:
    """Samples that have all the fields that an encoder reads."""
    return list(zip(*(examples(modality) for modality in encoder.reads), strict=False))


def decoded(encoder: BaseEncoder, sample: Sequence[bytes]) -> Any:
    """A sample that has all of its fields, as a value for `encode`."""
    return encoder.joined([encoder.decode_field(raw, place) for place, raw in enumerate(sample)])


def shape(encoder: BaseEncoder, values: Sequence[Any]) -> Iterator[str]:
    """One float32 row of `dim` components a value; none of no values."""
    made, none = encoder.encode(values), encoder.encode([])
    if made.shape != (len(values), encoder.dim) or none.shape != (0, encoder.dim):
        yield f"{made.shape} for {len(values)} values, {none.shape} for none, of {encoder.dim} components each"
    if made.dtype != np.float32:
        yield f"{made.dtype}, not float32"


def batches(encoder: BaseEncoder, values: Sequence[Any]) -> Iterator[str]:
    """A batch gives what each value gives alone, in the order given; the values are told apart."""
    together = encoder.encode(values)
    alone = np.concatenate([encoder.encode([value]) for value in values])
    off = np.abs(together - alone)
    if (off > BATCH_TOLERANCE + 1e-5 * np.abs(alone)).any():
        yield f"value {int(off.max(1).argmax())} differs by {off.max():.3g} in a batch"
    distance = np.linalg.norm(together[:, None] - together[None], axis=2) + np.eye(len(values)) * 9
    if distance.min() < 3e-3:
        yield "two unlike values have the same vector, so an order could not be seen"


def repeats(encoder: BaseEncoder, values: Sequence[Any]) -> Iterator[str]:
    """The same values give the same bytes, from several threads at once too."""
    with ThreadPoolExecutor(4) as pool:
        made = {each.tobytes() for each in pool.map(encoder.encode, [values] * 4)}
    if len(made) > 1:
        yield f"four calls gave {len(made)} results"


def finite(encoder: BaseEncoder, values: Sequence[Any]) -> Iterator[str]:
    """No NaN and no infinity; length 1 where the encoder says so."""
    made = encoder.encode(values)
    if not np.isfinite(made).all():
        yield "NaN or infinity"
    lengths = np.linalg.norm(made, axis=1)
    if encoder.normalised and not np.allclose(lengths, 1, atol=1e-5):
        yield f"of length {lengths.min():.3g} to {lengths.max():.3g}, not 1"


def rejects(encoder: BaseEncoder, values: Sequence[Any]) -> Iterator[str]:
    """Bytes that are no value raise DecodeError when they are decoded, and nothing else."""
    for place, bad in itertools.product(range(len(encoder.reads)), BAD):
        try:
            encoder.decode_field(bad, place)
        except DecodeError as error:
            if error.reason not in media.REASONS:
                yield f"reason {error.reason!r}; allowed: {', '.join(media.REASONS)}"
        except Exception as error:
            yield f"{type(error).__name__} for {bad!r}, not DecodeError: {error}"
        else:
            yield f"{bad!r} was decoded"


CHECKS: dict[str, Callable[[BaseEncoder, Sequence[Any]], Iterator[str]]] = {
    "shape and dtype": shape,
    "a batch of one is a batch of many, in order": batches,
    "the same bytes twice and in threads": repeats,
    "finite, and of length 1 where it says so": finite,
    "a bad value fails alone": rejects,
}


def check(encoder: BaseEncoder, tried: Sequence[Sequence[bytes]]) -> dict[str, list[str]]:
    """Every check, on samples -> what does not hold; nothing where it does. DecodeError where a value is rejected."""
    values = [decoded(encoder, sample) for sample in tried]
    return {name: list(_tried(each(encoder, values))) for name, each in CHECKS.items()}


def _tried(broken: Iterator[str]) -> Iterator[str]:
    try:
        yield from broken
    except Exception as error:
        # Of anybody's class: whatever it raises is what does not hold.
        yield f"it raises {type(error).__name__}: {error}"
