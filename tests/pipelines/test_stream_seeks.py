"""Windows read from the middle of a recording: the same bytes as from its beginning, and little is read for them."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from numpy.typing import NDArray

from featurestore.errors import DecodeError
from pipelines.sources import Missing
from pipelines.sources.files import FileValue
from pipelines.sources.streams import filled
from pipelines.synchronize import audio, sensor, video
from pipelines.synchronize.recording import Recording, Window
from tests import recordings
from tests.recordings import SECOND, frame_times

SECONDS = 10


def value(path: Path) -> FileValue:
    return FileValue(f"file://{path}", path.name)


def recording(file: FileValue, every: int = SECOND // 3, **field: Any) -> Recording:
    """Windows side by side, a third of a second each."""
    fields = filled({"it": {"modality": "image", "tolerance": SECOND, **field}})
    return Recording("r", {"it": file}, fields, {"every": every, "length": every, "per": None})


def told(window: Window) -> tuple[Any, ...]:
    """All that a window is, its value in bytes."""
    found = window.values["it"]
    if found is None or isinstance(found, Missing):
        return (*window[:4], found, window.residual_ns)
    try:
        return (*window[:4], found.fetch(), window.residual_ns)
    except DecodeError as error:
        return (*window[:4], str(error), window.residual_ns)


def ticks(start_s: float) -> NDArray[np.int64]:
    return frame_times(SECONDS, start_s=start_s, drop=0.1)


VIDEOS = [
    ("v.mp4", "mpeg4", {"bf": "2"}, -1.0),
    ("v.mp4", "libx264", {"bf": "3"}, 1.4),
    ("v.mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1"}, 1.4),
    ("v.mkv", "libx264", {"x264-params": "intra-refresh=1:scenecut=0:keyint=12:bframes=0"}, 0),
]
MORE_VIDEOS = [
    ("v.mp4", "mpeg4", {}, 1.4),
    ("v.mp4", "libx264", {"x264-params": "open-gop=1:b-pyramid=normal", "bf": "3"}, 0),
    ("v.mp4", "libx265", {"x265-params": "log-level=none:open-gop=1:bframes=4"}, 1.4),
    ("v.mkv", "ffv1", {}, 1.4),
    ("v.webm", "libvpx-vp9", {}, 1.4),
]


@pytest.mark.parametrize(
    ("name", "codec", "options", "start_s"),
    [*VIDEOS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_VIDEOS)],
)
def test_a_frame_is_the_same_from_wherever_it_is_read(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], start_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the frames is lost. Windows that begin before the first key frame, at one, and near the end are among them."""
    file = value(recordings.video(tmp_path / name, ticks(start_s), codec=codec, options=options, noise=20))
    count = sum(len(chunk.begin_ns) for chunk in recording(file).windows())
    with monkeypatch.context() as plain:
        plain.setattr(video, "start", lambda *_: None)
        whole = [told(window) for window in recording(file).read(range(count))]
    assert sum(isinstance(each[4], bytes) for each in whole) >= count - 5
    begun = []
    real = video.start
    monkeypatch.setattr(video, "start", lambda *args: begun.append(real(*args)) or begun[-1])
    for first in range(0, count, 3):
        numbers = range(first, min(first + 2, count))
        assert [told(window) for window in recording(file).read(numbers)] == whole[first : first + 2]
    assert sum(each is not None for each in begun) >= len(begun) / 2
    previous = recording(file, policy="previous", staleness=None)
    assert told(next(previous.read([count - 2])))[4] is not None


@pytest.mark.parametrize(("name", "codec"), [("v.avi", "mpeg4"), ("v.ts", "libx264"), ("v.flv", "flv")])
def test_what_has_no_list_of_key_frames_is_read_from_its_beginning(tmp_path: Path, name: str, codec: str) -> None:
    file = value(recordings.video(tmp_path / name, np.arange(90) * 1000, codec=codec))
    assert video.start(file, 2 * SECOND) is None


def test_few_frames_are_decoded_for_a_window_far_into_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = value(recordings.video(tmp_path / "v.mp4", ticks(1.4)))
    decoded = []

    def counted(*args: Any) -> Iterator[Any]:
        for each in real(*args):
            decoded.append(each[0])
            yield each

    real = video._frames
    monkeypatch.setattr(video, "_frames", counted)
    list(recording(file).read([28]))
    assert 0 < len(decoded) < 40


