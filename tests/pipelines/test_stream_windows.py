"""Windows about events, values weighted by time, and how much of a window is covered."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from featurestore.media import decode_sensor
from tests.pipelines.test_streams import (
    DRIFT_PPM,
    OFFSET_S,
    SECONDS,
    SRT,
    START_S,
    fetched,
    reason,
    samples,
    sensor_at,
    settings,
    write_manifest,
)
from tests.recordings import RATE, SECOND, beeps, sensor_csv, write_sound


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 7 s: sound on another clock, two cues, and a sensor at 100 Hz."""
    folder = tmp_path_factory.mktemp("talk")
    write_sound(folder / "talk.wav", beeps(SECONDS + START_S, offset_s=OFFSET_S, drift_ppm=DRIFT_PPM))
    (folder / "talk.srt").write_text(SRT)
    times = 1 + np.arange(0, SECONDS, 0.01)
    sensor_csv(folder / "talk.csv", times, sensor_at(times))
    write_manifest(folder, sound="talk.wav", words="talk.srt", motion="talk.csv")
    return folder


def test_a_window_for_each_event_of_a_sensor_stands_about_it(talk: Path, tmp_path: Path) -> None:
    (tmp_path / "pressed.csv").write_text("time,button\n2.5,1\n4.0,2\n")
    for name in ("talk.csv", "talk.srt"):
        (tmp_path / name).write_bytes((talk / name).read_bytes())
    write_manifest(tmp_path, pressed="pressed.csv", motion="talk.csv", words="talk.srt")
    fields = """
    pressed: {modality: sensor, from: pressed}
    motion: {modality: sensor, from: motion, policy: previous}
    words: {modality: text, from: words}
    """
    bounds = {"begin": (0, 2), "centre": (-1, 1), "end": (-2, 0)}
    for anchor, (before, after) in bounds.items():
        found = samples(settings(tmp_path, fields, f"{{per: pressed, length: 2s, anchor: {anchor}}}"))
        assert [(each.columns["begin_ns"], each.columns["end_ns"]) for each in found] == [
            (time + before * SECOND + (anchor == "end"), time + after * SECOND + (anchor == "end"))
            for time in (2_500_000_000, 4 * SECOND)
        ]
        for each, pressed_s, button in zip(found, (2.5, 4.0), (1, 2), strict=True):
            assert decode_sensor(fetched(each, "pressed")).tolist()[0 if anchor == "begin" else -1] == [button]
            assert each.columns["pressed_residual_ns"] == 0
            residual_s = each.columns["motion_residual_ns"] / SECOND
            assert -0.02 < residual_s <= 0
            assert abs(decode_sensor(fetched(each, "motion"))[0, 1] - pressed_s - residual_s) < 1e-5
    centred, told_nothing = (
        settings(tmp_path, fields, f"{{per: pressed, length: 2s{anchor}}}") for anchor in ("", ", anchor: centre")
    )
    assert centred == told_nothing
    first, second = samples(settings(tmp_path, fields, "{per: words, length: 500ms, anchor: begin}"))
    assert [(each.columns["begin_ns"], each.columns["end_ns"]) for each in (first, second)] == [
        (1_500_000_000, 2_000_000_000), (3_000_000_000, 3_500_000_000),
    ]  # fmt: skip


def test_overlapping_readings_are_weighted_by_how_long_they_hold(tmp_path: Path) -> None:
    """Against an integral of the steps in fine pieces, over windows that begin before, between and after the readings."""
    rng = np.random.default_rng(2)
    times = np.round(np.sort(rng.uniform(1, 9, 40)), 3)
    times[[10, 20]] = times[[9, 19]]
    values = np.round(rng.normal(0, 1, (40, 2)), 3)
    sensor_csv(tmp_path / "s.csv", times, values)
    write_manifest(tmp_path, motion="s.csv")
    fine = np.arange(0, 12, 0.001) + 0.0005
    for staleness, limit in (("", np.inf), (", staleness: 90ms", 0.09)):
        fields = f"{{motion: {{modality: sensor, from: motion, policy: overlap{staleness}, clock: {{offset: 500ms}}}}}}"
        found = samples(settings(tmp_path, fields, "{every: 170ms, length: 400ms}"))
        held = np.searchsorted(times + 0.5, fine, "right") - 1
        there = (held >= 0) & (held < len(times) - 1) & (fine - times[held.clip(0)] - 0.5 < limit)
        told = 0
        for each in found:
            begin, end = each.columns["begin_ns"] / SECOND, each.columns["end_ns"] / SECOND
            inside = there & (fine >= begin) & (fine < end)
            if reason(each, "motion"):
                assert not inside.any()
                assert each.columns["motion_covered_ns"] is None
                continue
            assert each.columns["motion_covered_ns"] == inside.sum() * 1_000_000
            if inside.any():
                assert np.allclose(decode_sensor(fetched(each, "motion")), values[held[inside]].mean(axis=0), atol=1e-5)
                told += 1
        assert told >= 40


def test_how_much_of_a_window_is_covered_is_told(talk: Path) -> None:
    """A clip that the stream's begin or end cuts short, and a window in which little is said, look so."""
    fields = """
    sound: {modality: audio, from: sound, clock: {offset: 237ms, drift: 40ppm}}
    words: {modality: text, from: words}
    """
    found = samples(settings(talk, fields))
    whole_ns = round((SECONDS + START_S) * SECOND * (1 + DRIFT_PPM / 1e6))
    for each in found:
        begin, end = each.columns["begin_ns"], each.columns["end_ns"]
        clip, _ = soundfile.read(io.BytesIO(fetched(each, "sound")))
        there = min(end, round(OFFSET_S * SECOND) + whole_ns) - max(begin, round(OFFSET_S * SECOND))
        assert abs(each.columns["sound_covered_ns"] - there) <= SECOND / RATE
        assert abs(each.columns["sound_covered_ns"] - len(clip) / RATE * SECOND) <= 2 * SECOND / RATE
        said = sum(max(min(end, until) - max(begin, since), 0) for since, until in ((15e8, 225e7), (3e9, 55e8)))
        assert each.columns["words_covered_ns"] == (None if reason(each, "words") else said)
    covered = [each.columns["sound_covered_ns"] for each in found]
    assert covered[0] < 1_800_000_000
    assert covered[-1] < 1_800_000_000
