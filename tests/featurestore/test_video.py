"""Videos that nobody vouches for: which frames are taken, and which reason each kind of damage gets."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore import containers, media, video
from featurestore.errors import DecodeError
from tests import videos

EVEN = [40 * number for number in range(30)]
# Containers do not agree on how long the last frame is shown, from 1 ms to 40 ms; the middles of its thirds are the same.
WHOLE = [*EVEN, 1200]
THIRDS = [5, 15, 25]
every = pytest.mark.parametrize("container", videos.CODECS)


def sampled(raw: bytes, count: int) -> list[int]:
    return videos.numbers(video.sample(raw, count))


def reason(raw: bytes) -> tuple[str, str]:
    with pytest.raises(DecodeError) as caught:
        media.check("video", raw)
    assert caught.value.reason in media.REASONS
    return caught.value.reason, caught.value.detail


@every
def test_a_container_is_named_by_its_bytes_and_says_its_length(container: str) -> None:
    raw = videos.video(EVEN, container)
    assert media.sniff_extension(raw) == container
    assert containers.stated_bytes(raw) in (0, len(raw))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\0\x18ftypheic", "bin"),
        (b"\0\0\0\x18ftypM4A ", "bin"),
        (b"\0\0\0\x08wide\0\0\0\x10mdat", "mov"),
        (b"\0\0\0\0G" + b"\0" * 191 + b"G" + b"\0" * 10, "ts"),
        (b"G" + b"a" * 187 + b"G", "txt"),
        (b"G" + b"\0" * 187 + b"H", "bin"),
    ],
)
def test_what_is_like_a_video_and_none_is_told_apart(head: bytes, expected: str) -> None:
    assert media.sniff_extension(head) == expected


@every
@pytest.mark.parametrize("key_every", [1, 7, 100])
def test_each_frame_is_the_one_shown_in_the_middle_of_its_stretch(container: str, key_every: int) -> None:
    """The mutant: frames counted from a key frame that the decoder had passed, or delayed by its reordering."""
    assert sampled(videos.video(WHOLE, container, key_every=key_every), 3) == THIRDS


def test_frames_at_uneven_times_are_taken_by_time_and_not_by_number() -> None:
    # Ten frames in the first tenth of a second, then one a second.
    times = [*range(0, 100, 10), *range(1000, 10_000, 1000), 10_000]
    assert sampled(videos.video(times, "mkv"), 5) == [10, 12, 14, 16, 18]


class Counting:
    """PyAV's container, or a packet of it, that counts the packets which are decoded."""

    decoded = 0

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def demux(self, stream: Any) -> Iterator[Any]:
        return map(Counting, self._inside.demux(stream))

    def decode(self) -> Any:
        Counting.decoded += 1
        return self._inside.decode()