def sound(path: Path, codec: str, rate: int, start_s: int, samples: NDArray[np.int16]) -> FileValue:
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, layout="mono")
        for at in range(0, len(samples), 1000):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1000], "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start_s * rate + at
            for each in [frame] if codec in ("pcm_s16le", "flac") else av.AudioResampler("fltp").resample(frame):
                file.mux(stream.encode(each))
        file.mux(stream.encode())
    return value(path)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "start_s"),
    [
        ("s.wav", "pcm_s16le", 44_100, 0), ("s.mov", "pcm_s16le", 44_100, 2), ("s.flac", "flac", 44_100, 0),
        ("s.mka", "flac", 44_100, 2), ("s.mka", "pcm_s16le", 48_000, 0), ("s.mp4", "aac", 16_000, 2),
        ("s.ogg", "libopus", 48_000, 0),
    ],
)  # fmt: skip
def test_a_clip_is_the_same_from_wherever_it_is_read(
    tmp_path: Path, name: str, codec: str, rate: int, start_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = (np.random.default_rng(3).uniform(-0.5, 0.5, rate * 6) * 32767).astype(np.int16)
    file = sound(tmp_path / name, codec, rate, start_s, samples)

    def clips() -> Recording:
        return recording(file, modality="audio", policy="window", tolerance=None)

    count = sum(len(chunk.begin_ns) for chunk in clips().windows())
    with monkeypatch.context() as plain:
        whole_of = audio.Clips
        plain.setattr(audio, "Clips", lambda file, _: whole_of(file))
        whole = [told(window) for window in clips().read(range(count))]
    made = []
    real = audio._samples
    monkeypatch.setattr(audio, "_samples", lambda frame: made.append(frame.samples) or real(frame))
    for first in range(0, count, 4):
        made.clear()
        numbers = range(first, min(first + 2, count))
        assert [told(window) for window in clips().read(numbers)] == whole[first : first + 2]
        assert sum(made) <= rate
    if codec in ("pcm_s16le", "flac"):
        for _, begin, _, end, clip, _ in whole[2:-2]:
            # A sample that begins half a nanosecond before a window is in it.
            first, beyond = (-(-(2 * at - 1) * rate // (2 * SECOND)) - start_s * rate for at in (begin, end))
            assert np.array_equal(soundfile.read(io.BytesIO(clip), dtype="int16")[0], samples[first:beyond])


@pytest.mark.parametrize("kind", ["csv", "parquet", "damaged parquet"])
def test_readings_are_the_same_from_wherever_they_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group of which a page is damaged costs its own windows, whichever are asked for."""
    monkeypatch.setattr(sensor, "BLOCK_BYTES", 4096)
    times = np.arange(0, 20, 0.01)
    path = tmp_path / f"s.{kind[-3:]}"
    if kind == "csv":
        recordings.sensor_csv(path, times, np.stack([times, times], axis=1))
    else:
        pq.write_table(
            pa.table({"time": times, "x": np.sin(times)}),
            path,
            row_group_size=200,
            compression="gzip",
            use_dictionary=False,
        )
        place = pq.ParquetFile(path).metadata.row_group(4).column(1)
        raw = bytearray(path.read_bytes())
        if kind == "damaged parquet":
            end = place.data_page_offset + place.total_compressed_size
            raw[end - 100 : end] = bytes(100)
        path.write_bytes(raw)

    def rows() -> Recording:
        return recording(value(path), modality="sensor", policy="window", tolerance=None)

    whole = [told(window) for window in rows().read(range(60))]
    assert [number for number, each in enumerate(whole) if isinstance(each[4], str)] == (
        [] if kind != "damaged parquet" else [24, 25, 26, 27, 28, 29]
    )
    made = []
    real = sensor._values
    monkeypatch.setattr(sensor, "_values", lambda table, layout: made.append(len(table)) or real(table, layout))
    for first in range(0, 60, 7):
        made.clear()
        assert [told(window) for window in rows().read(range(first, min(first + 2, 60)))] == whole[first : first + 2]
        assert sum(made) <= 400
