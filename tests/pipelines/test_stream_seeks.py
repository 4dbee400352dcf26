"""Windows read from the middle of a recording: the same bytes as from its beginning, and little is read for them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featurestore.errors import DecodeError
from pipelines.sources import Missing
from pipelines.sources.files import FileValue
from pipelines.sources.streams import filled
from pipelines.synchronize import video
from pipelines.synchronize.recording import Recording, Window
from tests import recordings
from tests.recordings import SECOND, frame_times

SECONDS = 20


def value(path: Path) -> FileValue:
    return FileValue(f"file://{path}", path.name)


def recording(file: FileValue, every: int = SECOND // 3, **field: Any) -> Recording:
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
    ("v.mp4", "mpeg4", {}, 1.4),
    ("v.mp4", "mpeg4", {"bf": "2"}, -1.0),
    ("v.mp4", "libx264", {"bf": "3"}, 1.4),
    ("v.mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1"}, 1.4),
    ("v.mp4", "libx264", {"x264-params": "open-gop=1:b-pyramid=normal", "bf": "3"}, 0),
    ("v.mkv", "libx264", {"x264-params": "intra-refresh=1"}, 0),
    ("v.mp4", "libx265", {"x265-params": "log-level=none:open-gop=1:bframes=4"}, 1.4),
    ("v.mkv", "ffv1", {}, 1.4),
    ("v.webm", "libvpx-vp9", {}, 1.4),
]


@pytest.mark.parametrize(("name", "codec", "options", "start_s"), VIDEOS)
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
    file = value(recordings.video(tmp_path / name, np.arange(300) * 1000, codec=codec))
    assert video.start(file, 8 * SECOND) is None


def test_few_frames_are_decoded_for_a_window_far_into_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = value(recordings.video(tmp_path / "v.mp4", ticks(1.4)))
    decoded = []

    def counted(*args: Any) -> Iterator[Any]:
        for each in real(*args):
            decoded.append(each[0])
            yield each

    real = video._frames
    monkeypatch.setattr(video, "_frames", counted)
    list(recording(file).read([55]))
    assert 0 < len(decoded) < 40
