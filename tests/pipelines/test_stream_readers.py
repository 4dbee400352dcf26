"""Readers of timed streams: the times and the values of files that this writes, and of damaged ones."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featurestore.errors import DecodeError
from featurestore.media import decode_audio, decode_image, decode_sensor
from pipelines.sources.files import FileValue
from pipelines.synchronize import audio, container, sensor, subtitles, video
from pipelines.synchronize.container import NoStream, nanoseconds
from tests import recordings, videos
from tests.pipelines.test_subtitles import SRT
from tests.recordings import FPS, RATE, SECOND, frame_number, frame_times, sensor_csv


def value(path: Path) -> FileValue:
    return FileValue(f"file://{path}", path.name)


def times(events: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    chunks = list(events)
    starts, ends, index = (np.concatenate([chunk[part] for chunk in chunks]) for part in range(3))
    assert np.array_equal(index, starts) or np.array_equal(index, np.arange(len(index)))
    return starts, ends


@given(st.integers(-(2**40), 2**40), st.integers(1, 10**6), st.integers(1, 10**6))
def test_ticks_are_nanoseconds_exactly(ticks: int, numerator: int, denominator: int) -> None:
    base = Fraction(numerator, denominator)
    assert abs(nanoseconds(ticks, base) - ticks * base * SECOND) <= Fraction(1, 2)


CODECS = [
    ("v.mp4", "mpeg4", {}),
    ("v.mp4", "libx264", {"bf": "3"}),
    ("v.mkv", "ffv1", {}),
    ("v.webm", "libvpx-vp9", {}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CODECS)
def test_frames_have_their_presentation_times_and_pictures(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    ticks = frame_times(3, start_s=1.4, drop=0.1)
    file = value(recordings.video(tmp_path / name, ticks, codec=codec, options=options))
    starts, _ = times(video.events(file))
    rounding = 0 if name.endswith("mp4") else 500_000
    assert np.abs(starts - np.rint(ticks * SECOND / 30_000)).max() <= rounding
    frames = video.Frames(file)
    for index in (0, 1, 1, 17, len(ticks) - 1, 16, 40, 2, 3):
        frame = frames.get(int(starts[index]))
        assert not isinstance(frame, DecodeError)
        png = frame.fetch()
        assert frame_number(png) == index
        assert decode_image(png).size == (32, 32)
    for none in (starts[0] - 1, starts[17] + 1, starts[-1] + 1):
        with pytest.raises(DecodeError, match=rf"^decode_error: {name}: the frame at {none / 1e9:.6f} s cannot"):
            raise frames.get(int(none))  # type: ignore[misc]
    header = container.header(file, "video")
    assert header.span_ns is not None
    assert abs(header.span_ns[0] - starts[0]) <= rounding
    assert 0 <= header.span_ns[1] - starts[-1] <= SECOND / FPS + 1_000_000


@pytest.mark.parametrize(("name", "codec", "options"), CODECS)
def test_a_damaged_packet_spoils_the_frames_that_need_it_and_no_other(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = recordings.video(tmp_path / name, frame_times(4), codec=codec, options=options)
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    raw, (position, size) = bytearray(path.read_bytes()), packets[40]
    assert position is not None
    raw[position + 12 : position + size] = np.random.default_rng(0).bytes(max(size - 12, 0))
    path.write_bytes(raw)
    frames = video.Frames(value(path))
    starts, _ = times(video.events(value(path)))
    found = [frames.get(time) for time in starts.tolist()]
    bad = [index for index, frame in enumerate(found) if isinstance(frame, DecodeError)]
    assert bad == list(range(40, bad[-1] + 1)), "up to the next key frame"
    assert bad[-1] <= 52
    assert all(
        frame_number(frame.fetch()) == index for index, frame in enumerate(found) if not isinstance(frame, DecodeError)
    )
    for frame, time in zip(reversed(found), reversed(starts.tolist()), strict=True):
        again = frames.get(time)
        assert isinstance(again, DecodeError) == isinstance(frame, DecodeError)
        assert isinstance(again, DecodeError) or again.fetch() == frame.fetch()  # type: ignore[union-attr]
    with pytest.raises(
        DecodeError, match=rf"^decode_error: {name}: the frame at {starts[40] / 1e9:.6f} s cannot be decoded"
    ):
        raise found[40]  # type: ignore[misc]


def test_a_picture_lies_as_it_is_shown(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        stream: Any = file.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        half = np.zeros((32, 64), np.uint8)
        half[:, 32:] = 200
        frame = av.VideoFrame.from_ndarray(half, "gray").reformat(format="yuv420p")
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    found = video.Frames(value(tmp_path / "v.mkv")).get(0)
    assert not isinstance(found, DecodeError)
    picture = np.asarray(Image.open(io.BytesIO(found.fetch())).convert("L"))
    assert picture.shape == (32, 64)
    assert picture[:, :30].mean() < 40 < 180 < picture[:, 34:].mean()


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '{secret}'\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_a_file_cannot_have_another_one_read(tmp_path: Path, content: bytes) -> None:
    """Playlists, lists of files and session descriptions open what they name."""
    secret = recordings.video(tmp_path / "secret.mp4", frame_times(1))
    path = tmp_path / "v.mp4"
    path.write_bytes(content.replace(b"{secret}", str(secret).encode()))
    with pytest.raises(DecodeError, match=r"^decode_error: v\.mp4: no media that is read here"):
        list(video.events(value(path)))


def test_sound_without_a_track_or_a_file_is_told(tmp_path: Path) -> None:
    path = recordings.video(tmp_path / "v.mp4", frame_times(1))
    with pytest.raises(NoStream, match=r"v\.mp4 has no audio"):
        list(audio.events(value(path)))
    assert audio.Clips(value(path)).get(0, SECOND)[0] == "no_stream"
    with pytest.raises(DecodeError, match=r"^unreadable: gone\.mp4: No such file"):
        list(video.events(value(tmp_path / "gone.mp4")))


def test_a_codec_that_nobody_knows_is_told(tmp_path: Path) -> None:
    path = recordings.video(tmp_path / "v.mkv", frame_times(0.5), sound=True)
    content = path.read_bytes()
    assert content.count(b"V_MPEG4") == content.count(b"A_AAC") == 1
    path.write_bytes(content.replace(b"V_MPEG4", b"V_NOT_4").replace(b"A_AAC", b"A_NOT"))
    with pytest.raises(DecodeError, match=r"^unsupported_format: v\.mkv: its video has a codec that is not known here"):
        list(video.events(value(path)))
    with pytest.raises(DecodeError, match=r"^unsupported_format: v\.mkv: its audio has a codec that is not known here"):
        list(audio.events(value(path)))
    for kind in ("video", "audio"):
        with pytest.raises(DecodeError, match=r"^unsupported_format"):
            container.header(value(path), kind)
    assert isinstance(audio.Clips(value(path)).get(0, SECOND)[0], DecodeError)


def test_a_track_beside_a_video_is_heard(tmp_path: Path) -> None:
    file = value(recordings.video(tmp_path / "v.mp4", frame_times(1), sound=True))
    clip, _ = audio.Clips(file).get(200_000_000, 700_000_000)
    assert isinstance(clip, audio.Clip)
    heard = decode_audio(clip.fetch(), RATE)
    assert len(heard) == RATE // 2
    assert 0.3 < np.sqrt(np.square(heard).mean()) < 0.4


NOISE = (np.random.default_rng(5).uniform(-0.9, 0.9, (RATE * 2, 2)) * 32768).astype(np.int16)


def write_sound(path: Path, start: int = 0, gap: int = 0) -> Path:
    """Two channels of noise from sample `start` on, with `gap` samples left out of the times after the first second."""
    codec = {"wav": "pcm_s16le", "flac": "flac", "mkv": "pcm_s16le", "mka": "flac", "mov": "pcm_s16le"}[path.suffix[1:]]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=RATE, layout="stereo")
        for at in range(0, len(NOISE), 800):
            frame = av.AudioFrame.from_ndarray(NOISE[at : at + 800].reshape(1, -1), "s16", "stereo")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = start + at + (gap if at >= RATE else 0)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["s.wav", "s.flac", "s.mkv", "s.mov"])
def test_clips_are_the_samples_of_their_windows(tmp_path: Path, name: str) -> None:
    clips = audio.Clips(value(write_sound(tmp_path / name)))
    for begin, end in ((0, 1), (250_000_000, 750_000_000), (250_031_250, 250_093_750), (1_900_000_000, 5 * SECOND)):
        clip, first_ns = clips.get(begin, end)
        assert isinstance(clip, audio.Clip)
        first, beyond = (-(-time * RATE // SECOND) for time in (begin, end))
        read, rate = soundfile.read(io.BytesIO(clip.fetch()), dtype="int16")
        assert rate == RATE
        assert np.array_equal(read, NOISE[first:beyond])
        assert 0 <= first_ns - begin < SECOND / RATE
    assert clips.get(2 * SECOND, 3 * SECOND)[0] == "stream_ended"


def test_a_gap_in_the_middle_is_silence_and_what_lacks_at_the_ends_is_left_out(tmp_path: Path) -> None:
    clips = audio.Clips(value(write_sound(tmp_path / "s.mkv", start=RATE, gap=RATE // 2)))
    assert clips.get(0, SECOND // 2)[0] == "not_started"
    clip, first_ns = clips.get(SECOND // 2, 4 * SECOND)
    assert isinstance(clip, audio.Clip)
    expected = np.concatenate([NOISE[:RATE], np.zeros((RATE // 2, 2), np.int16), NOISE[RATE:]])
    assert first_ns == SECOND
    assert np.array_equal(clip.samples, expected)
    again = audio.Clips(value(tmp_path / "s.mkv"))
    assert again.get(2_100_000_000, 2_400_000_000)[0] == "no_event"


def test_times_that_a_container_rounds_lose_no_sample(tmp_path: Path) -> None:
    """Frames of 800 samples at 44.1 kHz begin at fractions of the milliseconds that a Matroska tells."""
    samples = (np.random.default_rng(1).uniform(-0.5, 0.5, 44_100) * 32768).astype(np.int16)
    with av.open(str(tmp_path / "s.mkv"), "w") as file:
        stream: Any = file.add_stream("pcm_s16le", rate=44_100, layout="mono")
        for at in range(0, len(samples), 777):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 777], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, at, Fraction(1, 44_100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    clip, _ = audio.Clips(value(tmp_path / "s.mkv")).get(0, 2 * SECOND)
    assert isinstance(clip, audio.Clip)
    assert np.array_equal(clip.samples[:, 0], samples)


LAYOUT = sensor.Layout("time", "s")
TIMES = 1_700_000_000 + np.arange(0, 3, 0.001)
VALUES = np.stack([np.sin(TIMES % 100), np.arange(len(TIMES))], axis=1)


def rows_of(path: Path, layout: sensor.Layout = LAYOUT) -> tuple[list[int], NDArray[np.float64]]:
    blocks = list(sensor.readings(value(path), layout))
    return [time for block in blocks for time in block.time_ns.tolist()], np.concatenate(
        [each.values for each in blocks]
    )


def test_times_of_a_text_are_exact_whatever_their_unit_and_digits(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        "time,x\n1700000000.123456789,1\n1700000001,2\n1700000001.5,3\n1.7000000025e9,4\n1700000003.0000000004,5\n"
    )
    expected = [
        1_700_000_000_123_456_789, 1_700_000_001 * SECOND, 1_700_000_001_500_000_000, 1_700_000_002_500_000_000,
        1_700_000_003 * SECOND,
    ]  # fmt: skip
    assert rows_of(path)[0] == expected
    path.write_text("time,x\n-12.5,1\n0.25,2\n")
    for unit, power in sensor.UNITS.items():
        if power:
            assert rows_of(path, sensor.Layout("time", unit))[0] == [-125 * 10 ** (power - 1), 25 * 10 ** (power - 2)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolons", "bom", "parquet", "timestamps", "integers"])
def test_readings_are_those_of_the_file_in_blocks(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensor, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(sensor, "BLOCK_ROWS", 100)
    path, layout = tmp_path / "s.csv", LAYOUT
    nanoseconds = np.rint((TIMES - 1_700_000_000) * 1000).astype(np.int64) * 1_000_000 + 1_700_000_000 * SECOND
    if kind in ("parquet", "timestamps", "integers"):
        column = {
            "parquet": pa.array(nanoseconds / SECOND),
            "timestamps": pa.array(nanoseconds // 1000, pa.timestamp("us", "UTC")),
            "integers": pa.array(nanoseconds // 1_000_000),
        }[kind]
        layout = sensor.Layout("time", "ms" if kind == "integers" else "s")
        table = pa.table({"time": column, "x": VALUES[:, 0], "y": VALUES[:, 1]})
        pq.write_table(table, path, row_group_size=300)
    else:
        sensor_csv(path, TIMES, VALUES)
        text = path.read_text().replace(",", {"tsv": "\t", "semicolons": ";"}.get(kind, ","))
        path.write_text(("\ufeff" if kind == "bom" else "") + text)
    found, values = rows_of(path, layout)
    # A float64 tells a time since 1970 to a quarter of a microsecond, a text of 9 digits made from it as well.
    assert np.abs(np.array(found) - nanoseconds).max() <= (0 if kind in ("timestamps", "integers") else 256)
    assert np.array_equal(values, VALUES)
    assert len(list(sensor.readings(value(path), layout))) > 10
    rows = sensor.Rows(value(path), layout)
    for first, last in ((0, 0), (0, 250), (249, 260), (260, 260), (2999, 2999)):
        assert np.array_equal(rows.get(first, last).values, VALUES[first : last + 1])
    some = sensor.Layout(layout.time, layout.unit, ("y",))
    assert np.array_equal(rows_of(path, some)[1], VALUES[:, 1:])


@pytest.mark.parametrize(
    ("content", "rows", "told"),
    [
        ("time,x\n1,1\n1,2\n2,3\n", 3, None),
        ("time,x\n1,1\n3,2\n2,3\n4,4\n", 2, r"^unsorted_times: s\.csv, row 3: 2000000000 ns after 3000000000 ns; sort"),
        ("time,x\n1,1\n,2\n", 0, r"^decode_error: s\.csv, row 2: no time"),
        ("time,x\n1,1\nsoon,2\n", 0, r"^decode_error: s\.csv, row 2: 'soon' is no time in numbers"),
        ("time,x\n1,1\n1e30,2\n", 0, r"^decode_error: s\.csv, row 2: '1e30' is no time in numbers"),
        ("time,x\n1,1\nnan,2\n", 0, r"^decode_error: s\.csv, row 2: "),
        ("time,x\n1,one\n", 0, r"^decode_error: s\.csv: .*invalid value 'one'"),
        ("time,x\n1,1\n2\n", 0, r"^decode_error: s\.csv: .*Expected 2 columns, got 1"),
        ("t,x\n1,1\n", 0, r"^decode_error: s\.csv: column 'time' is there 0 times; columns: \['t', 'x'\]"),
        ("time\n1\n", 0, r"^decode_error: s\.csv: no column beside 'time'"),
        ("", 0, r"^decode_error: s\.csv: Empty CSV"),
        ("PAR1 and no more", 0, r"^decode_error: s\.csv: "),
    ],
)
def test_what_stands_before_a_bad_row_is_good(tmp_path: Path, content: str, rows: int, told: str | None) -> None:
    path = tmp_path / "s.csv"
    path.write_text(content)
    found = []

    def read() -> None:
        for block in sensor.readings(value(path), LAYOUT):
            found.extend(block.time_ns.tolist())

    if told is None:
        read()
    else:
        with pytest.raises(DecodeError, match=told):
            read()
    assert len(found) == rows


def test_readings_are_stored_as_float32_and_an_empty_one_is_rejected() -> None:
    made = sensor.Array(VALUES[:7], "s.csv").fetch()
    assert np.array_equal(decode_sensor(made), VALUES[:7].astype(np.float32))
    assert np.array_equal(np.load(io.BytesIO(made), allow_pickle=False), VALUES[:7].astype(np.float32))
    for wrong in (np.nan, 1e300):
        with pytest.raises(
            DecodeError, match=r"^decode_error: s\.csv: reading 1 of the window is empty or not finite in"
        ):
            sensor.Array(np.array([[0.0, 0.0], [0.0, wrong]]), "s.csv").fetch()


def test_a_header_that_asks_for_all_memory_is_damage_and_no_lack_of_memory(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(videos.greedy())
    with pytest.raises(DecodeError, match=r"^decode_error: v\.mp4: Cannot allocate memory"):
        list(video.events(value(tmp_path / "v.mp4")))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_that_nobody_vouches_for_end_in_an_error_or_in_events(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Files of each kind with bytes changed, taken out or put in."""
    folder = tmp_path_factory.mktemp("fuzz")
    kind = data.draw(st.sampled_from(["v.mp4", "s.mkv", "s.srt", "s.csv", "s.parquet"]))
    raw = bytearray(_WHOLE[kind](folder / kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    path = folder / f"bad_{kind}"
    path.write_bytes(raw)
    file, layout = value(path), sensor.Layout("time", "s")
    try:
        if kind == "v.mp4":
            starts, _ = times(video.events(file)) if (chunks := list(video.events(file))) else (np.zeros(0), 0)
            frames = video.Frames(file)
            shown = [frames.get(time) for time in starts.tolist()]
            assert sum(len(chunk.start_ns) for chunk in chunks) == len(shown)
        elif kind == "s.mkv":
            found, _ = audio.Clips(file).get(0, 3 * SECOND)
            assert isinstance(found, audio.Clip | DecodeError | str)
        elif kind == "s.srt":
            found_cues = subtitles.cues(file)
            assert [cue.start_ns for cue in found_cues] == sorted(cue.start_ns for cue in found_cues)
        else:
            for block in sensor.readings(file, layout):
                assert (np.diff(block.time_ns) >= 0).all()
    except (DecodeError, NoStream):
        pass


def _parquet(path: Path) -> bytes:
    pq.write_table(pa.table({"time": TIMES[:50], "x": VALUES[:50, 0]}), path)
    return path.read_bytes()


_WHOLE: dict[str, Any] = {
    "v.mp4": lambda path: recordings.video(path, frame_times(0.5)).read_bytes(),
    "s.mkv": lambda path: write_sound(path).read_bytes(),
    "s.srt": lambda path: SRT.encode(),
    "s.csv": lambda path: sensor_csv(path, TIMES[:50], VALUES[:50]).read_bytes(),
    "s.parquet": _parquet,
}