def test_what_stands_before_a_key_frame_or_behind_a_wanted_one_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: decoding goes on from one wanted frame to the next, over all key frames between them."""
    raw, opened, planned = videos.video(EVEN, "mkv", key_every=10, codec="mpeg4"), video._opened, []

    @contextmanager
    def counting(raw: bytes) -> Iterator[Any]:
        with opened(raw) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(video, "_opened", counting)
    monkeypatch.setattr(video, "_check_work", lambda times, wanted, stream: planned.append(times.decoded(wanted)))
    Counting.decoded = 0
    assert sampled(raw, 3) == [4, 14, 24]
    assert planned == [15]
    assert Counting.decoded - 15 in range(4), "each wanted frame comes with the packet behind it, at the latest"


def test_one_frame_stands_for_all_stretches() -> None:
    for container in videos.CODECS:
        assert sampled(videos.video([0], container), 4) == [0, 0, 0, 0]


def test_a_video_that_begins_late_is_sampled_from_its_first_frame() -> None:
    assert sampled(videos.video([5000 + each for each in WHOLE], "ts"), 3) == THIRDS


def turned(raw: bytes, degrees: int) -> bytes:
    """An MP4 whose header says that it is to be shown turned clockwise: the matrix of its track (ISO 14496-12, 8.3.2)."""
    sign = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1)}[degrees]
    a, b, c, d = (each << 16 for each in sign)
    at = raw.index(b"tkhd") + 4 + 40
    return raw[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + raw[at + 36 :]


def test_a_turned_video_comes_out_upright() -> None:
    drawn = np.full((32, 64, 3), 20, np.uint8)
    drawn[:, :32] = 200  # light on the left
    raw = videos.video([0, 40], "mp4", drawn=drawn)
    (right,) = video.sample(turned(raw, 90), 1)
    assert right.shape == (64, 32, 3)
    assert right[:24].mean() > 150 > 60 > right[40:].mean()
    (over,) = video.sample(turned(raw, 180), 1)
    assert over.shape == (32, 64, 3)
    assert over[:, 40:].mean() > 150 > 60 > over[:, :24].mean()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "empty"),
        (b"a text", "unsupported_format"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "unsupported_format"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 40, "decode_error"),
        *((videos.sound(container), "no_stream") for container in ("mp4", "mkv", "webm", "ts")),
    ],
)
def test_what_is_no_video_says_why(raw: bytes, expected: str) -> None:
    assert reason(raw)[0] == expected


@every
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_video_that_is_cut_is_not_taken_for_a_shorter_one(container: str, share: float) -> None:
    raw = videos.video(EVEN, container)
    cut = raw[: round(len(raw) * share)]
    if container == "ts":
        assert sampled(cut, 4)[-1] < 30 * share
    else:
        assert reason(cut) == (
            "decode_error",
            f"truncated: {len(cut)} of at least {containers.stated_bytes(cut)} bytes",
        )


def test_a_video_in_fragments_is_read_and_not_taken_for_a_shorter_one_where_it_is_cut() -> None:
    raw = videos.video(WHOLE, "mp4", options={"movflags": "frag_keyframe+empty_moov"})
    assert raw.count(b"moof") == 3
    assert sampled(raw, 3) == THIRDS
    assert reason(raw[: raw.rindex(b"mdat") + 10])[1].startswith("truncated")


def test_a_live_recording_that_says_no_length_is_read() -> None:
    raw = videos.video(EVEN, "mkv", options={"live": "1"})
    assert containers.stated_bytes(raw) < len(raw)
    assert sampled(raw, 3) == sampled(videos.video(EVEN, "mkv"), 3)


def zero_wide(raw: bytes) -> bytes:
    """An AVI of raw pixels whose headers say 0 pixels wide."""
    header = raw.index(b"strf") + 8 + 4
    return raw[:header] + struct.pack("<i", 0) + raw[header + 4 :]


def test_a_header_that_asks_for_all_memory_is_damage_and_no_lack_of_memory() -> None:
    with pytest.raises(av.error.MemoryError):
        av.open(io.BytesIO(videos.greedy()))
    with pytest.raises(DecodeError, match="claims to need more memory than FFmpeg gives") as raised:
        list(video.sample(videos.greedy(), 2))
    assert raised.value.reason == "decode_error"


def test_no_pixels_are_told() -> None:
    raw = videos.video([0, 40], "avi", codec="rawvideo")
    media.check("video", raw)
    assert reason(zero_wide(raw)) == ("zero_size", "0 x 0 pixels")


@pytest.mark.parametrize(
    ("name", "limit", "told"),
    [
        ("featurestore.media.MAX_IMAGE_PIXELS", 3000, "64 x 48 pixels; allowed: 3000"),
        ("featurestore.media.MAX_MEDIA_BYTES", 1000, r" bytes; allowed: 1000"),
        ("featurestore.video.MAX_SECONDS", 1, "1 s; allowed: 1"),
        ("featurestore.video.MAX_FRAMES", 29, "more than 29 frames"),
        ("featurestore.video.MAX_DECODED_PIXELS", 3000, "1 frames of 3072 pixels to decode; allowed: 3000 pixels"),
    ],
)
def test_what_is_too_large_is_refused_before_a_frame_is_decoded(
    name: str, limit: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = videos.video(EVEN, "mkv")
    monkeypatch.setattr(name, limit)
    monkeypatch.setattr(video, "_decoded", lambda *_: pytest.fail("a frame was decoded"))
    why, detail = reason(raw)
    assert (why, told in detail) == ("too_large", True), detail


def test_the_picture_of_a_cover_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        cover: Any = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame(16, 16, "yuvj420p")))
        file.mux(cover.encode())
    assert reason(buffer.getvalue())[0] == "no_stream"


_WHOLE = [videos.video(EVEN[:6], container) for container in videos.CODECS]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_never_raises_anything_but_a_decode_error(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(_WHOLE)))
    del raw[data.draw(st.integers(0, len(raw))) :]
    for position in data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=8)) if raw else []:
        raw[position] = data.draw(st.integers(0, 255))
    with suppress(DecodeError):
        assert len(list(video.sample(bytes(raw), 3))) == 3
