"""Windows that lie in others: anchors go back, and each sample still has what is nearest to its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from featurestore.media import decode_sensor
from pipelines.sources.files import FileValue
from pipelines.sources.streams import filled
from pipelines.synchronize import sensor, values, video
from pipelines.synchronize.recording import Recording
from tests import recordings
from tests.pipelines.test_stream_seeks import told, value
from tests.recordings import SECOND, frame_number, frame_times, sensor_csv

SECONDS = 20
NESTED = [(0, 10), (1, 3), (4, 5)]
DEEP = [(0, 18), (2, 19), *((1 + at / 4, 1.2 + at / 4) for at in range(40)), (11, 18.5), (12, 12.5)]
"""More windows in the first than are looked at ahead."""


def cues(folder: Path, spans: Sequence[tuple[float, float]]) -> FileValue:
    def clock(time_s: float) -> str:
        return f"00:00:{int(time_s):02},{round(time_s % 1 * 1000):03}"

    text = "".join(f"{n}\n{clock(a)} --> {clock(b)}\ncue {n}\n\n" for n, (a, b) in enumerate(spans, 1))
    (folder / "s.srt").write_text(text)
    return value(folder / "s.srt")


def recording(files: dict[str, FileValue], anchor: str, **field: Any) -> Recording:
    """Windows per cue, and in each what `field` says of the stream `it`."""
    fields = {"words": {"modality": "text"}, "it": {"tolerance": 60 * SECOND, **field}}
    return Recording("r", files, filled(fields), {"every": None, "length": None, "per": "words", "anchor": anchor})


def wanted(times: NDArray[np.int64], anchor: int, policy: str) -> int:
    """Which of some events, by brute force."""
    if policy == "previous":
        return max(at for at, time in enumerate(times.tolist()) if time <= anchor)
    return int(np.argmin(np.abs(times - anchor)))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
@pytest.mark.parametrize("spans", [NESTED, DEEP], ids=["nested", "deep"])
def test_each_sample_has_the_frame_of_its_own_anchor_however_shards_are_cut(
    tmp_path: Path, name: str, spans: list[tuple[float, float]]
) -> None:
    ticks = frame_times(SECONDS, drop=0.1)
    path = recordings.video(tmp_path / name, ticks, codec="libx264" if name == "v.ts" else "mpeg4")
    files = {"it": value(path), "words": cues(tmp_path, spans)}
    times = np.concatenate([chunk.start_ns for chunk in video.events(files["it"])])
    assert len(times) == len(ticks)
    for anchor, policy in (("centre", "nearest"), ("end", "nearest"), ("centre", "previous")):
        read = recording(files, anchor, modality="image", policy=policy, tolerance=None).read
        whole = list(read(range(len(spans))))
        for window in whole:
            at = wanted(times, window.anchor_ns, policy)
            assert frame_number(window.values["it"].fetch()) == at  # type: ignore[union-attr]
            assert window.residual_ns["it"] == times[at] - window.anchor_ns
        alone = [told(window) for number in range(len(spans)) for window in read([number])]
        assert alone == [told(window) for window in whole]


@pytest.mark.parametrize("name", ["s.csv", "s.parquet", "s.groups.parquet"])
@pytest.mark.parametrize("policy", ["nearest", "previous", "linear", "window", "overlap"])
@pytest.mark.parametrize("spans", [NESTED, DEEP], ids=["nested", "deep"])
def test_each_sample_has_the_readings_of_its_own_anchor(
    tmp_path: Path, name: str, policy: str, spans: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is read in many blocks."""
    monkeypatch.setattr(sensor, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(sensor, "BLOCK_ROWS", 64)
    time_s = np.arange(0, SECONDS, 0.01)
    if name == "s.csv":
        sensor_csv(tmp_path / name, time_s, time_s[:, None] ** 2, "time,x")
    else:
        groups = 100 if "groups" in name else None
        pq.write_table(pa.table({"time": time_s, "x": time_s**2}), tmp_path / name, row_group_size=groups)
    files = {"it": value(tmp_path / name), "words": cues(tmp_path, spans)}
    read = recording(files, "centre", modality="sensor", policy=policy).read
    whole = list(read(range(len(spans))))
    times = np.rint(time_s * SECOND).astype(np.int64)
    for window in whole:
        found = decode_sensor(window.values["it"].fetch())[:, 0]  # type: ignore[union-attr]
        inside = (times >= window.begin_ns) & (times < window.end_ns)
        if policy == "window":
            assert np.allclose(found, time_s[inside] ** 2, rtol=1e-6)
        elif policy == "overlap":
            assert abs(found[0] - (time_s[inside] ** 2).mean()) < 0.1
        elif policy == "linear":
            assert np.allclose(found, (window.anchor_ns / SECOND) ** 2, atol=1e-4, rtol=1e-6)
        else:
            assert np.allclose(found, time_s[wanted(times, window.anchor_ns, policy)] ** 2, rtol=1e-6)
    alone = [told(window) for number in range(len(spans)) for window in read([number])]
    assert alone == [told(window) for window in whole]


def test_few_windows_that_lie_in_another_take_no_further_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speakers who talk at once: their anchors go back at each second cue. One cue over the whole recording costs one more."""
    path = recordings.video(tmp_path / "v.mp4", frame_times(SECONDS))
    passes = []
    real = video._frames
    monkeypatch.setattr(video, "_frames", lambda *args: passes.append(args) or real(*args))
    at_once = [span for at in range(18) for span in ((at, at + 2), (at + 0.2, at + 0.4), (at + 0.3, at + 0.5))]
    for spans, most in ((at_once, 1), ([(0, 20), *at_once], 2)):
        passes.clear()
        files = {"it": value(path), "words": cues(tmp_path, spans)}
        assert len(list(recording(files, "centre", modality="image", policy="nearest").read(range(len(spans))))) == len(
            spans
        )
        assert len(passes) == most
    assert len(at_once) > values.AHEAD
