"""Bytes that nobody vouches for: what is decoded, and which reason each kind of damage gets."""

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from featurestore import media
from featurestore.errors import DecodeError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tone(kind: str, subtype: str, rate: int = 48_000, hertz: float = 440.0, seconds: float = 1.0) -> bytes:
    wave = np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave[:, None] * [0.5, 0.1], rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def reason(decode: object, *arguments: object) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(*arguments)  # type: ignore[operator]
    assert caught.value.reason in media.REASONS
    assert "0x" not in caught.value.detail, "an address would change the quarantine's bytes from run to run"
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_a_lossless_image_comes_back_as_it_was(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(media.decode_image(encoded(noise(), kind, **options)), noise())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 127))
    pixels = np.asarray(media.decode_image(encoded(image.convert(mode), "TIFF")))
    assert pixels[0, :, 0].tolist() == [255, 0, 128]


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    pixels = np.asarray(media.decode_image(encoded(image, transparency=0)))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "GIF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("LAB", "TIFF")]
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    white = Image.new("RGB", (16, 16), "white")
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(white, lab[1], lab[0], outputMode="LAB")
    else:
        image = white.convert(mode)
    decoded = media.decode_image(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() > 250


def test_sixteen_bits_keep_their_upper_eight() -> None:
    grey = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    assert np.asarray(media.decode_image(encoded(grey)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    # What is stored, so that the picture, seen upright, has red at its top left and blue at its top right.
    [
        (1, lambda stored: stored),
        (3, lambda stored: stored.transpose(Image.Transpose.ROTATE_180)),
        (6, lambda stored: stored.transpose(Image.Transpose.ROTATE_270)),
        (8, lambda stored: stored.transpose(Image.Transpose.ROTATE_90)),
        (2, lambda stored: stored.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ],
)
def test_exif_rotation_is_applied_the_right_way_round(
    orientation: int, upright: Callable[[Image.Image], Image.Image]
) -> None:
    stored = Image.new("RGB", (40, 20), "white")
    stored.paste("red", (0, 0, 20, 10))
    stored.paste("blue", (20, 0, 40, 10))
    exif = stored.getexif()
    exif[0x0112] = orientation
    found = np.asarray(media.decode_image(encoded(stored, "PNG", exif=exif)))
    np.testing.assert_array_equal(found, np.asarray(upright(stored)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    raw = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    with Image.open(io.BytesIO(raw)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    np.testing.assert_array_equal(np.asarray(media.decode_image(raw)), np.asarray(frames[0]))


def test_a_jpeg_shrinks_no_further_than_asked() -> None:
    photograph = encoded(noise(512), "JPEG")
    assert media.decode_image(photograph, smallest_side=100).size == (128, 128)
    assert media.decode_image(photograph).size == (512, 512)


def test_a_jpeg_shrinks_to_whole_pixels_alone() -> None:
    photograph = encoded(Image.new("RGB", (1028, 1032)), "JPEG")
    assert media.decode_image(photograph, smallest_side=100).size == (257, 258)
    photograph = encoded(Image.new("RGB", (1027, 1032)), "JPEG")
    assert media.decode_image(photograph, smallest_side=100).size == (1027, 1032)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_half_an_image_is_an_error(kind: str) -> None:
    raw = encoded(noise(), kind)
    assert reason(media.decode_image, raw[: len(raw) // 2]) == "decode_error"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((0, 0), "zero_size"), ((0, 5), "zero_size"), ((60_000, 60_000), "too_large"), ((8_001, 8_000), "too_large")],
)
def test_pixels_are_counted_before_decoding(size: tuple[int, int], expected: str) -> None:
    assert reason(media.decode_image, png_of_size(*size)) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "empty"),
        (b"a text", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (encoded(Image.new("RGB", (2, 2)), "PPM"), "unsupported_format"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "unsupported_format"),
    ],
)
def test_what_is_no_image_says_why(raw: bytes, expected: str) -> None:
    assert reason(media.decode_image, raw) == expected


def test_running_out_of_memory_is_not_the_values_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        media.decode_image(b"x")


@pytest.mark.parametrize(
    ("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("WAV", "PCM_16"), ("FLAC", "PCM_16")]
)
def test_sound_comes_out_mono_at_the_rate_asked_for(kind: str, subtype: str) -> None:
    samples = media.decode_audio(tone(kind, subtype), 16_000)
    assert samples.dtype == np.float32
    assert len(samples) == 16_000
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() == 440
    # The mean of the two channels' 0.5 and 0.1.
    assert np.sqrt(2 * np.mean(samples[2000:-2000] ** 2)) == pytest.approx(0.3, abs=0.01)


def test_eight_channels_at_96_khz_are_their_mean_at_the_rate_asked_for() -> None:
    time = np.arange(96_000) / 96_000
    tone = np.sin(2 * np.pi * 440 * time)
    found = media.decode_audio(wav(tone[:, None] * np.arange(8) / 28, 96_000), 16_000)  # a mean of an eighth
    assert found.shape == (16_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) / 8
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=2e-3)
    # What the lower rate cannot hold is filtered out, not folded down.
    high = media.decode_audio(wav(np.sin(2 * np.pi * 20_000 * time), 96_000), 16_000)
    assert np.abs(high[500:-500]).max() < 1e-3


def test_a_sound_of_one_sample_is_that_sample() -> None:
    np.testing.assert_allclose(media.decode_audio(wav(np.array([0.25])), 16_000), [0.25], atol=1e-6)


def test_long_sound_is_cut_from_the_start() -> None:
    whole = media.decode_audio(tone("WAV", "PCM_16", 16_000, seconds=3), 16_000)
    assert np.array_equal(media.decode_audio(tone("WAV", "PCM_16", 16_000, seconds=3), 16_000, 1.0), whole[:16_000])


@pytest.mark.parametrize(
    ("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("WAV", "PCM_16"), ("FLAC", "PCM_16")]
)
def test_half_a_sound_is_an_error(kind: str, subtype: str) -> None:
    raw = tone(kind, subtype, seconds=20)
    assert reason(media.decode_audio, raw[: len(raw) // 2], 16_000) == "decode_error"


def pages(ogg: bytes) -> list[int]:
    """Where the pages of an OGG begin, and where the last one ends."""
    starts = [0]
    while (page := starts[-1]) < len(ogg):
        assert ogg.startswith(b"OggS\0", page)
        segments = ogg[page + 27 : page + 27 + ogg[page + 26]]
        starts.append(page + 27 + len(segments) + sum(segments))
    return starts


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_cut_between_two_pages_is_an_error(subtype: str) -> None:
    whole = tone("OGG", subtype, seconds=8)
    starts = pages(whole)
    assert len(starts) > 6
    for cut in starts[1:-1]:
        assert reason(media.decode_audio, whole[:cut], 16_000) == "decode_error"
        # A few bytes of the next page's header, and a part of its table of segments.
        for more in (3, 20, 27, 28):
            assert reason(media.decode_audio, whole[: cut + more], 16_000) == "decode_error"


def test_an_ogg_of_two_streams_is_cut_when_either_is() -> None:
    first, second = (tone("OGG", "VORBIS", seconds=seconds) for seconds in (8, 4))
    media.decode_audio(first + second, 16_000)
    for cut in (first[: pages(first)[-2]] + second, first + second[: pages(second)[-2]]):
        assert reason(media.decode_audio, cut, 16_000) == "decode_error"


def test_bytes_after_an_oggs_end_are_no_part_of_it() -> None:
    whole = tone("OGG", "VORBIS")
    assert np.array_equal(media.decode_audio(whole + b"TAG" * 100, 16_000), media.decode_audio(whole, 16_000))


def sized(raw: bytes, riff: int, data: int) -> bytes:
    """A WAV with other sizes in the headers of its file and of its data."""
    order = "<I" if raw.startswith(b"RIFF") else ">I"
    at = raw.index(b"data") + 4
    return raw[:4] + struct.pack(order, riff) + raw[8:at] + struct.pack(order, data) + raw[at + 4 :]


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("riff", [None, 0, 2**32 - 1])
def test_a_wav_with_less_data_than_it_says_is_an_error(riff: int | None, *, big_endian: bool) -> None:
    buffer = io.BytesIO()
    endian = "BIG" if big_endian else "FILE"
    soundfile.write(buffer, np.full(4000, 0.5), 16_000, format="WAV", subtype="PCM_16", endian=endian)
    raw = buffer.getvalue()
    assert len(media.decode_audio(raw, 16_000)) == 4000
    for content, data in ((raw, 10**9), (raw, 8001), (raw[:-1], 8000), (raw[:1000], 8000)):
        cut = sized(content, len(content) - 8 if riff is None else riff, data)
        assert reason(media.decode_audio, cut, 16_000) == "decode_error"


@pytest.mark.parametrize(("riff", "data"), [(2**32 - 1, 2**32 - 1), (0, 2**32 - 1), (0, 0), (2**32 - 1, 0)])
def test_a_wav_from_a_pipe_does_not_know_its_length_and_is_played(riff: int, data: int) -> None:
    raw = wav(np.full(4000, 0.5), subtype="PCM_16")
    assert np.array_equal(media.decode_audio(sized(raw, riff, data), 16_000), media.decode_audio(raw, 16_000))


def test_a_flac_cut_anywhere_is_an_error() -> None:
    whole = tone("FLAC", "PCM_16")
    # Every frame begins with this; what a coded sample looks like it too does no harm here.
    frames = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xf8"]
    assert len(frames) > 8
    for cut in (*frames, len(whole) - 1):
        assert reason(media.decode_audio, whole[:cut], 16_000) == "decode_error"


def test_a_flac_without_a_length_says_so() -> None:
    whole = bytearray(tone("FLAC", "PCM_16"))
    # 36 bits of STREAMINFO, from the middle of byte 21 on.
    whole[21:26] = bytes([whole[21] & 0xF0, 0, 0, 0, 0])
    with pytest.raises(DecodeError, match="FLAC that does not say how many samples"):
        media.decode_audio(bytes(whole), 16_000)


TAG = b"ID3\x03\0\0\0\0\x01\x02" + bytes(130)


@pytest.mark.parametrize("kind", [("OGG", "VORBIS"), ("WAV", "PCM_16"), ("FLAC", "PCM_16")])
def test_a_tag_before_a_sound_changes_nothing(kind: tuple[str, str]) -> None:
    whole = tone(*kind)
    assert np.array_equal(media.decode_audio(TAG + whole, 16_000), media.decode_audio(whole, 16_000))
    assert media.sample_rate_of(TAG + whole) == 48_000
    assert reason(media.decode_audio, TAG + whole[:-1], 16_000) == "decode_error"


def mpeg_in_wav(mpeg: bytes) -> bytes:
    layout = struct.pack("<HHIIHHHHIHHH", 0x55, 2, 48_000, 16_000, 1, 0, 12, 1, 2, 1152, 1, 0)
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(mpeg)) + mpeg
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def test_damaged_mpeg_sound_is_refused_and_writes_nothing_on_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    mpeg = tone("MP3", "MPEG_LAYER_III", seconds=2)
    mpeg = mpeg[: len(mpeg) // 2] + b"x" * 2000
    with suppress(soundfile.LibsndfileError):
        soundfile.read(io.BytesIO(mpeg))
    assert "Illegal Audio-MPEG-Header" in capfd.readouterr().err, "libmpg123 has nothing to say of this file"
    for raw in (mpeg, TAG + mpeg, TAG + TAG + mpeg, mpeg_in_wav(mpeg)):
        assert reason(media.decode_audio, raw, 16_000) == "unsupported_format"
        assert reason(media.sample_rate_of, raw) == "unsupported_format"
    assert capfd.readouterr() == ("", "")


QUIET = """
import sys
import threading
from featurestore.media import decode_image
raw = sys.stdin.buffer.read()
threads = [threading.Thread(target=decode_image, args=[raw]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(decode_image(raw).size)
import warnings
warnings.warn("another's")
"""


def test_what_pillow_says_of_a_picture_is_not_on_the_screen() -> None:
    raw = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        Image.open(io.BytesIO(raw)).getexif()
    # Each test has filters of its own, so what an import sets is seen in another process.
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", QUIET],
        input=raw, capture_output=True, cwd=Path(__file__).parents[2], timeout=60, check=True,
    )  # fmt: skip
    assert ended.stdout == b"(64, 64)\n"
    assert ended.stderr.startswith(b"<string>:13: UserWarning: another's")
    assert b"EXIF" not in ended.stderr


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "empty"),
        (b"a text that is called 7.ogg", "decode_error"),
        (wav(np.zeros(0)), "zero_size"),
        (wav(np.full(10, np.nan)), "decode_error"),
        (wav(np.zeros(4000), 1), "too_large"),
        (wav(np.zeros((10, 17))), "too_large"),
        (wav(np.zeros(10), kind="AIFF"), "unsupported_format"),
    ],
    ids=["empty", "a text", "no sample", "NaN", "1 Hz", "17 channels", "AIFF"],  # the bytes tell when they were written
)
def test_what_is_no_sound_says_why(raw: bytes, expected: str) -> None:
    assert reason(media.decode_audio, raw, 16_000) == expected


def test_samples_are_counted_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = wav(np.zeros((100, 2)))
    monkeypatch.setattr(media, "MAX_AUDIO_VALUES", 199)
    assert reason(media.decode_audio, raw, 16_000) == "too_large"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"caf\xe9", "invalid_utf8"), (b"a" * (2**20 + 1), "too_large")],
)
def test_what_is_no_text_says_why(raw: bytes, expected: str) -> None:
    assert reason(media.decode_text, raw) == expected


@given(st.text(min_size=1, max_size=40))
def test_text_comes_back_as_it_was(text: str) -> None:
    if text.strip():
        assert media.decode_text(text.encode()) == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_never_raises_anything_but_a_decode_error(data: st.DataObject) -> None:
    decode, raw = data.draw(st.sampled_from(_VICTIMS))
    damaged = bytearray(raw[: data.draw(st.integers(0, len(raw)))])
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=8)) if damaged else []:
        damaged[position] = data.draw(st.integers(0, 255))
    # Anything but a DecodeError of a known reason fails the test.
    with suppress(DecodeError):
        decode(bytes(damaged))


_IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SOUNDS = (("OGG", "VORBIS"), ("WAV", "PCM_16"), ("FLAC", "PCM_16"))
_VICTIMS = [
    *((media.decode_image, encoded(noise(16), kind)) for kind in _IMAGES),
    *((partial(media.decode_audio, sample_rate=16_000), tone(*kind, seconds=0.05)) for kind in _SOUNDS),
    (media.decode_text, "Ein Satz, ein Wörtchen.".encode()),
]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (encoded(noise()), "png"),
        (encoded(noise(), "JPEG"), "jpg"),
        (encoded(noise(), "WEBP"), "webp"),
        (encoded(noise(), "GIF"), "gif"),
        (encoded(noise(), "BMP"), "bmp"),
        (encoded(noise(), "TIFF"), "tiff"),
        (tone("OGG", "VORBIS"), "ogg"),
        (tone("WAV", "PCM_16"), "wav"),
        (tone("FLAC", "PCM_16"), "flac"),
        ("ein Wörtchen".encode(), "txt"),
        (b"a" * 4095 + "é".encode(), "txt"),
        (b"caf\xe9", "bin"),
        (b"a\x00b", "bin"),
        (b"RIFF\0\0\0\0AVI ", "avi"),
        (b"RIFF\0\0\0\0CDXA", "bin"),
        (b"", "bin"),
    ],
)
def test_a_format_is_named_by_its_bytes(raw: bytes, expected: str) -> None:
    assert media.sniff_extension(raw) == expected


def test_headers_of_sensors_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.7 fails some of those that threads parse at once, and a good value would be rejected now and then."""
    file, real, inside = io.BytesIO(), np.lib.format.read_array_header_1_0, threading.Semaphore(1)
    np.save(file, np.zeros((2, 1), np.float32))

    def parsed(header: io.BytesIO) -> object:
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        inside.release()
        return real(header)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", parsed)
    with ThreadPoolExecutor(4) as pool:
        assert [each.shape for each in pool.map(media.decode_sensor, [file.getvalue()] * 8)] == [(2, 1)] * 8
